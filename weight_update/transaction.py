"""The one open transaction as the coordinator sees it: its phases, and which step leads from one to the next."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .digest import Digests
from .errors import WeightUpdateError
from .messages import Decision, MemberId


class Phase(enum.Enum):
    """Where the one open transaction stands."""

    IDLE = "idle"
    OPENING = "opening"
    OPEN = "open"
    PREPARING = "preparing"
    PREPARED = "prepared"
    INSTALLING = "installing"
    INSTALLED = "installed"
    CONFIRMING = "confirming"
    DECIDING = "deciding"
    PUBLISHING = "publishing"
    UNDOING = "undoing"
    ABORTING = "aborting"


@dataclass(slots=True, kw_only=True)
class Transaction:
    """The one open push, in the order of its `tensors`."""

    id: int
    version: int
    base_version: int
    push_id: str
    pushed_by: str
    since_s: float
    lease_s: float
    logical_bytes: int
    tensors: np.ndarray
    num_streams: int = 1
    digests: Digests | None = None
    wire_bytes: int = 0
    decide: bool = False  # go on to the decision once installed
    touched: bool = False  # an install began: some rank may be paused and hold new bytes
    failure: WeightUpdateError | None = None
    decision: Decision | None = None
    callers: list[int] = field(default_factory=list)
    results: dict[str, dict[MemberId, object]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """The answer of every member to one step."""

    step: str
    waiting: frozenset[MemberId]
    failed: Mapping[MemberId, WeightUpdateError]


# step of a round -> phase while members answer, phase once all did
ROUNDS: Mapping[str, tuple[Phase, Phase]] = {
    "open": (Phase.OPENING, Phase.OPEN),
    "prepare": (Phase.PREPARING, Phase.PREPARED),
    "install": (Phase.INSTALLING, Phase.INSTALLED),
    "confirm": (Phase.CONFIRMING, Phase.INSTALLED),
    "publish": (Phase.PUBLISHING, Phase.IDLE),
    "undo": (Phase.UNDOING, Phase.ABORTING),
    "abort": (Phase.ABORTING, Phase.IDLE),
}

# request -> phases in which it makes sense
ALLOWED: Mapping[str, frozenset[Phase]] = {
    "begin": frozenset(Phase),
    "prepare": frozenset({Phase.OPEN}),
    "install": frozenset({Phase.PREPARED}),
    "decide": frozenset({Phase.PREPARED, Phase.INSTALLED}),
    "abort": frozenset({Phase.OPENING, Phase.OPEN, Phase.PREPARING, Phase.PREPARED, Phase.INSTALLING, Phase.INSTALLED}),
}

# phases that a lapsed lease ends: nobody but the trainer can carry them on, and no decision was made
LEASED = frozenset({Phase.OPEN, Phase.PREPARED, Phase.INSTALLED})


def replica_sums(results: Mapping[MemberId, object]) -> dict[int, Digests]:
    """Add up the digests of each replica's ranks, mod 2^64."""
    sums: dict[int, Digests] = {}
    for member, digests in results.items():
        assert isinstance(digests, np.ndarray)
        sums[member.replica] = sums[member.replica] + digests if member.replica in sums else digests
    return sums
