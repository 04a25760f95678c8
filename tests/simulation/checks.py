"""What must hold after every event, and the planted bugs that break it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weight_update.membership import Membership
from weight_update.messages import Action
from weight_update.protocol import Coordinator

if TYPE_CHECKING:
    from .world import Bugs, World


class Broken(AssertionError):
    """Something that must hold does not."""


def check(world: World) -> None:
    """After every event."""
    versions: set[int] = set()
    for member, leader in world.ranks.items():
        if member.rank == 0 and leader.serves(world.now_s):
            versions.add(leader.member.version)
            _serves_one_version(world, member.replica, leader.member.version)
    if len(versions) > 1:
        raise Broken(f"a mixed fleet serves versions {sorted(versions)}")
    numbers = [each.version for each in world.disk.decisions]
    if numbers != list(range(1, len(numbers) + 1)):
        raise Broken(f"decisions {numbers}: a version was decided twice, or reversed")
    if len({each.push_id for each in world.disk.decisions}) < len(numbers):
        raise Broken("a push was decided twice")
    for rank in world.ranks.values():
        if rank.member.state == "idle" and rank.staging is not None:
            raise Broken(f"{rank}: idle, and something is staged")


def _serves_one_version(world: World, replica: int, version: int) -> None:
    """A version that is served was decided, and every rank of the replica holds its bytes."""
    if version not in world.disk.contents:
        raise Broken(f"replica {replica} serves version {version}, which nobody decided")
    for member, rank in world.ranks.items():
        if member.replica == replica and rank.rows != world.expected(rank, version):
            raise Broken(f"{rank}: its replica serves version {version}, and it holds other bytes")


def check_outcome(world: World, push_id: str, version: int | None) -> None:
    """What a trainer was told of its push is so."""
    decided = {each.push_id: each.version for each in world.disk.decisions}
    if version is not None and decided.get(push_id) != version:
        raise Broken(f"push {push_id}: told version {version}, decided {decided.get(push_id)}")


# ---------------------------------------------------------------- planted bugs


class DecidesEarly(Coordinator):
    """Goes on once the first replica has installed."""

    def ask(self, name: str, sends: Any) -> list[Action]:
        first = [send for send in sends if name != "install" or send.member.replica == sends[0].member.replica]
        return [*super().ask(name, first), *(send for send in sends if send not in first)]


class Unfenced(Membership):
    """Believes that whoever is fenced serves no more."""

    def silent_at(self) -> float:
        return float("-inf")


class LeaseIsNotFenced(Coordinator):
    """Installs while a fenced replica may still serve."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.membership.__class__ = Unfenced


def planted(bugs: Bugs) -> type[Coordinator]:
    """The coordinator with its bugs."""
    if bugs.decides_early:
        return DecidesEarly
    return LeaseIsNotFenced if bugs.lease_is_not_fenced else Coordinator


__all__ = ["Broken", "check", "check_outcome", "planted"]
