"""The transaction step by step, with one failure at a time; tests/test_simulation.py has all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.simulation.clients import Operator, Trainer, everything
from tests.simulation.faults import NoFaults
from tests.simulation.ranks import Answer, SimRank, whole_digests
from tests.simulation.world import World
from weight_update.errors import (
    BusyError,
    DigestError,
    ManifestError,
    MemberError,
    VersionError,
    WeightUpdateError,
)
from weight_update.member import Member
from weight_update.messages import MemberId, Send
from weight_update.opening import lost
from weight_update.transaction import Phase

MEMBERS = [MemberId(replica=replica, rank=rank) for replica in range(2) for rank in range(2)]


@dataclass
class Script(NoFaults):
    """Failures that a test names."""

    fail: Callable[[Send], bool] = lambda send: False
    lose: Callable[[Send], bool] = lambda send: False  # done by the member, its answer lost
    corrupt: Callable[[Send], bool] = lambda send: False
    cut: frozenset[int] = frozenset()  # replicas that no message reaches or leaves

    def refuses(self, rank: SimRank, send: Send) -> WeightUpdateError | None:
        return MemberError(f"{rank} fails in {send.step}") if self.fail(send) else None

    def answers(self, rank: SimRank, answer: Answer | None) -> Answer | None:
        if answer is None or self.lose(answer.send):
            return None
        if self.corrupt(answer.send) and isinstance(answer.result, np.ndarray):
            return answer._replace(result=answer.result + np.uint64(7))
        return answer

    def route(self, world: World, source: Any, target: Any, name: str) -> list[float]:
        ends = {each.id.replica for each in (source, target) if isinstance(each, SimRank)}
        return [] if ends & self.cut else super().route(world, source, target, name)


def start(seed: int = 0, replicas: int = 2, num_ranks: int = 2, min_replicas: int = 0) -> World:
    """A healthy service at version 1."""
    world = World(seed=seed, replicas=replicas, num_ranks=num_ranks, faults=Script(), min_replicas=min_replicas)
    assert world.run(lambda: world.is_healthy)
    return world


def push(world: World, push_id: str = "p", tensors: list[int] | None = None) -> Trainer:
    trainer = Trainer(world, push_id, everything() if tensors is None else tensors)
    trainer.begin()
    assert world.run(lambda: trainer.ended)
    return trainer


def ask(world: World, op: str, **args: Any) -> Operator:
    operator = Operator(world, op, **args)
    operator.go()
    assert world.run(lambda: operator.ended)
    return operator


def begin(world: World, **changes: Any) -> Operator:
    args = Trainer(world, "p", everything())._begin_args() | changes
    return ask(world, "begin", **args)


def settle(world: World, seconds: float = 30.0) -> None:
    end_s = world.now_s + seconds
    world.run(lambda: world.now_s > end_s)


def check_quiet(world: World, version: int) -> None:
    """Nothing is open; every member of every serving replica holds and serves the committed version."""
    assert world.run(lambda: world.is_healthy)
    assert world.disk.decisions[-1].version == version
    assert all(rank.rows == world.expected(rank, version) for rank in world.ranks.values())


# ---------------------------------------------------------------- a push


@pytest.mark.parametrize("seed", range(20))
def test_a_push_commits_on_every_member_whatever_the_order_of_messages(seed: int) -> None:
    world = start(seed)
    trainer = push(world)
    assert trainer.version == 2
    assert (world.disk.decisions[-1].digests == whole_digests(trainer.content)).all()
    check_quiet(world, 2)


@pytest.mark.parametrize("step", ["open", "prepare", "install"])
@pytest.mark.parametrize("member", MEMBERS, ids=str)
def test_a_failure_before_the_decision_leaves_every_member_on_the_old_version(step: str, member: MemberId) -> None:
    world = start(seed=MEMBERS.index(member))
    world.faults.fail = lambda send: send.step == step and send.member == member
    assert push(world).version is None
    world.faults.fail = lambda send: False
    check_quiet(world, 1)
    assert push(world, "q").version == 2
    check_quiet(world, 2)


@pytest.mark.parametrize("step", ["open", "prepare", "install"])
def test_an_answer_that_is_lost_before_the_decision_aborts(step: str) -> None:
    world = start()
    world.faults.lose = lambda send: send.step == step and send.member == MEMBERS[1]
    assert push(world).version is None
    check_quiet(world, 1)


@pytest.mark.parametrize("step", ["prepare", "install"])
def test_bytes_that_are_not_the_trainers_abort_and_name_the_tensor_and_the_replica(step: str) -> None:
    world = start()
    world.faults.corrupt = lambda send: send.step == step and send.member == MEMBERS[3]
    args = {"transaction": begun(world), "digests": whole_digests(world.loaded), "wire_bytes": 8}
    asked = ask(world, "prepare", **args)
    if step == "install":
        asked = ask(world, "decide", transaction=args["transaction"])
    assert isinstance(asked.error, DigestError)
    assert "replica 1: a" in str(asked.error)
    check_quiet(world, 1)


def begun(world: World, **changes: Any) -> int:
    """A push that is open, with all its bytes staged: those that the service has loaded."""
    operator = begin(world, **changes)
    assert operator.error is None
    for rank in world.ranks.values():
        assert rank.staging is not None
        rank.staging.rows = dict(enumerate(rank.rows))
    transaction: int = operator.result["transaction"]
    return transaction


def test_a_member_that_cannot_publish_is_fenced_and_comes_back_to_the_decision() -> None:
    world = start()
    world.faults.fail = lambda send: send.step == "publish" and send.member == MEMBERS[2]
    assert push(world).version == 2
    assert set(world.host.protocol.fenced) == {1}
    world.faults.fail = lambda send: False
    check_quiet(world, 2)


def test_a_rebuilt_replica_that_cannot_publish_does_not_count_as_serving() -> None:
    world = start()
    world.faults.fail = lambda send: send.step == "publish" and send.member == MEMBERS[2]
    world.kill(world.ranks[MEMBERS[2]])
    settle(world, 60.0)
    assert set(world.host.protocol.fenced) == {1}
    world.faults.fail = lambda send: False
    check_quiet(world, 1)


def test_a_member_that_failed_after_a_separate_install_is_noticed_before_the_decision() -> None:
    world = start()
    transaction = begun(world)
    ask(world, "prepare", transaction=transaction, digests=whole_digests(world.loaded), wire_bytes=8)
    assert ask(world, "install", transaction=transaction).error is None
    world.faults.fail = lambda send: send.step == "confirm" and send.member == MEMBERS[0]
    assert isinstance(ask(world, "decide", transaction=transaction).error, MemberError)
    check_quiet(world, 1)


def test_a_decision_that_cannot_be_made_durable_aborts() -> None:
    world = start()
    world.disk.failing_writes = 1
    assert push(world).version is None
    check_quiet(world, 1)


@pytest.mark.parametrize("phase", [Phase.OPEN, Phase.PREPARED, Phase.INSTALLED])
def test_a_lapsed_lease_frees_the_transaction(phase: Phase) -> None:
    world = start()
    world.keeps_log = True
    transaction = begun(world, pushed_by="alice", lease_s=20.0)
    if phase is not Phase.OPEN:
        ask(world, "prepare", transaction=transaction, digests=whole_digests(world.loaded), wire_bytes=8)
    if phase is Phase.INSTALLED:
        ask(world, "install", transaction=transaction)
    assert world.host.protocol.phase is phase
    settle(world, 19.0)
    assert world.host.protocol.phase is phase
    check_quiet(world, 1)
    assert any("the lease of alice lapsed" in line for line in world.log)


def test_a_second_push_is_refused_with_who_holds_the_first() -> None:
    world = start()
    begin(world, pushed_by="alice")
    error = begin(world, push_id="other", pushed_by="bob").error
    assert isinstance(error, BusyError)
    assert "alice" in str(error)


def test_the_same_push_id_renews_an_open_push_and_returns_the_version_of_a_committed_one() -> None:
    world = start()
    first = begin(world).result
    assert begin(world, tensors=()).result == first
    assert ask(world, "abort", transaction=first["transaction"], reason="").error is not None
    assert push(world).version == 2
    assert begin(world).result == {"already_committed": True, "version": 2}
    check_quiet(world, 2)


def test_the_same_push_id_while_members_still_open_is_answered_with_the_first() -> None:
    world = start()
    args = Trainer(world, "p", everything())._begin_args()
    twice = [Operator(world, "begin", **args) for _ in range(2)]
    for operator in twice:
        operator.go()
    assert world.run(lambda: all(operator.ended for operator in twice))
    assert twice[0].result == twice[1].result


def test_a_wrong_base_version_fingerprint_or_manifest_is_refused_before_anything_is_sent() -> None:
    world = start()
    assert isinstance(begin(world, base_version=7).error, VersionError)
    assert isinstance(begin(world, fingerprint=1).error, ManifestError)
    assert isinstance(begin(world, tensors=()).error, ManifestError)
    assert world.host.protocol.phase is Phase.IDLE
    check_quiet(world, 1)


def test_steps_out_of_order_are_refused() -> None:
    world = start()
    transaction = begun(world)
    assert isinstance(ask(world, "decide", transaction=transaction).error, BusyError)
    assert isinstance(ask(world, "install", transaction=transaction).error, BusyError)
    wrong = {"transaction": transaction + 1, "digests": whole_digests(world.loaded), "wire_bytes": 1}
    assert isinstance(ask(world, "prepare", **wrong).error, BusyError)


@pytest.mark.parametrize("seed", range(100))
def test_a_coordinator_that_dies_anywhere_is_replaced_and_every_member_resolved_within_15_s(seed: int) -> None:
    world = start(seed)
    trainer = Trainer(world, "p", everything())
    trainer.begin()
    dies_at = world.events + world.random.randrange(1, 60)
    world.run(lambda: world.events >= dies_at or trainer.ended)
    world.kill(world.host)
    died_s = world.now_s
    assert world.run(lambda: world.is_healthy)
    assert world.now_s - died_s < 15.0 + 5.0  # what it takes to start it
    check_quiet(world, world.disk.decisions[-1].version)


def test_an_older_coordinator_is_refused_by_members_that_follow_a_newer_one() -> None:
    member = Member(version=1)
    member.check("open", epoch=2, transaction=1, version=2)
    with pytest.raises(VersionError, match="epoch 1 is over"):
        member.check("abort", epoch=1, transaction=1, version=2)


# ---------------------------------------------------------------- going back


def rollback(world: World, version: int, op: str = "rollback") -> Operator:
    return ask(world, op, version=version, push_id=f"back-{world.next_number()}", pushed_by="me")


def test_a_rollback_is_a_new_version_with_the_bytes_of_an_older_one() -> None:
    world = start()
    for push_id, tensors in (("p", [0, 1, 2]), ("q", [1]), ("r", [0, 2])):
        push(world, push_id, tensors)
    assert rollback(world, 2).result["version"] == 5
    check_quiet(world, 5)
    assert world.disk.contents[5] == world.disk.contents[2]
    assert rollback(world, 4).result["version"] == 6  # forward again
    check_quiet(world, 6)
    assert [each.restores for each in world.disk.decisions] == [0, 0, 0, 0, 2, 4]


def test_a_version_that_one_rank_does_not_keep_is_refused_with_those_that_all_keep() -> None:
    world = start()
    for push_id in "pqr":
        push(world, push_id)
    world.ranks[MEMBERS[3]].history.pop(3)
    error = rollback(world, 1).error
    assert isinstance(error, VersionError)
    assert str(error) == "version 1 is not kept by every rank; reachable: 3"
    check_quiet(world, 4)
    assert isinstance(rollback(world, 4).error, VersionError)
    assert isinstance(rollback(world, 3, "reset").error, VersionError)


@pytest.mark.parametrize("step", ["reach", "open", "prepare", "install"])
def test_a_rollback_that_fails_anywhere_leaves_the_current_version(step: str) -> None:
    world = start()
    push(world)
    world.faults.fail = lambda send: send.step == step and send.member == MEMBERS[2]
    assert isinstance(rollback(world, 1).error, MemberError)
    world.faults.fail = lambda send: False
    check_quiet(world, 2)


def test_restored_bytes_that_are_not_the_recorded_ones_are_refused() -> None:
    world = start()
    push(world)
    base, rows = world.ranks[MEMBERS[0]].history[2]
    world.ranks[MEMBERS[0]].history[2] = base, [bytes(len(each)) for each in rows]
    error = rollback(world, 1).error
    assert isinstance(error, DigestError)
    assert "recorded" in str(error)
    check_quiet(world, 2)


# ---------------------------------------------------------------- members that come and go


def test_a_replica_that_dies_is_rebuilt_filled_by_a_live_one_and_serves() -> None:
    world = start()
    push(world)
    world.kill(world.ranks[MEMBERS[2]])
    check_quiet(world, 2)
    assert push(world, "q").version == 3
    check_quiet(world, 3)


def test_a_push_goes_on_without_a_fenced_replica_only_as_far_as_min_replicas_allows() -> None:
    for min_replicas, version in ((0, None), (1, 2)):
        world = start(min_replicas=min_replicas)
        world.faults.cut = frozenset({1})
        settle(world, 20.0)
        assert set(world.host.protocol.fenced) == {1}
        assert push(world).version == version
        world.faults.cut = frozenset()
        check_quiet(world, version or 1)


def test_nothing_is_installed_while_a_fenced_replica_may_still_serve_the_old_version() -> None:
    world = start(min_replicas=1)
    push(world)
    world.faults.cut = frozenset({1})
    assert world.run(lambda: bool(world.host.protocol.fenced))
    leader = world.ranks[MEMBERS[2]]
    assert leader.serves(world.now_s)
    trainer = Trainer(world, "q", everything())
    trainer.begin()
    assert world.run(lambda: world.host.protocol.phase is Phase.WAITING)
    assert world.run(lambda: world.host.protocol.phase is Phase.INSTALLING)
    assert not leader.serves(world.now_s)
    assert world.run(lambda: trainer.ended)
    assert trainer.version == 3


def test_a_version_that_is_published_late_is_not_served_when_a_later_one_is() -> None:
    world = start(min_replicas=1)
    world.faults.fail = lambda send: send.step == "publish" and send.member.replica == 1
    assert push(world).version == 2
    world.faults.cut = frozenset({1})
    settle(world, 20.0)
    assert push(world, "q").version == 3
    assert world.ranks[MEMBERS[2]].member.state == "installed"
    world.faults = Script()
    check_quiet(world, 3)  # every event on the way is checked for a mixed fleet


def test_an_older_publish_renames_nothing_that_a_rank_loaded_by_itself() -> None:
    member = Member(version=0)
    with pytest.raises(VersionError, match="never installed 2"):
        member.check("publish", epoch=1, transaction=1, version=2)
    assert member.check("adopt", epoch=1, transaction=1, version=2)


def test_the_same_ranks_announced_twice_change_nothing() -> None:
    world = start()
    members = MEMBERS[2:]
    args = {"members": members, "key": "new", "dead": False}
    ask(world, "add", **args)
    assert set(world.host.protocol.fenced) == {1}
    check_quiet(world, 1)
    ask(world, "add", **args)
    assert world.host.protocol.fenced == {}


def test_a_push_that_begins_while_a_replica_is_let_in_waits_for_it() -> None:
    world = start()
    world.kill(world.ranks[MEMBERS[2]])
    assert world.run(lambda: bool(world.host.protocol.fenced))
    assert world.run(lambda: world.host.protocol.phase is Phase.JOINING)
    assert push(world).version == 2
    check_quiet(world, 2)


def test_a_replica_that_is_removed_serves_no_more_and_the_next_push_does_without_it() -> None:
    world = start()
    leader = world.ranks[MEMBERS[2]]
    assert ask(world, "remove", replica=1).error is None
    assert not leader.serves(world.now_s)
    assert {member.replica for member in world.ranks} == {0}
    assert isinstance(ask(world, "remove", replica=0).error, MemberError)
    # The news of processes that were built for it before comes too late, even to another coordinator.
    world.kill(world.host)
    assert world.run(lambda: world.is_healthy)
    late = ask(world, "add", members=[m for m in MEMBERS if m.replica == 1], key="late", dead=True)
    assert isinstance(late.error, MemberError) and not world.host.protocol.fenced
    assert push(world).version == 2


def test_a_replica_that_is_added_holds_the_committed_version_before_it_serves() -> None:
    world = start()
    push(world)
    members = [MemberId(replica=2, rank=rank) for rank in range(2)]
    for member in members:
        world.ranks[member] = world.new_rank(member)
    world.announce(members)
    check_quiet(world, 2)
    assert push(world, "q").version == 3
    check_quiet(world, 3)


def loses_everything() -> World:
    """The only replica died after a commit, and came back with what it loads by itself."""
    world = start(replicas=1)
    push(world)
    world.kill(world.ranks[MEMBERS[0]])
    assert world.run(lambda: lost(world.host.protocol))
    return world


def test_once_nobody_holds_the_committed_version_a_part_of_the_next_is_refused_and_all_of_it_goes_on() -> None:
    world = loses_everything()
    assert not world.ranks[MEMBERS[0]].serves(world.now_s)
    error = push(world, "part", [0]).error
    assert isinstance(error, VersionError)
    assert "only a full push" in str(error)
    assert isinstance(rollback(world, 1).error, VersionError)
    assert push(world, "all").version == 3
    check_quiet(world, 3)


def test_once_nobody_holds_the_committed_version_a_reset_goes_back_to_a_stored_one() -> None:
    world = loses_everything()
    assert isinstance(rollback(world, 1, "reset").error, VersionError)  # nobody stored it
    assert world.run(lambda: lost(world.host.protocol))
    world.disk.stored[1] = world.disk.contents[1]
    assert rollback(world, 1, "reset").result["version"] == 3
    check_quiet(world, 3)
    assert world.disk.contents[3] == world.disk.contents[1]


def test_a_trainer_whose_answer_died_with_the_coordinator_learns_that_its_push_was_decided() -> None:
    world = start()
    trainer = Trainer(world, "p", everything())
    trainer.begin()
    assert world.run(lambda: world.host.protocol.phase is Phase.PUBLISHING)
    world.kill(world.host)
    assert world.run(lambda: trainer.ended)
    assert trainer.version == 2
    check_quiet(world, 2)
