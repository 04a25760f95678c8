"""One rank of one replica: the member's state machine over real bytes, and nothing else that a rank has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import xxhash

from quant.formats import TensorSpec
from quant.parameters import ParameterRow
from weight_update.digest import Digests
from weight_update.errors import BusyError, MemberError, TransferError, VersionError, WeightUpdateError
from weight_update.manifest import Manifest
from weight_update.member import Member
from weight_update.messages import Donor, Kept, MemberId, MemberState, Send

SHAPES = {"a": (4, 2), "b": (2, 2), "c": (4, 2)}
MANIFEST = Manifest(
    tensors=tuple(TensorSpec(name=name, dtype="BF16", shape=shape) for name, shape in SHAPES.items()),
    parameters=tuple(ParameterRow(name=name, shape=shape, format="bf16") for name, shape in SHAPES.items()),
)
SPECS = MANIFEST.tensors
NUM_TENSORS = len(SPECS)
ROW_BYTES = [spec.row_bytes for spec in SPECS]
KEPT_VERSIONS = 3

Content = tuple[bytes, ...]  # one a tensor: its rows, one after the other


@cache
def cuts(rank: int, world: int) -> list[tuple[int, int]]:
    """Of each tensor: where the rows of one rank begin and end, in bytes."""
    return [(spec.num_rows * rank // world * spec.row_bytes, spec.num_rows * (rank + 1) // world * spec.row_bytes)
            for spec in SPECS]  # fmt: skip


def shard(content: Content, rank: int, world: int) -> list[bytes]:
    """The rows of one rank."""
    return [data[first:stop] for data, (first, stop) in zip(content, cuts(rank, world), strict=True)]


def digests(rows: list[bytes], tensors: list[int], rank: int, world: int) -> Digests:
    """[n, 2]: sums of keyed hashes of rows, which add up over ranks."""
    sums = [_digest(i, rows[i], cuts(rank, world)[i][0] // ROW_BYTES[i]) for i in tensors]
    return np.array(sums, np.uint64).reshape(-1, 2)


@lru_cache(maxsize=4096)  # bytes are asked for as they are staged, installed, and read again
def _digest(tensor: int, data: bytes, first: int) -> list[int]:
    """Of some rows of one tensor, the first of which has this number."""
    size = ROW_BYTES[tensor]
    rows = enumerate((data[at : at + size] for at in range(0, len(data), size)), first)
    keyed = [(row, (tensor << 16 | number) << 1) for number, row in rows]
    return [sum(xxhash.xxh3_64_intdigest(row, key | lane) for row, key in keyed) & (1 << 64) - 1 for lane in range(2)]


def whole_digests(content: Content) -> Digests:
    """Of all tensors, as a trainer computes them."""
    return digests(list(content), list(range(NUM_TENSORS)), 0, 1)


class Answer(NamedTuple):
    """What goes back to the coordinator."""

    send: Send
    token: float
    result: object = None
    error: WeightUpdateError | None = None


@dataclass(slots=True, kw_only=True)
class Staging:
    """One transaction's bytes on this rank."""

    tensors: list[int]
    rows: dict[int, bytes]
    undo: list[bytes] | None = None


@dataclass(slots=True, kw_only=True)
class Engine:
    """What generates on a replica: its ranks stop and go on together, led by rank 0. waiting: installs that came to
    other ranks before the leader's."""

    paused: bool = False
    waiting: list[tuple[SimRank, Send]] = field(default_factory=list)


