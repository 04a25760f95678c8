"""Who takes part: replicas that serve, that are let in, or that are fenced; what each rank said last, and when.

    FENCED -all ranks answer, and a slot is free-> JOINING -filled, verified, published-> SERVING
       ^------------------------- a rank fails or falls silent --------------------------/

The unit is the replica: one rank that is gone takes its replica with it. A fenced replica may serve on for a while,
where it cannot be told: `silent_s` says when it surely does not any more, and nothing is installed elsewhere before.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .digest import Digests
from .errors import MemberError
from .member import SERVING_LEASE_S
from .messages import MemberId, MemberReply, MemberState

MAX_MISSED = 3  # greetings in a row without an answer, after which a replica is fenced
RETRY_S = 2.0  # after a join that failed


class Standing(enum.Enum):
    """What a replica may do."""

    FENCED = "fenced"
    JOINING = "joining"
    SERVING = "serving"


@dataclass(slots=True, kw_only=True)
class Contact:
    """What one rank said last."""

    heard_s: float = float("-inf")
    token: float = float("-inf")
    missed: int = 0
    round: int = 0  # of the greeting that `state` answers
    state: MemberState | None = None


@dataclass(slots=True, kw_only=True)
class Replica:
    """One full copy of the model over several ranks.

    key: of its processes. silent_s: when it surely serves no more, on the coordinator's clock; says something of fenced
    ones only. round: of the first greeting after it was fenced, older answers say nothing. stock: digests of all that
    it holds, where that is no version. leaving: calls to be answered once it is gone.
    """

    members: tuple[MemberId, ...]
    key: str = ""
    standing: Standing = Standing.FENCED
    reason: str = "not heard from yet"
    silent_s: float = float("-inf")
    round: int = 0
    retry_s: float = float("-inf")
    stock: Digests | None = None
    leaving: list[int] = field(default_factory=list)

    @property
    def leader(self) -> MemberId:
        return self.members[0]


class Membership:
    """The replicas of a service, and what is known of each. dismissed: numbers that never come back, however late
    somebody announces new processes of theirs."""

    def __init__(
        self, members: Iterable[MemberId], now_s: float, keys: Mapping[int, str], dismissed: Iterable[int] = ()
    ) -> None:
        self.replicas: dict[int, Replica] = {}
        self.dismissed = set(dismissed)
        self.contacts: dict[MemberId, Contact] = {}
        by_replica: dict[int, list[MemberId]] = {}
        for member in members:
            by_replica.setdefault(member.replica, []).append(member)
        for ranks in by_replica.values():
            # An earlier coordinator may have let it serve until just now.
            self.add(ranks, silent_s=now_s + SERVING_LEASE_S, key=keys.get(ranks[0].replica, ""))

    def add(self, ranks: Sequence[MemberId], *, silent_s: float, key: str = "", round: int = 0) -> None:
        """A new replica, or one that was rebuilt: nothing that was known of its ranks holds."""
        members = tuple(sorted(ranks, key=lambda member: member.rank))
        self.replicas[members[0].replica] = Replica(members=members, key=key, silent_s=silent_s, round=round)
        self.contacts |= {member: Contact() for member in members}

    def require_open(self, replica: int) -> None:
        """MemberError for a number that was dismissed."""
        if replica in self.dismissed:
            raise MemberError(f"replica {replica} was removed; 'transfuse replica add' starts one of another number")

    def drop(self, replica: int) -> list[int]:
        """Forget a replica, for good; returns the calls that wait for that."""
        gone = self.replicas.pop(replica)
        self.dismissed.add(replica)
        for member in gone.members:
            del self.contacts[member]
        return gone.leaving

    def taken(self) -> set[int]:
        """Numbers that no new replica may have."""
        return self.replicas.keys() | self.dismissed

    @property
    def members(self) -> list[MemberId]:
        """Every rank of every replica."""
        return list(self.contacts)

    @property
    def fenced(self) -> dict[int, str]:
        """Replica -> why it does not serve."""
        return {number: each.reason for number, each in self.replicas.items() if each.standing is not Standing.SERVING}

    def serving(self) -> list[int]:
        """Replicas that serve the committed version."""
        return [number for number, each in self.replicas.items() if each.standing is Standing.SERVING]

    def ranks(self, replicas: Iterable[int]) -> tuple[MemberId, ...]:
        """All ranks of these replicas."""
        return tuple(member for number in replicas for member in self.replicas[number].members)

    def state(self, member: MemberId) -> MemberState:
        """What a rank that was heard said of itself."""
        state = self.contacts[member].state
        assert state is not None
        return state

    # -- what is heard

    def heard(self, reply: MemberReply) -> None:
        """Take note of an answer, to a greeting or to a step."""
        contact = self.contacts.get(reply.member)
        if contact is None:
            return
        contact.missed = 0
        contact.heard_s = max(contact.heard_s, reply.now_s)
        contact.token = max(contact.token, reply.token)
        replica = self.replicas[reply.member.replica]
        if isinstance(reply.result, MemberState) and reply.round >= max(contact.round, replica.round):
            contact.round, contact.state = reply.round, reply.result
            # Only the leader answers requests; every greeting asks it to stop while its replica is fenced.
            if reply.member == replica.leader and replica.standing is Standing.FENCED and not reply.result.serves:
                replica.silent_s = min(replica.silent_s, reply.now_s)

    def missed(self, member: MemberId) -> None:
        """A greeting went unanswered."""
        contact = self.contacts.get(member)
        if contact is not None:
            contact.missed += 1
            contact.state = None
            self.replicas[member.replica].stock = None

    def gone(self) -> list[MemberId]:
        """Ranks that have not answered for long, one of each replica that is not fenced for it."""
        found = {m.replica: m for m, contact in self.contacts.items() if contact.missed >= MAX_MISSED}
        return [m for m in found.values() if self.follows(m)]

    # -- what is decided

    def fence(self, replica: int, reason: str, round: int) -> bool:
        """Take a replica out; False where it is out already. round: of the next greeting."""
        each = self.replicas.get(replica)
        if each is None or each.standing is Standing.FENCED:
            return False
        each.standing, each.reason, each.stock, each.round = Standing.FENCED, reason, None, round
        # Its lease runs from a token that came with an answer heard by then at the latest.
        each.silent_s = self.contacts[each.leader].heard_s + SERVING_LEASE_S
        for member in each.members:
            self.contacts[member].state = None
        return True

    def turn_away(self, replica: int, reason: str, round: int, now_s: float, stock: Digests | None) -> None:
        """A replica that was to come in did not; it is tried again later."""
        each = self.replicas.get(replica)
        if each is not None and each.standing is Standing.JOINING:
            self.fence(replica, reason, round)
            each.retry_s, each.stock = now_s + RETRY_S, stock

    def serve(self, replica: int) -> None:
        """A replica that came in serves."""
        each = self.replicas.get(replica)
        if each is not None and each.standing is Standing.JOINING:
            each.standing, each.reason = Standing.SERVING, ""
            for other in self.replicas.values():
                other.stock = None  # there is a donor now

    def follows(self, member: MemberId) -> bool:
        """Whether a member takes part in the open transaction still."""
        each = self.replicas.get(member.replica)
        return each is not None and each.standing is not Standing.FENCED

    def silent_at(self) -> float:
        """When no fenced replica serves any more."""
        fenced = [each.silent_s for each in self.replicas.values() if each.standing is Standing.FENCED]
        return max(fenced, default=float("-inf"))

    def joinable(self, now_s: float) -> int | None:
        """A fenced replica whose ranks all answer and none of which serves."""
        for number, each in self.replicas.items():
            heard = all(self.contacts[member].state is not None for member in each.members)
            due = each.standing is Standing.FENCED and each.silent_s <= now_s and each.retry_s <= now_s
            if heard and due and each.stock is None and not each.leaving:
                return number
        return None

    def stocked(self) -> list[int]:
        """Replicas that answer, hold no version, and found nobody to take it from."""
        return [number for number, each in self.replicas.items() if each.stock is not None]


def shared(kept: Mapping[MemberId, Iterable[int]]) -> list[int]:
    """The versions that every member keeps."""
    sets = [set(versions) for versions in kept.values()]
    return sorted(set.intersection(*sets)) if sets else []


def key_of(members: Mapping[MemberId, str], replica: int) -> str:
    """What tells the processes of a replica from those before them."""
    ranks = sorted((member.rank, address) for member, address in members.items() if member.replica == replica)
    return ",".join(address for _, address in ranks)
