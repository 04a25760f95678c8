"""The background scrub of a rank: all that is installed is read again and again, slowly, and compared with what was
committed.

Memory fails in silence. A rank that finds other bytes than it installed holds nobody's version from then on: it says
so in its next answer, its replica is fenced and filled anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from protos import transfuse_pb2 as pb
from weight_update.digest import Digests, digest_rows, name_key, unlike
from weight_update.errors import BusyError, PlanError, VersionError
from weight_update.values import to_digests_proto

if TYPE_CHECKING:
    from weight_update.receiver import Receiver

    from .rank import RankServer

log = logging.getLogger(__name__)

SLICE_BYTES = 4 << 20  # read at a time under the receiver's lock: a few milliseconds
DEVICE_BYTES = 256 << 20  # in a GPU's memory, whose digests are made there: no tensor is cut
SHARE = 0.9  # of the period that a round is spread over
RETRY_S = 0.05
ATTEMPTS = 20  # at one tensor, while commits come in between
IDLE_S = 0.1
TOLD_S = 0.1  # between two words on how far a re-read is


class Slice(NamedTuple):
    """What is read in one go: rows [first, stop) of one tensor, or with None all rows of several."""

    tensors: Sequence[int]
    rows: tuple[int, int] | None
    num_bytes: int


class Scrub:
    """One rank's bytes. groups: tensors that are looked at together, as the slices that make up all of their rows; a
    model may have tens of thousands, and to read one costs more than to copy a few hundred kB."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        on_host = receiver.device.type == "cpu"
        self.groups = list(self._grouped(SLICE_BYTES if on_host else DEVICE_BYTES, cut=on_host))
        self.num_slices = sum(map(len, self.groups))

    def look(self, group: Sequence[Slice], pace: Callable[[], bool]) -> str:
        """What is wrong with a group's tensors; "" where nothing is, or where commits came too often to tell. pace:
        called before each slice, False gives up."""
        receiver, tensors = self._receiver, group[0].tensors
        for attempt in range(ATTEMPTS):
            version = receiver.version
            try:
                found = self._read(version, group, pace if attempt == 0 else lambda: True)
                wanted, is_known = receiver.installed_digests(version, tensors)
            except VersionError:
                time.sleep(RETRY_S)
                continue
            if found is None:
                return ""
            names = [receiver.manifest.tensors[i].name for i in tensors]
            return "; ".join(
                f"scrub: {names[i]} reads {_hex(found[i])}, installed was {_hex(wanted[i])} as version {version}"
                for i in np.flatnonzero(is_known & unlike(found, wanted)).tolist()
            )
        return ""

    def read(self, version: int, each: Slice) -> Digests:
        """What the rows of a slice add to the digests of its tensors, [n, 2]; VersionError unless they are this
        version's."""
        receiver = self._receiver
        if each.rows is None:
            return receiver.read_back(version, each.tensors)
        (tensor,), (first, stop) = each.tensors, each.rows
        key = name_key(receiver.manifest.tensors[tensor].name)
        return np.array([digest_rows(key, receiver.rows(version, tensor, first, stop), first)], np.uint64)

    def _read(self, version: int, group: Sequence[Slice], pace: Callable[[], bool]) -> Digests | None:
        found = np.zeros((len(group[0].tensors), 2), np.uint64)
        for each in group:
            if not pace():
                return None
            found += self.read(version, each)
        return found

    def _grouped(self, slice_bytes: int, *, cut: bool) -> Iterator[list[Slice]]:
        """The tensors in their order: small ones together; each larger one by itself, cut into slices or whole."""
        receiver = self._receiver
        row_bytes = np.array([spec.row_bytes for spec in receiver.manifest.tensors], np.int64)
        sizes = (receiver.row_stop - receiver.row_start) * row_bytes
        small, small_bytes = list[int](), 0
        for index in np.flatnonzero(sizes).tolist():
            if small and small_bytes + sizes[index] > slice_bytes:
                yield [Slice(small, None, small_bytes)]
                small, small_bytes = [], 0
            if sizes[index] < slice_bytes or not cut:
                small.append(index)
                small_bytes += int(sizes[index])
                continue
            step = max(1, slice_bytes // int(row_bytes[index]))
            start, stop = int(receiver.row_start[index]), int(receiver.row_stop[index])
            edges = [*range(start, stop, step), stop]
            yield [Slice([index], (a, b), (b - a) * int(row_bytes[index])) for a, b in pairwise(edges)]
        if small:
            yield [Slice(small, None, small_bytes)]


def reread(receiver: Receiver, version: int, share: float) -> Iterator[pb.MemberRereadReply]:
    """Read all rows of a rank again, as an operator asked, within `share` of the time; the digests come last.

    A slice at a time and a rest after each, so that neither commits nor generation wait for it. Raises BusyError where
    the rank leaves this version meanwhile.
    """
    if not 0.0 < share <= 1.0:
        raise PlanError(f"reread: share {share}, expected above 0 and at most 1")
    scrub = Scrub(receiver)
    slices = [each for group in scrub.groups for each in group]
    total_bytes = sum(each.num_bytes for each in slices)
    done_bytes, found = 0, np.zeros((len(receiver.manifest.tensors), 2), np.uint64)
    told_s = float("-inf")
    for each in slices:
        start_s = time.perf_counter()
        try:
            found[each.tensors] += scrub.read(version, each)
        except VersionError as error:
            raise BusyError(f"reread: a commit came in between ({error}); ask again") from None
        done_bytes += each.num_bytes
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
            for group in self._scrub.groups:
                if self._rank.member.version == 0:  # it holds nobody's bytes, or is known to be damaged
                    break
                problem = self._scrub.look(group, pace)
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


def _hex(lanes: npt.NDArray[np.uint64]) -> str:
    return "".join(f"{lane:016x}" for lane in lanes.tolist())
