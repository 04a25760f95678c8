"""A small fleet that is broken on purpose: it serves all the while, and afterwards every byte must be right.

with Drill(scratch) as drill:
    drill.push(1)                          # version 2: the weights of seed 1
    ... break something ...
    drill.settle()
    assert not drill.problems()
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import ray
import torch
from torch import nn

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from quant.checkpoint import open_checkpoint
from quant.models import build_model, owners_of, placements_of
from service.fleet import Fleet, FleetConfig
from service.loading import cold_load
from sharding.fsdp import shard_range
from weight_update.client import Mode, Pusher, PushReport
from weight_update.links import AUTO
from weight_update.receiver import Receiver
from weight_update.transport import ControlClient, call, connect
from weight_update.wishes import OnBusy

LAYOUTS = ("trtllm", "cutlass")
RANKS = 2
LEASE_S = 4.0
RETRY_S = 20.0  # a coordinator that was killed is back by then
SETTLE_S = 240.0  # imports of a rank that is built anew took 50 s on two cores at a load of 60
SCRUB_S = 5.0
SLACK_S = 3.0  # between a token's making and its arrival here, on a machine that does much else
PAUSE_S = 0.5  # between requests: generation without a pause takes the cores from ranks that start
STEPS_A_BASE = 4  # seeds in a row that differ in a few weights only, so that deltas are pushed

START_FIELD = 18  # of /proc/PID/stat behind the state, field 22 of proc(5)

Bytes = dict[str, bytes]
Process = tuple[int, int]  # its number, and when it started
_GENERATOR = threading.Lock()  # torch's default generator belongs to one thread at a time


def weights(seed: int) -> nn.Module:
    """A random Llama of hidden 128, 9 MB; neighbouring seeds often differ in one row of each rank only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1 << 15,  # several chunks a rank
        hidden_size=128,
        intermediate_size=320,  # no multiple of 128: the last row tile is partly padding
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    with _GENERATOR:
        torch.manual_seed(seed // STEPS_A_BASE)
        model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for step in range(seed % STEPS_A_BASE):
            mlp = model.model.layers[step % 2].mlp
            mlp.gate_proj.weight[step * 7] *= -1.0  # a row of the first rank
            mlp.up_proj.weight[-1 - step * 7] *= -1.0  # and of the last: every rank has something to stage
    policy: nn.Module = model.to(torch.bfloat16).eval()
    return policy


class DrillPusher(Pusher):
    """A trainer of a drill. way: rank's address -> the one to dial. transport, fan_out: as a Pusher's."""

    def __init__(
        self,
        target: str,
        *,
        way: Callable[[str], str] = str,
        mode: Mode = "auto",
        transport: str = AUTO,
        fan_out: str = "never",
    ) -> None:
        super().__init__(
            target,
            mode=mode,
            lease_s=LEASE_S,
            retry_s=RETRY_S,
            pushed_by="drill",
            transport=transport,
            fan_out=fan_out,
        )
        self._control = TwoSteps(target)
        self._way = way

    def push_seed(self, seed: int, *, confirms: bool = False, on_busy: OnBusy = "error") -> PushReport:
        """Push the weights of a seed. confirms: install and decide are two calls."""
        assert isinstance(self._control, TwoSteps)
        self._control.confirms = confirms
        return self.push(weights(seed), step=seed, on_busy=on_busy)

    def _channel(self, address: str) -> Any:
        return super()._channel(self._way(address))


class TwoSteps(ControlClient):
    """Installs before it decides, where it is asked to, so that the coordinator confirms."""

    confirms = False

    def decide(self, transaction: int, **options: Any) -> pb.DecideReply:
        if self.confirms:
            self.install(transaction)
        return super().decide(transaction, **options)


class Drill:
    """A fleet, its traffic, and what is known of it. seed: of the newest weights."""

    def __init__(self, scratch: Path, *, rebuild_after_s: float = 20.0, fleet: type[Fleet] = Fleet) -> None:
        self._scratch = scratch
        self._model_dir = save(0, scratch / "model")
        self._fleet = fleet(
            FleetConfig(
                model=str(self._model_dir),
                layout=",".join(LAYOUTS),
                replicas=len(LAYOUTS),
                ranks=RANKS,
                state_dir=scratch / "state",
                min_replicas=1,
                rebuild_after_s=rebuild_after_s,
                scrub_s=SCRUB_S,
            )
        )
        self._expected: dict[tuple[int, str], list[Bytes]] = {}
        self._started: set[Process] = set()  # every one that a status named
        self.seed = 0

    def __enter__(self) -> Drill:
        self._fleet.__enter__()
        self._channel = connect(self._fleet.address)
        self.control = pb_grpc.ControlStub(self._channel)
        self.pusher = DrillPusher(self._fleet.address)
        self.traffic = Traffic(self._fleet.address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.traffic.stop()
            self.pusher.close()
            self._channel.close()
        finally:
            self._fleet.stop()
        if kind is None:
            self._require_gone()

    def _require_gone(self) -> None:
        """Nothing that was ever started lives."""
        deadline_s = time.monotonic() + 10
        while left := [pid for pid, born in self._started if _born(pid) == born]:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"processes {left} are left after the stop")
            time.sleep(0.1)

    # -- handles

    @property
    def address(self) -> str:
        return self._fleet.address

    @property
    def coordinator(self) -> Any:
        """Its Ray actor."""
        return self._fleet.coordinator

    def rank(self, replica: int, rank: int) -> Any:
        """The Ray actor of a rank; LookupError while its replica is being built."""
        actors = self._fleet.replicas.get(replica, [])
        if not actors:
            raise LookupError(f"replica {replica} is being built")
        return actors[rank]

    def new_seed(self) -> int:
        """Of weights that nobody has seen."""
        self.seed += 1
        return self.seed

    def status(self) -> pb.StatusReply:
        """From the coordinator; TimeoutError where it does not come back."""
        deadline_s = time.monotonic() + SETTLE_S
        while True:
            try:
                reply: pb.StatusReply = self.control.Status(pb.StatusRequest(), timeout=5)
                born = {pid: _born(pid) for each in reply.replicas for pid in each.pids}
                self._started |= {(pid, since) for pid, since in born.items() if since is not None}
                return reply
            except grpc.RpcError as error:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"no status within {SETTLE_S:.0f} s: {error}") from None
                time.sleep(0.2)

    def state_of(self, replica: int) -> str:
        """What the coordinator calls a replica; "" where it knows none."""
        return next((each.state for each in self.status().replicas if each.replica == replica), "")

    def settle(self, timeout_s: float = SETTLE_S) -> float:
        """Seconds until no transaction is open and every replica serves the same version."""
        start_s = time.monotonic()
        while not self._is_settled(status := self.status()):
            if time.monotonic() - start_s > timeout_s:
                raise TimeoutError(f"not healthy within {timeout_s:.0f} s: {status}")
            time.sleep(0.2)
        return time.monotonic() - start_s

    def _is_settled(self, status: pb.StatusReply) -> bool:
        """A status that names a dead process is older than its death, and who supervises the ranks may know more."""
        serving = all((each.state, each.version) == ("serving", status.version) for each in status.replicas)
        living = all(_born(pid) is not None for each in status.replicas for pid in each.pids)
        held = self._fleet.replicas
        whole = all(len(held.get(each.replica, ())) == RANKS for each in status.replicas)
        enough = len(status.replicas) >= len(LAYOUTS)
        return serving and living and whole and enough and not status.transaction_state

    # -- what must hold

    def problems(self) -> list[str]:
        """All that is wrong with a fleet that has settled: bytes, versions of tokens, leftovers."""
        status = self.status()
        current = {pid for each in status.replicas for pid in each.pids}
        return [
            *self._byte_problems(status),
            *self.traffic.problems(),
            *(
                f"process {pid} of an earlier replica lives"
                for pid, born in self._started
                if pid not in current and _born(pid) == born
            ),
            *(f"{path} is left" for path in Path("/dev/shm").glob("transfuse*")),
            *(f"{path} is left" for path in (self._scratch / "state").rglob(".v*")),
        ]

    def _byte_problems(self, status: pb.StatusReply) -> Iterator[str]:
        seed = self.seed_of(status.version)
        for replica, actors in self._fleet.replicas.items():
            if len(actors) != RANKS:
                yield f"replica {replica}: {len(actors)} of {RANKS} ranks run"
                continue
            expected = self.expected(seed, LAYOUTS[replica % len(LAYOUTS)])
            stored = ray.get([actor.stored_bytes.remote() for actor in actors])
            staged = ray.get([actor.staged_bytes.remote() for actor in actors])
            for rank, (held, wanted) in enumerate(zip(stored, expected, strict=True)):
                wrong = [name for name in wanted if held.get(name) != wanted[name]]
                where = f"replica {replica} rank {rank}"
                if wrong or held.keys() != wanted.keys():
                    named = ", ".join(wrong[:3])
                    yield f"{where}: {len(wrong)} storages differ from a cold load of {status.version}: {named}, .."
                if staged[rank]:
                    yield f"{where}: {staged[rank]} bytes are staged still"

    def seed_of(self, version: int) -> int:
        """Whose weights a version holds: trainers give the seed as their step."""
        reply = call(self.control.Versions, pb.VersionsRequest(), timeout_s=10)
        records = {each.version: each for each in reply.versions}
        record = records[version]
        while record.restores:
            record = records[record.restores]
        return int(record.step)

    def expected(self, seed: int, layout: str) -> list[Bytes]:
        """What every rank of a replica holds after a cold load of these weights."""
        if (seed, layout) not in self._expected:
            directory = save(seed, self._scratch / "cold")
            self._expected = {key: value for key, value in self._expected.items() if key[0] == seed}
            self._expected[seed, layout] = cold_shards(directory, layout)
        return self._expected[seed, layout]


