"""The disk of the coordinator and the version store: what survives any crash, and how writes fail."""

from __future__ import annotations

from dataclasses import dataclass, field

from weight_update.errors import MemberError
from weight_update.messages import Decision, MemberId

from .ranks import Content


class Superseded(Exception):
    """Another coordinator has opened the disk since."""


@dataclass(slots=True, kw_only=True)
class Disk:
    """Decisions in order; who is a member, and by which processes (keys); how often it was opened.

    contents: what each decided version is, which only the checks know. stored: versions in the store, whole.
    epoch_is_ignored: a planted bug.
    """

    members: list[MemberId]
    decisions: list[Decision] = field(default_factory=list)
    epoch: int = 0
    contents: dict[int, Content] = field(default_factory=dict)
    stored: dict[int, Content] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)
    dismissed: set[int] = field(default_factory=set)
    failing_writes: int = 0
    epoch_is_ignored: bool = False

    def open(self) -> int:
        self.epoch += 1
        return self.epoch

    def require(self, epoch: int) -> None:
        """Writes of a coordinator that was replaced do not happen."""
        if epoch != self.epoch and not self.epoch_is_ignored:
            raise Superseded

    def decide(self, decision: Decision, epoch: int) -> None:
        self.require(epoch)
        if self.failing_writes:
            self.failing_writes -= 1
            raise MemberError("the disk is full")
        self.decisions.append(decision)
