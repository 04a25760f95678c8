"""The trainer's side: one call that puts a model's weights into every running actor.

    from weight_update.client import Pusher

    report = Pusher("host:port").push(model, scope="all")

On several trainer ranks (torch.distributed) every rank calls `push` with its own shards; each streams its rows
straight to the ranks that own them, and all return the same report. Nothing is gathered and no second copy of the
model is made.
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from protos import transfuse_pb2 as pb
from quant.formats import NON_FINITE
from quant.names import IDENTITY, NameMap
from sharding.routes import destinations

from .digest import Digests, digest_rows, name_key
from .door import Door, route
from .encoder import encoded, global_scales, largest_bits, nonfinite_index
from .errors import ManifestError, WeightUpdateError, raise_all
from .manifest import Manifest
from .ranks import Ranks
from .source import Items, PushPlan, Scope, check_finite, plan_push
from .transport import ControlClient, StageStream, connect, from_manifest_proto

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What a push did. Bytes and seconds are over all trainer ranks; `wire_bytes` counts each replica's copy.

    phases: seconds of describe, plan, begin, transfer, prepare, commit. carried_over: parameters outside the scope.
    widened: parameters that were added to the scope because their fused group was cut.
    digest_verified: every rank's installed digest equalled the trainer's.
    """

    version: int
    base_version: int
    digest: str
    logical_bytes: int
    wire_bytes: int
    seconds: float
    phases: dict[str, float]
    pause_s: float
    planned_bytes: int
    replicas: list[str]
    digest_verified: bool
    carried_over: int
    widened: list[str] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)


