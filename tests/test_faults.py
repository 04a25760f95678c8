"""Everything that can break is broken in a running fleet, by real kills; then every byte of every rank is compared."""

from __future__ import annotations

import random
from itertools import product

import pytest

from launch.breakage import BREAKAGES, KILLS, STEPS, VICTIMS
from launch.chaos import rounds
from launch.drill import Drill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RESOLVED_S = 15.0

# From which step on the push is committed whoever of these dies: a trainer that has asked for the commit is not needed
# any more; without a rank's replica, and with the coordinator that comes after a killed one, the trainer begins anew.
COMMITTED_FROM = {"trainer": "install", "rank": "open", "coordinator": "open"}


def require_healthy(drill: Drill) -> None:
    drill.settle()
    assert drill.problems() == []


@pytest.mark.parametrize(("step", "victim"), list(product(STEPS, VICTIMS)))
def test_a_process_killed_at_any_step_leaves_one_version_everywhere(step: str, victim: str, drill: Drill) -> None:
    drill.settle()  # whoever used it before compared every byte
    before, tokens = drill.status().version, drill.traffic.num_tokens
    outcome = KILLS[f"kill the {victim} at {step}"](drill, random.Random(step))
    resolved_s = drill.settle()
    assert drill.problems() == []
    commits = STEPS.index(step) >= STEPS.index(COMMITTED_FROM[victim])
    assert drill.status().version == before + commits, outcome
    if victim == "coordinator":
        assert resolved_s < RESOLVED_S
    else:
        assert drill.traffic.num_tokens > tokens  # the other replica served on
    report = drill.pusher.push_seed(drill.new_seed())
    assert report.version == drill.status().version
    require_healthy(drill)


@pytest.mark.parametrize("name", sorted(BREAKAGES.keys() - KILLS.keys()))
def test_whatever_breaks_the_next_push_lands_and_every_byte_is_that_of_a_cold_load(name: str, drill: Drill) -> None:
    drill.settle()  # whoever used it before compared every byte
    BREAKAGES[name](drill, random.Random(name))
    require_healthy(drill)
    report = drill.pusher.push_seed(drill.new_seed())
    assert report.version == drill.status().version
    require_healthy(drill)


@pytest.mark.parametrize("seed", range(18))
def test_random_schedules_of_failures_lose_nothing(seed: int, drill: Drill) -> None:
    [played] = rounds(drill, seed, 1)
    print(played.as_text())
    assert not played.problems


@pytest.mark.parametrize("how", ["dropped", "truncated", "bit-flipped"])
def test_a_spoiled_chunk_never_becomes_a_version(how: str, drill: Drill) -> None:
    drill.settle()  # whoever used it before compared every byte
    before = drill.status().version
    outcome = BREAKAGES[f"a chunk {how}"](drill, random.Random(0))
    assert outcome in ("transfer", "digest", "manifest", "version") or outcome == f"version {before + 1}"
    assert drill.status().version == before + outcome.startswith("version ")
    require_healthy(drill)


@pytest.mark.parametrize("step", ["prepare", "install"])
def test_a_bit_that_flips_in_staging_is_found_before_anything_is_decided(step: str, drill: Drill) -> None:
    drill.settle()  # whoever used it before compared every byte
    before = drill.status().version
    assert BREAKAGES[f"flip a staged bit before {step}"](drill, random.Random(0)) == "digest"
    require_healthy(drill)
    assert drill.status().version == before
