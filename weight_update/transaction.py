"""The one open transaction as the coordinator sees it: its kinds, its phases, and which round leads to which.

push        a trainer's bytes become the next version
rollback    bytes that every member keeps become the next version
join        the committed version comes to a replica that lacks it; no new version
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .digest import Digests, total, unlike
from .errors import DigestError, WeightUpdateError
from .manifest import Manifest
from .messages import Decision, Kept, MemberId, Source

MAX_PROBLEMS = 20  # mismatching tensors named in one digest error


class Kind(enum.Enum):
    """What a transaction is for."""

    PUSH = "push"
    ROLLBACK = "rollback"
    JOIN = "join"


MEANT: Mapping[Kind, str] = {
    Kind.PUSH: "what the trainer meant to send",
    Kind.ROLLBACK: "those that were recorded when that version was decided",
    Kind.JOIN: "those of the committed version",
}
RETRY: Mapping[Kind, str] = {
    Kind.PUSH: "push again",
    Kind.ROLLBACK: "choose another version",
    Kind.JOIN: "it is tried again",
}


class Phase(enum.Enum):
    """Where the one open transaction stands."""

    IDLE = "idle"
    JOINING = "joining"
    OPENING = "opening"
    OPEN = "open"
    PREPARING = "preparing"
    PREPARED = "prepared"
    WAITING = "waiting"  # for fenced replicas to stop serving for certain
    INSTALLING = "installing"
    INSTALLED = "installed"
    CONFIRMING = "confirming"
    DECIDING = "deciding"
    PUBLISHING = "publishing"
    UNDOING = "undoing"
    ABORTING = "aborting"


@dataclass(slots=True, kw_only=True)
class Transaction:
    """The one open transaction, in the order of its `tensors`.

    base: digests of all that the members hold before it. digests: of the tensors that it brings.
    """

    id: int
    kind: Kind
    members: tuple[MemberId, ...]
    version: int
    base_version: int
    push_id: str
    pushed_by: str
    since_s: float
    tensors: np.ndarray
    base: Digests
    lease_s: float = 60.0
    logical_bytes: int = 0
    num_streams: int = 1
    step: int = 0
    source: Source = None
    digests: Digests | None = None
    wire_bytes: int = 0
    decide: bool = False  # go on to the decision once installed
    touched: bool = False  # an install began: some rank may be paused and hold new bytes
    failure: WeightUpdateError | None = None
    decision: Decision | None = None
    callers: list[int] = field(default_factory=list)
    results: dict[str, dict[MemberId, object]] = field(default_factory=dict)
    held: dict[MemberId, int] = field(default_factory=dict)  # of a join: the version of each rank, once resolved
    undone: dict[MemberId, int] = field(default_factory=dict)  # of a join: what ranks hold open and nobody decided
    is_empty: bool = False  # of a join: a rank was built to be filled, its bytes are nobody's
    stock: Digests | None = None  # of a join that found no donor: what the replica holds

    @property
    def replicas(self) -> set[int]:
        return {member.replica for member in self.members}

    def decided(self, now_s: float) -> Decision:
        """The durable record of this transaction, everything that it does not bring carried over."""
        assert self.digests is not None
        digests = self.base.copy()
        digests[self.tensors] = self.digests
        return Decision(
            version=self.version,
            base_version=self.base_version,
            transaction=self.id,
            push_id=self.push_id,
            pushed_by=self.pushed_by,
            created_s=now_s,
            digest=total(digests),
            digests=digests,
            num_tensors=len(self.tensors),
            wire_bytes=self.wire_bytes,
            logical_bytes=self.logical_bytes,
            seconds=now_s - self.since_s,
            step=self.step,
            restores=self.source.version if isinstance(self.source, Kept) else 0,
        )

    def mismatch(
        self, round_name: str, what: str, manifest: Manifest, held: Callable[[int, Manifest], np.ndarray]
    ) -> DigestError | None:
        """Tensors, by replica, whose digests are not those that were meant. held: which tensors of the manifest a
        replica holds; of others it has no rows."""
        assert self.digests is not None
        problems = []
        for replica, digests in replica_sums(self.results[round_name]).items():
            meant = of_held(self.digests, held(replica, manifest)[self.tensors])
            differs = np.flatnonzero(unlike(digests, meant))
            problems += [f"replica {replica}: {manifest.tensors[self.tensors[i]].name}" for i in differs[:MAX_PROBLEMS]]
        if not problems:
            return None
        listed = "\n".join(f"  - {problem}" for problem in problems)
        told = f"the {what} bytes are not {MEANT[self.kind]}:\n{listed}\n  nothing was changed; {RETRY[self.kind]}"
        return DigestError(told)


@dataclass(slots=True, kw_only=True)
class Round:
    """The answer of every member to one step."""

    name: str
    id: int
    waiting: set[MemberId]
    failed: dict[MemberId, WeightUpdateError] = field(default_factory=dict)


# round -> phase while members answer, phase once all did; a join stays JOINING all along
ROUNDS: Mapping[str, tuple[Phase, Phase]] = {
    "reach": (Phase.OPENING, Phase.OPENING),
    "open": (Phase.OPENING, Phase.OPEN),
    "prepare": (Phase.PREPARING, Phase.PREPARED),
    "install": (Phase.INSTALLING, Phase.INSTALLED),
    "confirm": (Phase.CONFIRMING, Phase.INSTALLED),
    "publish": (Phase.PUBLISHING, Phase.IDLE),
    "adopt": (Phase.JOINING, Phase.JOINING),
    "undo": (Phase.UNDOING, Phase.ABORTING),
    "abort": (Phase.ABORTING, Phase.IDLE),
    "resolve": (Phase.JOINING, Phase.JOINING),
    "settle": (Phase.JOINING, Phase.JOINING),
    "digest": (Phase.JOINING, Phase.JOINING),
}

# rounds that speak of the transaction's tensors
TOLD = frozenset({"open", "prepare", "install"})

# rounds after which there is no way but on: whoever fails is fenced
ONE_WAY = frozenset({"publish", "undo", "abort"})

# request -> phases in which it makes sense; what opens a transaction says by itself who is in the way
ALLOWED: Mapping[str, frozenset[Phase]] = {
    "begin": frozenset(Phase),
    "rollback": frozenset(Phase),
    "reset": frozenset(Phase),
    "add": frozenset(Phase),
    "remove": frozenset(Phase),
    "prepare": frozenset({Phase.OPEN, Phase.PREPARING, Phase.PREPARED}),
    "install": frozenset({Phase.PREPARED}),
    "decide": frozenset({Phase.PREPARED, Phase.INSTALLED}),
    "abort": frozenset(
        {
            Phase.OPENING,
            Phase.OPEN,
            Phase.PREPARING,
            Phase.PREPARED,
            Phase.WAITING,
            Phase.INSTALLING,
            Phase.INSTALLED,
        }
    ),
}

# phases that a lapsed lease ends: nobody but the trainer can carry them on, and no decision was made
LEASED = frozenset({Phase.OPEN, Phase.PREPARED, Phase.INSTALLED})


def of_held(digests: Digests, held: np.ndarray) -> Digests:
    """The digests of a replica that holds only some of the tensors: zeros for the others, whose rows it lacks."""
    return np.where(held[:, None], digests, np.uint64(0))


def replica_sums(results: Mapping[MemberId, object]) -> dict[int, Digests]:
    """Add up the digests of each replica's ranks, mod 2^64."""
    sums: dict[int, Digests] = {}
    for member, digests in results.items():
        assert isinstance(digests, np.ndarray)
        sums[member.replica] = sums[member.replica] + digests if member.replica in sums else digests
    return sums