class Pusher:
    """Pushes weights to a Transfuse service.

    target: host:port of the coordinator. group: the trainer's process group (default: the default group, when there is
    one). names: from the trainer's names to the service's (quant.name_maps), for tensors that are named or packed
    otherwise, such as q, k and v in one. lease_s: how long the service keeps an open push whose trainer went silent.
    on_progress: called with (phase, bytes done, bytes in all). Errors: see weight_update.errors; whatever is raised,
    the service serves the old version unchanged.
    """

    def __init__(
        self,
        target: str,
        *,
        group: dist.ProcessGroup | None = None,
        names: NameMap = IDENTITY,
        lease_s: float = 60.0,
        retry_s: float = 30.0,
        pushed_by: str | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self._control = ControlClient(target)
        self._ranks = Ranks(group)
        self._names = names
        self._lease_s = lease_s
        self._retry_s = retry_s
        self._pushed_by = pushed_by or f"{_user()}@{socket.gethostname()} pid {os.getpid()}"
        self._on_progress = on_progress or (lambda phase, done, total: None)
        self._channels: dict[str, Any] = {}
        self._manifest: Manifest | None = None

    def push(
        self, model: Items, scope: Scope = "all", *, base_version: int | None = None, push_id: str | None = None
    ) -> PushReport:
        """Push a model's weights as the next version; returns once every replica serves it, or raises with nothing
        changed.

        model: nn.Module (FSDP2-sharded or not, on any device), for a pipeline a mapping from component to module, or an
        iterable of (name, tensor or DTensor). FP32 and FP16 weights are cast to BF16, ties to even. scope: "all" (every
        parameter of the service must be there), "trainable", or name patterns; widened to whole fused groups, the rest
        is carried over. base_version: refuse unless it is current. push_id: pushing the same id again returns the first
        outcome instead of a second version.
        """
        clock = _Clock()
        described = self._describe()
        manifest = self._manifest_of(described)
        clock.stop("describe")
        plan = self._plan(manifest, model, scope)
        scales = self._scales(plan)
        clock.stop("plan")
        chosen_id = self._ranks.from_first(lambda: push_id or uuid.uuid4().hex)
        begun = self._begin(manifest, plan, base_version or 0, chosen_id)
        clock.stop("begin")
        if begun.already_committed:
            return self._known(plan, clock, begun.version)
        with _Lease(self, chosen_id):
            try:
                wire_bytes, decided = self._carry_out(described, manifest, plan, scales, begun, clock)
            except BaseException as error:
                self._abort(begun.transaction, error)
                raise
        return _report(plan, begun, decided, wire_bytes, clock)

    def close(self) -> None:
        """Close all connections."""
        self._control.close()
        for channel in self._channels.values():
            channel.close()

    # -- steps

    def _describe(self) -> pb.DescribeReply:
        known = self._manifest.fingerprint if self._manifest else 0
        data = self._ranks.from_first(lambda: self._control.describe(known).SerializeToString())
        return pb.DescribeReply.FromString(data)

    def _manifest_of(self, described: pb.DescribeReply) -> Manifest:
        if self._manifest is None or self._manifest.fingerprint != described.fingerprint:
            self._manifest = from_manifest_proto(described.manifest)
        return self._manifest

    def _plan(self, manifest: Manifest, model: Items, scope: Scope) -> PushPlan:
        plan, problems = plan_push(manifest, model, scope, is_first_rank=self._ranks.rank == 0, names=self._names)
        everywhere = list(dict.fromkeys(problem for each in self._ranks.gather(problems) for problem in each))
        raise_all(ManifestError, "push refused", everywhere)
        assert plan is not None
        return plan

    def _scales(self, plan: PushPlan) -> dict[str, Tensor]:
        """The global scale of every source to encode: one amax a fused group, over all trainer ranks. Refuses NaN and
        Inf."""
        bits = np.zeros(len(plan.sources), np.int64)
        where: dict[str, tuple[int, ...]] = {}
        for i, source in enumerate(plan.sources):
            bits[i] = largest_bits(source)
            if bits[i] >= NON_FINITE:
                where[source.name] = nonfinite_index(source)
        bits = self._ranks.reduce(bits, dist.ReduceOp.MAX)
        check_finite(plan, bits, where)
        pairs = zip(plan.sources, bits.tolist(), strict=True)
        return global_scales((source.parameter, value) for source, value in pairs if source.kind == "encode")

    def _begin(self, manifest: Manifest, plan: PushPlan, base_version: int, push_id: str) -> pb.BeginReply:
        def begin() -> bytes:
            return self._control.begin(
                push_id=push_id,
                base_version=base_version,
                fingerprint=manifest.fingerprint,
                tensors=plan.specs,
                pushed_by=self._pushed_by,
                logical_bytes=plan.logical_bytes,
                lease_s=self._lease_s,
                num_streams=self._ranks.world,
            ).SerializeToString()

        return pb.BeginReply.FromString(self._ranks.from_first(begin))

    def _carry_out(
        self,
        described: pb.DescribeReply,
        manifest: Manifest,
        plan: PushPlan,
        scales: dict[str, Tensor],
        begun: pb.BeginReply,
        clock: _Clock,
    ) -> tuple[int, pb.DecideReply]:
        failure: WeightUpdateError | None = None
        sent, digests = 0, np.zeros((len(plan.specs), 2), np.uint64)
        try:
            sent, digests = self._transfer(described, manifest, plan, scales, begun)
        except WeightUpdateError as error:
            failure = error
        for each in self._ranks.gather(failure):
            if each is not None:
                raise each
        clock.stop("transfer")
        digests = self._ranks.reduce(digests, dist.ReduceOp.SUM)
        wire_bytes = int(self._ranks.reduce(np.array([sent], np.int64), dist.ReduceOp.SUM)[0])
        self._ranks.from_first(lambda: self._control.prepare(begun.transaction, digests, wire_bytes))
        clock.stop("prepare")
        decided = self._ranks.from_first(lambda: self._control.decide(begun.transaction).SerializeToString())
        clock.stop("commit")
        return wire_bytes, pb.DecideReply.FromString(decided)

    def _transfer(
        self,
        described: pb.DescribeReply,
        manifest: Manifest,
        plan: PushPlan,
        scales: dict[str, Tensor],
        begun: pb.BeginReply,
    ) -> tuple[int, Digests]:
        """Encode and stream this rank's rows; returns the wire bytes and the digests of what was sent."""
        streams = [
            StageStream(
                self._channel(rank.address),
                target=rank.address,
                transaction=begun.transaction,
                epoch=described.epoch,
                trainer_rank=self._ranks.rank,
                retry_s=self._retry_s,
            )
            for rank in described.ranks
        ]
        starts = [np.array(rank.row_start, np.int64) for rank in described.ranks]
        stops = [np.array(rank.row_stop, np.int64) for rank in described.ranks]
        doors = [Door(each, [streams[i] for i in each.ranks]) for each in destinations(starts, stops)]
        try:
            digests = self._send(manifest, plan, scales, doors)
            for stream in streams:
                stream.finish()
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return sum(stream.wire_bytes for stream in streams), digests

    def _send(self, manifest: Manifest, plan: PushPlan, scales: dict[str, Tensor], doors: Sequence[Door]) -> Digests:
        digests = np.zeros((len(plan.specs), 2), np.uint64)
        positions = {spec.name: i for i, spec in enumerate(plan.specs)}
        done = 0
        for source in plan.sources:
            for spec, first, data in encoded(source, scales.get(source.name)):
                position = positions[spec.name]
                digests[position] += np.array(digest_rows(name_key(spec.name), data, first), np.uint64)
                index = manifest.index[spec.name]
                for door in doors:
                    route(door, position, index, spec, first, data)
            done += 2 * source.rows.numel()
            self._on_progress("transfer", done, plan.logical_bytes)
        for door in doors:
            door.flush()
        return digests

    def _channel(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = connect(address)
        return self._channels[address]

    def _abort(self, transaction: int, error: BaseException) -> None:
        """Tell the service to give up; where it cannot be told, the lease does it."""
        if self._ranks.rank != 0:
            return
        try:
            self._control.abort(transaction, f"{type(error).__name__}: {error}"[:1000])
        except WeightUpdateError as unheard:
            log.info("abort of transaction %d: %s", transaction, unheard)

    def _known(self, plan: PushPlan, clock: _Clock, version: int) -> PushReport:
        """The report of a push id that was committed before."""
        info = next(info for info in self._control.versions() if info.version == version)
        decided = pb.DecideReply(version=info, digest_verified=True)
        return _report(plan, pb.BeginReply(version=version), decided, info.wire_bytes, clock)


class _Lease:
    """Renews the lease of an open push from the first trainer rank while the block runs."""

    def __init__(self, pusher: Pusher, push_id: str) -> None:
        self._pusher, self._push_id = pusher, push_id
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> None:
        if self._pusher._ranks.rank == 0:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def _run(self) -> None:
        fields = {"push_id": self._push_id, "tensors": (), "pushed_by": self._pusher._pushed_by}
        while not self._stopped.wait(self._pusher._lease_s / 3):
            try:
                self._pusher._control.begin(**fields)
            except WeightUpdateError as error:
                log.info("lease not renewed: %s", error)


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def stop(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        return self._last - self._start


def _report(
    plan: PushPlan, begun: pb.BeginReply, decided: pb.DecideReply, wire_bytes: int, clock: _Clock
) -> PushReport:
    timings = [
        {field.name: getattr(timing, field.name) for field in pb.RankTiming.DESCRIPTOR.fields}
        for timing in decided.timings
    ]
    return PushReport(
        version=decided.version.version,
        base_version=decided.version.base_version,
        digest=decided.version.digest,
        logical_bytes=plan.logical_bytes,
        wire_bytes=wire_bytes,
        seconds=clock.seconds,
        phases=clock.phases,
        pause_s=decided.version.pause_s,
        planned_bytes=begun.planned_bytes,
        replicas=list(decided.replicas),
        digest_verified=decided.digest_verified,
        carried_over=plan.carried_over,
        widened=list(plan.widened),
        timings=timings,
    )


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return f"uid {os.getuid()}"
