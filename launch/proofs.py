"""`transfuse formats`, `conformance` and `chaos`: what a release knows, and what this machine can prove of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, emit


def formats(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    as_json: Json = False,
) -> None:
    """Formats and layouts that this release knows."""
    from . import tables

    rows = {"formats": tables.formats(), "layouts": tables.layouts()}
    render = tables.markdown if as_markdown else tables.aligned
    emit(rows, "\n\n".join(render(table) for table in rows.values()), as_json)


def conformance(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders with a manifest.json.")],
    as_list: Annotated[bool, typer.Option("--list", help="Also what is covered, and what no row covers.")] = False,
    as_json: Json = False,
) -> None:
    """Compare with what other libraries wrote.

    Golden fixtures hold tensors of third-party libraries: every one that a row of 'transfuse formats' follows must be
    reproduced, byte for byte. Exit code 1 on any difference, naming its first byte.
    """
    from .conformance import run

    value, text, equal = run(directories, as_list, as_json)
    emit(value, text, as_json)
    if not equal:
        raise typer.Exit(1)


def chaos(
    seed: Annotated[int, typer.Option(min=0, help="Draws the schedules.")] = 0,
    rounds: Annotated[int, typer.Option(min=1, help="Schedules of one to three failures each.")] = 20,
    as_json: Json = False,
) -> None:
    """Break a local fleet on purpose and check that nothing is lost.

    Trainers, ranks and the coordinator are killed at random steps of pushes, streams cut, chunks spoiled, bits flipped.
    After each round all bytes must be those of a cold load. Exit code 1 where anything is lost. With --json one object
    a round.
    """
    from dataclasses import asdict

    from .progress import Bars

    with Bars().show("load libraries"):
        from .chaos import Round, run, summary

    played: list[Round] = []

    def show(each: Round) -> None:
        played.append(each)
        emit(asdict(each), each.as_text(), as_json)

    kept = run(seed, rounds, show)
    if not as_json:
        emit(None, summary(seed, played), as_json)
    if not kept:
        raise typer.Exit(1)
