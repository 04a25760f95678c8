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
    now_s, ranks, serving = world.now_s, world.ranks.values(), {}  # serving: replica -> version
    for rank in ranks:
        if rank.staging is not None and rank.member.state == "idle":
            raise Broken(f"{rank}: idle, and something is staged")
        if rank.leads and rank.serves(now_s):
            serving[rank.id.replica] = rank.member.version
    if len(versions := set(serving.values())) > 1:
        raise Broken(f"a mixed fleet serves versions {sorted(versions)}")
    if len(world.disk.decisions) != world.num_checked:
        _check_decisions(world)
    for version in versions:
        if version not in world.disk.contents:
            raise Broken(f"replicas {sorted(serving)} serve version {version}, which nobody decided")
        for rank in ranks:
            if rank.id.replica in serving and rank.rows != world.expected(rank, version):
                raise Broken(f"{rank}: its replica serves version {version}, and it holds other bytes")


def _check_decisions(world: World) -> None:
    """Records never change and are only added: looked at when there are more of them."""
    decisions = world.disk.decisions
    numbers = [each.version for each in decisions]
    if numbers != list(range(1, len(numbers) + 1)):
        raise Broken(f"decisions {numbers}: a version was decided twice, or reversed")
    if len({each.push_id for each in decisions}) < len(numbers):
        raise Broken("a push was decided twice")
    world.num_checked = len(decisions)


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
