"""What the service says, as text: aligned tables for a terminal, Markdown for the README."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def aligned(rows: Sequence[Row]) -> str:
    """Columns as wide as their widest cell, numbers to the right."""
    if not rows:
        return "(none)"
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    head = "  ".join(key.ljust(width) for key, width in widths.items())
    lines = ["  ".join(_cell(row[key], width) for key, width in widths.items()) for row in rows]
    return "\n".join(line.rstrip() for line in (head, *lines))


def markdown(rows: Sequence[Row]) -> str:
    """The same rows as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any, width: int) -> str:
    return str(value).rjust(width) if isinstance(value, int | float) else str(value).ljust(width)


def mebibytes(num_bytes: int) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**20:.1f} MiB"


def status_text(reply: Row) -> str:
    """StatusReply for people."""
    head = f"{reply['model']}: version {reply['version']}, digest {reply['digest']}, up {reply['uptime_s']:.0f} s"
    names = ["replica", "state", "version", "format", "layout", "num_sequences", "checkpoint", "reason"]
    names += ["digest"] if len({replica["format"] for replica in reply["replicas"]}) > 1 else []
    rows = [{name: replica[name] for name in names} for replica in reply["replicas"]]
    since = time.strftime("%H:%M:%S", time.localtime(reply["transaction_since_s"]))
    push = f"push {reply['transaction']} {reply['transaction_state']}, by {reply['transaction_by']} since {since}"
    lines = [head, aligned(rows), push if reply["transaction_state"] else "no push is open"]
    lines += [f"experts lie by maps of digest {reply['expert_map_digest']}"] if reply["expert_map_digest"] else []
    lines += [_store_text(reply)] if reply["store_dir"] else []
    lines += [f"LOST: {reply['lost']}"] if reply["lost"] else []
    return "\n".join(lines)


def _store_text(reply: Row) -> str:
    """What is durable, and why the rest is not."""
    durable = f"version {reply['durable_version']} is durable" if reply["durable_version"] else "nothing is durable yet"
    return f"store {reply['store_dir']}: {durable}" + (f"; {reply['store']}" if reply["store"] else "")


def event_row(event: Row) -> Row:
    """Event for people, in a table."""
    return {
        "number": event["number"],
        "time": moment(event["time_s"]),
        "kind": event["kind"],
        "version": event["version"],
        "who": event["who"] or "-",
        "from": event["peer"] or "-",
        "text": event["text"],
    }


def event_line(event: Row) -> str:
    """Event for people, by itself."""
    by = f" by {event['who']} from {event['peer']}" if event["who"] else ""
    return f"{moment(event['time_s'])}  {event['kind']:<8}  version {event['version']}{by}  {event['text']}".rstrip()


def moment(time_s: float) -> str:
    """Unix seconds for people, in their time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))


def version_row(info: Row) -> Row:
    """VersionInfo for people."""
    return {
        "version": info["version"],
        "base": info["base_version"],
        "step": info["step"],
        "state": info["state"],
        "rollback": "yes" if info["reachable"] else "no",
        "committed": moment(info["created_s"]),
        "wire": mebibytes(info["wire_bytes"]),
        "seconds": round(info["seconds"], 2),
        "pause ms": round(1e3 * info["pause_s"]),
        "digest": info["digest"],
        "by": info["pushed_by"],
    }


def describe_text(reply: Row) -> str:
    """DescribeReply for people."""
    parameters = [
        {
            "parameter": row["name"],
            "shape": " x ".join(map(str, row["shape"])),
            "format": row["format"],
            "group": row["group"],
        }
        for row in reply["manifest"]["parameters"]
    ]
    ranks = [{name: rank[name] for name in ("replica", "rank", "address")} for rank in reply["ranks"]]
    num_tensors = len(reply["manifest"]["tensors"])
    head = f"version {reply['version']}, {len(parameters)} parameters in {num_tensors} tensors"
    return "\n\n".join([head, aligned(parameters), aligned(ranks)])


def formats() -> list[Row]:
    """The registry of formats."""
    from quant.formats import FORMATS

    return [
        {
            "format": row.name,
            "checkpoint tensors of a weight": ", ".join(f"{part.suffix} {part.dtype}" for part in row.components),
            "elements a scale": " x ".join(str(size or "all") for size in row.encode_block),
            "zeros": row.zero,
            "bytes checked against": row.oracle,
        }
        for row in FORMATS.values()
    ]


def layouts() -> list[Row]:
    """The registry of layouts, and at its end what is known to be missing and why."""
    from quant.layouts import LAYOUTS, MISSING

    rows = [
        {
            "layout": row.name,
            "modules": row.kind,
            "formats": "all" if row.kind == "any" else ", ".join(sorted(row.formats)),
            "gate and up": row.row_order.replace("_", " ") if row.kind != "linear" else "-",
            "kernels on": ", ".join(map(device_name, sorted(row.archs, key=str))) or "any device",
            "bytes checked against": row.oracle,
            "its kernel": row.kernel + (f"; before it {row.seam}" if row.seam else ""),
        }
        for row in LAYOUTS.values()
    ]
    absent = dict.fromkeys(rows[0], "-")
    return [*rows, *({**absent, "layout": name, "its kernel": f"no row: {why}"} for name, why in MISSING.items())]


def device_name(arch: int | str) -> str:
    """A row of `Layout.archs` for people."""
    return f"sm_{arch}" if isinstance(arch, int) else arch


def decimal_bytes(num_bytes: Any) -> str:
    """Bytes as links and disks count them: 1 GB is 10^9."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} B"
