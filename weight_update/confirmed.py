"""The last push that the service confirmed, as one trainer rank remembers it: version, digest, and its bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from protos import transfuse_pb2 as pb

from .base import Base, Changes, Whole

if TYPE_CHECKING:
    from .attempt import Attempt


class Confirmed:
    """version, digest: 0 and "" before the first one. base: its bytes, None where they are not here; why: the reason
    for that."""

    def __init__(self) -> None:
        self.version, self.digest = 0, ""
        self.base: Base | None = None
        self.why = "this trainer has pushed nothing yet"

    @property
    def num_bytes(self) -> int:
        """Memory that it takes here."""
        return 0 if self.base is None else self.base.num_bytes

    def state_dict(self) -> dict[str, Any]:
        """No weights."""
        return {"version": self.version, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Of the run that this one goes on with."""
        self.version, self.digest = int(state["version"]), str(state["digest"])
        self.base = None
        self.why = f"this run was resumed after version {self.version} and does not hold its bytes"

    def commit(self, attempt: Attempt, info: pb.VersionInfo) -> None:
        """A commit is certain: what was sent is what the service holds."""
        carried = self.base
        if carried is not None and carried.digest != attempt.described.digest:
            carried = None  # of a version that this push does not build on
        self.base = attempt.content.confirmed(carried, info.version, info.digest)
        self.version, self.digest = info.version, info.digest

    def differs(self, described: pb.DescribeReply) -> str:
        """Why no delta can build on what the service holds; "" where one can."""
        if self.base is None:
            return self.why
        if self.base.digest != described.digest:
            held = f"the service holds version {described.version} of digest {described.digest}"
            return f"{held}, the last confirmed push of this trainer was version {self.base.version}"
        return ""

    def whole_of(self, changes: Changes) -> Whole:
        """The same push in full; the base becomes what it sends, so that no second copy of the weights is made."""
        self.base, self.why = None, "the last push did not end well"
        return Whole.of(changes)
