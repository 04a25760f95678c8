"""A picture of who sends what to whom: a matrix of trainer ranks by actor ranks with the totals of both.

write_picture(Path("plan.png"), links, title)       # .png, .svg, or .html with the image inside
"""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from weight_update.errors import PlanError

from .report import ACCENT, QUIET, STYLE, image_of
from .tables import decimal_bytes

SUFFIXES = (".png", ".svg", ".html")
MAX_NUMBERS = 16  # ranks on a side up to which every link shows its bytes

Links = npt.NDArray[np.int64]


def write_picture(path: Path, links: Links, title: str) -> None:
    """links: bytes [trainer ranks, actor ranks]."""
    if path.suffix not in SUFFIXES:
        raise PlanError(f"{path}: a picture ends in {', '.join(SUFFIXES)}")
    figure = picture(links, title)
    if path.suffix != ".html":
        figure.savefig(path, dpi=140)
        return
    head = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
    body = f"<style>{STYLE}</style></head><body><main><section>{image_of(figure)}</section></main></body></html>\n"
    path.write_text(head + body, encoding="utf-8")


def picture(links: Links, title: str) -> Figure:
    """The figure: sums of what each rank sends on the right, of what each gets on top."""
    figure = Figure(figsize=(9.0, 8.0), layout="constrained")
    grid = figure.subplots(2, 2, width_ratios=(5, 1), height_ratios=(1, 5), squeeze=True)
    (top, corner), (matrix, right) = grid
    corner.axis("off")
    shown = np.where(links > 0, links, np.nan).astype(np.float64)
    norm = PowerNorm(0.4, vmin=0.0, vmax=float(links.max()))  # a small link can be told from none
    image = matrix.imshow(shown, aspect="auto", cmap="Blues", norm=norm, interpolation="nearest")
    matrix.set_xlabel("actor rank")
    matrix.set_ylabel("trainer rank")
    for axis in (matrix.xaxis, matrix.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if max(links.shape) <= MAX_NUMBERS:
        _numbers(matrix, links)
    _totals(top, right, links)
    marks = [0.1 * links.max(), links.max()]
    bar = figure.colorbar(image, ax=corner, orientation="horizontal", fraction=0.3, aspect=8, ticks=marks)
    bar.set_label("a link", fontsize=8)
    bar.formatter = FuncFormatter(lambda value, _: decimal_bytes(value))
    bar.ax.tick_params(labelsize=7)
    used = int((links > 0).sum())
    counts = f"{decimal_bytes(links.sum())} over {used} of {links.size} links"
    figure.suptitle(f"{title}\n{counts}", fontsize=11)
    return figure


def _numbers(axes: Axes, links: Links) -> None:
    for (row, column), value in np.ndenumerate(links):
        colour = "white" if value > 0.6 * links.max() else "#1f2933"
        text = decimal_bytes(value) if value else "-"
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8 if links.size > 36 else 10)


def _totals(top: Axes, right: Axes, links: Links) -> None:
    sent, received = links.sum(axis=1), links.sum(axis=0)
    top.bar(np.arange(len(received)), received, width=1.0 if len(received) > MAX_NUMBERS else 0.8, color=ACCENT)
    right.barh(np.arange(len(sent)), sent, height=1.0 if len(sent) > MAX_NUMBERS else 0.8, color=QUIET)
    top.set_xlim(-0.5, len(received) - 0.5)
    right.set_ylim(len(sent) - 0.5, -0.5)
    top.set_title(f"received by a rank, {_range(received)}", loc="left", fontsize=9)
    right.set_title(f"sent by a rank,\n{_range(sent)}", loc="left", fontsize=9)
    form = FuncFormatter(lambda value, _: decimal_bytes(value))
    for axes, axis in ((top, top.yaxis), (right, right.xaxis)):
        axis.set_major_formatter(form)
        axis.set_major_locator(MaxNLocator(3))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    top.set_xticks([])
    right.set_yticks([])


def _range(totals: Links) -> str:
    low, high = decimal_bytes(totals.min()), decimal_bytes(totals.max())
    return low if low == high else f"{low} to {high}"
