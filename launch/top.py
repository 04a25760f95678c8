"""`transfuse top`: a service at a glance, live in a terminal, once into a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import DEFAULT_TARGET, Json, Target, emit

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Row = dict[str, Any]
LANE = 1 << 64
PIPE_WIDTH = 200  # columns where no terminal says how many it has
PAUSES = 40  # versions in the pause history
BLOCKS = " " + "".join(map(chr, range(0x2581, 0x2589)))  # lower eighths of a block
COLOURS = {"serving": "green", "paused": "yellow", "draining": "yellow", "joining": "cyan", "starting": "cyan"}


def top(
    interval_s: Annotated[float, typer.Option("--interval", min=0.2, metavar="S", help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once; so it is where stdout is no terminal.")] = False,
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Watch a service: replicas, digests, streams, memory, pauses.

    Live until Ctrl-C. With --json one object: status and versions, as those commands print them.
    """
    from rich.console import Console

    if as_json:
        status, versions = look(target)
        emit({"status": status, "versions": versions}, "", as_json)
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if once or not console.is_terminal:
        console.print(view(*look(target), {}))
        return
    _live(console, target, interval_s)


def _live(console: Any, target: str, interval_s: float) -> None:
    from rich.live import Live

    from weight_update.errors import TransferError

    before: Row | None = None
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                try:
                    status, versions = look(target)
                    live.update(view(status, versions, rates(before, status)), refresh=True)
                    before = status
                except TransferError as error:  # a coordinator that restarts comes back
                    live.update(f"{error}\nlooking again; Ctrl-C ends", refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        sys.stdout.flush()  # how it is meant to end


def look(target: str) -> tuple[Row, list[Row]]:
    """Status and the newest versions."""
    from protos import transfuse_pb2 as pb

    from .rpc import ask, values

    status = values(ask(target, "Status", pb.StatusRequest())) | {"at_s": time.monotonic()}
    versions = values(ask(target, "Versions", pb.VersionsRequest(last=PAUSES), timeout_s=60.0))["versions"]
    return status, versions


# ---------------------------------------------------------------- values


def streams_of(status: Row) -> Iterator[tuple[tuple[int, int, int], Row]]:
    """((replica, rank, trainer rank), stream) of all open streams."""
    for rank in status["ranks"]:
        for stream in rank["gauges"]["streams"]:
            yield (rank["replica"], rank["rank"], stream["trainer_rank"]), stream


def rates(before: Row | None, now: Row) -> dict[tuple[int, int, int], float]:
    """Bytes a second of each stream between two looks."""
    if before is None:
        return {}
    earlier = {key: stream["received_bytes"] for key, stream in streams_of(before)}
    seconds = max(now["at_s"] - before["at_s"], 1e-3)
    return {
        key: (stream["received_bytes"] - earlier[key]) / seconds for key, stream in streams_of(now) if key in earlier
    }


def replica_digest(ranks: Sequence[Row]) -> str:
    """The digest of a replica from those of its ranks: they add up. "" where one does not know its own."""
    digests = [rank["gauges"]["digest"] for rank in ranks]
    if not digests or not all(digests):
        return ""
    lanes = [sum(int(digest[at : at + 16], 16) for digest in digests) % LANE for at in (0, 16)]
    return "".join(f"{lane:016x}" for lane in lanes)


def bars(values: Sequence[float]) -> str:
    """A history as a row of blocks, the largest one full."""
    most = max(values, default=0.0) or 1.0
    return "".join(BLOCKS[max(1, round(value / most * (len(BLOCKS) - 1)))] if value else BLOCKS[0] for value in values)


# ---------------------------------------------------------------- what is shown


def view(status: Row, versions: Sequence[Row], rate: Mapping[tuple[int, int, int], float]) -> RenderableType:
    """All of it."""
    from rich.console import Group
    from rich.text import Text

    from .tables import status_text

    lines = status_text(status).splitlines()
    parts: list[RenderableType] = [Text(lines[0], style="bold"), _replicas(status), _ranks(status)]
    if any(True for _ in streams_of(status)):
        parts.append(_streams(status, rate))
    parts += [Text(line) for line in lines if line.startswith(("push ", "no push", "store ", "LOST"))]
    return Group(*parts, Text(_pauses(versions)))


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in ("state", "digest", "reason", "from") else "right")
    return table


def _replicas(status: Row) -> Table:
    from rich.text import Text

    table = _table("replicas", "replica", "state", "version", "sequences", "digest", "reason")
    for each in status["replicas"]:
        found = replica_digest([rank for rank in status["ranks"] if rank["replica"] == each["replica"]])
        same = found == status["digest"] and each["version"] == status["version"]
        verdict = f"{found} {'as committed' if same else 'NOT the committed one'}" if found else "not read back yet"
        style = "green" if same else "red" if found and each["version"] == status["version"] else ""
        table.add_row(
            str(each["replica"]),
            Text(each["state"], style=COLOURS.get(each["state"], "red")),
            str(each["version"]),
            str(each["num_sequences"]),
            Text(verdict, style=style),
            each["reason"],
        )
    return table


def _ranks(status: Row) -> Table:
    from .tables import mebibytes

    table = _table("ranks", "rank", "state", "version", "staged", "planned", "kept", "pid")
    for each in status["ranks"]:
        gauges = each["gauges"]
        sizes = (mebibytes(gauges[f"{name}_bytes"]) for name in ("staged", "planned", "reserved"))
        name = f"{each['replica']}.{each['rank']}"
        table.add_row(name, each["state"], str(each["version"]), *sizes, str(each["pid"]))
    return table


def _streams(status: Row, rate: Mapping[tuple[int, int, int], float]) -> Table:
    from .tables import mebibytes

    table = _table("streams", "rank", "trainer rank", "received", "rate", "credit", "seconds", "from")
    for key, each in streams_of(status):
        seen = rate.get(key, each["received_bytes"] / max(each["seconds"], 1e-3))
        table.add_row(
            f"{key[0]}.{key[1]}",
            str(key[2]),
            mebibytes(each["received_bytes"]),
            f"{mebibytes(int(seen))}/s",
            mebibytes(each["credit_bytes"] - each["received_bytes"]),
            f"{each['seconds']:.1f}",
            each["peer"],
        )
    return table


def _pauses(versions: Sequence[Row]) -> str:
    pauses = [each["pause_s"] for each in versions]
    if not any(pauses):
        return "pauses: none yet"
    first, last = versions[0]["version"], versions[-1]["version"]
    return (
        f"pauses of versions {first} to {last}, longest {1e3 * max(pauses):.0f} ms,"
        f" last {1e3 * pauses[-1]:.0f} ms: {bars(pauses)}"
    )
