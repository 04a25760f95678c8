"""The background scrub of a rank: all that is installed is read again and again, slowly, and compared with what was
committed.

Memory fails in silence. A rank that finds other bytes than it installed holds nobody's version from then on: it says
so in its next answer, its replica is fenced and filled anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from protos import transfuse_pb2 as pb
from weight_update.digest import MASK, Lanes, digest_rows, name_key
from weight_update.errors import BusyError, PlanError, VersionError
from weight_update.values import to_digests_proto

if TYPE_CHECKING:
    from weight_update.receiver import Receiver

    from .rank import RankServer

log = logging.getLogger(__name__)

SLICE_BYTES = 4 << 20  # read at a time under the receiver's lock: a few milliseconds
SHARE = 0.9  # of the period that a round is spread over
RETRY_S = 0.05
ATTEMPTS = 20  # at one tensor, while commits come in between
IDLE_S = 0.1
TOLD_S = 0.1  # between two words on how far a re-read is


class Scrub:
    """One rank's bytes, a tensor at a time."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self.slices = [list(self._cut(index)) for index in range(len(receiver.manifest.tensors))]
        self.num_slices = sum(map(len, self.slices))

    def look(self, index: int, pace: Callable[[], bool]) -> str:
        """What is wrong with a tensor; "" where nothing is, or where commits came too often to tell. pace: called
        before each slice, False gives up."""
        receiver, spec = self._receiver, self._receiver.manifest.tensors[index]
        for attempt in range(ATTEMPTS):
            version = receiver.version
            try:
                found = self._read(version, index, pace if attempt == 0 else lambda: True)
                wanted = receiver.installed_digest(version, index)
            except VersionError:
                time.sleep(RETRY_S)
                continue
            if found is None or wanted is None or found == wanted:
                return ""
            return f"scrub: {spec.name} reads {_hex(found)}, installed was {_hex(wanted)} as version {version}"
        return ""

    def _read(self, version: int, index: int, pace: Callable[[], bool]) -> Lanes | None:
        key, lane0, lane1 = name_key(self._receiver.manifest.tensors[index].name), 0, 0
        for first, stop in self.slices[index]:
            if not pace():
                return None
            part0, part1 = digest_rows(key, self._receiver.rows(version, index, first, stop), first)
            lane0, lane1 = lane0 + part0, lane1 + part1
        return lane0 & MASK, lane1 & MASK

    def _cut(self, index: int) -> Iterator[tuple[int, int]]:
        receiver = self._receiver
        start, stop = int(receiver.row_start[index]), int(receiver.row_stop[index])
        step = max(1, SLICE_BYTES // max(1, receiver.manifest.tensors[index].row_bytes))
        return ((first, min(first + step, stop)) for first in range(start, stop, step))


def reread(receiver: Receiver, version: int, share: float) -> Iterator[pb.MemberRereadReply]:
    """Read all rows of a rank again, as an operator asked, within `share` of the time; the digests come last.

    A slice at a time and a rest after each, so that neither commits nor generation wait for it. Raises BusyError where
    the rank leaves this version meanwhile.
    """
    if not 0.0 < share <= 1.0:
        raise PlanError(f"reread: share {share}, expected above 0 and at most 1")
    scrub, specs = Scrub(receiver), receiver.manifest.tensors
    total_bytes = sum((stop - first) * specs[i].row_bytes for i, cut in enumerate(scrub.slices) for first, stop in cut)
    done_bytes, found = 0, np.zeros((len(specs), 2), np.uint64)
    told_s = float("-inf")
    for index, spec in enumerate(specs):
        for first, stop in scrub.slices[index]:
            start_s = time.perf_counter()
            try:
                rows = receiver.rows(version, index, first, stop)
            except VersionError as error:
                raise BusyError(f"reread: a commit came in between ({error}); ask again") from None
            found[index] += np.array(digest_rows(name_key(spec.name), rows, first), np.uint64)
            done_bytes += rows.numel()
            time.sleep((time.perf_counter() - start_s) * (1.0 / share - 1.0))
            if time.monotonic() > told_s + TOLD_S:
                told_s = time.monotonic()
                yield pb.MemberRereadReply(done_bytes=done_bytes, total_bytes=total_bytes)
    yield pb.MemberRereadReply(done_bytes=done_bytes, total_bytes=total_bytes, digests=to_digests_proto(found))


class Pace:
    """Slices of one round come due one after the other, evenly over it."""

    def __init__(self, stopped: threading.Event, period_s: float, num_slices: int) -> None:
        self._stopped, self._each_s = stopped, SHARE * period_s / num_slices
        self._due_s = time.monotonic()

    def __call__(self) -> bool:
        """Wait for the next; False once all is over."""
        self._due_s += self._each_s
        return not self._stopped.wait(max(0.0, self._due_s - time.monotonic()))


class Scrubber:
    """The thread of a rank. period_s: within which every byte is read; 0 for never."""

    def __init__(self, rank: RankServer, period_s: float) -> None:
        self._rank, self._period_s = rank, period_s
        self._scrub = Scrub(rank.receiver)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)

    def start(self) -> None:
        """Begin, unless it is off or there is nothing to read."""
        if self._period_s and self._scrub.num_slices:
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(IDLE_S):
            pace = Pace(self._stopped, self._period_s, self._scrub.num_slices)
            for index in range(len(self._scrub.slices)):
                if self._rank.member.version == 0:  # it holds nobody's bytes, or is known to be damaged
                    break
                problem = self._scrub.look(index, pace)
                if problem:
                    self._report(problem)

    def _report(self, problem: str) -> None:
        rank = self._rank
        with rank.steps:
            if rank.member.state == "installed":
                return  # it is being replaced; if it is not, the next round says so
            log.error("rank %s.%s: %s", rank.identity.replica, rank.identity.rank, problem)
            rank.damage = problem
            rank.member.version = rank.receiver.version = 0


def _hex(lanes: Lanes) -> str:
    return "".join(f"{lane:016x}" for lane in lanes)
