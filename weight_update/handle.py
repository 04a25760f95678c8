"""A push that goes on by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from .report import PushReport


class PushHandle:
    """A push under way. The trainer may change its weights from the moment it has this: what is sent was encoded
    before."""

    def __init__(self, run: Callable[[], PushReport], cancel: Callable[[], None]) -> None:
        self._future: Future[PushReport] = Future()
        self._cancel = cancel
        self._thread = threading.Thread(target=self._run, args=(run,), name="push", daemon=True)
        self._thread.start()

    def _run(self, run: Callable[[], PushReport]) -> None:
        try:
            self._future.set_result(run())
        except BaseException as error:
            self._future.set_exception(error)

    def done(self) -> bool:
        """Whether the push is over, well or not."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> PushReport:
        """Wait for the report; raises what the push raised, or TimeoutError."""
        return self._future.result(timeout_s)

    def wait(self) -> None:
        """Wait until the push is over; raises nothing."""
        self._future.exception()

    def cancel(self) -> None:
        """Give up unless the commit was asked for already; `result` then raises. Returns at once."""
        self._cancel()
