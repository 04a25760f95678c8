"""The report of a comparison: report.html, readable offline with its plots inside, and every plot as a PNG beside it.

write_report(Path("compared"), found, verdicts)
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .comparison import WHY, Comparison, Row, Verdict
from .records import Record
from .report import ACCENT, QUIET, STYLE

BROKEN = "#e45756"
MAX_ROWS = 400  # of the table; the plots and --json have all
MAX_PICTURES = 6


def write_report(folder: Path, found: Comparison, verdicts: Sequence[Verdict]) -> Path:
    """Write the page and its plots; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    images = {name: _png(plot(found)) for name, plot in PLOTS[found.how].items()}
    for name, image in images.items():
        (folder / f"{name}.png").write_bytes(image)
    page = folder / "report.html"
    page.write_text(_page(found, verdicts, images), encoding="utf-8")
    return page


def _page(found: Comparison, verdicts: Sequence[Verdict], images: dict[str, bytes]) -> str:
    sections = [
        (
            "Limits",
            _table(LIMIT_HEAD, [_limit_cells(verdict) for verdict in verdicts]) if verdicts else "None was given.",
        ),
        (
            "Measures",
            _table(("measure", "value", "where"), [(n, _number(m.value), m.where) for n, m in found.measures.items()]),
        ),
        *((name.replace("_", " ").capitalize(), _image(image)) for name, image in images.items()),
        (f"The first {MAX_ROWS} rows" if len(found.rows) > MAX_ROWS else "Rows", _rows(found.rows[:MAX_ROWS])),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>{content}</section>" for title, content in sections)
    what = f"{found.candidate.label} against {found.reference.label}; {WHY[found.how]}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Transfuse compare</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><main><h1>Compare</h1><p class="lead">{html.escape(what)}</p>{body}</main></body></html>\n'
    )


LIMIT_HEAD = ("limit", "allowed", "measured", "outcome", "where")


def _limit_cells(verdict: Verdict) -> tuple[str, ...]:
    outcome = "kept" if verdict.ok else "BROKEN"
    return verdict.option, f"{verdict.allowed:g}", _number(verdict.measured), outcome, verdict.where


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    names = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return f'<div class="wide"><table><tr>{names}</tr>{"".join(cells)}</table></div>'


def _rows(rows: Sequence[Row]) -> str:
    """One table for each set of columns: steps and frames have different ones."""
    heads = dict.fromkeys(tuple(row) for row in rows)
    return "".join(
        _table(head, [[_number(value) for value in row.values()] for row in rows if tuple(row) == head])
        for head in heads
    )


def _number(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _image(image: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(image).decode()}">'


# ---------------------------------------------------------------- plots


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _axes(label: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.0, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xlabel(unit)
    axes.set_ylabel(label)
    return figure, axes


def _along(column: str, unit: str, label: str) -> Callable[[Comparison], Figure]:
    """A column against the token, probe or step; of several samples one line each."""

    def plot(found: Comparison) -> Figure:
        figure, axes = _axes(label, unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no step 0.5
        rows = [row for row in found.rows if unit in row]
        for sample in dict.fromkeys(row.get("sample", 0) for row in rows):
            mine = [row for row in rows if row.get("sample", 0) == sample]
            axes.plot(
                [row[unit] for row in mine],
                [_finite(row[column]) for row in mine],
                marker=".",
                label=f"sample {sample}",
            )
        if rows and "sample" in rows[0]:
            axes.legend(frameon=False)
        return figure

    return plot


def _finite(value: float) -> float:
    """Infinities leave a gap, as NaNs do: equal frames have no PSNR to draw."""
    return float(value) if math.isfinite(value) else math.nan


def _agreement(found: Comparison) -> Figure:
    """A mark where the likeliest tokens differ."""
    unit = "token" if found.how == "logits" else "probe"
    figure, axes = _axes("likeliest token", unit)
    for same, colour, label in ((True, QUIET, "the same"), (False, BROKEN, "another")):
        places = [row[unit] for row in found.rows if row["top1"] == same]
        axes.vlines(places, 0, 1, color=colour, label=label)
    axes.set_yticks([])
    axes.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1.0, 1.2))
    return figure


def _surprisals(found: Comparison) -> Figure:
    """Each token as both see it; equal models lie on the diagonal."""
    figure, axes = _axes("candidate, nats", "reference, surprisal of the text's tokens in nats")
    pairs = [(row["surprisal_reference"], row["surprisal_candidate"]) for row in found.rows]
    axes.scatter([_finite(x) for x, _ in pairs], [_finite(y) for _, y in pairs], s=9, color=ACCENT)
    axes.axline((pairs[0][0],) * 2, slope=1, color=QUIET, linewidth=1)
    return figure


def _pictures(found: Comparison) -> Figure:
    """The first frames of the first sample: reference, candidate, and their difference, scaled to its own largest."""
    reference, candidate = (_shown(record) for record in (found.reference, found.candidate))
    gap = (reference - candidate).abs()
    gray = {"cmap": "gray", "vmin": float(reference.min()), "vmax": float(reference.max())}
    rows = (
        ("reference", reference, gray),
        ("candidate", candidate, gray),
        ("difference, scaled", gap.mean(-1) if gap.ndim == 4 else gap, {"cmap": "magma", "vmin": 0.0}),
    )
    figure = Figure(figsize=(9.0, 4.8), layout="constrained")
    grid = figure.subplots(len(rows), len(gap), squeeze=False)
    for (label, pictures, shown), line in zip(rows, grid, strict=True):
        for axes, picture in zip(line, pictures, strict=True):
            axes.imshow(picture.numpy(), **shown)
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(label)
    return figure


def _shown(record: Record) -> Tensor:
    """[frames, H, W, 3] of a VAE, or [frames, H, W] of the last latents, their channels averaged."""
    if "frames" in record.tensors:
        return record.tensors["frames"][0, :MAX_PICTURES].permute(0, 2, 3, 1)
    sample = record.tensors["latents"][-1, 0]
    if sample.ndim == 4:
        return sample.mean(0)[:MAX_PICTURES]
    # Tokens of 2 x 2 pixels, row by row.
    return sample.mean(-1).view(1, record.asked["height"] // 2, record.asked["width"] // 2)


PLOTS: dict[str, dict[str, Callable[[Comparison], Figure]]] = {
    "logits": {"kl": _along("kl", "token", "KL, nats"), "likeliest_tokens": _agreement, "surprisal": _surprisals},
    "tops": {"kl_at_least": _along("kl_at_least", "probe", "KL at least, nats"), "likeliest_tokens": _agreement},
    "latents": {
        "pictures": _pictures,
        "cosine": _along("cosine", "step", "cosine"),
        "rmse": _along("rmse", "step", "RMSE"),
        "max_abs": _along("max_abs", "step", "largest error"),
        "psnr": _along("psnr", "frame", "PSNR, dB"),
    },
}
