"""The transaction under every order of messages and failures: real state machines, only the network is simulated."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from quant.formats import TensorSpec
from quant.parameters import ParameterRow
from weight_update.errors import (
    BusyError,
    DigestError,
    ManifestError,
    MemberError,
    TransferError,
    VersionError,
    WeightUpdateError,
)
from weight_update.manifest import Manifest
from weight_update.member import Member
from weight_update.messages import (
    Decision,
    MemberId,
    MemberReply,
    Notify,
    Persist,
    Persisted,
    Reply,
    Request,
    Send,
    SetTimer,
    Timeout,
)
from weight_update.protocol import Coordinator
from weight_update.transaction import Phase

MANIFEST = Manifest(
    tensors=(TensorSpec(name="a", dtype="BF16", shape=(4, 4)), TensorSpec(name="b", dtype="BF16", shape=(2,))),
    parameters=(
        ParameterRow(name="a", shape=(4, 4), format="bf16"),
        ParameterRow(name="b", shape=(2,), format="bf16"),
    ),
)
MEMBERS = [MemberId(replica=replica, rank=rank) for replica in range(2) for rank in range(2)]
SENT = np.array([[10, 20], [30, 40]], np.uint64)
HALF = SENT // np.uint64(2)  # what each of two ranks reports: they add up


@dataclass
class World:
    """A network whose messages arrive in an order drawn from a seed, a disk, and members that hold a version number."""

    seed: int = 0
    fail: Callable[[Send], bool] = lambda send: False
    lose: Callable[[Send], bool] = lambda send: False  # done by the member, its answer lost
    corrupt: Callable[[Send], bool] = lambda send: False
    disk_full: bool = False
    disk: list[Decision] = field(default_factory=list)
    replies: dict[int, Reply] = field(default_factory=dict)
    events: list[Notify] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.rank = {member: Member(version=1) for member in MEMBERS}
        self.held = dict.fromkeys(MEMBERS, 1)  # the version of the bytes in each rank's live storages
        self.flight: list[Send] = []
        self.timed = ""  # the phase in which the last timer was set
        self.next_id = 0
        self.coordinator = self.start(epoch=1)

    def start(self, epoch: int) -> Coordinator:
        last = self.disk[-1] if self.disk else None
        return Coordinator(
            members=MEMBERS,
            manifest=MANIFEST,
            version=last.version if last else 1,
            digests=last.digests if last else np.zeros((2, 2), np.uint64),
            epoch=epoch,
            committed={each.push_id: each.version for each in self.disk},
            decided={each.transaction: each.version for each in self.disk},
        )

    def ask(self, op: str, **args: object) -> int:
        self.next_id += 1
        self.do(self.coordinator.handle(Request(id=self.next_id, op=op, now_s=0.0, args=args)))
        return self.next_id

    def answer(self, op: str, **args: object) -> Reply:
        id_ = self.ask(op, **args)
        self.run()
        return self.replies[id_]

    def begin(self, **changes: object) -> Reply:
        args = {
            "push_id": "p",
            "base_version": 0,
            "fingerprint": MANIFEST.fingerprint,
            "tensors": MANIFEST.tensors,
            "pushed_by": "me",
            "logical_bytes": 36,
            "lease_s": 60.0,
        }
        return self.answer("begin", **(args | changes))

    def push(self) -> Reply:
        begun = self.begin()
        if begun.error:
            return begun
        transaction = begun.result["transaction"]  # type: ignore[index]
        prepared = self.answer("prepare", transaction=transaction, digests=SENT, wire_bytes=36)
        return prepared if prepared.error else self.answer("decide", transaction=transaction)

    def run(self, limit: int = 10_000) -> None:
        while self.flight and limit:
            self.step()
            limit -= 1

    def step(self) -> None:
        send = self.flight.pop(self.random.randrange(len(self.flight)))
        result: object = None
        error: WeightUpdateError | None = None
        try:
            result = self.serve(send)
        except WeightUpdateError as failure:
            error = failure
        if self.lose(send):
            result, error = None, TransferError("no answer")
        self.do(
            self.coordinator.handle(
                MemberReply(
                    member=send.member,
                    step=send.step,
                    transaction=send.transaction,
                    now_s=0.0,
                    result=result,
                    error=error,
                )
            )
        )

    def serve(self, send: Send) -> object:
        member = self.rank[send.member]
        epoch = self.coordinator.epoch
        if not member.check(send.step, epoch=epoch, transaction=send.transaction, version=send.version):
            return member.result(send.step)
        if self.fail(send):
            raise MemberError(f"{send.member} fails in {send.step}")
        result: object = HALF + np.uint64(7) if self.corrupt(send) else HALF
        if send.step == "open":
            result = 100
        if send.step == "install":
            self.held[send.member] = send.version
        if send.step == "undo":
            self.held[send.member] = member.version
        if send.step == "abort":  # a rank that serves again reads its peers' bytes
            assert all(held == 1 for held in self.held.values())
        return member.done(send.step, transaction=send.transaction, version=send.version, result=result)

    def do(self, actions: list[object]) -> None:
        for action in actions:
            if isinstance(action, Send):
                assert action.step != "publish" or any(each.version == action.version for each in self.disk)
                self.flight.append(action)
            elif isinstance(action, Reply):
                self.replies[action.id] = action
            elif isinstance(action, SetTimer):
                self.timed = self.coordinator.phase.value
            elif isinstance(action, Notify):
                self.events.append(action)
            elif isinstance(action, Persist):
                error = MemberError("disk full") if self.disk_full else None
                if error is None:
                    self.disk.append(action.decision)
                done = Persisted(transaction=action.decision.transaction, now_s=0.0, error=error)
                self.do(self.coordinator.handle(done))

    def check_quiet(self, version: int) -> None:
        """Nothing is open; every member of every serving replica holds and serves the committed version."""
        assert self.coordinator.phase is Phase.IDLE
        assert self.coordinator.transaction is None
        assert self.coordinator.version == version
        for member in MEMBERS:
            if member.replica not in self.coordinator.fenced:
                assert self.rank[member].state == "idle"
                assert self.rank[member].version == version
                assert self.held[member] == version


@pytest.mark.parametrize("seed", range(20))
def test_a_push_commits_on_every_member_whatever_the_order_of_messages(seed: int) -> None:
    world = World(seed=seed)
    reply = world.push()
    assert reply.error is None
    assert len(world.disk) == 1
    assert world.disk[0].version == 2
    assert (world.disk[0].digests == SENT).all()
    world.check_quiet(version=2)


@pytest.mark.parametrize("step", ["open", "prepare", "install"])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_a_failure_before_the_decision_leaves_every_member_on_the_old_version(
    step: str, member: MemberId, seed: int
) -> None:
    world = World(seed=seed, fail=lambda send: send.step == step and send.member == member)
    reply = world.push()
    assert isinstance(reply.error, MemberError)
    assert world.disk == []
    world.check_quiet(version=1)
    world.fail = lambda send: False
    assert world.push().error is None
    world.check_quiet(version=2)


@pytest.mark.parametrize("step", ["open", "prepare", "install"])
@pytest.mark.parametrize("seed", range(5))
def test_an_answer_that_is_lost_before_the_decision_aborts(step: str, seed: int) -> None:
    world = World(seed=seed, lose=lambda send: send.step == step and send.member == MEMBERS[1])
    assert isinstance(world.push().error, TransferError)
    world.check_quiet(version=1)


@pytest.mark.parametrize("step", ["prepare", "install"])
def test_bytes_that_are_not_the_trainers_abort_and_name_the_tensor_and_the_replica(step: str) -> None:
    world = World(corrupt=lambda send: send.step == step and send.member == MEMBERS[3])
    reply = world.push()
    assert isinstance(reply.error, DigestError)
    assert "replica 1: a" in str(reply.error)
    world.check_quiet(version=1)


def test_a_member_that_cannot_publish_is_fenced_and_the_others_serve_the_decision() -> None:
    world = World(fail=lambda send: send.step == "publish" and send.member == MEMBERS[2])
    reply = world.push()
    assert reply.error is None
    assert set(world.coordinator.fenced) == {1}
    world.check_quiet(version=2)
    assert isinstance(world.begin(push_id="next").error, MemberError)


def test_a_member_that_failed_after_a_separate_install_is_noticed_before_the_decision() -> None:
    world = World()
    transaction = world.begin().result["transaction"]  # type: ignore[index]
    world.answer("prepare", transaction=transaction, digests=SENT, wire_bytes=36)
    assert world.answer("install", transaction=transaction).error is None
    world.fail = lambda send: send.step == "confirm" and send.member == MEMBERS[0]
    assert isinstance(world.answer("decide", transaction=transaction).error, MemberError)
    assert world.disk == []
    world.check_quiet(version=1)


def test_a_decision_that_cannot_be_made_durable_aborts() -> None:
    world = World(disk_full=True)
    assert isinstance(world.push().error, MemberError)
    world.check_quiet(version=1)


@pytest.mark.parametrize("phase", ["open", "prepared", "installed"])
def test_a_lapsed_lease_frees_the_transaction(phase: str) -> None:
    world = World()
    transaction = world.begin().result["transaction"]  # type: ignore[index]
    if phase != "open":
        world.answer("prepare", transaction=transaction, digests=SENT, wire_bytes=36)
    if phase == "installed":
        world.answer("install", transaction=transaction)
    assert world.coordinator.phase.value == phase
    assert world.timed == phase  # every phase in which only the trainer can go on has a timer of its own
    world.do(world.coordinator.handle(Timeout(name="lease", transaction=transaction, now_s=61.0)))
    world.run()
    world.check_quiet(version=1)
    assert "lease" in world.events[-1].text


def test_a_second_push_is_refused_with_who_holds_the_first() -> None:
    world = World()
    world.begin(pushed_by="alice")
    error = world.begin(push_id="other", pushed_by="bob").error
    assert isinstance(error, BusyError)
    assert "alice" in str(error)


def test_the_same_push_id_renews_an_open_push_and_returns_the_version_of_a_committed_one() -> None:
    world = World()
    first = world.begin().result
    assert world.begin(tensors=()).result == first
    transaction = first["transaction"]  # type: ignore[index]
    world.answer("prepare", transaction=transaction, digests=SENT, wire_bytes=36)
    world.answer("decide", transaction=transaction)
    assert world.begin().result == {"already_committed": True, "version": 2}
    assert len(world.disk) == 1


def test_the_same_push_id_while_members_still_open_is_answered_with_the_first() -> None:
    world = World()
    args = {"base_version": 0, "fingerprint": MANIFEST.fingerprint, "pushed_by": "", "logical_bytes": 36, "lease_s": 9}
    ids = [world.ask("begin", push_id="p", tensors=MANIFEST.tensors, **args) for _ in range(2)]
    assert world.replies == {}
    world.run()
    assert world.replies[ids[0]].result == world.replies[ids[1]].result


def test_a_wrong_base_version_fingerprint_or_manifest_is_refused_before_anything_is_sent() -> None:
    world = World()
    assert isinstance(world.begin(base_version=7).error, VersionError)
    assert isinstance(world.begin(fingerprint=1).error, ManifestError)
    assert isinstance(world.begin(tensors=MANIFEST.tensors[:0]).error, ManifestError)
    assert world.flight == []
    assert world.coordinator.phase is Phase.IDLE


def test_steps_out_of_order_are_refused() -> None:
    world = World()
    transaction = world.begin().result["transaction"]  # type: ignore[index]
    assert isinstance(world.answer("decide", transaction=transaction).error, BusyError)
    assert isinstance(world.answer("install", transaction=transaction).error, BusyError)
    error = world.answer("prepare", transaction=transaction + 1, digests=SENT, wire_bytes=1).error
    assert isinstance(error, BusyError)


@pytest.mark.parametrize("seed", range(300))
def test_a_coordinator_that_dies_anywhere_is_replaced_and_every_member_resolved(seed: int) -> None:
    world = World(seed=seed)
    steps_before_death = world.random.randrange(1, 20)
    script = [
        lambda transaction: world.ask("prepare", transaction=transaction, digests=SENT, wire_bytes=36),
        lambda transaction: world.ask("decide", transaction=transaction),
    ]
    begun = world.ask(
        "begin", push_id="p", base_version=0, fingerprint=MANIFEST.fingerprint, tensors=MANIFEST.tensors,
        pushed_by="me", logical_bytes=36, lease_s=60.0,
    )  # fmt: skip
    for _ in range(steps_before_death):
        if world.flight:
            world.step()
        elif script and begun in world.replies:
            script.pop(0)(world.replies[begun].result["transaction"])  # type: ignore[index]
    decided = len(world.disk)
    world.flight.clear()  # what was under way dies with the coordinator
    world.coordinator = world.start(epoch=2)
    states = {
        member: {"state": rank.state, "transaction": rank.transaction, "version": rank.version}
        for member, rank in world.rank.items()
    }
    for action in world.coordinator.recover(states):  # carried out one by one, in order
        world.do([action])
        world.run()
    assert world.coordinator.fenced == {}
    world.check_quiet(version=1 + decided)


def test_an_older_coordinator_is_refused_by_members_that_follow_a_newer_one() -> None:
    member = Member(version=1)
    member.check("open", epoch=2, transaction=1, version=2)
    with pytest.raises(VersionError, match="epoch 1 is over"):
        member.check("abort", epoch=1, transaction=1, version=2)
