"""Replicas that die are built anew and filled by those that live; replicas come and go; streams break and go on."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from launch.breakage import cut_streams
from launch.cli import main
from launch.drill import RANKS, Drill, end
from protos import transfuse_pb2 as pb
from tests import processes
from tests.local import local_service
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.errors import PlanError


def await_state(drill: Drill, replica: int, state: str, timeout_s: float = 60.0) -> pb.ReplicaStatus:
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = next((each for each in drill.status().replicas if each.replica == replica), None)
        if found is not None and found.state == state:
            return found
        assert time.monotonic() < deadline_s, f"replica {replica} is {found}, expected {state}"
        time.sleep(0.1)


@pytest.fixture
def healthy(drill: Drill) -> Iterator[Drill]:
    drill.settle()
    yield drill
    drill.settle()
    assert drill.problems() == []


def test_a_killed_rank_takes_its_replica_out_and_new_processes_are_filled_by_the_other_one(healthy: Drill) -> None:
    drill = healthy
    before = await_state(drill, 1, "serving")
    end(ray.get(drill.rank(1, 1).pid.remote()))
    await_state(drill, 1, "fenced")
    report = drill.pusher.push_seed(drill.new_seed())  # one replica is enough
    assert report.digest_verified
    drill.settle()
    after = await_state(drill, 1, "serving")
    assert after.version == report.version
    assert not set(before.pids) & set(after.pids)  # a process group does not survive a member: all are new
    assert drill.control.Verify(pb.VerifyRequest(), timeout=60).ok
    assert drill.pusher.push_seed(drill.new_seed()).version == report.version + 1  # it counts again


@pytest.mark.slow
def test_a_leader_that_stands_still_for_good_is_replaced(healthy: Drill) -> None:
    before = await_state(healthy, 1, "serving")
    os.kill(ray.get(healthy.rank(1, 0).pid.remote()), signal.SIGSTOP)
    await_state(healthy, 1, "fenced")
    after = await_state(healthy, 1, "serving", timeout_s=120)
    assert not set(before.pids) & set(after.pids)


@pytest.mark.slow
def test_replicas_are_added_and_removed_while_requests_run(healthy: Drill, capsys: pytest.CaptureFixture[str]) -> None:
    drill = healthy
    main_of(["replica", "add", "--to", drill.address])
    assert "replica 2 serves" in capsys.readouterr().out
    assert drill.problems() == []  # all six ranks
    report = drill.pusher.push_seed(drill.new_seed())
    assert len(report.replicas) == 3
    drill.settle()
    pids = await_state(drill, 2, "serving").pids
    tokens = drill.traffic.num_tokens
    main_of(["replica", "remove", "2", "--yes", "--to", drill.address])
    assert drill.traffic.num_tokens > tokens
    assert [each.replica for each in drill.status().replicas] == [0, 1]
    deadline_s = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def main_of(args: list[str]) -> None:
    try:
        main(args)
    except SystemExit as ended:
        assert not ended.code


@pytest.mark.slow
def test_a_stream_that_breaks_goes_on_where_the_ranks_are(healthy: Drill) -> None:
    before = healthy.status().version
    outcome, _, connections, sent = cut_streams(healthy, random.Random(0)).rsplit(", ", 3)
    assert outcome == f"version {before + 1}"
    assert int(connections.split()[0]) >= 2 * 2 * RANKS
    model_bytes = sum(spec_bytes(spec) for spec in healthy.control.Describe(pb.DescribeRequest()).manifest.tensors)
    # Every replica gets the model once; what was in flight when the streams broke comes again.
    assert int(sent.split()[0]) < 1.5 * 2 * model_bytes


def spec_bytes(spec: pb.TensorSpec) -> int:
    num = {"BF16": 2, "F32": 4}.get(spec.dtype, 1)
    for size in spec.shape:
        num *= size
    return num


@pytest.mark.slow
def test_a_commit_that_no_replica_survived_is_said_to_be_lost_and_the_next_full_push_goes_on(drill: Drill) -> None:
    drill.settle()
    report = drill.pusher.push_seed(drill.new_seed())
    for replica in (0, 1):
        end(ray.get(drill.rank(replica, 0).pid.remote()))
    deadline_s = time.monotonic() + 120
    while not drill.status().lost:
        assert time.monotonic() < deadline_s, drill.status()
        time.sleep(0.5)
    assert str(report.version) in drill.status().lost
    again = drill.pusher.push_seed(drill.new_seed())
    assert again.version == report.version + 1
    assert again.mode == "full"
    drill.settle()
    assert drill.problems() == []


@pytest.mark.slow
def test_a_memory_budget_that_is_too_small_refuses_the_push_and_changes_nothing(tmp_path: Path) -> None:
    model = save(tiny_llama(seed=0), tmp_path / "model")
    with processes.fleet(model, replicas=1, ranks=1, memory_budget_bytes=32 << 20) as fleet:
        [rank] = fleet.ranks
        before = rank("stored_bytes")
        pusher = Pusher(fleet.address)
        with pytest.raises(PlanError, match="budget"):
            pusher.push(tiny_llama(seed=1))
        pusher.close()
        assert rank("stored_bytes") == before


class JumpingClock:
    """The module `time`, whose wall clock jumps."""

    def __init__(self) -> None:
        self.jump_s = 0.0

    def time(self) -> float:
        return time.time() + self.jump_s

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


@pytest.mark.parametrize("jump_s", [86400.0, -86400.0])
def test_a_clock_that_jumps_by_a_day_ends_no_lease_and_no_push(
    jump_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = JumpingClock()
    # gRPC counts its deadlines by the same clock, in Python and in C at once; only the first can be turned here.
    ours = [module for name, module in sys.modules.items() if name.partition(".")[0] in ("service", "weight_update")]
    for module in ours:
        if getattr(module, "time", None) is time:
            monkeypatch.setattr(module, "time", clock)
    model = save(tiny_llama(seed=0), tmp_path / "model")
    with local_service(model, tmp_path / "state") as service:
        pusher = Pusher(service.address, lease_s=30.0)
        prepare = pusher._control.prepare

        def jumping(transaction: int, digests: np.ndarray, wire_bytes: int, *, retry_s: float) -> None:
            prepare(transaction, digests, wire_bytes, retry_s=retry_s)
            clock.jump_s = jump_s

        monkeypatch.setattr(pusher._control, "prepare", jumping)
        assert pusher.push(tiny_llama(seed=1)).version == 2
        assert pusher.push(tiny_llama(seed=2)).version == 3
        pusher.close()
        assert {rank.engine.state for rank in service.ranks} == {"serving"}
