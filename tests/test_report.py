"""The demo's report: one file that needs nothing else, and says what the steps said."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.demo_text import text_html
from launch.report import Results, render, write_report


def step(version: int, **changes: Any) -> dict[str, Any]:
    start = 1.7e9 + 10 * version
    timings = [
        {
            "replica": replica,
            "rank": rank,
            "stage_start_s": start,
            "stage_stop_s": start + 2.0,
            "pause_start_s": start + 2.5,
            "install_stop_s": start + 2.6,
            "pause_stop_s": start + 2.7,
        }
        for replica in range(2)
        for rank in range(2)
    ]
    known = {
        "version": version,
        "base_version": version - 1,
        "reward": 0.25 + version / 16,
        "logical_bytes": 3 << 20,
        "wire_bytes": 2 << 20,
        "seconds": 3.25,
        "pause_s": 0.043,
        "digest_verified": True,
        "phases": {"plan": 0.5, "transfer": 2.5},
        "timings": timings,
    }
    return known | changes


def results(*steps: dict[str, Any]) -> Results:
    return Results(
        title="a tiny run",
        steps=steps,
        reward_after=0.875,
        reward_means="More is better.",
        shown="Text",
        note="With one seed.",
        pairs=[(text_html("Once upon <b>", " a time"), text_html("Once upon <b>", " a & b"))],
    )


class Page(HTMLParser):
    """Text, sources and links of a page; fails where tags do not nest."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self.sources: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        self.cells += [data] if self.open and self.open[-1] == "td" else []


def test_report_is_one_file_with_three_plots_inside(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, results(step(2), step(3)))
    page = Page(path.read_text())
    assert len(page.sources) == 3
    for source in page.sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)


def test_table_says_what_the_steps_said() -> None:
    page = Page(render(results(step(2), step(3, digest_verified=False))))
    assert page.cells[:14] == [
        *["2", "0.375", "3.0 MiB", "2.0 MiB", "3.25", "43 ms", "verified"],
        *["3", "0.438", "3.0 MiB", "2.0 MiB", "3.25", "43 ms", "MISMATCH"],
    ]
    assert page.cells[14:] == ["2", "0.50", "2.50", "3", "0.50", "2.50"]
    assert "1 of 2" in page.text and "0.38 to 0.88" in page.text


def test_texts_are_shown_as_text() -> None:
    page = Page(render(results(step(2))))
    assert "Once upon <b> a time" in page.text and "Once upon <b> a & b" in page.text
    assert "before, version 1" in page.text and "after, version 2" in page.text


@pytest.mark.parametrize("missing", ["stage_start_s", "pause_start_s", "pause_stop_s"])
def test_a_rank_without_a_span_leaves_a_gap(missing: str) -> None:
    """A replica that was fenced during the push has zeros."""
    last = step(2)
    last["timings"][3][missing] = 0.0
    assert "1 of 1" in Page(render(results(last))).text


def test_a_step_without_timings_still_has_its_row() -> None:
    text = render(results(step(2, timings=[])))
    assert re.search(r"<td>2</td><td>0\.375</td>", text)
