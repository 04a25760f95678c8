"""Tables as text: aligned for a terminal, Markdown for the README."""

from __future__ import annotations

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


def formats() -> list[Row]:
    """The registry of formats."""
    from quant.formats import FORMATS

    return [
        {
            "format": row.name,
            "checkpoint tensors of a weight": ", ".join(
                f"{part.suffix} {part.dtype}" for part in row.components
            ),
            "elements a scale": " x ".join(map(str, row.encode_block)),
            "bytes checked against": row.oracle,
        }
        for row in FORMATS.values()
    ]


def layouts() -> list[Row]:
    """The registry of layouts."""
    from quant.layouts import LAYOUTS

    return [
        {
            "layout": row.name,
            "modules": row.kind,
            "formats": ", ".join(sorted(row.formats)),
            "gate and up": row.row_order.replace("_", " ") if row.kind != "linear" else "-",
            "kernels on": ", ".join(f"sm_{arch}" for arch in sorted(row.archs)) or "any device",
            "bytes checked against": row.oracle,
        }
        for row in LAYOUTS.values()
    ]
