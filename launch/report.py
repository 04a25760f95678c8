"""The demo's report: one HTML file with its plots inside, readable offline.

write_report(Path("transfuse-demo/report.html"), Results(steps=..., texts=..., ...))
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .tables import mebibytes

# Words are the protocol's; a rank's bars in the timeline, in the order in which they happen.
SPANS = (
    ("stage", "stage_start_s", "stage_stop_s", "#4c78a8"),
    ("pause: install", "pause_start_s", "install_stop_s", "#e45756"),
    ("pause: commit", "install_stop_s", "pause_stop_s", "#f2a541"),
)
ACCENT, QUIET = "#4c78a8", "#b8c4d0"

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, sans-serif; color: #1f2933; background: #f5f7f9; margin: 0; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.1rem; margin: 0 0 .4rem; }
.lead { color: #52606d; margin: .2rem 0 1.6rem; }
section { background: #fff; border: 1px solid #e1e7ec; border-radius: 10px; padding: 1.1rem 1.3rem; margin: 1rem 0; }
img { width: 100%; height: auto; } .note { color: #52606d; font-size: .87rem; margin: .3rem 0 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: #52606d; font-size: .85rem; }
td, th { padding: .35rem .6rem; border-bottom: 1px solid #edf1f4; white-space: nowrap; } td { text-align: right; }
.facts { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 0 0 .3rem; }
.facts b { display: block; font-size: 1.5rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem; margin: .8rem 0; }
.pair p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; } .prompt { color: #8794a0; }
.tag { font-size: .78rem; color: #52606d; text-transform: uppercase; letter-spacing: .04em; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a demo saw. steps: one dict a step, as `transfuse demo --json` prints it.

    reward_after: of samples from the last version; a step's own reward is that of the version it started from.
    pairs: HTML of what the actors made (`shown`, `note`), before and after.
    """

    title: str
    steps: Sequence[dict[str, Any]]
    reward_after: float
    reward_means: str
    shown: str
    note: str
    pairs: Sequence[tuple[str, str]]


