"""What takes long: a million simulated schedules of the protocol, hundreds of random pushes into one service, thousands
of pushes in a row, hundreds of random failures of real processes, a million broken inputs.

    python -m tests.bench.soak [--only PART]... [--count N] [--first N]

Prints a paragraph a part, what was done and what was lost, and exits 1 on the first byte that is not what a cold load
would give. `--first` is where seeds and inputs begin, so that several runs of a part are of different ones.
"""

from __future__ import annotations

import argparse
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from launch.chaos import Round, rounds, summary
from launch.drill import Drill
from tests.bench import growth
from tests.fuzz import targets
from tests.local import LocalService, cold, local_service
from tests.rig import LAYOUT_PAIRS, Rig
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.errors import WeightUpdateError

LAYOUTS = ("trtllm", "cutlass", "plain")
POINTS = ("open", "stage", "prepare", "install", "installed")
SCOPES = ("all", "model.layers.0.*", "*.mlp.down_proj.weight", "*norm*")


def compared_pushes(service: LocalService, scratch: Path, pushes: int, chance: random.Random) -> Counter[str]:
    """Random pushes; after each, every storage equals a cold load of what was last committed, at its old address."""
    outcomes: Counter[str] = Counter()
    pusher = Pusher(service.address)
    committed = tiny_llama(seed=0)
    pusher.push(committed)
    addresses = service.addresses()
    for i in range(pushes):
        candidate, scope = tiny_llama(seed=1000 + i), chance.choice(SCOPES)
        point = chance.choice((*POINTS, *[""] * len(POINTS)))
        if point:
            chance.choice(service.ranks).faults.arm(point, "raise")
        try:
            report = pusher.push(candidate, scope=[scope] if scope != "all" else scope)
        except WeightUpdateError:
            outcomes[f"failed at {point}"] += 1
        else:
            carry_over(committed, candidate, scope, report.widened)
            outcomes[f"committed {scope}"] += 1
        save(committed, scratch)
        expected = [cold(scratch, layout)[1].storage_bytes() for layout in LAYOUTS]
        if service.bytes() != expected or service.addresses() != addresses:
            raise SystemExit(f"push {i}, scope {scope}, failure {point or 'none'}: bytes or addresses differ")
    pusher.close()
    return outcomes


def carry_over(committed: torch.nn.Module, candidate: torch.nn.Module, scope: str, widened: list[str]) -> None:
    """Bring the committed model to what a push of this scope made of it."""
    from fnmatch import fnmatchcase

    pushed = dict(candidate.named_parameters())
    with torch.no_grad():
        for name, parameter in committed.named_parameters():
            if scope == "all" or fnmatchcase(name, scope) or name in widened:
                parameter.copy_(pushed[name])


# ---------------------------------------------------------------- the parts: how many, and from which seed or input on


def simulate(count: int, first: int) -> None:
    """Schedules of the protocol without I/O."""
    simulation = ["--first", f"{first}", "--schedules", f"{count}"]
    if subprocess.run([sys.executable, "-m", "tests.simulation", *simulation]).returncode:
        raise SystemExit(1)


def push_randomly(count: int, first: int) -> None:
    """Random scopes and failures, three layouts at once."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        model_dir = save(tiny_llama(seed=0), scratch / "model")
        with local_service(model_dir, scratch / "state", LAYOUTS) as service:
            outcomes = compared_pushes(service, scratch / "cold", count, random.Random(first))
    print(f"{count} random pushes into replicas of layouts {', '.join(LAYOUTS)}: every byte as a cold load")
    for outcome, times in sorted(outcomes.items()):
        print(f"  {times:4d} {outcome}")
    print(f"  {time.monotonic() - start:.0f} s")


def push_in_a_row(count: int, first: int) -> None:
    """Pushes of one service, and whether anything of it grows."""
    growth.run(count)


def feed_broken(count: int, first: int) -> None:
    """Inputs of tests.fuzz, a fifth for each decoder, then what the ranks hold; AssertionError names the first one
    that is not refused as it should be."""
    logging.disable(logging.WARNING)  # the decoders' own words on a million inputs
    start, rig = time.monotonic(), Rig(LAYOUT_PAIRS[2])
    rig.push_all(seed=1)
    rig.begin(range(len(rig.specs)))
    with tempfile.TemporaryDirectory() as directory:
        found = targets(Path(directory), rig)
        numbers = range(first, first + count // len(found))
        taken = {target.name: target.run(numbers) for target in found}
    assert rig.wrong() == []
    logging.disable(logging.NOTSET)
    print(f"{count} broken inputs refused by name, none with more memory than its bound, no served byte changed")
    for name, still_valid in taken.items():
        print(f"  inputs {numbers[0]} to {numbers[-1]} of {name}, {still_valid} of them still valid")
    print(f"  {time.monotonic() - start:.0f} s")


def break_randomly(count: int, first: int) -> None:
    """Random schedules of failures of real processes; the first byte that is lost ends it."""
    start, played = time.monotonic(), list[Round]()
    with tempfile.TemporaryDirectory() as directory, Drill(Path(directory)) as drill:
        for each in rounds(drill, first, count):
            played.append(each)
            print(each.as_text(), file=sys.stderr, flush=True)
    print(summary(first, played))
    print(f"  {time.monotonic() - start:.0f} s")
    if any(each.problems for each in played):
        raise SystemExit(1)


PARTS = {
    "schedules": (simulate, 1_000_000),
    "random": (push_randomly, 300),
    "row": (push_in_a_row, growth.PUSHES),
    "chaos": (break_randomly, 200),
    "fuzz": (feed_broken, 1_000_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all of them")
    parser.add_argument("--count", type=int, help="in place of the part's own")
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    for name in options.only or PARTS:
        part, count = PARTS[name]
        part(options.count or count, options.first)


if __name__ == "__main__":
    main()
