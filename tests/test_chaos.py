"""`transfuse chaos` as a user runs it. Before the tests that share one fleet: this one starts its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.breakage import BREAKAGES

SEED = "31"  # a trainer is killed, a rank fails: no process takes long to start again; test_faults has other rounds


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_chaos_prints_a_round_a_line_and_leaves_nothing_behind() -> None:
    command = [sys.executable, "-c", "from launch.cli import main; main()", "chaos", "--seed", SEED, "--rounds", "2"]
    done = subprocess.run(
        [*command, "--json"], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr
    played = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["number"] for each in played] == [0, 1]
    assert all(each["breakages"] and set(each["breakages"]) <= BREAKAGES.keys() for each in played)
    assert all(each["problems"] == [] and each["num_tokens"] > 0 for each in played)
    assert not list(Path("/tmp").glob("transfuse-chaos-*"))