def write_report(path: Path, results: Results) -> None:
    """Write the report, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(results), encoding="utf-8")


def render(results: Results) -> str:
    """The whole page."""
    steps = results.steps
    sections = (
        ("Reward", image_of(_plot_reward(results)), f"Mean over the samples of each version. {results.reward_means}"),
        ("Bytes", image_of(_plot_bytes(steps)), "Logical: the weights in BF16. Wire: what was sent, to all replicas."),
        ("Timeline", image_of(_plot_timeline(steps)), "Ranks serve while they stage. On the right the pause alone."),
        ("Steps", _table(steps, COLUMNS), "Verified: the digest of every rank's installed bytes is the trainer's."),
        ("Seconds of a push", _table(steps, _phase_columns(steps)), "As the trainer saw them (and as predicted)."),
        (f"{results.shown} before and after", _pairs(results), results.note),
    )
    body = "\n".join(
        f'<section><h2>{title}</h2>{content}<p class="note">{note}</p></section>' for title, content, note in sections
    )
    title = html.escape(results.title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>Transfuse</h1><p class='lead'>{title}</p><section>{_facts(results)}</section>"
        f"{body}</main></body></html>\n"
    )


def _facts(results: Results) -> str:
    steps = results.steps
    verified = sum(step["digest_verified"] for step in steps)
    facts = (
        (f"{steps[0]['reward']:.2f} to {results.reward_after:.2f}", "reward"),
        (f"{verified} of {len(steps)}", "pushes verified"),
        (f"{1e3 * max(step['pause_s'] for step in steps):.0f} ms", "longest pause"),
        (f"{sum(step['seconds'] for step in steps) / len(steps):.1f} s", "a push, mean"),
    )
    return '<div class="facts">' + "".join(f"<div><b>{value}</b>{name}</div>" for value, name in facts) + "</div>"


Columns = Mapping[str, Callable[[dict[str, Any]], str]]

# What a column shows of a step; the table on the terminal has the same.
COLUMNS: Columns = {
    "version": lambda step: str(step["version"]),
    "reward": lambda step: f"{step['reward']:.3f}",
    "logical": lambda step: mebibytes(step["logical_bytes"]),
    "wire": lambda step: mebibytes(step["wire_bytes"]),
    "seconds": lambda step: f"{step['seconds']:.2f}",
    "pause": lambda step: f"{1e3 * step['pause_s']:.0f} ms",
    "digest": lambda step: "verified" if step["digest_verified"] else "MISMATCH",
}


def _phase_columns(steps: Sequence[dict[str, Any]]) -> Columns:
    phases = dict.fromkeys(phase for step in steps for phase in step["phases"])
    shown = {phase: lambda step, phase=phase: _beside(step, phase) for phase in phases}
    return {"version": COLUMNS["version"], **shown}


def _beside(step: dict[str, Any], phase: str) -> str:
    """Measured, and in brackets what was predicted before."""
    predicted = step.get("predicted", {}).get(phase)
    return f"{step['phases'].get(phase, 0.0):.2f}" + ("" if predicted is None else f" ({predicted:.2f})")


def _table(steps: Sequence[dict[str, Any]], columns: Columns) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = ("".join(f"<td>{html.escape(show(step))}</td>" for show in columns.values()) for step in steps)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _pairs(results: Results) -> str:
    first, last = results.steps[0], results.steps[-1]
    tags = (f"before, version {_base(first)}", f"after, version {last['version']}")
    return "".join(
        '<div class="pair">'
        + "".join(f'<div><span class="tag">{tag}</span>{made}</div>' for tag, made in zip(tags, pair, strict=True))
        + "</div>"
        for pair in results.pairs
    )


def _base(step: dict[str, Any]) -> int:
    return int(step.get("base_version", step["version"] - 1))


# ---------------------------------------------------------------- plots


def image_of(figure: Figure) -> str:
    """An image element with the figure inside."""
    buffer = io.BytesIO()
    # As an image, not inline: the ids of several inline SVGs would clash.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _figure(height: float) -> Figure:
    return Figure(figsize=(9.0, height), layout="constrained")


def _plot_reward(results: Results) -> Figure:
    figure = _figure(2.6)
    axes = _quiet(figure.subplots())
    versions = [*(_base(step) for step in results.steps), int(results.steps[-1]["version"])]
    rewards = [*(step["reward"] for step in results.steps), results.reward_after]
    axes.plot(versions, rewards, color=ACCENT, marker="o", linewidth=2)
    for version, reward in zip(versions, rewards, strict=True):
        axes.annotate(f"{reward:.2f}", (version, reward), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set_xticks(versions)
    axes.margins(y=0.25)
    axes.set_xlabel("version that generated")
    return figure


def _plot_bytes(steps: Sequence[dict[str, Any]]) -> Figure:
    figure = _figure(2.4)
    axes = _quiet(figure.subplots())
    for offset, key, colour, label in ((-0.2, "logical_bytes", QUIET, "logical"), (0.2, "wire_bytes", ACCENT, "wire")):
        places = [step["version"] + offset for step in steps]
        bars = axes.bar(places, [step[key] / 2**20 for step in steps], 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks([step["version"] for step in steps])
    axes.margins(y=0.18)
    axes.set_xlabel("version")
    axes.set_ylabel("MiB")
    axes.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1.0, 1.18))
    return figure


def _plot_timeline(steps: Sequence[dict[str, Any]]) -> Figure:
    num_ranks = max(len(step["timings"]) for step in steps)
    figure = _figure(0.6 + len(steps) * (0.5 + 0.17 * max(num_ranks, 1)))
    grid = figure.subplots(len(steps), 2, squeeze=False, sharex="col", width_ratios=(3, 2))
    for (whole, pause), step in zip(grid, steps, strict=True):
        timings = sorted(step["timings"], key=lambda timing: (timing["replica"], timing["rank"]))
        _bars(whole, timings, SPANS, scale=1.0)
        _bars(pause, timings, SPANS[1:], scale=1e3)
        whole.set_yticks(range(len(timings)), [f"{int(each['replica'])}.{int(each['rank'])}" for each in timings])
        whole.set_title(f"version {step['version']}", loc="left", fontsize=9)
        pause.set_yticks([])
    grid[-1][0].set_xlabel("s; rows are replica.rank")
    grid[-1][1].set_xlabel("ms")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(SPANS), frameon=False)
    return figure


def _bars(
    axes: Axes, timings: Sequence[dict[str, float]], spans: Sequence[tuple[str, str, str, str]], *, scale: float
) -> None:
    """One row a rank; time counts from the first event of any rank. A rank without a span has zeros there."""
    _quiet(axes)
    starts = [timing[span[1]] for timing in timings for span in spans if timing[span[1]]]
    origin = min(starts, default=0.0)
    for label, start, stop, colour in spans:
        rows = [i for i, timing in enumerate(timings) if timing[start] and timing[stop] >= timing[start]]
        left = [scale * (timings[i][start] - origin) for i in rows]
        width = [scale * (timings[i][stop] - timings[i][start]) for i in rows]
        axes.barh(rows, width, left=left, height=0.7, color=colour, label=label)
    axes.set_ylim(max(len(timings), 1) - 0.5, -0.5)
    axes.set_xlim(left=0.0)


def _quiet(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    return axes
