"""A service and a trainer of plain processes, without Ray, each in a network namespace of its own where asked: for
benchmarks and tests that need several ranks on both sides.

    with fleet(model_dir, replicas=2, ranks=2) as service:
        reports = train(service.address, model_dir, ranks=2, pushes=[1.0, 0.01])
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from service.workers import Serving
from sharding.cost import Rates
from weight_update.security import Security

CLONE_NEWNET = 0x40000000
TIMEOUT_S = 120.0

context = mp.get_context("forkserver")
context.set_forkserver_preload(
    ["service.actor", "service.coordinator_actor", "weight_update.client", "transformers.models.llama.modeling_llama"]
)


@dataclass(frozen=True)
class Place:
    """Where a process listens: an address, and the network namespace that has it ("" for this one)."""

    host: str = "127.0.0.1"
    namespace: str = ""


HERE = Place()
OPEN = Security(insecure_plaintext=True)  # nobody else is on the networks of a test
DEFAULT = Serving()


class Remote:
    """A process that answers calls in turn."""

    def __init__(self, entry: Callable[..., Any], place: Place, *args: Any) -> None:
        self._connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_run, args=(theirs, place, entry, args), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *call: Any) -> None:
        self._connection.send(call)

    def answer(self) -> Any:
        assert self._connection.poll(TIMEOUT_S), "no answer"
        ok, value = self._connection.recv()
        assert ok, value
        return value

    def __call__(self, *call: Any) -> Any:
        self.ask(*call)
        return self.answer()

    def stop(self) -> None:
        self._connection.close()
        self.process.join(20.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _run(connection: Connection, place: Place, entry: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Make an object in the namespace, then do what is asked for until nobody asks."""
    if place.namespace:
        with open(f"/run/netns/{place.namespace}") as file:
            assert ctypes.CDLL("libc.so.6", use_errno=True).setns(file.fileno(), CLONE_NEWNET) == 0, ctypes.get_errno()
    import torch

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if not place.namespace else f"{place.namespace}-0"
    made = None
    while True:
        try:
            method, *given = connection.recv()
        except EOFError:
            break
        try:
            made = entry(place, *args) if made is None else made
            connection.send((True, getattr(made, method)(*given)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    if made is not None:
        made.stop()


class _Rank:
    def __init__(self, place: Place, settings: dict[str, Any]) -> None:
        from service.actor import RankActor, RankConfig

        class Actor(RankActor):
            @property
            def _host(self) -> str:
                return place.host

        self._actor = Actor(RankConfig(host=place.host, num_threads=1, scrub_s=0.0, security=OPEN, **settings))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)


class _Coordinator:
    def __init__(self, place: Place, addresses: Sequence[str], state: str, model: str) -> None:
        from service.coordinator_actor import CoordinatorActor

        self._actor = CoordinatorActor(
            addresses, state, f"{place.host}:0", model, model, min_replicas=0, loaded=None, store=None, security=OPEN
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._actor, name)

    def cpu_s(self) -> float:
        used = os.times()
        return used.user + used.system


@dataclass(frozen=True)
class Fleet:
    """A running service. ranks: processes by replica and rank."""

    address: str
    coordinator: Remote
    ranks: Sequence[Remote]


@contextmanager
def fleet(
    model_dir: Path,
    *,
    replicas: int,
    ranks: int,
    format: str = "nvfp4",
    layout: str = "trtllm",
    serving: Serving = DEFAULT,
    memory_budget_bytes: int | None = None,
    places: Sequence[Place] = (),
    at: Place = HERE,
) -> Iterator[Fleet]:
    """places: of the ranks, one after the other, as on hosts of their own."""
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        started: list[Remote] = []
        for number in range(replicas * ranks):
            settings = {
                "replica": number // ranks,
                "rank": number % ranks,
                "world": ranks,
                "model": str(model_dir),
                "format": format,
                "layout": layout,
                "serving": serving,
                "memory_budget_bytes": memory_budget_bytes,
                "shares_memory": not places,
            }
            started.append(Remote(_Rank, places[number] if places else HERE, settings))
            stack.callback(started[-1].stop)
        for first in range(0, len(started), ranks):
            met = started[first]("rendezvous")
            for each in started[first : first + ranks]:
                each.ask("build", met, str(model_dir))
        addresses = [each.answer() for each in started]
        for each in started:
            each.ask("warm_up")
        for each in started:
            each.answer()
        coordinator = Remote(_Coordinator, at, addresses, f"{scratch}/state.sqlite", str(model_dir))
        stack.callback(coordinator.stop)
        yield Fleet(address=coordinator("address"), coordinator=coordinator, ranks=started)


class _Trainer:
    """One trainer rank with FSDP2 shards of a Llama."""

    def __init__(
        self,
        place: Place,
        rank: int,
        world: int,
        met: str,
        model_dir: str,
        address: str,
        sharded: bool,
        transport: str,
    ) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from transformers import LlamaForCausalLM

        from weight_update.client import Pusher

        dist.init_process_group("gloo", init_method=f"tcp://{met}", rank=rank, world_size=world)
        self._model: Any = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        if sharded:
            mesh = init_device_mesh("cpu", (world,))
            for layer in self._model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self._model, mesh=mesh)
        self._pusher = Pusher(address, transport=transport, security=OPEN)

    def push(self, share: float, full: bool) -> dict[str, Any]:
        """Change a share of the layers' elements, then push; what the report says and this rank's peak memory."""
        from dataclasses import asdict

        import torch

        self._pusher.mode = "full" if full else "auto"
        with torch.no_grad():
            for parameter in self._model.parameters():
                local = getattr(parameter, "_local_tensor", parameter)
                count = int(local.numel() * share)
                local.view(-1)[:count].mul_(1.5 if local.numel() else 1)
        report = asdict(self._pusher.push(self._model))
        return {**report, "peak_bytes": peak_bytes()}

    def fan_out(self, how: Any) -> None:
        """As a Pusher's option, from the next push on."""
        self._pusher._fan_out = how

    def rates(self) -> Rates:
        """By which the next push is predicted."""
        return self._pusher._foresight.rates

    def expect(self, rates: Rates) -> None:
        """Predict the next push by these rates."""
        self._pusher._foresight.rates = rates

    def stop(self) -> None:
        import torch.distributed as dist

        self._pusher.close()
        dist.destroy_process_group()


def peak_bytes() -> int:
    """The largest resident size of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


@dataclass(frozen=True)
class Trainer:
    """Ranks that push together."""

    ranks: Sequence[Remote]

    def __call__(self, share: float, full: bool) -> list[dict[str, Any]]:
        """Change a share of the elements, then push: a report a rank."""
        return self.all("push", share, full)

    def all(self, *call: Any) -> list[Any]:
        """The same call on every rank."""
        for each in self.ranks:
            each.ask(*call)
        return [each.answer() for each in self.ranks]


@contextmanager
def trainer(
    address: str,
    model_dir: Path,
    *,
    ranks: int,
    places: Sequence[Place] = (),
    sharded: bool = True,
    transport: str = "grpc",
) -> Iterator[Trainer]:
    """places: of the ranks. sharded: by FSDP2; else every rank holds the whole model. transport: by default what goes
    over links."""
    host = places[0].host if places else HERE.host
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        met = f"{host}:{probe.getsockname()[1]}"
    with ExitStack() as stack:
        started = []
        for rank in range(ranks):
            place = places[rank] if places else HERE
            given = (rank, ranks, met, str(model_dir), address, sharded and ranks > 1, transport)
            started.append(Remote(_Trainer, place, *given))
            stack.callback(started[-1].stop)
        yield Trainer(ranks=started)
