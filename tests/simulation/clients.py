"""Trainers and operators: who push, ask again when they hear nothing, roll back, add and remove."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import xxhash

from weight_update.errors import BusyError, WeightUpdateError
from weight_update.messages import MemberId

from . import checks
from .ranks import MANIFEST, NUM_TENSORS, SPECS, SimRank, shard, whole_digests
from .world import World

PATIENCE_S = 8.0  # without an answer, a client asks again
LEASE_S = 10.0
RESEND_S = 2.0
MAX_TRIES = 4
MAX_WAITS = 5  # for somebody else's transaction to end
MAX_BEGUN = 3

Service = tuple[int, frozenset[tuple[int, str]]]  # epoch of the coordinator; replicas, and the keys of their processes


class Client:
    """A process that asks the coordinator, again where no answer comes."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.alive = world, name, True

    def __str__(self) -> str:
        return self.name.split("-")[0]

    def ask(
        self, op: str, args: dict[str, Any], done: Callable[[Any, WeightUpdateError | None], None], tries: int = 1
    ) -> None:
        """done(result, None), done(None, error), or done(None, None) where no answer comes."""
        over: list[bool] = []

        def answered(result: object, error: WeightUpdateError | None) -> None:
            if not over:
                over.append(True)
                done(result, error)

        def send() -> None:
            host = self.world.host
            self.world.send(self, host, host.request, self, op, args, answered, name=op)

        def again(left: int) -> None:
            if over:
                return
            if left:
                send()
                self.world.after(
                    PATIENCE_S * (5 if op == "decide" else 1), self, again, left - 1, name="patience", is_event=False
                )
            else:
                answered(None, None)

        again(tries)


class Trainer(Client):
    """Pushes once: all tensors or some, on the version that it knows."""

    def __init__(self, world: World, push_id: str, tensors: list[int]) -> None:
        super().__init__(world, f"trainer-{push_id}")
        self.push_id, self.tensors = push_id, tensors
        self.content = world.new_content()
        self.version: int | None = None
        self.error: WeightUpdateError | None = None
        self.transaction = self.num_begun = 0
        self.met: Service = (0, frozenset())
        self.unacked: set[tuple[MemberId, int]] = set()
        self.ended = False
        self.waits = 0
        world.pushed[push_id] = {i: self.content[i] for i in tensors}

    def begin(self) -> None:
        self.num_begun += 1
        self.ask("begin", self._begin_args(), self._begun, tries=MAX_TRIES)  # replicas that come in are waited for

    def _begin_args(self) -> dict[str, Any]:
        return {
            "push_id": self.push_id,
            "base_version": 0,
            "fingerprint": MANIFEST.fingerprint,
            "tensors": [SPECS[i] for i in self.tensors],
            "pushed_by": self.name,
            "logical_bytes": 8,
            "lease_s": LEASE_S,
        }

    def _begun(self, result: Any, error: WeightUpdateError | None) -> None:
        if isinstance(error, BusyError) and self.waits < MAX_WAITS:
            self.waits += 1
            self.world.after(PATIENCE_S, self, self.begin, name="wait", is_event=False)
            return None
        if result is None or result["already_committed"]:
            return self.end(result["version"] if result else None, error)
        self.transaction = result["transaction"]
        open_ = self.world.host.protocol.transaction
        members = open_.members if open_ is not None and open_.id == self.transaction else ()
        self.met = self._service({member.replica for member in members})
        self.unacked = {(member, position) for member in members for position in range(len(self.tensors))}
        return self._stream(0) if self.unacked else self._give_up()

    def _stream(self, round: int) -> None:
        """Send what has not been acknowledged, until all is."""
        if round > MAX_TRIES:
            return self._give_up()
        for member, position in sorted(self.unacked):
            rank = self.world.ranks.get(member)
            if rank is not None:
                self._send_chunk(rank, member, position)
        self.world.after(RESEND_S, self, self._resend, round, name="resend", is_event=False)

    def _resend(self, round: int) -> None:
        if self.unacked and not self.ended:
            self._stream(round + 1)

    def _send_chunk(self, rank: SimRank, member: MemberId, position: int) -> None:
        world, i, transaction = self.world, self.tensors[position], self.transaction
        payload = shard(self.content, member.rank, world.num_ranks)[i]
        checksum = xxhash.xxh3_64_intdigest(payload)
        damaged = world.faults.damages(world, payload)

        def stage() -> None:
            try:
                rank.stage(transaction, i, damaged, checksum)
            except WeightUpdateError:
                return
            world.send(rank, self, self._acknowledged, transaction, member, position, name="ack")

        world.send(self, rank, stage, name="chunk")

    def _acknowledged(self, transaction: int, member: MemberId, position: int) -> None:
        if transaction == self.transaction and (member, position) in self.unacked:
            self.unacked.discard((member, position))
            if not self.unacked and not self.ended:
                digests = whole_digests(self.content)[self.tensors]
                args = {"transaction": self.transaction, "digests": digests, "wire_bytes": 8}
                self.ask("prepare", args, partial(self._prepared, transaction), tries=2)

    def _prepared(self, transaction: int, result: Any, error: WeightUpdateError | None) -> None:
        if transaction != self.transaction:
            return None
        if result is None:
            return self._give_up()
        return self.ask("decide", {"transaction": self.transaction}, self._decided)

    def _decided(self, result: Any, error: WeightUpdateError | None) -> None:
        if result is not None:
            return self.end(result["version"], None)
        # Whether it was decided is not known to who hears nothing: asked by id, which begins nothing anew that is over.
        self.ask("begin", self._begin_args(), self._asked, tries=MAX_TRIES)

    def _asked(self, result: Any, error: WeightUpdateError | None) -> None:
        known = result is not None and result["already_committed"]
        if known:
            return self.end(result["version"], None)
        if result is not None:
            self.transaction = result["transaction"]  # that the question opened, where the push was over
        return self._give_up()

    def _service(self, replicas: Iterable[int]) -> Service:
        host = self.world.host
        held = host.protocol.membership.replicas
        return host.epoch, frozenset((number, held[number].key) for number in replicas)

    def _give_up(self) -> None:
        """Begin anew where another coordinator came meanwhile, which knows nothing of this push, or replicas did."""
        changed = self.met != self._service(self.world.host.protocol.membership.serving())
        transaction, anew = self.transaction, changed and self.num_begun < MAX_BEGUN and not self.ended
        if not transaction:
            return self.end(None, None)
        args = {"transaction": transaction, "reason": "gave up"}
        if not anew:
            self.ask("abort", args, lambda result, error: None)
            return self.end(None, None)
        self.transaction, self.waits = 0, 0
        return self.ask("abort", args, lambda result, error: self.begin())

    def end(self, version: int | None, error: WeightUpdateError | None) -> None:
        if self.ended:
            return
        self.ended, self.version, self.error = True, version, error
        checks.check_outcome(self.world, self.push_id, version)


class Operator(Client):
    """Asks for one thing at some time."""

    def __init__(self, world: World, op: str, **args: Any) -> None:
        super().__init__(world, f"operator-{op}")
        self.op, self.args = op, args
        self.result: Any = None
        self.error: WeightUpdateError | None = None
        self.ended = False

    def go(self) -> None:
        self.ask(self.op, self.args, self._done, tries=2)

    def _done(self, result: Any, error: WeightUpdateError | None) -> None:
        self.result, self.error, self.ended = result, error, True


def everything() -> list[int]:
    """The scope of a full push."""
    return list(range(NUM_TENSORS))
