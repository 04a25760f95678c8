"""What a drill does to a fleet: a table of breakages, each a function that breaks something and says what came of it.

Most hold the protocol at one step: a rank, or the coordinator around its decision, stalls at a named point, and while
it does its victim is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import product
from typing import Any

import ray

from protos import transfuse_pb2 as pb
from weight_update.client import Mode
from weight_update.errors import WeightUpdateError
from weight_update.links import GRPC
from weight_update.transport import call

from .drill import SETTLE_S, Drill, DrillPusher, end
from .relays import SPOILS, Proxy, Relay

# in the order of a push; `decide` and `decided` are the coordinator's, before and after the record is durable
STEPS = ("open", "stage", "prepare", "install", "installed", "confirm", "decide", "decided", "publish")
COORDINATOR_STEPS = frozenset({"decide", "decided"})
VICTIMS = ("trainer", "rank", "coordinator")
REACH_S = 60.0
PUSH_S = 120.0  # after which a push counts as hung

REFUSE_S = 4.0  # for which a cut stream cannot be opened again, at most
CUT_AT_BYTES = 3_000_000  # of about 4.5 MB a rank
FLIPPED = "model.layers.1.mlp.up_proj.weight"  # 320 rows: every rank holds some

Breakage = Callable[[Drill, random.Random], str]

# Forked from a process that only imported, and runs no thread: a new one would import for 5 s.
TRAINERS = multiprocessing.get_context("forkserver")
TRAINERS.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama"])


def push(pusher: DrillPusher, seed: int, **options: Any) -> str:
    """What came of a push: committed, or the kind of its error."""
    try:
        return f"version {pusher.push_seed(seed, **options).version}"
    except WeightUpdateError as error:
        return error.code


def _train(address: str, seed: int, confirms: bool) -> None:
    """A trainer in a process of its own."""
    DrillPusher(address).push_seed(seed, confirms=confirms, on_busy="wait")


class Trainer:
    """A push under way, in another thread or, to be killed, in another process."""

    def __init__(
        self, drill: Drill, *, apart: bool, confirms: bool, mode: Mode = "auto", pusher: DrillPusher | None = None
    ) -> None:
        drill.status()  # the coordinator is back
        self._pusher = pusher or drill.pusher
        self._pool = ThreadPoolExecutor(1)
        self._process: Any = None
        seed = drill.new_seed()
        if apart:
            self._process = TRAINERS.Process(target=_train, args=(drill.address, seed, confirms), daemon=True)
            self._process.start()
        else:
            self._pusher.mode = mode
            self._pushing = self._pool.submit(push, self._pusher, seed, confirms=confirms, on_busy="wait")

    def kill(self) -> None:
        """Kill -9."""
        end(self._process.pid)

    def is_over(self) -> bool:
        """Whether the push has ended."""
        return self._pushing.done() if self._process is None else not self._process.is_alive()

    def outcome(self) -> str:
        """What came of the push."""
        if self._process is not None:
            self._process.join(PUSH_S)
            if self._process.is_alive():
                raise TimeoutError(f"a push did not end within {PUSH_S:.0f} s")
            return f"trainer ended with {self._process.exitcode}"
        try:
            return self._pushing.result(PUSH_S)
        finally:
            self._pusher.mode = "auto"
            self._pool.shutdown(wait=False)


def kill_at(drill: Drill, step: str, victim: str, rank: int, pusher: DrillPusher | None = None) -> str:
    """Kill the victim while the protocol stands at a step; rank: the one of replica 1 that stalls, or is killed.
    pusher: who pushes, the drill's own where none is given."""
    stalling = drill.coordinator if step in COORDINATOR_STEPS else drill.rank(1, rank)
    killed = {"rank": drill.rank(1, rank), "coordinator": drill.coordinator}.get(victim)
    ray.get(stalling.arm.remote(step, "stall"))
    trainer = Trainer(drill, apart=victim == "trainer", confirms=step == "confirm", pusher=pusher)
    try:
        _await_stall(stalling, step, trainer)
        if killed is None:
            trainer.kill()
        else:
            end(ray.get(killed.pid.remote()))
    finally:
        _release(stalling)
        outcome = trainer.outcome()
    return outcome


def fail_at(drill: Drill, step: str, rank: int) -> str:
    """A rank of replica 1 raises at a step."""
    ray.get(drill.rank(1, rank).arm.remote(step, "raise"))
    outcome = push(drill.pusher, drill.new_seed(), confirms=step == "confirm", on_busy="wait")
    _release(drill.rank(1, rank))
    return outcome


