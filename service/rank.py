"""One rank of one replica behind its own door: the gRPC servicers over a Receiver, a Member and an Engine.

Nothing here decides anything: `weight_update.protocol.Member` says whether a step may be done, the Receiver does it to
the bytes, the Engine stops and resumes serving.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.chunks import Chunk, StageOpen, decode_request
from weight_update.errors import BusyError, MemberError, TransferError, WeightUpdateError
from weight_update.member import Member
from weight_update.receiver import Receiver, State
from weight_update.transport import to_digests_proto, to_manifest_proto

from .engine import Engine
from .faults import Faults
from .generation import MESSAGE_BYTES, GenerationServicer
from .wire import bind, make_server, refuse, refusing, set_serving
from .witness import Witness

log = logging.getLogger(__name__)

WINDOW_BYTES = 16 << 20  # payload that one stream may have in flight
STREAM_BYTES = 5 * WINDOW_BYTES  # payload in flight: in gRPC on the way in, as messages, as Python objects; measured
PAUSE_TIMEOUT_S = {"steps": 60.0, "samples": 540.0}  # how long a step may last, or what is left of a sample
RESUME_TIMEOUT_S = 60.0
PAUSE_POLL_S = 0.1
SERVICES = ("Data", "Member", "Generation")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankIdentity:
    """Which rank this is, and what it holds."""

    replica: int
    rank: int
    format: str
    layout: str


class RankServer:
    """Serves Data, Member and Generation for one rank.

    reshard: called at the step boundary before an install; gives the module its local shards back, whose addresses are
    audited (the engine's refresh gathers them again). listen: host:port, port 0 for any. witness: of how the
    checkpoint was read.
    """

    def __init__(
        self,
        *,
        identity: RankIdentity,
        receiver: Receiver,
        engine: Engine[..., Any],
        reshard: Callable[[], None],
        faults: Faults,
        listen: str,
        witness: Witness,
    ) -> None:
        self.identity = identity
        self.receiver = receiver
        self.engine = engine
        self.faults = faults
        self.witness = witness
        self.member = Member(version=0)
        self.timing = pb.RankTiming(replica=identity.replica, rank=identity.rank)
        self.operator_paused = False
        self._reshard = reshard
        self._stale = False  # resharded since the last refresh
        self.given_up = threading.Event()  # the coordinator undoes: do not wait for a pause that may never come
        self.steps = threading.Lock()  # one step of the protocol at a time; never taken by the data stream
        services = [pb.DESCRIPTOR.services_by_name[name] for name in SERVICES]
        self._server, self._checks = make_server(services, max_message_bytes=MESSAGE_BYTES[engine.rpc])
        self._names = [service.full_name for service in services]
        pb_grpc.add_MemberServicer_to_server(MemberServicer(self), self._server)
        pb_grpc.add_GenerationServicer_to_server(
            GenerationServicer(
                engine,
                replica=identity.replica,
                version=lambda: self.member.version,
                paused=lambda: self.operator_paused,
            ),
            self._server,
        )
        self._server.add_generic_rpc_handlers((_data_handler(DataServicer(self)),))
        self.address = bind(self._server, listen)

    def set_serving(self, serving: bool) -> None:
        """What gRPC health says: serving only with a published version."""
        set_serving(self._checks, self._names, serving)

    def stop(self) -> None:
        """End all calls and stop generating."""
        self._server.stop(grace=0.5).wait()
        self.engine.stop()

    # -- the steps, each under `steps`

    def open(self, request: Any) -> int:
        tensors = np.array(request.tensors, np.int64)
        self.given_up.clear()
        plan = self.receiver.begin(
            request.transaction,
            request.version,
            request.base_version,
            tensors,
            in_flight_bytes=request.num_streams * STREAM_BYTES,
        )
        self.timing = pb.RankTiming(
            replica=self.identity.replica,
            rank=self.identity.rank,
            planned_bytes=plan.peak_bytes,
            stage_start_s=time.time(),
        )
        return plan.peak_bytes

    def prepare(self, request: Any) -> np.ndarray:
        digests = self.receiver.prepare()
        self.witness.hear()
        self.timing.stage_stop_s = time.time()
        return digests

    def install(self, request: Any) -> np.ndarray:
        self._pause()
        self.timing.pause_start_s = time.time()
        self._stale = True
        self._reshard()
        digests = self.receiver.install()
        self.timing.install_stop_s = time.time()
        self.faults.reached("installed")
        return digests

    def confirm(self, request: Any) -> None:
        self.receiver.audit()

    def publish(self, request: Any) -> None:
        if self.member.state == "installed":
            self.receiver.publish()
        self.receiver.version = request.version
        self._resume(request.version, refresh=True)
        self.timing.pause_stop_s = time.time()
        self.set_serving(True)

    def undo(self, request: Any) -> None:
        if self.receiver.state is State.INSTALLED:
            self.receiver.undo()
        self._stale = True  # a peer may have resharded where this rank had not yet

    def abort(self, request: Any) -> None:
        self.receiver.abort()
        self._resume(self.member.version, refresh=self._stale)

    def pause(self, request: Any) -> None:
        self.operator_paused = True
        self._pause()
        self.set_serving(False)

    def resume(self, request: Any) -> None:
        self.operator_paused = False
        self._resume(self.member.version, refresh=False)
        self.set_serving(True)

    def _pause(self) -> None:
        if self.identity.rank == 0:
            self.engine.request_pause()
        between = self.engine.commit_between
        deadline_s = time.monotonic() + PAUSE_TIMEOUT_S[between]
        while not self.engine.wait_paused(PAUSE_POLL_S):
            if time.monotonic() < deadline_s and not self.given_up.is_set():
                continue
            left = f"within {PAUSE_TIMEOUT_S[between]:.0f} s: {self.engine.state}"
            raise MemberError(f"serving did not stop between {between} {left}; --commit-between steps waits least")

    def _resume(self, version: int, *, refresh: bool) -> None:
        """Serve `version`; an operator's pause outlives a commit."""
        if self.engine.state.startswith("failed"):
            raise MemberError(f"the engine is gone: {self.engine.state}; rebuild the replica")
        if self.identity.rank == 0 and (self.engine.state == "paused" or refresh):
            self.engine.resume(version, refresh=refresh, stay_paused=self.operator_paused)
        self._stale = self._stale and not refresh
        if not self.engine.wait_resumed(version, RESUME_TIMEOUT_S):
            raise MemberError(f"serving did not go on within {RESUME_TIMEOUT_S:.0f} s: {self.engine.state}")


# step -> what does it
STEPS: Mapping[str, Callable[[RankServer, Any], Any]] = {
    "open": RankServer.open,
    "prepare": RankServer.prepare,
    "install": RankServer.install,
    "confirm": RankServer.confirm,
    "publish": RankServer.publish,
    "undo": RankServer.undo,
    "abort": RankServer.abort,
}


class MemberServicer(pb_grpc.MemberServicer):
    """The coordinator's calls, one method a step."""

    def __init__(self, rank: RankServer) -> None:
        self._rank = rank

    def _step(self, step: str, request: Any) -> Any:
        rank = self._rank
        if step == "undo":
            rank.given_up.set()
        with rank.steps:
            due = rank.member.check(step, epoch=request.epoch, transaction=request.transaction, version=request.version)
            if not due:
                return rank.member.result(step)
            rank.faults.reached(step)
            start_s = time.perf_counter()
            result = STEPS[step](rank, request)
            log.info(
                "%s version=%d rank=%s.%s seconds=%.4f",
                step, request.version, rank.identity.replica, rank.identity.rank, time.perf_counter() - start_s,
            )  # fmt: skip
            return rank.member.done(step, transaction=request.transaction, version=request.version, result=result)

    def _digests(self, digests: np.ndarray) -> pb.MemberDigests:
        return pb.MemberDigests(digests=to_digests_proto(digests), timing=self._rank.timing)

    def _reply(self) -> pb.MemberReply:
        return pb.MemberReply(timing=self._rank.timing, version=self._rank.member.version)

    @refusing
    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloReply:
        rank = self._rank
        return pb.HelloReply(
            manifest=to_manifest_proto(rank.receiver.manifest) if request.epoch else None,
            spec=pb.RankSpec(
                replica=rank.identity.replica,
                rank=rank.identity.rank,
                address=rank.address,
                row_start=rank.receiver.row_start.tolist() if request.epoch else (),
                row_stop=rank.receiver.row_stop.tolist() if request.epoch else (),
            ),
            version=rank.member.version,
            state=rank.member.state,
            transaction=rank.member.transaction,
            layout=rank.identity.layout,
            format=rank.identity.format,
            pid=os.getpid(),
            num_sequences=rank.engine.num_sequences,
            paused=rank.engine.state != "serving",
            checkpoint=rank.witness.status,
        )

    @refusing
    def Open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        return pb.OpenReply(planned_bytes=self._step("open", request))

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
            if self._rank.member.state == "installed":
                raise BusyError("digest: a commit is in progress on this rank; ask again")
            return self._digests(self._rank.receiver.digests())

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


class DataServicer:
    """The bytes: messages stay raw, so that a payload is copied once, into the staging buffer."""

    def __init__(self, rank: RankServer) -> None:
        self._rank = rank

    def stage(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[pb.StageReply]:
        try:
            yield from self._stage(messages)
        except WeightUpdateError as error:
            refuse(context, error)

    def _stage(self, messages: Iterator[bytes]) -> Iterator[pb.StageReply]:
        rank, received_bytes = self._rank, 0
        opening = decode_request(next(messages, b""))
        if not isinstance(opening, StageOpen):
            raise TransferError("stage: the first message must be StageOpen; open the stream first")
        member = rank.member
        if (member.state, member.transaction) != ("open", opening.transaction):
            raise BusyError(
                f"stage: this rank is {member.state} in transaction {member.transaction}, the stream is for"
                f" {opening.transaction}; begin again"
            )
        yield pb.StageReply(credit_bytes=WINDOW_BYTES, staged_bytes=rank.receiver.staged_bytes)
        for message in messages:
            chunk = decode_request(message)
            if not isinstance(chunk, Chunk):
                raise TransferError("stage: a second StageOpen on one stream; open another stream")
            rank.faults.reached("stage")
            staged_bytes = rank.receiver.stage(chunk, transaction=opening.transaction)
            received_bytes += len(chunk.payload)
            yield pb.StageReply(
                sequence=chunk.sequence, credit_bytes=received_bytes + WINDOW_BYTES, staged_bytes=staged_bytes
            )
        rank.timing.staged_bytes = rank.receiver.staged_bytes


def _data_handler(servicer: DataServicer) -> grpc.GenericRpcHandler:
    stage = grpc.stream_stream_rpc_method_handler(
        servicer.stage, request_deserializer=None, response_serializer=pb.StageReply.SerializeToString
    )
    return grpc.method_handlers_generic_handler("transfuse.v1.Data", {"Stage": stage})
