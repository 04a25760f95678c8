"""The step boundary: how the rank server stops whatever runs a model between two steps, and lets it go on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from service.engine import CommitBetween
from service.work import Stream
from weight_update.errors import BusyError, MemberError

log = logging.getLogger(__name__)


class Boundary(Protocol):
    """What the rank server asks of an engine; service.engine.Engine is one, Foreign another.

    state: serving, paused, stopped, or "failed: reason". While it is paused nothing reads or writes the weights.
    """

    commit_between: CommitBetween

    @property
    def rpc(self) -> str:
        """The call of the Generation service that this engine answers."""

    @property
    def state(self) -> str: ...

    @property
    def num_sequences(self) -> int: ...

    def warm_up(self) -> None:
        """Compile what must be before the first request."""

    def request_pause(self) -> int:
        """Ask for a pause at the next boundary, and return. Idempotent."""

    def wait_paused(self, timeout: float | None = None) -> bool:
        """True once it stands at the boundary; False when time ran out."""

    def resume(
        self, version: int, *, refresh: bool = True, stay_paused: bool = False, timeout: float | None = None
    ) -> None:
        """With refresh make new bytes visible and drop what was computed from old ones; then go on, unless told not
        to."""

    def wait_resumed(self, version: int, timeout: float | None = None) -> bool:
        """True once it has taken up the version."""

    def submit(self, *args: Any, **kwargs: Any) -> Stream[Any]:
        """Generate."""

    def stop(self) -> None:
        """End it."""


class Controls(Protocol):
    """What differs between engines: three calls to their own control plane. Each returns once it is done, or raises."""

    @property
    def name(self) -> str: ...

    def pause(self) -> None:
        """Stop between two steps; running requests are kept."""

    def renew(self, version: int) -> None:
        """Drop caches of values that old weights gave, and show the version."""

    def resume(self) -> None:
        """Go on."""


class Foreign:
    """The boundary of an engine that is not ours. Its calls are made one after another, in a thread of their own."""

    rpc = "Generate"
    commit_between: CommitBetween = "steps"
    num_sequences = 0  # the engine's own affair

    def __init__(self, controls: Controls) -> None:
        self._controls = controls
        self._calls = ThreadPoolExecutor(1, thread_name_prefix=f"{controls.name}-controls")
        self._changed = threading.Condition()  # guards all below
        self._version = 0
        self._state = "serving"
        self._pausing: Future[None] | None = None

    @property
    def state(self) -> str:
        return self._state

    def warm_up(self) -> None:
        """Nothing: an engine that runs is warm."""

    def request_pause(self) -> int:
        with self._changed:
            if self._state == "serving" and self._pausing is None:
                self._pausing = self._calls.submit(self._pause)
        return 0

    def _pause(self) -> None:
        self._controls.pause()
        with self._changed:
            self._state, self._pausing = "paused", None
            self._changed.notify_all()

    def wait_paused(self, timeout: float | None = None) -> bool:
        """MemberError where the engine refused."""
        with self._changed:
            pausing = self._pausing
        if pausing is not None and pausing.done() and (error := pausing.exception()) is not None:
            with self._changed:
                self._pausing = None  # the next request asks again
            raise MemberError(f"{self._controls.name} did not pause: {error}")
        with self._changed:
            return self._changed.wait_for(lambda: self._state == "paused", timeout)

    def resume(
        self, version: int, *, refresh: bool = True, stay_paused: bool = False, timeout: float | None = None
    ) -> None:
        """MemberError where the engine refused; it stays paused then."""
        if refresh:
            self._call(lambda: self._controls.renew(version), "renew its caches", timeout)
        if not stay_paused and self._state == "paused":
            self._call(self._controls.resume, "go on", timeout)
        with self._changed:
            self._version = version
            self._state = self._state if stay_paused else "serving"
            self._changed.notify_all()

    def _call(self, call: Callable[[], None], what: str, timeout: float | None) -> None:
        try:
            self._calls.submit(call).result(timeout)
        except Exception as error:  # of the engine's control plane, whatever it is
            raise MemberError(f"{self._controls.name} did not {what}: {error}") from error

    def wait_resumed(self, version: int, timeout: float | None = None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._version == version, timeout)

    def submit(self, *args: Any, **kwargs: Any) -> Stream[Any]:
        """Always BusyError."""
        raise BusyError(f"this replica is a {self._controls.name} engine; send requests to its own address")

    def stop(self) -> None:
        self._calls.shutdown(wait=False, cancel_futures=True)
