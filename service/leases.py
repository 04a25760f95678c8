"""The right to serve, as a lease: a replica whose coordinator is silent, or does not want it, stands still."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from weight_update.errors import MemberError

if TYPE_CHECKING:
    from .rank import RankServer

log = logging.getLogger(__name__)

POLL_S = 0.2
RESUME_TIMEOUT_S = 60.0


class ServingLease:
    """Stops a replica's leader at a step boundary when its lease lapses, and lets it go on when it is renewed."""

    def __init__(self, rank: RankServer) -> None:
        self._rank = rank
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        """Followers stop and go on with their leader, which alone needs this."""
        if self._rank.identity.rank == 0:
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            # A step of the protocol stops and resumes by itself, and asks for the lease as it does.
            if self._rank.steps.acquire(blocking=False):
                try:
                    self._look()
                except MemberError as error:
                    log.info("the engine of rank %s is gone: %s", self._rank.identity, error)
                    return
                finally:
                    self._rank.steps.release()

    def _look(self) -> None:
        rank = self._rank
        if rank.member.state == "installed" or rank.operator_paused:
            return
        may = rank.member.serves(time.monotonic())
        if not may and rank.engine.state == "serving":
            log.info("replica %s stands still: it has no right to serve", rank.identity.replica)
            rank.engine.request_pause()
            rank.set_serving(False)
        elif may and rank.engine.state == "paused" and not rank.stale:
            rank.engine.resume(rank.member.version, refresh=False, timeout=RESUME_TIMEOUT_S)
            rank.set_serving(True)
