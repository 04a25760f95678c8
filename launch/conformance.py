"""`transfuse conformance`: what third-party libraries wrote, against what the rows of our tables write.

report = check([Path("tests/golden")])
report.rows(), report.differences, report.uncovered
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weight_update.errors import PlanError

from .cases_experts import EXPERT_CASES
from .cases_exports import EXPORT_CASES
from .cases_formats import FORMAT_CASES, Apart, Case
from .cases_layouts import LAYOUT_CASES
from .fixtures import Fixture, read_directory
from .tables import aligned

CASES: tuple[Case, ...] = (*FORMAT_CASES, *LAYOUT_CASES, *EXPERT_CASES, *EXPORT_CASES)

# Tensors of primary oracles that no row reproduces: group, names, why.
UNCOVERED: tuple[tuple[str, str, str], ...] = (
    ("e2m1", r"ct\.value", "compressed-tensors' values before packing: its packed bytes and its decoding are checked"),
    ("nvfp4", r"modelopt\.weight_scale_fp32_unrounded", "a value inside the library: no checkpoint holds it"),
    ("nvfp4", r"ct_\w+\.scale_before_compress", "a value inside the library: no checkpoint holds it"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One tensor of one fixture. status: equal, different, refused (the row takes no such input), special."""

    row: str
    oracle: str
    fixture: str
    tensor: str
    status: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    fixtures: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    uncovered: tuple[Outcome, ...]

    @property
    def differences(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == "different"]

    def rows(self) -> list[dict[str, Any]]:
        """The table: row x oracle, how many tensors were compared, and what came of it."""
        counts: dict[tuple[str, str], Counter[str]] = {}
        for outcome in self.outcomes:
            counts.setdefault((outcome.row, outcome.oracle), Counter())[outcome.status] += 1
        return [
            {
                "format or layout": row,
                "oracle": oracle,
                "cases": count["equal"] + count["different"],
                "equal": count["equal"],
                "refused": count["refused"],
                "special": count["special"],
            }
            for (row, oracle), count in counts.items()
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": not self.differences,
            "fixtures": list(self.fixtures),
            "rows": self.rows(),
            "differences": [asdict(outcome) for outcome in self.differences],
            "apart": [asdict(each) for each in self.outcomes if each.status in ("refused", "special")],
            "uncovered": [asdict(outcome) for outcome in self.uncovered],
        }

    def as_text(self) -> str:
        differing = [f"DIFFERS  {each.fixture}: {each.row}: {each.detail}" for each in self.differences]
        equal = sum(outcome.status == "equal" for outcome in self.outcomes)
        compared = equal + len(self.differences)
        end = f"{len(self.fixtures)} fixtures, {equal} of {compared} tensors equal"
        return "\n".join([aligned(self.rows()), *differing, end])

    def listing(self) -> str:
        """What is covered, what stands apart and what no row covers, each with its reason."""
        covered = Counter(outcome.fixture for outcome in self.outcomes)
        left = Counter(outcome.fixture for outcome in self.uncovered)
        files = [{"fixture": name, "covered": covered[name], "not covered": left[name]} for name in self.fixtures]
        reasons = Counter(
            (each.row, each.oracle, each.status, each.detail)
            for each in (*self.outcomes, *self.uncovered)
            if each.status not in ("equal", "different")
        )
        apart = [
            {"row": row, "oracle": oracle, "tensors": count, "status": status, "why": detail}
            for (row, oracle, status, detail), count in reasons.items()
        ]
        return "\n\n".join([aligned(files), aligned(apart)])


def check(directories: Sequence[Path]) -> Report:
    """Compare every tensor that a case of CASES reproduces, in every fixture of the directories."""
    fixtures = [fixture for directory in directories for fixture in read_directory(directory)]
    outcomes = [outcome for fixture in fixtures for outcome in _check(fixture)]
    return Report(
        fixtures=tuple(fixture.name for fixture in fixtures),
        outcomes=tuple(outcome for outcome in outcomes if outcome.status not in ("no row", "input")),
        uncovered=tuple(outcome for outcome in outcomes if outcome.status in ("no row", "input")),
    )


def _check(fixture: Fixture) -> Iterator[Outcome]:
    if not fixture.outputs:
        detail = "inputs of other fixtures: nothing to reproduce"
        yield Outcome(row="-", oracle="-", fixture=fixture.name, tensor="", status="input", detail=detail)
    for name in fixture.outputs:
        found = ((case, re.fullmatch(case.match, name)) for case in CASES if case.group == fixture.group)
        case, match = next(((case, match) for case, match in found if match), (None, None))
        if case is None or match is None:
            yield _without_row(fixture, name)
        else:
            yield _compare(fixture, case, match)


def _compare(fixture: Fixture, case: Case, match: re.Match[str]) -> Outcome:
    try:
        detail = fixture.difference(match[0], case.produce(fixture, match))
        status = "equal" if detail is None else "different"
    except Apart as apart:
        status, detail = apart.status, str(apart)
    except PlanError:
        raise
    except (ValueError, LookupError, RuntimeError) as error:
        status, detail = "different", f"{match[0]}: {type(error).__name__}: {error}"
    return Outcome(
        row=case.row, oracle=case.oracle, fixture=fixture.name, tensor=match[0], status=status, detail=detail or ""
    )


def _without_row(fixture: Fixture, name: str) -> Outcome:
    known = (why for group, match, why in UNCOVERED if group == fixture.group and re.fullmatch(match, name))
    other = "another library's bytes: not all can hold at once, and no row follows this one"
    why = next(known, "no case reproduces it yet" if fixture.is_primary(name) else other)
    prefix = name.rpartition(".")[0] or name
    return Outcome(row="-", oracle=prefix, fixture=fixture.name, tensor=name, status="no row", detail=why)


def run(directories: Sequence[Path], as_list: bool, as_json: bool) -> tuple[Any, str, bool]:
    """What the command prints, as JSON and as text, and whether all is equal."""
    report = check(directories)
    if not report.fixtures:
        raise PlanError(f"{', '.join(map(str, directories))}: manifests without fixtures; nothing was checked")
    text = "\n\n".join([report.listing(), report.as_text()]) if as_list and not as_json else report.as_text()
    return report.as_json(), text, not report.differences
