"""How commands that start processes end: by Ctrl-C or SIGTERM, through their own clean-up, which nothing cuts short."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

from service.fleet import Fleet

SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_S = 2.0


def raise_interrupts() -> None:
    """Make a signal a KeyboardInterrupt, raised again every two seconds until `hold_interrupts`.

    Again, since one that lands in a destructor or a callback from C is printed and lost. Call this once more when Ray
    is up: Ray's own handler of SIGTERM aborts the process, and its children stay.
    """
    for each in (*SIGNALS, signal.SIGALRM):
        signal.signal(each, _interrupt)


def hold_interrupts() -> None:
    """Ignore signals from here on: the clean-up has begun."""
    signal.setitimer(signal.ITIMER_REAL, 0.0)
    for each in (*SIGNALS, signal.SIGALRM):
        signal.signal(each, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    signal.setitimer(signal.ITIMER_REAL, REPEAT_S)
    raise KeyboardInterrupt


class ForegroundFleet(Fleet):
    """A fleet whose stop an impatient second Ctrl-C does not interrupt."""

    def stop(self) -> None:
        hold_interrupts()
        super().stop()
