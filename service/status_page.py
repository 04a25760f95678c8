"""The coordinator's page for a browser: one HTML document with inline SVG, no script, nothing from elsewhere.

    /            replicas and versions, the last pushes as timelines, pause and wire bytes over time
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from protos import transfuse_pb2 as pb

REFRESH_S = 5
WIDTH, ROW, LABEL = 720, 14, 56  # pixels of a drawing: whole width, height of a rank's row, room for its name
CHART_HEIGHT = 90
RANKS = 16  # rows of one timeline
SPANS = (("stage", "stage_start_s", "stage_stop_s"), ("pause", "pause_start_s", "pause_stop_s"))

STYLE = """
:root { color-scheme: light dark; --ink: #1b2330; --quiet: #5d6a7e; --line: #d9dfe8; --back: #f6f8fb; --card: #ffffff;
  --stage: #8fb4e3; --pause: #d9542b; --bar: #3a6fb0; --good: #1d7a46; --bad: #b3261e; --wait: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5eaf2; --quiet: #98a5b8; --line: #2d3746; --back: #11161e;
  --card: #18202b; --stage: #3d6596; --pause: #ff8a5c; --bar: #6fa3e0; --good: #5ecb8d; --bad: #ff8a80;
  --wait: #f0b95a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 20px 16px 48px; }
h1 { font-size: 20px; margin: 0; } h2 { font-size: 15px; margin: 0 0 10px; }
p { margin: 4px 0; color: var(--quiet); overflow-wrap: anywhere; } code { font: 13px ui-monospace, monospace; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  margin-top: 14px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 12px 4px 0; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 500; } tr:last-child td { border-bottom: 0; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; } .wait { color: var(--wait); }
svg { display: block; width: 100%; min-width: 620px; height: auto; }
svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
.stage { fill: var(--stage); } .pause { fill: var(--pause); } .bar { fill: var(--bar); } .axis { stroke: var(--line); }
figure { margin: 0 0 14px; } figcaption { font-size: 13px; color: var(--quiet); margin-bottom: 3px; }
.key::before { content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.key.stage::before { background: var(--stage); } .key.pause::before { background: var(--pause); }
.key { margin-right: 14px; }
"""
STATES = {"serving": "good", "paused": "wait", "draining": "wait", "joining": "wait", "starting": "wait"}


def render(status: pb.StatusReply, versions: Sequence[pb.VersionInfo], commits: Sequence[pb.DecideReply]) -> str:
    """The document. versions, commits: the newest ones, oldest first; commits are those that trainers made since this
    coordinator started."""
    newest = list(reversed(commits))
    sections = [
        _section("Replicas", _replicas(status)),
        _section("Last pushes", "".join(map(_timeline, newest)) or "<p>none since the coordinator started</p>", _KEY),
        _section("Pause, ms", _chart(versions, [1e3 * each.pause_s for each in versions], "ms")),
        _section("Wire bytes, MiB", _chart(versions, [each.wire_bytes / 2**20 for each in versions], "MiB")),
        _section("Versions", _versions(versions)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>Transfuse</title>'
        f"<style>{STYLE}</style></head><body><main>{_head(status)}{''.join(sections)}</main></body></html>\n"
    )


_KEY = '<p><span class="key stage">stage</span><span class="key pause">pause</span>rows are replica.rank</p>'


def _section(title: str, body: str, note: str = "") -> str:
    return f"<section><h2>{title}</h2>{note}{body}</section>"


def _head(status: pb.StatusReply) -> str:
    since = time.strftime("%H:%M:%S", time.localtime(status.transaction_since_s))
    push = f"push {status.transaction} is {status.transaction_state}, by {status.transaction_by}, since {since}"
    troubles = [text for text in (status.lost and f"LOST: {status.lost}", status.store) if text]
    return (
        f"<h1>Transfuse, version {status.version}</h1>"
        f"<p>{escape(status.model)}, digest <code>{escape(status.digest)}</code>, up {_span(status.uptime_s)}</p>"
        f"<p>{escape(push if status.transaction_state else 'no push is open')}</p>"
        + "".join(f'<p class="bad">{escape(text)}</p>' for text in troubles)
    )


def _span(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _replicas(status: pb.StatusReply) -> str:
    rows = [
        [
            str(each.replica),
            f'<span class="{STATES.get(each.state, "bad")}">{escape(each.state)}</span>',
            str(each.version),
            str(each.num_sequences),
            escape(f"{each.format}, {each.layout}"),
            escape(each.reason or each.checkpoint),
        ]
        for each in status.replicas
    ]
    return _table(("replica", "state", "version", "sequences", "format, layout", "note"), rows)


def _versions(versions: Sequence[pb.VersionInfo]) -> str:
    rows = [
        [
            str(each.version),
            str(each.step),
            escape(each.state),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each.created_s)),
            f"{each.wire_bytes / 2**20:.1f} MiB",
            f"{1e3 * each.pause_s:.0f} ms",
            f"<code>{escape(each.digest)}</code>",
            escape(each.pushed_by),
        ]
        for each in reversed(versions)
    ]
    return _table(("version", "step", "state", "committed", "wire", "pause", "digest", "by"), rows)


# ---------------------------------------------------------------- drawings


def _timeline(commit: pb.DecideReply) -> str:
    timings = sorted(commit.timings, key=lambda each: (each.replica, each.rank))
    shown = timings[:RANKS]
    starts = [each.stage_start_s for each in shown if each.stage_start_s]
    if not starts:
        return ""
    origin, stop = min(starts), max(each.pause_stop_s for each in shown)
    scale = (WIDTH - LABEL) / max(stop - origin, 1e-6)
    marks = []
    for row, timing in enumerate(shown):
        top = row * ROW + 2
        marks.append(f'<text x="0" y="{top + ROW - 4}">{timing.replica}.{timing.rank}</text>')
        for name, start_name, stop_name in SPANS:
            start_s, stop_s = getattr(timing, start_name), getattr(timing, stop_name)
            if start_s and stop_s >= start_s:
                left, width = LABEL + scale * (start_s - origin), max(1.5, scale * (stop_s - start_s))
                marks.append(
                    f'<rect class="{name}" x="{left:.1f}" y="{top}" width="{width:.1f}" height="{ROW - 4}" rx="2">'
                    f"<title>{name} {1e3 * (stop_s - start_s):.0f} ms</title></rect>"
                )
    more = f", {len(timings) - RANKS} more ranks" if len(timings) > RANKS else ""
    info = commit.version
    told = f"version {info.version}: {stop - origin:.2f} s, pause {1e3 * info.pause_s:.0f} ms{more}"
    return f"<figure><figcaption>{told}</figcaption>{_svg(len(shown) * ROW + 4, told, marks)}</figure>"


def _chart(versions: Sequence[pb.VersionInfo], values: Sequence[float], unit: str) -> str:
    most = max(values, default=0.0)
    if not most:
        return "<p>nothing yet</p>"
    step = (WIDTH - LABEL) / len(values)
    base = CHART_HEIGHT - 16
    marks = [f'<line class="axis" x1="{LABEL}" y1="{base}" x2="{WIDTH}" y2="{base}"/>']
    marks.append(f'<text x="0" y="12">{most:.3g}</text>')
    for i, (each, value) in enumerate(zip(versions, values, strict=True)):
        height = (base - 4) * value / most
        left, width = LABEL + i * step + 1, max(1.0, min(step - 2, 40))
        marks.append(
            f'<rect class="bar" x="{left:.1f}" y="{base - height:.1f}" width="{width:.1f}" height="{height:.1f}">'
            f"<title>version {each.version}: {value:.3g} {unit}</title></rect>"
        )
    first, last = versions[0].version, versions[-1].version
    marks.append(f'<text x="{LABEL}" y="{CHART_HEIGHT - 2}">version {first}</text>')
    if last != first:
        marks.append(f'<text x="{WIDTH}" y="{CHART_HEIGHT - 2}" text-anchor="end">version {last}</text>')
    return _svg(CHART_HEIGHT, f"{unit} by version, largest {most:.3g}", marks)


def _svg(height: int, label: str, marks: Sequence[str]) -> str:
    drawing = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(marks)}</svg>'
    return f'<div class="wide">{drawing}</div>'
