"""How commands that start processes end: by the first Ctrl-C or SIGTERM, through their own clean-up."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def interrupt_once() -> None:
    """Make the first signal a KeyboardInterrupt and ignore later ones, so that nobody cuts the clean-up short.

    Call it again once Ray is up: Ray's own handler of SIGTERM aborts the process, and its children stay.
    """
    for each in SIGNALS:
        signal.signal(each, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt
