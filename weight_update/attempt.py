"""One push on its way: begin, streams, prepare, decide, and what became of it.

Every trainer rank has one; what only the coordinator is told, the first rank tells it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist

from protos import transfuse_pb2 as pb
from sharding.cost import Work
from sharding.routes import Destination, chains

from .base import Changes, Whole
from .delta import DeltaPlan
from .device_base import FormChanges
from .device_rings import DEVICE_RING_BYTES
from .errors import BusyError, TransferError, WeightUpdateError
from .groups import Groups
from .links import CUDA_IPC, GRPC, NCCL, ON_DEVICE, SHARED_MEMORY, Link, choose, here
from .manifest import Manifest
from .membership import key_of
from .messages import MemberId
from .ranks import Ranks
from .report import Clock
from .rings import RING_BYTES
from .sending import Packed, Streams, announced, destinations_of, pack_for, send_packed, send_whole
from .source import PushPlan
from .stream import StageStream
from .transport import ControlClient
from .values import from_place_proto, to_delta_proto

log = logging.getLogger(__name__)

BUSY_POLL_S = 0.2
OUTCOME_POLL_S = 0.5
MAX_BEGUN = 5  # a fleet whose replicas come and go all the time fails the push in the end
RENEW_RETRY_S = 1.0  # after a renewal that was not heard
END_S = 1.0  # for the thread that renews to end: one that outlives the trainer's main thread can abort its process
RING_OF = {CUDA_IPC: DEVICE_RING_BYTES, NCCL: DEVICE_RING_BYTES, SHARED_MEMORY: RING_BYTES}

Progress = Callable[[str, int, int], None]


@dataclass(kw_only=True, eq=False)
class Attempt:
    """All that one push needs once its bytes are settled. ranks: over which the trainer ranks agree meanwhile."""

    control: ControlClient
    ranks: Ranks
    described: pb.DescribeReply
    manifest: Manifest
    plan: PushPlan
    content: Whole | Changes | FormChanges
    work: Work
    reason: str
    clock: Clock
    push_id: str
    base_version: int
    step: int
    durable: bool
    on_busy: str
    fans_out: bool  # ranks pass on what they get
    lease_s: float
    retry_s: float
    pushed_by: str
    transports: Sequence[str]  # that may be used
    channel: Callable[[str], Any]
    groups: Groups
    on_progress: Progress
    unknown: bool = False  # the commit was asked for, and whether it happened is not known
    num_begun: int = 0
    num_changed: int = 0
    links: list[str] = field(default_factory=list)  # how the bytes went, of all trainer ranks
    _to: list[Destination] = field(default_factory=list)  # of what is begun, and the way to every rank
    _ways: list[Link] = field(default_factory=list)
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _deciding: bool = False
    _passing: bool = False
    _streams: Streams | None = None
    _packed: list[Packed] = field(default_factory=list)

    def cancel(self) -> None:
        """Give up, unless the commit was asked for; from any thread."""
        self._cancelled.set()
        streams = self._streams
        if streams is not None and not self._deciding:
            streams.cancel()

    # -- the steps

    def begin(self) -> pb.BeginReply:
        """Open the transaction; where another is open, do as on_busy says."""
        self._deciding, self.num_begun = False, self.num_begun + 1
        self._to, self._ways = destinations_of(self.described.ranks), self._links()
        delta, self._passing = self._delta(), self.fans_out and self._passes_on()
        reply = pb.BeginReply.FromString(self.ranks.from_first(lambda: self._begin(delta).SerializeToString()))
        self.clock.stop("begin")
        return reply

    def meets_another_service(self, described: pb.DescribeReply) -> bool:
        """Whether what failed has a chance now: another coordinator came, which knows nothing of the transaction, or a
        replica came or went."""
        known = self.described
        if described.fingerprint != known.fingerprint or self.num_begun >= MAX_BEGUN:
            return False
        return described.epoch != known.epoch or keys_of(described) != keys_of(known)

    def transfer(self, begun: pb.BeginReply) -> int:
        """Stream this rank's bytes; returns the wire bytes of all trainer ranks. Every rank has prepared then."""
        failure: WeightUpdateError | None = None
        sent = 0
        try:
            sent = self._transfer(begun)
        except WeightUpdateError as error:
            failure = error
        ways = [] if self._streams is None else self._streams.ways
        everywhere = self.ranks.gather((failure, ways))
        for each, _ in everywhere:
            if each is not None:
                raise each
        self.links = [f"trainer {i} to {way}" for i, (_, ways) in enumerate(everywhere) for way in ways]
        if self.ranks.rank == 0:
            log.info("push %s: %s", self.push_id, ", ".join(self.links))
        self._packed = []
        self.clock.stop("transfer")
        digests = self.ranks.reduce(self.content.digests, dist.ReduceOp.SUM)
        wire_bytes = int(self.ranks.reduce(np.array([sent], np.int64), dist.ReduceOp.SUM)[0])
        self.ranks.from_first(
            lambda: self.control.prepare(begun.transaction, digests, wire_bytes, retry_s=self.retry_s)
        )
        self.clock.stop("prepare")
        return wire_bytes

    def decide(self, begun: pb.BeginReply) -> pb.DecideReply:
        """Ask for the commit. An answer that got lost is asked for by the id of the push."""
        reply, self.unknown, error = self.ranks.gather(self._decide(begun.transaction))[0]
        self.clock.stop("commit")
        if error is not None:
            raise error
        return pb.DecideReply.FromString(reply)

    def wait_durable(self, version: int) -> None:
        """Return once the committed version is stored; a coordinator that is away meanwhile is waited for."""
        self.ranks.from_first(lambda: self._wait_durable(version))

    def _wait_durable(self, version: int) -> None:
        deadline_s = time.monotonic() + self.retry_s
        while True:
            try:
                return self.control.wait_durable(version)
            except TransferError as error:
                if time.monotonic() > deadline_s:
                    raise
                log.info("version %d is committed, waiting for the store: %s", version, error)
                time.sleep(OUTCOME_POLL_S)

    def abort(self, transaction: int, error: BaseException) -> None:
        """Tell the service to give up; where it cannot be told, the lease does it."""
        if self.ranks.rank != 0 or self.unknown:
            return
        try:
            self.control.abort(transaction, f"{type(error).__name__}: {error}"[:1000])
        except WeightUpdateError as unheard:
            log.info("abort of transaction %d: %s", transaction, unheard)

    def info(self) -> pb.VersionInfo | None:
        """The version that this push became, None where it became none."""

        def found() -> bytes | None:
            info = next((each for each in self.control.versions() if each.push_id == self.push_id), None)
            return None if info is None else info.SerializeToString()

        data = self.ranks.from_first(found)
        return None if data is None else pb.VersionInfo.FromString(data)

    # -- begin

    def _delta(self) -> DeltaPlan | None:
        """Pack the changes; what every rank gets, from all trainer ranks."""
        if isinstance(self.content, Whole):
            self.num_changed = len(self.plan.specs)
            return None
        on_device = [all(self._ways[i].transport in ON_DEVICE for i in each.ranks) for each in self._to]
        self._packed = pack_for(self.content, self._to, on_device)
        sizes = self.ranks.gather([size for _, size in self._packed])
        self.num_changed = int(self.ranks.reduce(self.content.changed, dist.ReduceOp.MAX).sum())
        return DeltaPlan(
            base_version=self.described.version,
            base_digest=self.described.digest,
            ranks=tuple(announced(self.described.ranks, self._to, sizes)),
        )

    def _begin(self, delta: DeltaPlan | None) -> pb.BeginReply:
        while True:
            try:
                return self._begin_once(delta)
            except BusyError as error:
                if self.on_busy == "error":
                    raise
                self._raise_cancelled()
                log.info("push %s: %s, %s", self.push_id, {"wait": "waiting"}.get(self.on_busy, self.on_busy), error)
                if self.on_busy == "replace":
                    self.control.abort(0, f"replaced by push {self.push_id} of {self.pushed_by}")
                time.sleep(BUSY_POLL_S)

    def _begin_once(self, delta: DeltaPlan | None) -> pb.BeginReply:
        self._raise_cancelled()
        return self.control.begin(
            push_id=self.push_id,
            base_version=self.base_version or (0 if delta is None else delta.base_version),
            fingerprint=self.manifest.fingerprint,
            tensors=self.plan.specs,
            pushed_by=self.pushed_by,
            logical_bytes=self.plan.logical_bytes,
            lease_s=self.lease_s,
            num_streams=self.ranks.world * (2 if self._passing else 1),
            step=self.step,
            keys=keys_of(self.described),
            retry_s=self.retry_s,
            **({} if delta is None else {"delta": to_delta_proto(delta)}),
        )

    # -- transfer

    def _transfer(self, begun: pb.BeginReply) -> int:
        if isinstance(self.content, Whole):
            total = self.plan.columns.num_bytes
        else:
            total = sum(size.num_bytes for _, size in self._packed)
        with self._open_streams(begun, total) as self._streams:
            self._raise_cancelled()
            if isinstance(self.content, Whole):
                send_whole(self.content, self._streams.doors, self._counted(total))
            else:
                send_packed(self._packed, self.ranks.rank, self._streams.doors, self._counted(total))
        return self._streams.wire_bytes

    def _open_streams(self, begun: pb.BeginReply, total_bytes: int) -> Streams:
        """One to every rank, or to the first of a chain."""
        opened = [[self._stream(begun, chain, total_bytes) for chain in each] for each in self._chains()]
        return Streams(self._to, opened)

    def _chains(self) -> list[list[tuple[int, ...]]]:
        """Of each destination; ranks that are not reached over a network are in none with others."""
        ranks = self.described.ranks
        over_network = [i for i, link in enumerate(self._ways) if self.fans_out and link.transport == GRPC]
        hosts = {i: ranks[i].place.host or ranks[i].address for i in over_network}
        return [chains(each, hosts) for each in self._to]

    def _passes_on(self) -> bool:
        """Whether ranks have a chain from any trainer rank: a stream out beside the one in."""
        return any(self.ranks.gather(any(len(chain) > 1 for each in self._chains() for chain in each)))

    def _stream(self, begun: pb.BeginReply, chain: Sequence[int], total_bytes: int) -> StageStream:
        (rank, *others), link = [self.described.ranks[i] for i in chain], self._ways[chain[0]]
        return StageStream(
            self.channel(rank.address),
            target=rank.address,
            name=f"{rank.replica}.{rank.rank}",
            transaction=begun.transaction,
            epoch=self.described.epoch,
            trainer_rank=self.ranks.rank,
            retry_s=self.retry_s,
            ticket=begun.ticket,
            link=link,
            device=self.content.device,
            groups=self.groups,
            ring_bytes=min(RING_OF.get(link.transport, 0), 2 * total_bytes),
            onward=[pb.RankSpec(replica=r.replica, rank=r.rank, address=r.address, place=r.place) for r in others],
        )

    def _links(self) -> list[Link]:
        """The way to every rank, from where what is sent lies."""
        ours = here(self.content.device)
        ranks = self.described.ranks
        return [choose(ours, from_place_proto(rank.place), self.transports, rank.address) for rank in ranks]

    def _counted(self, total: int) -> Callable[[int], None]:
        done = 0

        def sent(num_bytes: int) -> None:
            nonlocal done
            done += num_bytes
            self.on_progress("transfer", done, total)

        return sent

    def _raise_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise TransferError(f"push {self.push_id}: was cancelled; nothing was changed")

    # -- decide

    def _decide(self, transaction: int) -> tuple[bytes, bool, WeightUpdateError | None]:
        """(reply, whether the outcome is not known, error) on the first rank."""
        if self.ranks.rank != 0:
            return b"", False, None
        try:
            self._raise_cancelled()
            self.control.wait_ready(self.retry_s)
            self._deciding = True
            return self.control.decide(transaction, durable=self.durable).SerializeToString(), False, None
        except WeightUpdateError as error:
            if not self._deciding:
                return b"", False, error
            return self._outcome(transaction, error)

    def _outcome(self, transaction: int, error: WeightUpdateError) -> tuple[bytes, bool, WeightUpdateError | None]:
        """Whether a commit that was asked for happened: the service knows the id of the push, or works on it, or does
        neither. error: why the answer to it is not there."""
        deadline_s = time.monotonic() + self.retry_s
        while True:
            try:
                working = self.control.status().transaction == transaction
                info = next((each for each in self.control.versions() if each.push_id == self.push_id), None)
                if info is not None:
                    return pb.DecideReply(version=info, digest_verified=True).SerializeToString(), False, None
                if not working:
                    return b"", False, error
            except WeightUpdateError as unheard:
                log.info("push %s: %s", self.push_id, unheard)
            if time.monotonic() > deadline_s:
                told = f"push {self.push_id}: its outcome is not known ({error}); the next push finds out"
                return b"", True, TransferError(told)
            time.sleep(OUTCOME_POLL_S)


def keys_of(described: pb.DescribeReply) -> list[str]:
    """What tells the processes of each described replica from those before them."""
    addresses = {MemberId(replica=rank.replica, rank=rank.rank): rank.address for rank in described.ranks}
    return [key_of(addresses, replica) for replica in sorted({rank.replica for rank in described.ranks})]


class Lease:
    """Renews the lease of an open push from the first trainer rank while the block runs."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def __enter__(self) -> None:
        if self._attempt.ranks.rank == 0:
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._attempt.ranks.rank == 0:
            self._thread.join(END_S)

    def _run(self) -> None:
        attempt = self._attempt
        pause_s = attempt.lease_s / 3
        while not self._stopped.wait(pause_s):
            try:
                attempt.control.begin(push_id=attempt.push_id, tensors=(), pushed_by=attempt.pushed_by)
                pause_s = attempt.lease_s / 3
            except WeightUpdateError as error:
                log.info("lease not renewed: %s", error)
                pause_s = min(RENEW_RETRY_S, attempt.lease_s / 3)
