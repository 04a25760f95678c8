"""What goes into the protocol's state machines and what comes out: events and actions, all values.

Those of which there are many are named tuples, which are made and hashed several times faster than frozen dataclasses:
the simulation makes billions. All are made with keywords.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .delta import DeltaPlan
from .digest import Digests
from .errors import WeightUpdateError

# ---------------------------------------------------------------- events


class MemberId(NamedTuple):
    """One rank of one replica."""

    replica: int
    rank: int

    def __str__(self) -> str:
        return f"replica {self.replica} rank {self.rank}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A call from a trainer or an operator; `id` names the call that the answer goes to."""

    id: int
    op: str
    now_s: float
    args: Mapping[str, object]


class MemberState(NamedTuple):
    """What a member says of itself when it is greeted. serves: it answers requests, or may begin to by itself."""

    state: str
    transaction: int
    version: int
    serves: bool
    kept: tuple[int, ...] = ()


class MemberReply(NamedTuple):
    """A member's answer to one `Send`; `error` when it failed or did not answer in time.

    round: of the `Send`. token: the member's own clock when it answered; the next `Send` brings it back.
    """

    member: MemberId
    step: str
    round: int
    now_s: float
    token: float = float("-inf")
    result: object = None
    error: WeightUpdateError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time goes by: greet the members, notice who is gone, let in who is back."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeout:
    """A timer set by `SetTimer` ran out."""

    name: str
    transaction: int
    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Persisted:
    """The outcome of `Persist`: durable, or certainly not (`error`)."""

    transaction: int
    now_s: float
    error: WeightUpdateError | None = None


Event = Request | MemberReply | Timeout | Persisted | Tick

# ---------------------------------------------------------------- what a transaction's bytes are made of


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A version that members can restore by themselves: from what later commits overwrote, or from a store."""

    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Donor:
    """A serving replica, whose ranks give their rows away."""

    replica: int


Source = DeltaPlan | Kept | Donor | None

# ---------------------------------------------------------------- actions


class Send(NamedTuple):
    """One step of the protocol to one member; the shell answers with a `MemberReply`.

    epoch, round: the coordinator's, and a number that grows with every batch of sends: a member takes nothing from an
    older epoch, and no right to serve from an older round. token: see `MemberReply`. base_version: 0 stands for
    whatever the member holds. tensors: of the transaction, all of them; the member is told of its own. source: where
    the bytes come from, None for a trainer's streams of whole tensors, a plan for its streams of changes.
    """

    member: MemberId
    step: str
    epoch: int
    round: int
    transaction: int
    version: int
    base_version: int = 0
    tensors: np.ndarray | None = None
    num_streams: int = 1
    source: Source = None
    token: float = float("-inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to `Request.id`: a result, or an error."""

    id: int
    result: object = None
    error: WeightUpdateError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The durable record of a commit: a complete version."""

    version: int
    base_version: int
    transaction: int
    push_id: str
    pushed_by: str
    created_s: float
    digest: str
    digests: Digests
    num_tensors: int
    wire_bytes: int
    logical_bytes: int
    seconds: float
    step: int = 0  # the trainer's own count, as it gave it
    restores: int = 0  # the version whose bytes these are, of a rollback


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Make the decision durable, the commit point; the shell answers with `Persisted`."""

    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTimer:
    """Send a `Timeout` after `delay_s`, unless a later timer of the same name replaces it."""

    name: str
    transaction: int
    delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Notify:
    """Something that an operator wants to see."""

    kind: str
    version: int
    transaction: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dismiss:
    """A replica is no member any more: forget it, durably, before what follows."""

    replica: int


Action = Send | Reply | Persist | SetTimer | Notify | Dismiss
