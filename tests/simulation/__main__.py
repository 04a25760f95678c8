"""python -m tests.simulation [--first N] [--schedules N] [--processes N] [--replay SEED]"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor

from .schedule import Schedule
from .world import World

BATCH = 250

Coverage = Counter[tuple[str, str, str]]


def one(seed: int) -> tuple[World, str]:
    """What a schedule left behind, and what broke."""
    schedule = Schedule(seed)
    try:
        schedule.run()
    except Exception:
        return schedule.world, traceback.format_exc().strip().splitlines()[-1]
    return schedule.world, ""


def batch(first: int, count: int) -> tuple[list[int], list[int], Coverage, dict[int, str]]:
    """Schedules in one process: the events and the crashes of each, coverage, and what broke, by seed."""
    events: list[int] = []
    crashes: list[int] = []
    coverage: Coverage = Counter()
    broken: dict[int, str] = {}
    for seed in range(first, first + count):
        world, problem = one(seed)
        events.append(world.events)
        crashes.append(world.num_crashes)
        coverage += world.coverage
        if problem:
            broken[seed] = problem
    return events, crashes, coverage, broken


def show(coverage: Coverage) -> str:
    """state x message x fault, one line a state and message."""
    faults = sorted({fault for _, _, fault in coverage})
    rows = sorted({(state, name) for state, name, _ in coverage})
    lines = [f"{'state':28}{'message':16}" + "".join(f"{fault:>18}" for fault in faults)]
    for state, name in rows:
        lines.append(f"{state:28}{name:16}" + "".join(f"{coverage[state, name, fault] or '-':>18}" for fault in faults))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--schedules", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--replay", type=int)
    args = parser.parse_args()
    if args.replay is not None:
        schedule = Schedule(args.replay, keeps_log=True)
        try:
            schedule.run()
        finally:
            print("\n".join(schedule.world.log))
        return 0
    start_s = time.perf_counter()
    events: list[int] = []
    crashes: list[int] = []
    coverage: Coverage = Counter()
    broken: dict[int, str] = {}
    firsts = range(args.first, args.first + args.schedules, BATCH)
    counts = [min(BATCH, args.first + args.schedules - first) for first in firsts]
    with ProcessPoolExecutor(args.processes) as pool:
        for some, crashed, covered, problems in pool.map(batch, firsts, counts):
            events += some
            crashes += crashed
            coverage += covered
            broken |= problems
    seconds = time.perf_counter() - start_s
    print(show(coverage))
    print(
        f"{len(events)} schedules, {sum(events)} events, median {statistics.median(events):.0f} a schedule,"
        f" {sum(crashes)} crashes, at least {min(crashes)} a schedule, {len(coverage)} of state x message x fault,"
        f" {seconds:.0f} s: {len(broken)} broken"
    )
    for seed, problem in sorted(broken.items())[:20]:
        print(f"seed {seed}: {problem}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
