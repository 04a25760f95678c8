"""Ctrl-C reaches a command even where its first KeyboardInterrupt is lost, and never its clean-up."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from launch.interrupts import REPEAT_S, SIGNALS, hold_interrupts, raise_interrupts


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {each: signal.getsignal(each) for each in (*SIGNALS, signal.SIGALRM)}
    yield
    hold_interrupts()
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_lost_interrupt_is_raised_again(number: int) -> None:
    raise_interrupts()
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), number)
        time.sleep(1.0)
    with pytest.raises(KeyboardInterrupt):
        time.sleep(3 * REPEAT_S)


def test_clean_up_is_not_interrupted() -> None:
    raise_interrupts()
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)
    hold_interrupts()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.2 * REPEAT_S)
