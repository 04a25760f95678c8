"""What the options and the output of several commands have in common."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

DEFAULT_TARGET = "127.0.0.1:7464"


def address_of(value: str) -> str:
    """HOST:PORT, checked."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise typer.BadParameter(f"{value!r} is no HOST:PORT, for instance {DEFAULT_TARGET}")
    return value


Target = Annotated[
    str,
    typer.Option(
        "--to", envvar="TRANSFUSE_SERVICE", metavar="HOST:PORT", callback=address_of, help="The service's coordinator."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]

# Of services of diffusion pipelines.
Components = Annotated[
    list[str],
    typer.Option("--component", metavar="NAME=PATH", help="Take a component's weights from PATH; repeatable."),
]
CommitBetween = Annotated[
    str, typer.Option(metavar="steps|samples", help="'samples' lets running ones end before new weights are used.")
]
Offload = Annotated[
    str, typer.Option(metavar="none|component", help="'component' keeps only the one in use in memory; slower.")
]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the blocks of a pipeline.")]


def emit(value: Any, text: str, as_json: bool) -> None:
    """Print a result: the value as JSON, or the text."""
    sys.stdout.write((json.dumps(value) if as_json else text) + "\n")
    sys.stdout.flush()
