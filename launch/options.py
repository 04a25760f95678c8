"""What the options and the output of several commands have in common."""

from __future__ import annotations

import json
import sys
from pathlib import Path
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

# ---------------------------------------------------------------- of a service

Format = Annotated[
    str, typer.Option(help="Row of 'transfuse formats'; of a pipeline also 'auto', or NAME=ROW,... by component.")
]
Layout = Annotated[
    str, typer.Option(help="'auto', a layout or its family; several, by commas, are dealt out to the replicas.")
]
Listen = Annotated[
    str, typer.Option(metavar="HOST:PORT", callback=address_of, help="Of the coordinator; port 0 takes a free one.")
]

# ---------------------------------------------------------------- of a service of a pipeline

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

# ---------------------------------------------------------------- of a service that lasts

MinReplicas = Annotated[
    int, typer.Option(min=0, metavar="K", help="How many replicas a push needs; 0 means all of them.")
]
StateFolder = Annotated[
    Path | None, typer.Option(help="Folder of the decision record, for restarts. Default: none is kept.")
]
StoreFolder = Annotated[
    Path | None,
    typer.Option(help="Folder of the version store: versions become durable, a restart serves the last one."),
]
Keep = Annotated[int, typer.Option(min=1, metavar="N", help="How many of the newest versions the store keeps.")]
KeepBytes = Annotated[int | None, typer.Option(min=1, metavar="B", help="And how many bytes of them.")]
Scrub = Annotated[
    float, typer.Option(min=0.0, metavar="S", help="Re-read every installed byte within S seconds; 0 is never.")
]
Grace = Annotated[
    float, typer.Option("--grace", min=0.0, metavar="S", help="Seconds a stop waits for running requests.")
]
MetricsPort = Annotated[
    int,
    typer.Option(
        "--metrics-port",
        min=0,
        max=65535,
        metavar="PORT",
        help="Metrics and a status page; the ranks' metrics on the ports after it. 0 is none.",
    ),
]
MetricsAt = Annotated[
    str,
    typer.Option(
        "--metrics-at",
        metavar="loopback|node",
        help="'node': at the addresses of --listen and of the ranks, with their certificates and tokens.",
    ),
]
Record = Annotated[
    Path | None,
    typer.Option("--record", metavar="DIR", help="Record the last 4 pushes there, weights included, for 'replay'."),
]
LogFormat = Annotated[str, typer.Option("--log-format", metavar="text|json", help="Of the processes' logs.")]


def emit(value: Any, text: str, as_json: bool) -> None:
    """Print a result: the value as JSON, or the text."""
    sys.stdout.write((json.dumps(value) if as_json else text) + "\n")
    sys.stdout.flush()
