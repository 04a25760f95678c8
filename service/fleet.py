"""A running service: replicas of ranks and a coordinator on a Ray cluster.

with Fleet(FleetConfig(model="smollm2", replicas=2, ranks=2)) as fleet:
    print(fleet.address)
    fleet.wait()
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from quant.checkpoint import open_checkpoint
from quant.pipelines import PipelineCheckpoint
from weight_update.channels import PLAINTEXT
from weight_update.errors import MemberError, PlanError
from weight_update.security import Security

from .actor import RankConfig
from .coordinator_actor import REMOTE_COORDINATOR
from .engine import CommitBetween
from .keeper import StoreConfig
from .logs import Seeing
from .rank import SCRUB_S
from .restart import Weights
from .supervisor import Progress, Supervisor, value_of
from .work import OnCommit
from .workers import Serving, check_serving

log = logging.getLogger(__name__)

# On a cluster of its own a rank reserves next to nothing: the ranks of a trial share the cores of one machine, and a
# replica may be added.
LOCAL_SHARE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """What to serve and where.

    model: a directory, a GGUF file, or "smollm2"; a directory may be a pipeline of diffusers. format: a row of FORMATS;
    of a pipeline also "auto", or "transformer=nvfp4,transformer_2=bf16". layout: a row of quant.layouts.LAYOUTS, or
    "auto"; several, separated by commas, are dealt out to the replicas. components: of a pipeline, component -> where
    its weights are instead. replicas: full copies of the model. ranks: processes that share one copy. listen: host:port
    of the coordinator, port 0 for any. ray_address: an existing cluster; None starts a local one. state_dir: where
    decisions are kept (default: a temporary folder, for trials). min_replicas: how many must serve for a push, 0 for
    all. rebuild_after_s: how long a replica may stay fenced beside others that serve before its processes are replaced,
    even though they live. store: where committed versions are kept; its newest one is what a start serves. scrub_s:
    within which every installed byte is read again and compared, 0 for never. security: of all connections; its paths
    are read on every node. seeing: what its processes show of themselves; the ports of the ranks' metrics follow the
    coordinator's, in order. For the rest see Serving.
    """

    model: str
    format: str = "nvfp4"
    layout: str = "auto"
    components: Mapping[str, str] = field(default_factory=dict)
    replicas: int = 1
    ranks: int = 1
    listen: str = "127.0.0.1:0"
    ray_address: str | None = None
    state_dir: Path | None = None
    max_batch: int = 32
    max_tokens: int | None = None
    commit_between: CommitBetween = "steps"
    on_commit: OnCommit = "continue"
    offload: str = "none"
    compile: bool = False
    memory_budget_bytes: int | None = None
    min_replicas: int = 0
    rebuild_after_s: float = 120.0
    store: StoreConfig | None = None
    scrub_s: float = SCRUB_S
    security: Security = PLAINTEXT
    seeing: Seeing = field(default_factory=Seeing)

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.ranks < 1:
            raise PlanError(f"replicas {self.replicas}, ranks {self.ranks}: expected at least 1 of each")
        if not 0 <= self.min_replicas <= self.replicas:
            raise PlanError(f"min_replicas {self.min_replicas}: expected 0 (all) to {self.replicas}, the replicas")
        self.security.require(self.listen, "listening on")

    @property
    def serving(self) -> Serving:
        """How each replica generates."""
        return Serving(
            max_batch=self.max_batch,
            max_tokens=self.max_tokens,
            commit_between=self.commit_between,
            on_commit=self.on_commit,
            offload=self.offload,
            compile=self.compile,
        )


class Fleet:
    """Starts everything, and stops everything. on_progress: called with (what, done, total); on_note: with what whoever
    starts it should know."""

    def __init__(
        self, config: FleetConfig, on_progress: Progress | None = None, on_note: Callable[[str], None] = log.warning
    ) -> None:
        self.config = config
        self.address = ""
        self._on_progress = on_progress or (lambda what, done, total: None)
        self._on_note = on_note
        self._started_ray = False
        self._supervisor: Supervisor | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None  # the state of a trial; gone with the fleet
        self.coordinator: Any = None

    def __enter__(self) -> Fleet:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        config = self.config
        checkpoint = open_checkpoint(
            config.model,
            progress=lambda done, total: self._on_progress("checkpoint", done, total),
            components=config.components,
        )
        config_dir = checkpoint.config_dir
        checkpoint.close()
        num_components = len(checkpoint.components) if isinstance(checkpoint, PipelineCheckpoint) else 0
        check_serving(config.serving, num_components, self._on_note)
        self._on_progress("ray", 0, 1)
        self._connect()
        self._on_progress("ray", 1, 1)
        self._weights = Weights(str(config_dir), None if config.store is None else config.store.directory)
        self._supervisor = self._supervise(str(config_dir))
        addresses = self._supervisor.start(config.replicas)
        self._on_progress("coordinator", 0, 1)
        state_dir = self._state_dir()
        # Its address and its state file are of this node.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.coordinator = REMOTE_COORDINATOR.options(num_cpus=0, scheduling_strategy=here).remote(
            addresses,
            str(state_dir / "transfuse.sqlite"),
            self._listen(),
            config.model,
            str(config_dir),
            min_replicas=config.min_replicas,
            loaded=self._weights.loaded,
            store=config.store,
            security=config.security,
            seeing=config.seeing,
        )
        self.address = value_of(self.coordinator.address.remote(), "the coordinator")
        self._supervisor.watch(self.address)
        self._on_progress("coordinator", 1, 1)

    def _state_dir(self) -> Path:
        if self.config.state_dir is not None:
            return self.config.state_dir
        self._scratch = tempfile.TemporaryDirectory(prefix="transfuse-")
        return Path(self._scratch.name)

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        address = self.config.ray_address
        options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
        ray.init(log_to_driver=False, configure_logging=False, **options)
        # Ray tells of every killed worker on stdout, which belongs to results, and has no public switch for it. The
        # supervisor says it on its own log.
        ray._private.worker._worker_logs_enabled = False
        self._started_ray = True

    def _listen(self) -> str:
        """A fixed port, so that a restarted coordinator comes back on it."""
        host, _, port = self.config.listen.rpartition(":")
        if port != "0":
            return self.config.listen
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def _supervise(self, model: str) -> Supervisor:
        config = self.config
        local = config.ray_address is None
        cores = os.cpu_count() or 1
        threads = max(1, cores // (config.replicas * config.ranks)) if local else cores
        return Supervisor(
            lambda replica: [self._rank_config(replica, rank, model, threads) for rank in range(config.ranks)],
            self._weights.source,
            share=LOCAL_SHARE if local else 1.0,
            rebuild_after_s=config.rebuild_after_s,
            on_progress=self._on_progress,
            security=config.security,
        )

    def _rank_config(self, replica: int, rank: int, model: str, threads: int) -> RankConfig:
        config = self.config
        layouts = config.layout.split(",")
        return RankConfig(
            replica=replica,
            rank=rank,
            world=config.ranks,
            model=model,
            format=config.format,
            layout=layouts[replica % len(layouts)],
            host=config.listen.rpartition(":")[0],
            num_threads=threads,
            serving=config.serving,
            components=dict(config.components),
            memory_budget_bytes=config.memory_budget_bytes,
            store_dir=None if config.store is None else config.store.directory,
            scrub_s=config.scrub_s,
            security=config.security,
            seeing=config.seeing.after(replica * config.ranks + rank),
        )

    @property
    def ranks(self) -> list[Any]:
        """The actors of all ranks, by replica and rank; others after a rebuild."""
        return [actor for actors in self.replicas.values() for actor in actors]

    @property
    def replicas(self) -> dict[int, list[Any]]:
        """Replica -> the actors of its ranks; none while it is being built anew."""
        return {} if self._supervisor is None else self._supervisor.replicas

    def wait(self) -> None:
        """Block until interrupted, or until nobody watches the ranks any more."""
        while self._supervisor is not None and self._supervisor.failure is None:
            time.sleep(1.0)
        raise MemberError("the ranks are not watched any more; see the logs of Ray under /tmp/ray, then start again")

    def stop(self) -> None:
        """Stop every process that this fleet started."""
        if self._supervisor is not None:
            self._supervisor.halt()
        if self.coordinator is not None:
            ray.kill(self.coordinator, no_restart=True)
        if self._supervisor is not None:
            self._supervisor.stop()
        self._supervisor = self.coordinator = None
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None
