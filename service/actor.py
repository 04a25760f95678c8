"""The Ray actor of a rank. Ray places, starts and restarts it; nothing else goes through Ray."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray

from .garbage import uncollected

with uncollected():
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    from quant.checkpoint import open_checkpoint
    from quant.models import build_model, owners_of
    from quant.modules import layouts_of, mark_all_applied, quantized_modules
    from sharding.fsdp import reshard_all, shard_model
    from weight_update.channels import PLAINTEXT
    from weight_update.inplace import seal
    from weight_update.receiver import Receiver
    from weight_update.security import Security, is_loopback
    from weight_update.store import Store

    from .engine import Engine
    from .faults import Faults
    from .loading import cold_load, holdings_among
    from .logs import Seeing, set_up
    from .rank import SCRUB_S, RankIdentity, RankServer
    from .refresh import Refresher
    from .witness import Witness
    from .work import Worker
    from .workers import Serving, make_worker, offload_of

log = logging.getLogger(__name__)

GROUP_TIMEOUT = timedelta(minutes=10)
ENGINE_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RankConfig:
    """All that one rank needs to build itself.

    host: of the coordinator; ranks listen there where that is loopback, else at the addresses of their nodes.
    components: of a pipeline, component -> where its weights are. formats: of all replicas, where they have several.
    shares_memory: with other processes of the same user on this host.
    """

    replica: int
    rank: int
    world: int
    model: str
    format: str
    layout: str
    host: str
    num_threads: int
    serving: Serving = field(default_factory=Serving)
    components: Mapping[str, str] = field(default_factory=dict)
    redundant_experts: int | None = None
    formats: Sequence[str] = ()
    memory_budget_bytes: int | None = None
    store_dir: Path | None = None
    scrub_s: float = SCRUB_S
    security: Security = PLAINTEXT
    seeing: Seeing = field(default_factory=Seeing)
    shares_memory: bool = True


class RankActor:
    """One rank: its FSDP2 shard of the quantized model behind its own gRPC door."""

    def __init__(self, config: RankConfig) -> None:
        set_up(config.seeing.log_format)
        self._config = config
        self._faults = Faults()
        self._server: RankServer | None = None

    @property
    def _host(self) -> str:
        """The address that peers and trainers dial."""
        host = self._config.host
        return host if is_loopback(f"{host}:0") else str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def rendezvous(self) -> str:
        """host:port where the ranks of this replica meet; asked of rank 0 only."""
        with socket.socket() as probe:
            probe.bind((self._host, 0))
            return f"{self._host}:{probe.getsockname()[1]}"

    def build(self, rendezvous: str, source: str | None) -> str:
        """Build, shard and fill the model, start its engine and its door; returns the door's host:port.

        source: the checkpoint whose weights are loaded; with None all stay zero until a donor fills them.
        """
        config = self._config
        torch.set_num_threads(config.num_threads)
        torch.manual_seed(0)
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = self._join(rendezvous, device_type)
        with open_checkpoint(config.model, components=config.components) as checkpoint:
            model = self._model(checkpoint.config_dir, mesh, device_type)
            holdings = holdings_among(model, checkpoint.config_dir, config.format, config.formats)
            receiver = Receiver.of(holdings, memory_budget_bytes=config.memory_budget_bytes)
            config_dir = checkpoint.config_dir
        witness = Witness(receiver, None)
        if source is not None:
            overrides = config.components if source == config.model else {}  # a stored version has its own weights
            with open_checkpoint(source, components=overrides) as checkpoint:
                cold_load(receiver, checkpoint, dist.group.WORLD, owners_of(model))
                witness = Witness(receiver, checkpoint)
        mark_all_applied(model)
        seal(model)
        refresher = Refresher(model, receiver, sharded=config.world > 1, offload=offload_of(model, config.serving))
        self._server = RankServer(
            identity=self._identity(model),
            receiver=receiver,
            engine=self._engine(make_worker(model, config_dir, config.serving, refresher, device=device_type)),
            reshard=lambda: reshard_all(model),
            foresee=refresher.foresee,
            faults=self._faults,
            listen=f"{self._host}:0",
            scrub_s=config.scrub_s,
            witness=witness,
            security=config.security,
            shares_memory=config.shares_memory,
        )
        self._server.empty = source is None
        self._server.show(config.seeing)
        if config.store_dir is not None:
            self._server.sources.store = Store(
                config.store_dir, config_dir=config_dir, manifest=receiver.manifest, read_only=True
            )
        return self._server.address

    def _model(self, config_dir: Path, mesh: DeviceMesh, device_type: str) -> nn.Module:
        """The model, this rank's shard of it, all zeros."""
        config = self._config
        # One rank alone holds the whole model as it is: nothing to gather, and no gathered copy beside it.
        sharded = config.world > 1
        with uncollected():  # the model's library is imported
            model = build_model(
                config_dir,
                config.format,
                config.layout,
                device="meta" if sharded else device_type,
                components=config.components,
                redundant_experts=config.redundant_experts,
            )
        if sharded:
            shard_model(model, mesh, quantized=quantized_modules(model))
        return model

    def _identity(self, model: nn.Module) -> RankIdentity:
        config, layout = self._config, ", ".join(layouts_of(model))
        return RankIdentity(
            replica=config.replica, rank=config.rank, world=config.world, format=config.format, layout=layout
        )

    def _join(self, rendezvous: str, device_type: str) -> DeviceMesh:
        """The process group of this replica, and the mesh over its ranks."""
        config = self._config
        backend = {"cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}[device_type]
        dist.init_process_group(
            backend, init_method=f"tcp://{rendezvous}", rank=config.rank, world_size=config.world, timeout=GROUP_TIMEOUT
        )
        return init_device_mesh(device_type, (config.world,), mesh_dim_names=("shard",))

    def _engine(self, worker: Worker[..., Any]) -> Engine[..., Any]:
        """The engine of this rank, running; its steps are agreed on over a group of their own."""
        config = self._config
        engine = Engine(
            worker,
            group=dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT),
            rank=config.rank,
            world=config.world,
            version=0,
            commit_between=config.serving.commit_between,
        )
        engine.start()
        return engine

    def warm_up(self) -> None:
        """Compile kernels and graphs, before any version is published. Called on all ranks of a replica at once."""
        assert self._server is not None
        start_s = time.perf_counter()
        self._server.engine.warm_up()
        log.info(
            "warm-up rank=%s.%s seconds=%.1f", self._config.replica, self._config.rank, time.perf_counter() - start_s
        )

    def ended(self) -> str:
        """Returns when this rank can serve no more, and says why; a supervisor waits for it."""
        assert self._server is not None
        while (state := self._server.engine.state) in ("serving", "paused"):
            time.sleep(ENGINE_POLL_S)
        return state

    def arm(self, point: str, action: str, skip: int = 0) -> None:
        """Plan a failure at a point of the protocol; see service.faults."""
        self._faults.arm(point, action, skip)

    def stalled(self) -> str:
        """The point where an armed stall holds this rank; "" where none does."""
        return self._faults.stalled

    def release(self) -> None:
        """End a stall, disarm all points."""
        self._faults.release()

    def staged_bytes(self) -> int:
        """Bytes staged in the open transaction; 0 where none is open."""
        assert self._server is not None
        return self._server.receiver.staged_bytes

    def stored_bytes(self) -> dict[str, bytes]:
        """Every live storage of this rank as it lies in memory, for audits and tests."""
        assert self._server is not None
        return self._server.receiver.storage_bytes()

    def addresses(self) -> dict[str, int]:
        """The data pointer of every live storage of this rank."""
        assert self._server is not None
        return self._server.receiver.storage_addresses()

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def stop(self) -> None:
        """End the engine and the server."""
        if self._server is not None:
            self._server.stop()


# Calls may overlap: `arm` must get through while `build` runs. Ray's stubs do not know the option of an actor class.
REMOTE_RANK: Any = ray.remote(max_concurrency=4)(RankActor)  # type: ignore[call-overload]
