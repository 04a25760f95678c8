"""The coordinator's calls to one rank: whether a step may be done now, and its answer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.errors import BusyError
from weight_update.values import to_digests_proto, to_manifest_proto, to_place_proto

from .gauges import gauges_of
from .scrubbing import reread
from .wire import refusing, refusing_stream

if TYPE_CHECKING:
    from .rank import RankServer

# step -> what does it
STEPS: Mapping[str, Callable[[RankServer, Any], Any]] = {
    "open": lambda rank, request: rank.open(request),
    "prepare": lambda rank, request: rank.prepare(request),
    "install": lambda rank, request: rank.install(request),
    "confirm": lambda rank, request: rank.confirm(request),
    "publish": lambda rank, request: rank.publish(request),
    "adopt": lambda rank, request: rank.publish(request),
    "undo": lambda rank, request: rank.undo(request),
    "abort": lambda rank, request: rank.abort(request),
}


class MemberServicer(pb_grpc.MemberServicer):
    """The coordinator's calls, one method a step."""

    def __init__(self, rank: RankServer) -> None:
        self._rank = rank

    def _step(self, step: str, request: Any) -> Any:
        rank = self._rank
        if step in ("undo", "abort"):
            rank.given_up.set()
            rank.sources.cancel()
        with rank.steps:
            due = rank.member.check(
                step,
                epoch=request.epoch,
                transaction=request.transaction,
                version=request.version,
                round=getattr(request, "round", 0),
                token=getattr(request, "token", 0.0),
            )
            if not due:
                return rank.member.result(step)
            rank.faults.reached(step)
            start_s = time.perf_counter()
            result = STEPS[step](rank, request)
            rank.did(step, request.version, time.perf_counter() - start_s)
            return rank.member.done(step, transaction=request.transaction, version=request.version, result=result)

    def _digests(self, digests: np.ndarray) -> pb.MemberDigests:
        return pb.MemberDigests(digests=to_digests_proto(digests), timing=self._rank.timing, token=time.monotonic())

    def _reply(self) -> pb.MemberReply:
        return pb.MemberReply(timing=self._rank.timing, version=self._rank.member.version, token=time.monotonic())

    @refusing
    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloReply:
        rank, in_full = self._rank, bool(request.epoch) and not request.brief
        if request.epoch:
            rank.member.hello(epoch=request.epoch, round=request.round, version=request.version, token=request.token)
            rank.coordinator = request.coordinator or rank.coordinator
        return pb.HelloReply(
            manifest=to_manifest_proto(rank.receiver.manifest) if in_full else None,
            spec=pb.RankSpec(
                replica=rank.identity.replica,
                rank=rank.identity.rank,
                address=rank.address,
                row_start=rank.receiver.row_start.tolist() if in_full else (),
                row_stop=rank.receiver.row_stop.tolist() if in_full else (),
                place=to_place_proto(rank.place),
            ),
            version=rank.member.version,
            state=rank.state,
            transaction=rank.member.transaction,
            layout=rank.identity.layout,
            format=rank.identity.format,
            pid=os.getpid(),
            num_sequences=rank.engine.num_sequences,
            paused=rank.engine.state != "serving",
            serves=rank.serves(),
            kept=rank.sources.kept(),
            damage=rank.damage,
            checkpoint=rank.witness.status,
            token=time.monotonic(),
            gauges=gauges_of(rank),
        )

    @refusing
    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        return pb.OpenReply(planned_bytes=self._step("open", request), token=time.monotonic())

    @refusing
    def Prepare(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberDigests:
        return self._digests(self._step("prepare", request))

    @refusing
    def Install(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberDigests:
        return self._digests(self._step("install", request))

    @refusing
    def Confirm(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberReply:
        self._step("confirm", request)
        return self._reply()

    @refusing
    def Publish(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberReply:
        self._step("publish", request)
        return self._reply()

    @refusing
    def Adopt(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberReply:
        self._step("adopt", request)
        return self._reply()

    @refusing
    def Reach(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.ReachReply:
        with self._rank.steps:
            self._rank.member.follow("reach", request.epoch)
            self._rank.sources.settle()
            return pb.ReachReply(versions=self._rank.sources.kept(), token=time.monotonic())

    @refusing
    def Undo(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberReply:
        self._step("undo", request)
        return self._reply()

    @refusing
    def Abort(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberReply:
        self._step("abort", request)
        return self._reply()

    @refusing
    def Digest(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberDigests:
        with self._rank.steps:
            self._rank.member.follow("digest", request.epoch)
            if self._rank.member.state == "installed":
                raise BusyError("digest: a commit is in progress on this rank; ask again")
            return self._digests(self._rank.receiver.digests())

    @refusing_stream
    def Reread(
        self, request: pb.MemberRereadRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.MemberRereadReply]:
        self._rank.member.follow("reread", request.epoch)
        yield from reread(self._rank.receiver, request.version, request.share)

    @refusing
    def Drain(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberReply:
        with self._rank.steps:
            self._rank.drain(request)
        return self._reply()

    @refusing
    def Pause(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberReply:
        with self._rank.steps:
            self._rank.pause(request)
        return self._reply()

    @refusing
    def Resume(self, request: pb.MemberRequest, context: grpc.ServicerContext) -> pb.MemberReply:
        with self._rank.steps:
            self._rank.resume(request)
        return self._reply()