def _await_stall(stalling: Any, step: str, trainer: Trainer) -> None:
    deadline_s = time.monotonic() + REACH_S
    while ray.get(stalling.stalled.remote()) != step:
        if trainer.is_over() or time.monotonic() > deadline_s:
            raise LookupError(f"the push did not come to {step}")
        time.sleep(0.02)


def _release(stalling: Any) -> None:
    with contextlib.suppress(ray.exceptions.RayError):  # it was killed
        ray.get(stalling.release.remote())


# ---------------------------------------------------------------- other breakages


def kill_idle(drill: Drill, chance: random.Random) -> str:
    """A rank dies while nothing is pushed."""
    end(ray.get(drill.rank(1, chance.randrange(2)).pid.remote()))
    return "killed"


def kill_in_chain(drill: Drill, chance: random.Random) -> str:
    """A rank dies to which the rank of another replica passes rows on."""
    with closing(DrillPusher(drill.address, transport=GRPC, fan_out="always")) as pusher:
        return kill_at(drill, "stage", "rank", chance.randrange(2), pusher)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # its replica is built anew
        os.kill(pid, number)


def slow_rank(drill: Drill, chance: random.Random) -> str:
    """A rank gets a hundredth of its time during a push."""
    pid = ray.get(drill.rank(1, chance.randrange(2)).pid.remote())
    stopped = threading.Event()

    def brake() -> None:
        while not stopped.is_set():
            _signal(pid, signal.SIGSTOP)
            stopped.wait(0.099)
            _signal(pid, signal.SIGCONT)
            time.sleep(0.001)

    thread = threading.Thread(target=brake, daemon=True)
    thread.start()
    timer = threading.Timer(20.0, stopped.set)
    timer.start()
    try:
        return push(drill.pusher, drill.new_seed(), on_busy="wait")
    finally:
        timer.cancel()
        stopped.set()
        thread.join()


def stopped_rank(drill: Drill, chance: random.Random) -> str:
    """A rank stands still for some seconds, as in a long swap or a debugger, and goes on."""
    pid = ray.get(drill.rank(1, chance.randrange(2)).pid.remote())
    _signal(pid, signal.SIGSTOP)
    timer = threading.Timer(chance.uniform(1.0, 8.0), _signal, (pid, signal.SIGCONT))
    timer.start()
    try:
        return push(drill.pusher, drill.new_seed(), on_busy="wait")
    finally:
        timer.join()


def racing_trainers(drill: Drill, chance: random.Random) -> str:
    """Two trainers push at once: one waits for the other, or replaces it."""
    second = DrillPusher(drill.address)
    with ThreadPoolExecutor(2) as pool:
        seeds = drill.new_seed(), drill.new_seed()
        how = chance.choice(("wait", "replace", "error"))
        pushes = [pool.submit(push, drill.pusher, seeds[0]), pool.submit(push, second, seeds[1], on_busy=how)]
        outcomes = [each.result(PUSH_S) for each in pushes]
    second.close()
    return f"{how}: {', '.join(outcomes)}"


@contextmanager
def _ways(make: Callable[[str], Proxy | Relay]) -> Iterator[dict[str, Any]]:
    """Rank's address -> what stands in front of it, made where it is first asked for."""

    class Ways(dict[str, Any]):
        def __missing__(self, address: str) -> Any:
            self[address] = made = make(address)
            return made

    ways = Ways()
    try:
        yield ways
    finally:
        for each in ways.values():
            each.close()


def _push_along(drill: Drill, ways: Mapping[str, Any]) -> str:
    # Over gRPC, so that payloads are on the way that is cut or spoiled.
    pusher = DrillPusher(drill.address, way=lambda address: str(ways[address].address), mode="full", transport=GRPC)
    try:
        return push(pusher, drill.new_seed(), on_busy="wait")
    finally:
        pusher.close()


def spoil_chunk(drill: Drill, how: str) -> str:
    """One chunk to every rank is spoiled on the wire."""
    with _ways(lambda address: Relay(address, SPOILS[how])) as ways:
        return _push_along(drill, ways)


def cut_streams(drill: Drill, chance: random.Random) -> str:
    """Every stream of a push breaks, and cannot be opened again for some seconds."""
    refuse_s = chance.uniform(0.5, REFUSE_S)
    with _ways(lambda address: Proxy(address, bytes_per_s=1e6)) as ways:
        cutting = threading.Thread(target=_cut_once_under_way, args=(ways, refuse_s))
        cutting.start()
        outcome = _push_along(drill, ways)
        cutting.join()
        sent = sum(each.num_bytes for each in ways.values())
        streams = sum(each.num_connections for each in ways.values())
    return f"{outcome}, cut for {refuse_s:.1f} s, {streams} connections, {sent} bytes"


