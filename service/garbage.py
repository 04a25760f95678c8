"""Python's garbage collector, kept out of the way where all that is made stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No collection meanwhile, and none afterwards looks at what is there by then. Imports and the building of a model
    make a million objects that live as long as their process, and every collection would look at them again: a sixth of
    the time in which a rank starts."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
