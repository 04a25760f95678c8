"""What operators ask of all ranks at once: read everything again, drain, pause, resume."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import grpc
import numpy as np

from protos import transfuse_pb2 as pb
from weight_update.digest import Digests
from weight_update.errors import MemberError, WeightUpdateError
from weight_update.messages import MemberId
from weight_update.transport import error_of
from weight_update.values import from_digests_proto

from .coordinator import CoordinatorShell
from .members import MemberSpec
from .roster import differing

SHARE = 0.2  # of a rank's time that a re-read takes where nobody says otherwise
POLL_S = 0.1


class Operators:
    """Over the members of a coordinator."""

    def __init__(self, shell: CoordinatorShell) -> None:
        self._shell = shell

    def every(self, step: str) -> None:
        """One plain step on every live member."""
        self._shell.of_all(self._shell.live_members(), step)

    def verify(self) -> pb.VerifyReply:
        """Re-read all installed bytes on all ranks, as fast as they can, while no step of the protocol runs."""
        start_s = time.perf_counter()
        version, digests = self._shell.committed("verify")
        found = self._shell.of_all(self._shell.live_members(), "digest")
        return self._outcome(version, digests, found, start_s)

    def reread(self, share: float, alive: Callable[[], bool]) -> Iterator[pb.RereadProgress]:
        """The same within `share` of every rank's time and beside the protocol, with progress; the outcome comes last.
        Ends early where nobody is `alive` to hear it."""
        start_s = time.perf_counter()
        version, digests = self._shell.committed("verify")
        members = self._shell.live_members()
        heard: queue.SimpleQueue[tuple[MemberId, Any]] = queue.SimpleQueue()
        request = pb.MemberRereadRequest(epoch=self._shell.index.epoch, version=version, share=share or SHARE)
        calls = [self._shell.roster.stub(member.id).Reread(request) for member in members]
        for member, call in zip(members, calls, strict=True):
            self._shell.beside(partial(_hear, member.id, call, heard))
        last: dict[MemberId, pb.MemberRereadReply] = {}
        try:
            while alive() and sum(each.HasField("digests") for each in last.values()) < len(members):
                try:
                    who, told = heard.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if isinstance(told, WeightUpdateError):
                    raise told
                last[who] = told
                yield _progress(last.values())
        finally:
            for call in calls:
                call.cancel()
        if alive():
            found = {who: from_digests_proto(each.digests) for who, each in last.items()}
            yield _progress(last.values(), self._outcome(version, digests, found, start_s))

    def _outcome(
        self, version: int, digests: Digests, found: dict[MemberId, Digests], start_s: float
    ) -> pb.VerifyReply:
        manifest, membership = self._shell.manifest, self._shell.protocol.membership
        problems = differing(found, digests, manifest, lambda replica: membership.held(replica, manifest))
        sizes = np.array([spec.num_bytes for spec in manifest.tensors], np.int64)
        replicas = {member.replica for member in found}
        num_bytes = sum(int(sizes[membership.held(replica, manifest)].sum()) for replica in replicas)
        return pb.VerifyReply(
            ok=not problems,
            version=version,
            bytes=num_bytes,
            seconds=time.perf_counter() - start_s,
            mismatches=problems,
        )

    def drain(self, replicas: Sequence[int], timeout_s: float, alive: Callable[[], bool]) -> pb.DrainReply:
        """These replicas take no new requests; returns once their running sequences have ended, or the time is over."""
        shell = self._shell
        members = [member for member in shell.live_members() if not replicas or member.id.replica in replicas]
        missing = sorted(set(replicas) - {member.id.replica for member in members})
        if missing or not members:
            raise MemberError(f"drain: replica {missing or 'any'} does not serve; 'transfuse status' shows which do")
        shell.of_all(members, "drain")
        deadline_s = time.monotonic() + timeout_s
        while (left := self._running(members)) and time.monotonic() < deadline_s and alive():
            time.sleep(POLL_S)
        return pb.DrainReply(num_sequences=left, replicas=sorted({member.id.replica for member in members}))

    def _running(self, members: Sequence[MemberSpec]) -> int:
        found = (self._shell.roster.hello(each.address, brief=True) for each in members if each.id.rank == 0)
        return sum(each.num_sequences for each in found if isinstance(each, pb.HelloReply))


def _progress(told: Collection[pb.MemberRereadReply], outcome: pb.VerifyReply | None = None) -> pb.RereadProgress:
    done, total = (sum(getattr(each, name) for each in told) for name in ("done_bytes", "total_bytes"))
    return pb.RereadProgress(done_bytes=done, total_bytes=total, outcome=outcome)


def _hear(member: MemberId, call: Any, heard: queue.SimpleQueue[tuple[MemberId, Any]]) -> None:
    try:
        for reply in call:
            heard.put((member, reply))
    except grpc.RpcError as error:
        heard.put((member, error_of(error, str(member))))