def _cut_once_under_way(ways: Mapping[str, Any], refuse_s: float) -> None:
    deadline_s = time.monotonic() + REACH_S
    while not any(each.num_bytes > CUT_AT_BYTES for each in list(ways.values())) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    for each in list(ways.values()):
        each.cut(refuse_s)


def _flip(receiver: Any, where: str) -> int:
    """Runs in the rank's process: one bit of what is staged, or of what is served; returns its byte."""
    memory = _spot(receiver, where)
    memory ^= 8
    return int(memory)


def _spot(receiver: Any, where: str) -> Any:
    """One byte of a rank's memory."""
    staged = where == "staging"
    memory = receiver._install.staging.memory if staged else receiver._live.bytes[FLIPPED].view(-1)
    return memory[len(memory) // 4]  # behind the middle the last tile is padding


def flip_served(drill: Drill, rank: int) -> str:
    """A bit of what a rank serves changes; its scrub finds it, and a donor fills the replica anew."""
    actor = drill.rank(1, rank)
    flipped = ray.get(actor.__ray_call__.remote(lambda self: _flip(self._server.receiver, "served")))
    deadline_s = time.monotonic() + SETTLE_S  # it is found within SCRUB_S; to fill a replica anew takes what that takes
    # Its state is no sign: a fence may come and go between two looks at it.
    while ray.get(actor.__ray_call__.remote(lambda self: int(_spot(self._server.receiver, "served")))) == flipped:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"a flipped bit was not found and mended within {SETTLE_S:.0f} s")
        time.sleep(0.05)
    return "found"


def flip_staged(drill: Drill, step: str, rank: int) -> str:
    """A bit of what is staged changes while a push stands before a step."""
    stalling = drill.rank(1, rank)
    ray.get(stalling.arm.remote(step, "stall"))
    trainer = Trainer(drill, apart=False, confirms=False, mode="full")
    try:
        _await_stall(stalling, step, trainer)
        ray.get(stalling.__ray_call__.remote(lambda actor: _flip(actor._server.receiver, "staging")))
    finally:
        _release(stalling)
        outcome = trainer.outcome()
    return outcome


def rollback(drill: Drill, chance: random.Random) -> str:
    """Back to an older version, or why not: a push may be open still whose trainer was killed."""
    drill.status()  # the coordinator is back
    try:
        *older, _ = call(drill.control.Versions, pb.VersionsRequest(), timeout_s=10).versions
        reachable = [each.version for each in older if each.reachable]
        if not reachable:
            return "nothing is reachable"
        request = pb.RollbackRequest(version=chance.choice(reachable), pushed_by="drill")
        reply = call(drill.control.Rollback, request, timeout_s=PUSH_S)
    except WeightUpdateError as error:
        return error.code
    return f"version {reply.version.version} as {reply.version.restores}"


KILLS: Mapping[str, Breakage] = {
    f"kill the {victim} at {step}": lambda drill, chance, step=step, victim=victim: kill_at(  # type: ignore[misc]
        drill, step, victim, chance.randrange(2)
    )
    for step, victim in product(STEPS, VICTIMS)
}
FAILURES: Mapping[str, Breakage] = {
    f"fail at {step}": lambda drill, chance, step=step: fail_at(drill, step, chance.randrange(2))  # type: ignore[misc]
    for step in STEPS
    if step not in COORDINATOR_STEPS
}
OTHERS: Mapping[str, Breakage] = {
    "kill a rank between pushes": kill_idle,
    "slow a rank down": slow_rank,
    "stop a rank for a while": stopped_rank,
    "race two trainers": racing_trainers,
    "roll back": rollback,
    "cut all streams": cut_streams,
    "kill a rank to which rows are passed on": kill_in_chain,
}
SPOILED: Mapping[str, Breakage] = {
    f"a chunk {how}": lambda drill, chance, how=how: spoil_chunk(drill, how)  # type: ignore[misc]
    for how in SPOILS
}
FLIPS: Mapping[str, Breakage] = {
    "flip a staged bit before prepare": lambda drill, chance: flip_staged(drill, "prepare", chance.randrange(2)),
    "flip a staged bit before install": lambda drill, chance: flip_staged(drill, "install", chance.randrange(2)),
    "flip a served bit": lambda drill, chance: flip_served(drill, chance.randrange(2)),
}
BREAKAGES: Mapping[str, Breakage] = {**KILLS, **FAILURES, **OTHERS, **SPOILED, **FLIPS}
