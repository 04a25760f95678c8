"""The main job on one machine: actors sample, a trainer learns from the samples and pushes, actors switch together.

What is learned is a Subject: launch.demo_text and launch.demo_pictures are the two.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from service.fleet import FleetConfig

from .interrupts import ForegroundFleet, raise_interrupts
from .progress import Bars
from .report import COLUMNS, Results, write_report

FORMAT, REPLICAS, RANKS = "nvfp4", 2, 2
LAYOUT = "trtllm,cutlass"  # one a replica: a push is in checkpoint form and serves both

Step = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What the actors make now. line: for the terminal, "" for nothing. html: for the report."""

    line: str
    html: str


class Session(Protocol):
    """One trainer and the service that it feeds."""

    def step(self, number: int) -> Step:
        """Sample from the actors, learn, push."""

    def reward(self, seed: int) -> float:
        """Of fresh samples from the current version."""

    def show(self) -> list[Shown]:
        """What people look at, with one seed whenever it is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A demo about to start. model: what FleetConfig.model says. session: made with the address of the service."""

    model: str
    session: Callable[[str], Session]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a demo learns. prepare: makes what is served, in a folder that is gone afterwards."""

    title: str
    reward_means: str
    shown: str
    note: str
    prepare: Callable[[Path, Bars], Prepared]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audience:
    """Who is told: each step as it ends, and lines of text."""

    step: Callable[[Step], None]
    say: Callable[[str], None]


def run(subject: Subject, num_steps: int, out_dir: Path, audience: Audience) -> Path:
    """Run a whole demo; returns where the report is. Whatever it started is stopped when this returns or raises."""
    raise_interrupts()
    bars = Bars()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="transfuse-demo-")))
        with bars.show():
            prepared = subject.prepare(scratch, bars)
            config = FleetConfig(
                model=prepared.model,
                format=FORMAT,
                layout=LAYOUT,
                replicas=REPLICAS,
                ranks=RANKS,
                state_dir=scratch,
            )
            fleet = ForegroundFleet(config, lambda what, done, total: bars.update(f"start {what}", done, total))
            stack.enter_context(fleet)
            raise_interrupts()
            bars.update("load the trainer", 0, 0)
            session = prepared.session(fleet.address)
        results = _train(subject, session, num_steps, audience)
        with bars.show("stop"):
            stack.close()
    path = out_dir / "report.html"
    write_report(path, results)
    audience.say(f"reward {results.steps[0]['reward']:.3f} -> {results.reward_after:.3f}; report: {path}")
    return path


def _train(subject: Subject, session: Session, num_steps: int, audience: Audience) -> Results:
    before = session.show()
    audience.say(_told(subject, "before", before))
    steps = []
    for number in range(1, num_steps + 1):
        steps.append(session.step(number))
        audience.step(steps[-1])
    reward_after = session.reward(seed=num_steps + 1)
    after = session.show()
    audience.say(_told(subject, "after", after))
    return Results(
        title=f"{subject.title} in {FORMAT}: {REPLICAS} replicas of {RANKS} ranks, {num_steps} steps",
        steps=steps,
        reward_after=reward_after,
        reward_means=subject.reward_means,
        shown=subject.shown,
        note=subject.note,
        pairs=[(old.html, new.html) for old, new in zip(before, after, strict=True)],
    )


def _told(subject: Subject, when: str, made: list[Shown]) -> str:
    return "\n".join([f"{subject.shown.lower()} {when}:", *(f"  {each.line}" for each in made if each.line)])


def to_people() -> Audience:
    """A line a step under one header."""
    width = 11
    header = ["".join(name.rjust(width) for name in COLUMNS)]

    def step(step: Step) -> None:
        while header:
            print(header.pop())
        print("".join(show(step).rjust(width) for show in COLUMNS.values()), flush=True)

    return Audience(step=step, say=lambda text: print(text, flush=True))


def to_scripts() -> Audience:
    """One JSON object a step, and nothing else."""
    return Audience(step=lambda step: print(json.dumps(step), flush=True), say=lambda text: None)
