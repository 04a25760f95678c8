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
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from quant.checkpoint import open_checkpoint
from quant.pipelines import PipelineCheckpoint
from weight_update.errors import MemberError, PlanError

from .actor import REMOTE_COORDINATOR, REMOTE_RANK, RankConfig
from .engine import CommitBetween
from .work import OnCommit
from .workers import Serving, check_serving

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """What to serve and where.

    model: a directory, a GGUF file, or "smollm2"; a directory may be a pipeline of diffusers. format: a row of FORMATS;
    of a pipeline also "auto", or "transformer=nvfp4,transformer_2=bf16". layout: a row of quant.layouts.LAYOUTS, or
    "auto"; several, separated by commas, are dealt out to the replicas. components: of a pipeline, component -> where
    its weights are instead. replicas: full copies of the model. ranks: processes that share one copy. listen: host:port
    of the coordinator, port 0 for any. ray_address: an existing cluster; None starts a local one. state_dir: where
    decisions are kept (default: a temporary folder, for trials). For the rest see Serving.
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

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.ranks < 1:
            raise PlanError(f"replicas {self.replicas}, ranks {self.ranks}: expected at least 1 of each")

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
        self.ranks: list[Any] = []
        self._on_progress = on_progress or (lambda what, done, total: None)
        self._on_note = on_note
        self._started_ray = False
        self._groups: list[Any] = []
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
        addresses = self._start_ranks(str(config_dir))
        self._warm_up()
        self._on_progress("coordinator", 0, 1)
        state_dir = self._state_dir()
        self.coordinator = REMOTE_COORDINATOR.remote(
            addresses, str(state_dir / "transfuse.sqlite"), self._listen(), config.model, str(config_dir)
        )
        self.address = _get(self.coordinator.address.remote(), "the coordinator")
        self._on_progress("coordinator", 1, 1)

    def _state_dir(self) -> Path:
        if self.config.state_dir is not None:
            return self.config.state_dir
        self._scratch = tempfile.TemporaryDirectory(prefix="transfuse-")
        return Path(self._scratch.name)

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        # A local cluster counts ranks, not cores: on a small machine ranks share them.
        needed = self.config.replicas * self.config.ranks + 1
        local = {"num_cpus": max(os.cpu_count() or 1, needed), "include_dashboard": False}
        options: dict[str, Any] = {"address": self.config.ray_address} if self.config.ray_address else local
        ray.init(log_to_driver=False, configure_logging=False, **options)
        self._started_ray = True

    def _listen(self) -> str:
        """A fixed port, so that a restarted coordinator comes back on it."""
        host, _, port = self.config.listen.rpartition(":")
        if port != "0":
            return self.config.listen
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def _start_ranks(self, model: str) -> list[str]:
        config = self.config
        total = config.replicas * config.ranks
        self._on_progress("ranks", 0, total)
        local = self.config.ray_address is None
        threads = max(1, (os.cpu_count() or 1) // total) if local else max(1, os.cpu_count() or 1)
        actor = REMOTE_RANK
        builds: dict[Any, str] = {}
        for replica in range(config.replicas):
            group = placement_group([{"CPU": 1.0}] * config.ranks, strategy="PACK")
            self._groups.append(group)
            members = [
                actor.options(
                    num_cpus=1,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
                ).remote(self._rank_config(replica, rank, model, threads))
                for rank in range(config.ranks)
            ]
            self.ranks += members
            meeting = _get(members[0].rendezvous.remote(), f"replica {replica} rank 0")
            for rank, member in enumerate(members):
                builds[member.build.remote(meeting)] = f"replica {replica} rank {rank}"
        self._await(builds, "ranks")
        return [ray.get(build) for build in builds]

    def _warm_up(self) -> None:
        """Kernels and graphs are compiled before the first request, not by it."""
        self._on_progress("warm-up", 0, len(self.ranks))
        ranks = self.config.ranks
        calls = {
            rank.warm_up.remote(): f"replica {i // ranks} rank {i % ranks} in its warm-up"
            for i, rank in enumerate(self.ranks)
        }
        self._await(calls, "warm-up")

    def _await(self, calls: Mapping[Any, str], what: str) -> None:
        """Wait for Ray calls, reporting each; calls: reference -> who."""
        waiting = list(calls)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            _get(done[0], calls[done[0]])
            self._on_progress(what, len(calls) - len(waiting), len(calls))

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
        )

    def wait(self) -> None:
        """Block until interrupted or until no rank is left."""
        while True:
            time.sleep(1.0)
            if not any(_alive(rank) for rank in self.ranks):
                raise MemberError("all ranks are gone; see the logs of Ray under /tmp/ray, then start again")

    def stop(self) -> None:
        """Stop every process that this fleet started."""
        actors = [*([self.coordinator] if self.coordinator is not None else []), *self.ranks]
        for actor in actors:
            ray.kill(actor, no_restart=True)
        for group in self._groups:
            ray.util.remove_placement_group(group)
        self.ranks, self._groups, self.coordinator = [], [], None
        if self._started_ray:
            ray.shutdown()
            self._started_ray = False
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


def _get(reference: Any, who: str) -> Any:
    """The value of a Ray call; a failure names who failed and why, without Ray's own frames."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise MemberError(f"{who}: {error.cause}") from error
    except ray.exceptions.RayActorError as error:
        raise MemberError(f"{who} died while starting: {error}") from error


def _alive(actor: Any) -> bool:
    try:
        ray.get(actor.pid.remote(), timeout=30)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return False
    return True
