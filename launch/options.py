"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

DEFAULT_TARGET = "127.0.0.1:7464"


def address(value: str) -> str:
    """HOST:PORT, or typer's error."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise typer.BadParameter(f"{value!r} is no HOST:PORT, for instance {DEFAULT_TARGET}")
    return value


Target = Annotated[
    str,
    typer.Option(
        "--to", envvar="TRANSFUSE_SERVICE", metavar="HOST:PORT", callback=address, help="The service's coordinator."
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
OnCommit = Annotated[
    str,
    typer.Option(
        metavar="continue|recompute|restart",
        help="What running texts do when the weights change: keep their KV, compute it anew, or begin again.",
    ),
]
Offload = Annotated[
    str, typer.Option(metavar="none|component", help="'component' keeps only the one in use in memory; slower.")
]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile the blocks of a pipeline.")]
