"""Planned failures, for tests and drills: a rank can be told to fail at a named point of the protocol.

Points are armed through the rank's Ray actor, never over the network. An armed point fires once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

from weight_update.errors import MemberError


def _raise(point: str) -> None:
    raise MemberError(f"planned failure at {point}; it was armed by a test or drill")


def _kill(point: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS: Mapping[str, Callable[[str], None]] = {"raise": _raise, "kill": _kill}
POINTS = ("open", "stage", "prepare", "install", "installed", "confirm", "publish", "undo", "abort")


class Faults:
    """The armed points of one rank."""

    def __init__(self) -> None:
        self._armed: dict[str, str] = {}

    def arm(self, point: str, action: str) -> None:
        """Fail with `action` the next time that `point` is reached."""
        if point not in POINTS or action not in ACTIONS:
            raise ValueError(f"fault {point!r}: {action!r}; points {', '.join(POINTS)}, actions {', '.join(ACTIONS)}")
        self._armed[point] = action

    def reached(self, point: str) -> None:
        """Fail here if `point` is armed."""
        action = self._armed.pop(point, None)
        if action is not None:
            ACTIONS[action](point)
