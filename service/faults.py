"""Planned failures, for tests and drills: a rank, or the coordinator, can be told to fail at a named point.

Points are armed through the process's Ray actor, never over the network. An armed point fires once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weight_update.errors import MemberError

STALL_S = 30.0  # an end to stalls that nobody releases

# of a rank: its steps, `installed` once the bytes are in place. Of the coordinator: the steps that it asks members for,
# `decide` before the durable record is written, `decided` after.
POINTS = (
    "open", "stage", "prepare", "install", "installed", "confirm", "decide", "decided", "publish", "undo", "abort",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What happens at a point. skip: how often the point is passed before."""

    action: str
    skip: int = 0


class Faults:
    """The armed points of one process."""

    def __init__(self) -> None:
        self._guard = threading.Lock()  # guards _armed; nothing blocks under it
        self._armed: dict[str, Plan] = {}
        self._released = threading.Event()
        self.stalled = ""  # the point where a thread stands still

    def arm(self, point: str, action: str, skip: int = 0) -> None:
        """Do `action` when `point` is reached the next time but `skip`."""
        if point not in POINTS or action not in ACTIONS:
            raise ValueError(f"fault {point!r}: {action!r}; points {', '.join(POINTS)}, actions {', '.join(ACTIONS)}")
        with self._guard:
            self._released.clear()
            self._armed[point] = Plan(action=action, skip=skip)

    def release(self) -> None:
        """Forget what is armed; whoever stalls goes on."""
        with self._guard:
            self._armed.clear()
            self._released.set()

    def reached(self, point: str) -> None:
        """Fail here if `point` is armed."""
        if not self._armed:
            return
        with self._guard:
            plan = self._armed.pop(point, None)
            if plan is None:
                return
            if plan.skip:
                self._armed[point] = Plan(action=plan.action, skip=plan.skip - 1)
                return
        ACTIONS[plan.action](self, point)

    def _raise(self, point: str) -> None:
        raise MemberError(f"planned failure at {point}; it was armed by a test or drill")

    def _kill(self, point: str) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _stall(self, point: str) -> None:
        self.stalled = point
        self._released.wait(STALL_S)
        self.stalled = ""


ACTIONS: Mapping[str, Callable[[Faults, str], None]] = {
    "raise": Faults._raise,
    "kill": Faults._kill,
    "stall": Faults._stall,
}
