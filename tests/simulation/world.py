"""Network, clock and processes: one event after another, in an order that a seed decides.

Every delivery passes `faults`, which may drop, double, delay or damage it, or kill the process that it goes to. After
every event `checks` look at the whole world.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from weight_update.digest import total
from weight_update.errors import MemberError, TransferError, WeightUpdateError
from weight_update.messages import (
    Decision,
    Dismiss,
    MemberId,
    MemberReply,
    Notify,
    Persist,
    Persisted,
    Reply,
    Request,
    Send,
    SetTimer,
    Tick,
    Timeout,
)
from weight_update.protocol import Coordinator
from weight_update.transaction import Phase

from . import checks
from .disk import Disk, Superseded
from .ranks import MANIFEST, Answer, Content, Engine, SimRank, shard, whole_digests

TICK_S = 2.0
STEP_TIMEOUT_S = 6.0
ONE_WAY_ATTEMPTS = 3
LATENCY_S = (0.001, 0.08)

OnReply = Callable[[object, WeightUpdateError | None], None]


class Node(Protocol):
    """A process: what is sent to it is lost once it is dead."""

    alive: bool


@dataclass(slots=True)
class Process:
    """A process without a state of its own here: a trainer, an operator, the outside."""

    name: str
    alive: bool = True

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Bugs:
    """Planted defects, each of which the simulation must find."""

    decides_early: bool = False  # not all members have installed
    lease_is_not_fenced: bool = False  # nobody waits until a fenced replica serves no more
    undo_is_dropped: bool = False  # before the decision
    epoch_is_ignored: bool = False  # by members and by the disk


class Host:
    """A coordinator's process: the shell around the state machine."""

    def __init__(self, world: World) -> None:
        self.world, self.alive = world, True
        disk = world.disk
        self.epoch = disk.open()
        last = disk.decisions[-1]
        self.protocol = world.make_coordinator(
            members=disk.members,
            manifest=MANIFEST,
            version=last.version,
            digests=last.digests,
            epoch=self.epoch,
            now_s=world.now_s,
            committed={each.push_id: each.version for each in disk.decisions},
            decided={each.transaction: each.version for each in disk.decisions if each.transaction},
            min_replicas=world.min_replicas,
            keys=disk.keys,
            dismissed=disk.dismissed,
        )
        self.calls: dict[int, tuple[Node, OnReply]] = {}
        self.pending: dict[tuple[int, MemberId], int] = {}  # round, member -> attempts
        self.timers: dict[str, int] = {}
        self.world.after(0.0, self, self.tick, name="tick")

    def __str__(self) -> str:
        return "coordinator"

    @property
    def state(self) -> str:
        return self.protocol.phase.value

    def tick(self) -> None:
        try:
            self.world.disk.require(self.epoch)
        except Superseded:
            self.alive = False
            return
        self.feed(Tick(now_s=self.world.now_s))
        self.world.after(TICK_S, self, self.tick, name="tick")

    def request(self, caller: Node, op: str, args: dict[str, Any], on_reply: OnReply) -> None:
        id_ = self.world.next_number()
        self.calls[id_] = caller, on_reply
        if op in ("rollback", "reset"):
            args = args | {"digests": whole_digests(self.world.disk.contents[args["version"]])}
        self.feed(Request(id=id_, op=op, now_s=self.world.now_s, args=args))

    def feed(self, event: Any) -> None:
        for action in self.protocol.handle(event):
            ACTIONS[type(action)](self, action)
            if not self.alive:
                return

    def _send(self, send: Send) -> None:
        self.pending[send.round, send.member] = 1
        self._deliver(send, self.world.ranks.get(send.member))

    def _deliver(self, send: Send, rank: SimRank | None) -> None:
        """To the process that had this address when the step began, and to none that came after it."""
        world = self.world
        if rank is not None:
            world.send(self, rank, world.serve_step, self, rank, send, name=send.step)
        world.after(STEP_TIMEOUT_S, self, self._unanswered, send, rank, name="timeout", is_event=False)

    def _unanswered(self, send: Send, rank: SimRank | None) -> None:
        attempts = self.pending.get((send.round, send.member))
        if attempts is None:
            return
        if send.step in ("publish", "undo", "abort") and attempts < ONE_WAY_ATTEMPTS:
            self.pending[send.round, send.member] = attempts + 1
            self._deliver(send, rank)
            return
        del self.pending[send.round, send.member]
        error = TransferError(f"{send.member}: no answer to {send.step}")
        self.feed(
            MemberReply(
                member=send.member, step=send.step, round=send.round, now_s=self.world.now_s,
                token=float("-inf"), error=error,
            )
        )  # fmt: skip

    def answered(self, answer: Answer) -> None:
        send = answer.send
        if self.pending.pop((send.round, send.member), None) is None:
            return
        self.feed(
            MemberReply(
                member=send.member, step=send.step, round=send.round, now_s=self.world.now_s,
                token=answer.token, result=answer.result, error=answer.error,
            )
        )  # fmt: skip

    def _reply(self, reply: Reply) -> None:
        caller, on_reply = self.calls.pop(reply.id)
        self.world.send(self, caller, on_reply, reply.result, reply.error, name="reply")

    def _persist(self, persist: Persist) -> None:
        world, decision = self.world, persist.decision
        torn = world.faults.tears_write(world, self)
        error = None
        try:
            if torn is None or torn:
                self._write(decision)
        except Superseded:
            self.alive = False
            return
        except MemberError as failure:
            error = failure
        if torn is not None:  # dies in the write: the record is there, or it is not
            world.kill(self)
            return
        world.after(
            0.002, self, self.feed,
            Persisted(transaction=decision.transaction, now_s=world.now_s, error=error), name="persisted",
        )  # fmt: skip

    def _write(self, decision: Decision) -> None:
        open_ = self.protocol.transaction
        assert open_ is not None
        self.world.disk.decide(decision, self.epoch)
        self.world.decided(decision)

    def _set_timer(self, timer: SetTimer) -> None:
        number = self.timers[timer.name] = self.timers.get(timer.name, 0) + 1

        def fire() -> None:
            if self.timers[timer.name] == number:
                self.feed(Timeout(name=timer.name, transaction=timer.transaction, now_s=self.world.now_s))

        self.world.after(timer.delay_s, self, fire, name=timer.name, is_event=False)

    def _notify(self, notify: Notify) -> None:
        self.world.note(f"{notify.kind} v{notify.version} {notify.text}")

    def _dismiss(self, dismiss: Dismiss) -> None:
        disk = self.world.disk
        try:
            disk.require(self.epoch)
        except Superseded:
            self.alive = False
            return
        disk.members = [member for member in disk.members if member.replica != dismiss.replica]
        disk.dismissed.add(dismiss.replica)
        for member in [member for member in self.world.ranks if member.replica == dismiss.replica]:
            self.world.ranks.pop(member).alive = False