class Traffic:
    """Requests all the time, and the version of every token that came back."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._guard = threading.Lock()  # guards the three below
        self._first_s: dict[int, float] = {}  # version -> when its first token came
        self._problems: list[str] = []
        self.num_tokens = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self._thread.start()

    def problems(self) -> list[str]:
        """What was wrong since the last call."""
        with self._guard:
            found, self._problems = self._problems, []
            return found

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        prompts = [pb.Prompt(token_ids=[3 + i, 4, 5]) for i in range(4)]
        request = pb.GenerateRequest(prompts=prompts, max_new_tokens=24, ignore_eos=True)
        with connect(self._address) as channel:
            stub = pb_grpc.GenerationStub(channel)
            while not self._stopped.wait(PAUSE_S):
                try:
                    for token in stub.Generate(request, timeout=30):
                        self._took(token)
                except grpc.RpcError:
                    pass  # a replica or the coordinator is gone: requests end early, the next one is tried

    def _took(self, token: pb.Token) -> None:
        now_s = time.monotonic()
        with self._guard:
            self.num_tokens += 1
            self._first_s.setdefault(token.version, now_s)
            for version, first_s in self._first_s.items():
                late_s = now_s - first_s
                if version > token.version and late_s > SLACK_S:
                    told = (
                        f"replica {token.replica} served version {token.version}, {late_s:.1f} s after {version} came"
                    )
                    self._problems.append(told)


def save(seed: int, directory: Path) -> Path:
    """A checkpoint of the weights of a seed."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = weights(seed)
    model.save_pretrained(directory)
    return directory


