"""`transfuse chaos`: random schedules of failures on a local fleet, and whether anything was lost.

A round breaks one to three things, one into the recovery of the other, waits until the fleet is healthy by itself, and
compares every byte of every rank with a cold load of the version that the coordinator names; then a push must land. The
same seed draws the same schedules; how they interleave with the service's own threads differs from run to run.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import ray

from weight_update.errors import WeightUpdateError

from .breakage import BREAKAGES
from .drill import Drill
from .interrupts import raise_interrupts
from .progress import Bars

MAX_BREAKAGES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One schedule and how it ended. version: served afterwards, 0 where it did not come so far. healthy_s: until
    everything served again. problems: what is lost."""

    number: int
    breakages: Sequence[str]
    outcomes: Sequence[str]
    version: int
    healthy_s: float
    seconds: float
    num_tokens: int
    problems: Sequence[str]

    def as_text(self) -> str:
        """For people."""
        told = "; ".join(f"{name}: {out}" for name, out in zip(self.breakages, self.outcomes, strict=True))
        verdict = "\n  LOST ".join(["", *self.problems]) if self.problems else "every byte as a cold load"
        return f"round {self.number}: {told}; healthy after {self.healthy_s:.1f} s, version {self.version}, {verdict}"


def rounds(drill: Drill, seed: int, count: int, names: Sequence[str] = tuple(BREAKAGES)) -> Iterator[Round]:
    """Run schedules until one loses something."""
    chance = random.Random(seed)
    for number in range(count):
        yield (played := _play(drill, chance, number, names))
        if played.problems:
            return


def _play(drill: Drill, chance: random.Random, number: int, names: Sequence[str]) -> Round:
    start_s, tokens = time.monotonic(), drill.traffic.num_tokens
    drawn = [chance.choice(names) for _ in range(chance.randint(1, MAX_BREAKAGES))]
    chances = [random.Random(chance.random()) for _ in drawn]  # so that a schedule does not depend on what came of it
    outcomes, problems, healthy_s, version = [""] * len(drawn), [], 0.0, 0
    try:
        outcomes = [_broken(drill, name, each) for name, each in zip(drawn, chances, strict=True)]
        healthy_s = drill.settle()
        problems += drill.problems()
        report = drill.pusher.push_seed(drill.new_seed())
        drill.settle()
        problems += drill.problems()
        if (version := drill.status().version) != report.version:
            problems.append(f"version {version} is served after version {report.version} was committed")
    except (TimeoutError, WeightUpdateError) as error:
        problems.append(f"{type(error).__name__}: {error}")
    return Round(
        number=number,
        breakages=drawn,
        outcomes=outcomes,
        version=version,
        healthy_s=healthy_s,
        seconds=time.monotonic() - start_s,
        num_tokens=drill.traffic.num_tokens - tokens,
        problems=problems,
    )


def _broken(drill: Drill, name: str, chance: random.Random) -> str:
    try:
        return BREAKAGES[name](drill, chance)
    except ray.exceptions.RayTaskError as error:
        return f"not done, in its victim: {error.cause!r}"
    except LookupError as error:
        return f"not done, {error}"
    except ray.exceptions.RayError:
        return "not done, its victim was gone already"


def run(seed: int, count: int, show: Callable[[Round], None]) -> bool:
    """Start a fleet, play `count` rounds, stop it; whether nothing was lost."""
    raise_interrupts()
    bars = Bars()
    with (
        bars.show("start fleet"),
        TemporaryDirectory(prefix="transfuse-chaos-") as scratch,
        Drill(Path(scratch)) as drill,
    ):
        raise_interrupts()
        for played in rounds(drill, seed, count):
            show(played)
            bars.update("rounds", played.number + 1, count)
            if played.problems:
                return False
    return True


def summary(seed: int, played: Sequence[Round]) -> str:
    """The verdict, and how often what was done."""
    counts = Counter(name for each in played for name in each.breakages)
    lost = [problem for each in played for problem in each.problems]
    verdict = f"LOST: {'; '.join(lost)}" if lost else "nothing was lost"
    slowest_s = max((each.healthy_s for each in played), default=0.0)
    return "\n".join(
        [
            f"{len(played)} rounds from seed {seed}, {sum(counts.values())} failures: {verdict}",
            f"{sum(each.num_tokens for each in played)} tokens, none of an older version after a newer one;"
            f" healthy again within {slowest_s:.1f} s",
            *(f"{count:5d}  {name}" for name, count in sorted(counts.items())),
        ]
    )