ACTIONS: dict[type, Callable[[Host, Any], None]] = {
    Send: Host._send,
    Reply: Host._reply,
    Persist: Host._persist,
    SetTimer: Host._set_timer,
    Notify: Host._notify,
    Dismiss: Host._dismiss,
}


@dataclass(slots=True)
class World:
    """Everything there is. min_replicas: as an operator set it. contents of a push are known by its id."""

    seed: int
    replicas: int
    num_ranks: int
    faults: Any
    bugs: Bugs = field(default_factory=Bugs)
    min_replicas: int = 0
    keeps_log: bool = False
    now_s: float = 0.0
    events: int = 0
    num_crashes: int = 0
    num_checked: int = 0  # decisions that were looked at
    log: list[str] = field(default_factory=list)
    coverage: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    pushed: dict[str, dict[int, bytes]] = field(default_factory=dict)
    ranks: dict[MemberId, SimRank] = field(default_factory=dict)
    random: random.Random = field(init=False)
    disk: Disk = field(init=False)
    host: Host = field(init=False)
    loaded: Content = field(init=False)
    _queue: list[Any] = field(default_factory=list)
    _number: int = 0
    _rebuilding: set[int] = field(default_factory=set)
    _shards: dict[int, list[list[bytes]]] = field(default_factory=dict)  # version -> what each rank of a replica holds

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        members = [MemberId(replica=r, rank=i) for r in range(self.replicas) for i in range(self.num_ranks)]
        self.loaded = self.new_content()
        self.disk = Disk(members=members, epoch_is_ignored=self.bugs.epoch_is_ignored)
        digests = whole_digests(self.loaded)
        self.becomes(1, self.loaded)
        self.disk.decisions.append(
            Decision(
                version=1, base_version=0, transaction=0, push_id="load", pushed_by="", created_s=0.0,
                digest=total(digests), digests=digests, num_tensors=3, wire_bytes=0, logical_bytes=0, seconds=0.0,
            )
        )  # fmt: skip
        for member in members:
            self.ranks[member] = self.new_rank(member)
        self.host = Host(self)

    def make_coordinator(self, **fields: Any) -> Coordinator:
        return checks.planted(self.bugs)(**fields)

    def new_rank(self, member: MemberId) -> SimRank:
        rank = SimRank(
            member,
            self.num_ranks,
            self.loaded,
            engine=Engine() if member.rank == 0 else self.ranks[MemberId(replica=member.replica, rank=0)].engine,
            clock_s=self.random.uniform(-1e6, 1e6),
            stored=self.disk.stored,
            fetch=self._fetch,
            undo_is_dropped=self.bugs.undo_is_dropped,
        )
        if self.bugs.epoch_is_ignored:
            rank.member.follow = lambda step, epoch: None  # type: ignore[method-assign]
        return rank

    def new_content(self) -> Content:
        return tuple(self.random.randbytes(spec.num_bytes) for spec in MANIFEST.tensors)

    def next_number(self) -> int:
        self._number += 1
        return self._number

    def note(self, text: str) -> None:
        if self.keeps_log:
            self.log.append(f"{self.now_s:8.3f} {text}")

    # -- time and messages

    def after(self, delay_s: float, node: Node, function: Callable[..., None], *args: Any, name: str,
              is_event: bool = True) -> None:  # fmt: skip
        """Call later, unless the process is dead by then."""
        self._number += 1
        heapq.heappush(self._queue, (self.now_s + delay_s, self._number, node, function, args, name, is_event))

    def send(self, source: Node, target: Node, function: Callable[..., None], *args: Any, name: str) -> None:
        """A message, in as many copies and as late as the faults let it be."""
        for delay_s in self.faults.route(self, source, target, name):
            self.after(delay_s, target, function, *args, name=name)

    def step(self) -> bool:
        """One event; False when there is none."""
        while self._queue:
            at_s, _, node, function, args, name, is_event = heapq.heappop(self._queue)
            if not node.alive:
                continue
            self.now_s = max(self.now_s, at_s)
            if not is_event:
                function(*args)
                return True
            self.events += 1
            if self.keeps_log:
                self.note(f"{name} -> {node}")
            fault = self.faults.strikes(self, node, name)
            if fault == "before":
                self.kill(node)
                return True
            function(*args)
            if fault == "after":
                self.kill(node)
            return True
        return False

    def serve_step(self, host: Host, rank: SimRank, send: Send) -> None:
        """A rank takes one message of a coordinator."""
        error = self.faults.refuses(rank, send)
        answer = rank.receive(send, self.now_s) if error is None else Answer(send=send, token=0.0, error=error)
        answer = self.faults.answers(rank, answer)
        if answer is not None:
            self.faults.damages_live(self, rank, send)
            self.send(rank, host, host.answered, answer, name=f"{send.step} done")
        if rank.engine.paused and rank.engine.waiting:
            waiting, rank.engine.waiting = rank.engine.waiting, []
            for follower, held in waiting:
                self.after(0.001, follower, self.serve_step, host, follower, held, name=held.step)

    def _fetch(self, rank: SimRank, send: Send) -> None:
        source: Any = send.source
        donor = self.ranks.get(MemberId(replica=source.replica, rank=rank.id.rank))
        host = self.host

        def give() -> None:
            assert donor is not None
            self.send(donor, rank, take, list(donor.rows), donor.member.version, name="rows")

        def take(rows: list[bytes], version: int) -> None:
            answer = rank.filled(send.transaction, rows, self.now_s) if version == send.version else None
            if answer is not None:
                self.send(rank, host, host.answered, answer, name="prepare done")

        if donor is not None:
            self.send(rank, donor, give, name="fetch")

    # -- processes that die and come back

    def kill(self, node: Any) -> None:
        """The process is gone, and so is all that it held in memory."""
        node.alive = False
        self.num_crashes += 1
        self.note(f"{node} dies")
        if isinstance(node, Host):
            if node is self.host:
                self.after(self.random.uniform(0.5, 5.0), self.outside, self.start_coordinator, name="restart")
        elif isinstance(node, SimRank):
            for member, rank in self.ranks.items():
                rank.broken = rank.broken or member.replica == node.id.replica
            if node.id.replica not in self._rebuilding:
                self._rebuilding.add(node.id.replica)
                delay_s = self.random.uniform(1.0, 8.0)
                self.after(delay_s, self.outside, self.rebuild, node.id.replica, name="rebuild")

    @property
    def outside(self) -> Node:
        return OUTSIDE

    def start_coordinator(self) -> None:
        self.host = Host(self)

    def rebuild(self, replica: int) -> None:
        """New processes for a replica, with what they load by themselves; the old ones surely are gone."""
        self._rebuilding.discard(replica)
        members = [member for member in self.ranks if member.replica == replica]
        for member in members:
            self.ranks[member].alive = False
            self.ranks[member] = self.new_rank(member)
        if members:
            self.announce(members)

    def announce(self, members: list[MemberId]) -> None:
        """Tell the coordinator of new ranks until one has heard it."""

        def are_there() -> bool:
            ranks = [self.ranks.get(member) for member in members]
            return all(rank is born for rank, born in zip(ranks, first, strict=True))

        def greeted(host: Host) -> None:
            # The coordinator greets them before it takes them in: news of processes that others replaced say nothing.
            if are_there():
                host.request(OUTSIDE, "add", {"members": members, "key": key, "dead": True}, done)

        def ask() -> None:
            if not heard and are_there():
                self.send(OUTSIDE, self.host, greeted, self.host, name="add")
                self.after(3.0, OUTSIDE, ask, name="announce", is_event=False)

        def done(result: object, error: WeightUpdateError | None) -> None:
            heard.append(result)

        heard: list[object] = []
        key = self.disk.keys[members[0].replica] = str(self.next_number())
        first = [self.ranks[member] for member in members]
        known = [member for member in members if member in self.disk.members]
        self.disk.members += [member for member in members if member not in known]
        ask()

    def decided(self, decision: Decision) -> None:
        """What the new version is: the base, and over it what its push brought; or the version that it restores."""
        contents = self.disk.contents
        if decision.restores:
            return self.becomes(decision.version, contents[decision.restores])
        base = list(contents[decision.version - 1])
        for i, data in self.pushed[decision.push_id].items():
            base[i] = data
        self.becomes(decision.version, tuple(base))

    def becomes(self, version: int, content: Content) -> None:
        """What a version is: as a whole, and on each rank."""
        self.disk.contents[version] = content
        self._shards[version] = [shard(content, rank, self.num_ranks) for rank in range(self.num_ranks)]

    def expected(self, rank: SimRank, version: int) -> list[bytes]:
        """What a rank that holds this version holds."""
        return self._shards[version][rank.id.rank]

    # -- driving

    def run(self, until: Callable[[], bool], max_events: int = 5000) -> bool:
        """Events until something holds; whether it does."""
        limit = self.events + max_events
        while not until():
            if self.events >= limit or not self.step():
                return False
            checks.check(self)
        return True

    @property
    def is_whole(self) -> bool:
        """Every process lives, and the coordinator, which learns of deaths and births later, knows these processes."""
        replicas = self.host.protocol.membership.replicas.items()
        known = all(each.key == self.disk.keys.get(number, "") for number, each in replicas)
        return self.host.alive and known and all(rank.alive and not rank.broken for rank in self.ranks.values())

    @property
    def is_healthy(self) -> bool:
        """Every replica serves the committed version, nothing is open, nothing is staged."""
        protocol = self.host.protocol
        version = self.disk.decisions[-1].version
        return (
            self.host.alive
            and protocol.phase is Phase.IDLE
            and protocol.version == version
            and not protocol.fenced
            and all(rank.alive and not rank.broken and rank.member.version == version for rank in self.ranks.values())
            and all(rank.member.state == "idle" and rank.staging is None for rank in self.ranks.values())
            and all(rank.serves(self.now_s) for member, rank in self.ranks.items() if member.rank == 0)
        )


OUTSIDE = Process("outside")