class SimRank:
    """Real bytes, the real `Member`; time and messages come from the world.

    clock_s: this rank's clock is its own.
    fetch: asks a donor for its rows, which come back through `filled`. stored: what the version store holds.
    """

    def __init__(
        self,
        id_: MemberId,
        world: int,
        loaded: Content,
        *,
        engine: Engine,
        clock_s: float,
        stored: dict[int, Content],
        fetch: Callable[[SimRank, Send], None],
        undo_is_dropped: bool = False,
    ) -> None:
        self.id, self.world, self.leads = id_, world, id_.rank == 0
        self.alive = True
        self.broken = False  # another rank of its replica is gone, and the process group with it
        self.member = Member(version=0)
        self.rows = shard(loaded, id_.rank, world)
        self.staging: Staging | None = None
        self.history: dict[int, tuple[int, list[bytes]]] = {}  # version -> what it was built on, with its bytes
        self.filling: int | None = None  # transaction whose bytes a donor gives
        self.held: Send | None = None  # a prepare that waits for them
        self.engine = engine
        self._clock_s = clock_s  # what this rank's own clock shows more than the world's
        self._stored, self._fetch, self._undo_is_dropped = stored, fetch, undo_is_dropped

    def __str__(self) -> str:
        return str(self.id)

    @property
    def state(self) -> str:
        return self.member.state

    def serves(self, now_s: float) -> bool:
        return self.alive and not self.broken and not self.engine.paused and self.member.serves(now_s + self._clock_s)

    # -- the coordinator's messages

    def receive(self, send: Send, now_s: float) -> Answer | None:
        """One step; None where the answer comes later."""
        try:
            result = self._hello(send, now_s) if send.step == "hello" else self._step(send)
        except WeightUpdateError as error:
            return Answer(send=send, token=now_s + self._clock_s, error=error)
        later = self.held is send or (self, send) in self.engine.waiting
        return None if later else Answer(send=send, token=now_s + self._clock_s, result=result)

    def _hello(self, send: Send, now_s: float) -> MemberState:
        member = self.member
        member.hello(epoch=send.epoch, round=send.round, version=send.version, token=send.token)
        return MemberState(
            state=member.state,
            transaction=member.transaction,
            version=member.version,
            serves=self.serves(now_s),
        )

    def _step(self, send: Send) -> object:
        if send.step in ("undo", "abort"):
            self.filling = self.held = None
        if send.step in ("reach", "digest"):
            return STEPS[send.step](self, send)
        due = self.member.check(
            send.step,
            epoch=send.epoch,
            transaction=send.transaction,
            version=send.version,
            round=send.round,
            token=send.token,
        )
        if not due:
            return self.member.result(send.step)
        if self.broken and send.step in ("install", "publish", "adopt"):
            raise MemberError("a peer is gone")
        if send.step == "install" and not self._pauses(send):
            return None
        if send.step == "prepare" and self.filling is not None:
            self.held = send
            return None
        return self._done(send, STEPS[send.step](self, send))

    def _pauses(self, send: Send) -> bool:
        """Whether the replica stands at a step boundary; who leads makes it, who follows waits for that."""
        if self.id.rank == 0:
            self.engine.paused = True
        if not self.engine.paused:
            self.engine.waiting.append((self, send))
        return self.engine.paused

    def _done(self, send: Send, result: object) -> object:
        return self.member.done(send.step, transaction=send.transaction, version=send.version, result=result)

    def filled(self, transaction: int, rows: list[bytes], now_s: float) -> Answer | None:
        """A donor's rows; too late where the transaction is over."""
        if self.filling != transaction:
            return None
        self.filling = None
        self._staged().rows = dict(enumerate(rows))
        held, self.held = self.held, None
        return self.receive(held, now_s) if held is not None else None

    def stage(self, transaction: int, tensor: int, payload: bytes, checksum: int) -> None:
        """A chunk: all rows of one tensor that this rank holds."""
        staging = self.staging
        if staging is None or (self.member.state, self.member.transaction) != ("open", transaction):
            raise BusyError(f"{self}: {self.member.state} in {self.member.transaction}, the chunk is for {transaction}")
        if xxhash.xxh3_64_intdigest(payload) != checksum:
            raise TransferError("damaged on the way")
        staging.rows[tensor] = payload

    # -- the steps

    def _reach(self, send: Send) -> tuple[int, ...]:
        self.member.follow("reach", send.epoch)
        return (*self._reachable(), *self._stored)

    def _reachable(self) -> dict[int, list[bytes]]:
        found, at = {}, self.member.version
        while at in self.history:
            at, rows = self.history[at]
            found[at] = rows
        return found

    def _digest(self, send: Send) -> Digests:
        self.member.follow("digest", send.epoch)
        return digests(self.rows, list(range(NUM_TENSORS)), self.id.rank, self.world)

    def _open(self, send: Send) -> int:
        assert send.tensors is not None
        if send.base_version and send.base_version != self.member.version:
            raise VersionError(f"{self} holds {self.member.version}, the base is {send.base_version}")
        tensors = send.tensors.tolist()
        if isinstance(send.source, Donor):
            self.filling = send.transaction
            self._fetch(self, send)
        rows: dict[int, bytes] = {}
        if isinstance(send.source, Kept):
            version, kept = send.source.version, self._reachable()
            if version not in kept and version not in self._stored:
                raise VersionError(f"version {version} is not kept")
            old = kept.get(version) or shard(self._stored[version], self.id.rank, self.world)
            rows = {i: old[i] for i in tensors}
        self.staging = Staging(tensors=tensors, rows=rows)
        return 100

    def _staged(self) -> Staging:
        assert self.staging is not None
        return self.staging

    def _prepare(self, send: Send) -> Digests:
        staging = self._staged()
        missing = [i for i in staging.tensors if i not in staging.rows]
        if missing:
            raise TransferError(f"{missing} have not arrived")
        staging.undo = list(self.rows)
        rows = [staging.rows.get(i, b"") for i in range(NUM_TENSORS)]
        return digests(rows, staging.tensors, self.id.rank, self.world)

    def _install(self, send: Send) -> Digests:
        staging = self._staged()
        for i in staging.tensors:
            self.rows[i] = staging.rows[i]
        if self._undo_is_dropped:
            staging.undo = None
        return digests(self.rows, staging.tensors, self.id.rank, self.world)

    def _confirm(self, send: Send) -> None:
        pass

    def _publish(self, send: Send) -> None:
        if self.member.state == "installed":
            undo = self._staged().undo
            if undo is not None and 0 < self.member.version < send.version:
                self.history[send.version] = self.member.version, undo
            for version in sorted(self.history)[:-KEPT_VERSIONS]:
                del self.history[version]
        self.staging = None
        self._resume()

    def _undo(self, send: Send) -> None:
        if self.member.state == "installed" and self._staged().undo is not None:
            self.rows = list(self._staged().undo or ())

    def _abort(self, send: Send) -> None:
        self._undo(send)
        self.staging = None
        self._resume()

    def _resume(self) -> None:
        if self.id.rank == 0:
            self.engine.paused = False


STEPS: dict[str, Callable[[SimRank, Send], object]] = {
    "reach": SimRank._reach,
    "digest": SimRank._digest,
    "open": SimRank._open,
    "prepare": SimRank._prepare,
    "install": SimRank._install,
    "confirm": SimRank._confirm,
    "publish": SimRank._publish,
    "adopt": SimRank._publish,
    "undo": SimRank._undo,
    "abort": SimRank._abort,
}