def cold_shards(model_dir: Path, layout: str) -> list[Bytes]:
    """What every rank would hold after a cold load: unsharded storages, cut by torch.chunk over units."""
    with open_checkpoint(str(model_dir)) as checkpoint:
        model = build_model(checkpoint.config_dir, "nvfp4", layout)
        receiver = Receiver.from_module(model)
        cold_load(receiver, checkpoint, None, owners_of(model))
    units = {placement.storage: placement.unit_bytes for placement in placements_of(model)}
    shards: list[Bytes] = []
    for rank in range(RANKS):
        held = {}
        for name, data in receiver.storage_bytes().items():
            unit_bytes = units.get(name, len(data))  # derived scalars are one unit
            start, stop = shard_range(len(data) // unit_bytes, rank, RANKS)
            held[name] = data[start * unit_bytes : stop * unit_bytes]
        shards.append(held)
    return shards


def _born(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None of one that is dead, waited for or not. Processes and
    threads share 32768 numbers on many machines, so that in minutes of a drill the number alone may be another's."""
    try:
        state, *fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(fields[START_FIELD])


def end(pid: int) -> None:
    """Kill -9, and wait until it is gone."""
    born = _born(pid)
    os.kill(pid, 9)
    while born is not None and _born(pid) == born:
        time.sleep(0.02)
