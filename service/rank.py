"""One rank of one replica behind its own door: the gRPC servicers over a Receiver, a Member and a Boundary.

Nothing here decides anything: `weight_update.protocol.Member` says whether a step may be done, the Receiver does it to
the bytes, the Boundary (our Engine, or one of vLLM or SGLang) stops and resumes serving.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.channels import PLAINTEXT
from weight_update.delta import BlobSize
from weight_update.device_rings import DEVICE_RING_BYTES
from weight_update.errors import MemberError
from weight_update.flight import Recorder
from weight_update.install import MemoryPlan
from weight_update.links import Place, here
from weight_update.member import Member
from weight_update.receiver import Receiver, State
from weight_update.security import Security
from weight_update.values import from_delta_proto

from .data import WINDOW_BYTES, DataServicer
from .elsewhere import Elsewhere
from .faults import Faults
from .gauges import Gauges
from .generation import MESSAGE_BYTES, GenerationServicer
from .guard import Guard, Limits
from .hosts.boundary import Boundary
from .leases import ServingLease
from .logs import Seeing, phase
from .metrics import RankMetrics
from .pages import Pages
from .scrubbing import Scrubber
from .sources import Sources
from .steps import MemberServicer
from .wire import bind, make_server, set_serving
from .witness import Witness

log = logging.getLogger(__name__)

STREAM_BYTES = 5 * WINDOW_BYTES  # payload in flight: in gRPC on the way in, as messages, as Python objects; measured
STREAM_BYTES_OF = {"cpu": STREAM_BYTES, "cuda": STREAM_BYTES + DEVICE_RING_BYTES}  # with a ring in device memory
PAUSE_TIMEOUT_S = {"steps": 60.0, "samples": 540.0}  # how long a step may last, or what is left of a sample
RESUME_TIMEOUT_S = 60.0
SCRUB_S = 600.0
PAUSE_POLL_S = 0.1
SERVICES = ("Data", "Member", "Generation", "Control")  # to calls of Control it answers where the coordinator is


@dataclass(frozen=True, slots=True, kw_only=True)
class RankIdentity:
    """Which rank this is, and what it holds. world: ranks of its replica."""

    replica: int
    rank: int
    world: int = 1
    format: str
    layout: str


class RankServer:
    """Serves Data, Member and Generation for one rank.

    reshard: called at the step boundary before an install; gives the module its local shards back, whose addresses are
    audited (the engine's refresh gathers them again). foresee: called before a pause, once it is known what will be
    written. listen: host:port, port 0 for any. scrub_s: within which every installed byte is read again, 0 for never.
    witness: of how the checkpoint was read. security, limits: of its door. shares_memory: with trainers of the same
    user on this host.
    """

    def __init__(
        self,
        *,
        identity: RankIdentity,
        receiver: Receiver,
        engine: Boundary,
        reshard: Callable[[], None],
        foresee: Callable[[], None] = lambda: None,
        faults: Faults,
        listen: str,
        scrub_s: float = SCRUB_S,
        witness: Witness,
        security: Security = PLAINTEXT,
        limits: Limits | None = None,
        shares_memory: bool = True,
    ) -> None:
        self.identity = identity
        self.place = here(receiver.device) if shares_memory else Place()
        self.receiver = receiver
        self.engine = engine
        self.faults = faults
        self.witness = witness
        self.member = Member(version=0)
        receiver.version = 0  # what was loaded is nobody's version before it is adopted
        self.sources = Sources(receiver, security=security.as_service())
        self._lease = ServingLease(self)
        self._scrubber = Scrubber(self, scrub_s)
        self.damage = ""  # what the scrub found, until these bytes are replaced or compared anew
        self.timing = pb.RankTiming(replica=identity.replica, rank=identity.rank)
        self.operator_paused = False
        self.draining = False  # takes no new requests
        self.gauges = Gauges()
        self.coordinator = ""  # host:port of Control, as the coordinator said
        self.empty = False  # built to be filled: nothing was loaded
        self._reshard = reshard
        self._foresee = foresee
        # Resharded since the last refresh, here or on a peer: nothing may go on until the transaction's end gathers
        # anew, for it would gather here what peers hold otherwise, or hang where they gather nothing.
        self.stale = False
        self._is_pushed = False  # the open transaction comes from a trainer
        self.given_up = threading.Event()  # the coordinator undoes: do not wait for a pause that may never come
        self.steps = threading.Lock()  # one step of the protocol at a time; never taken by the data stream
        self.metrics = RankMetrics(self)
        self.pages: Pages | None = None
        self.recorder: Recorder | None = None
        self.guard = Guard(security, limits)
        self.address = bind(self._door(), listen, security)
        self._lease.start()
        self._scrubber.start()

    def _door(self) -> grpc.Server:
        """The server of all that this rank answers, not yet listening."""
        services = [pb.DESCRIPTOR.services_by_name[name] for name in SERVICES]
        max_message_bytes = MESSAGE_BYTES[self.engine.rpc]
        self._server, self._checks = make_server(services, max_message_bytes=max_message_bytes, guard=self.guard)
        self._names = [service.full_name for service in services]
        pb_grpc.add_MemberServicer_to_server(MemberServicer(self), self._server)
        pb_grpc.add_GenerationServicer_to_server(self._generation(), self._server)
        self._data = DataServicer(self)
        elsewhere = Elsewhere(f"rank {self.identity.replica}.{self.identity.rank}", lambda: self.coordinator)
        self._server.add_generic_rpc_handlers((self._data.handler(), elsewhere))
        return self._server

    def _generation(self) -> GenerationServicer:
        return GenerationServicer(
            self.engine,
            replica=self.identity.replica,
            version=lambda: self.member.version,
            may_serve=lambda: self.member.state == "installed" or self.member.serves(time.monotonic()),
            refused=self._refused,
        )

    def _refused(self) -> str:
        """What an operator did that lets no request in; "" for nothing."""
        return "paused" if self.operator_paused else "drained" if self.draining else ""

    def show(self, seeing: Seeing) -> None:
        """Record pushes and serve metrics, as asked. A port that is taken is no reason not to serve the model."""
        if seeing.record_dir is not None:
            self.recorder = Recorder(seeing.record_dir, f"{self.identity.replica}.{self.identity.rank}")
        try:
            listen = seeing.pages(self.address)
            self.pages = Pages(listen, {"/metrics": self.metrics.text}, self.guard) if listen else None
        except MemberError as error:
            log.warning("rank %s.%s shows no metrics: %s", self.identity.replica, self.identity.rank, error)

    @property
    def state(self) -> str:
        """Of its member; "empty" while it holds neither a version nor what anybody loaded."""
        return "empty" if self.empty and (self.member.state, self.member.version) == ("idle", 0) else self.member.state

    def serves(self) -> bool:
        """Whether it answers requests, or may begin to by itself."""
        return self.engine.state == "serving" or self.member.serves(time.monotonic())

    def set_serving(self, serving: bool) -> None:
        """What gRPC health says: serving only with a published version."""
        set_serving(self._checks, self._names, serving)

    def stop(self) -> None:
        """End all calls and stop generating."""
        self._lease.stop()
        self._scrubber.stop()
        if self.pages is not None:
            self.pages.stop()
        self._server.stop(grace=0.5).wait()
        self._data.close()
        self.guard.stop()
        self.engine.stop()

    # -- the steps, each under `steps`

    def open(self, request: Any) -> int:
        self.given_up.clear()
        self._data.end_streams()
        self.sources.settle()
        if not request.base_version:  # whatever is here is replaced, every byte of it
            self.receiver.version, self.damage = 0, ""
            self.witness.forget()
        self._is_pushed = not (request.restores or request.donors)
        plan = self._begin(request) if self._is_pushed else self.sources.begin(request)
        self._data.peers = frozenset(request.peers)
        self.timing = pb.RankTiming(
            replica=self.identity.replica,
            rank=self.identity.rank,
            planned_bytes=plan.peak_bytes,
            stage_start_s=time.time(),
        )
        if self.recorder is not None and self._is_pushed:
            self.recorder.begin(request.transaction, self._facts(request))
        return plan.peak_bytes

    def _facts(self, request: Any) -> dict[str, Any]:
        """Of the open transaction, for its recording."""
        receiver, indices = self.receiver, list(request.tensors)
        specs = [receiver.manifest.tensors[i] for i in indices]
        return {
            "transaction": request.transaction,
            "version": request.version,
            "base_version": request.base_version,
            "is_delta": request.HasField("delta"),
            "format": self.identity.format,
            "layout": self.identity.layout,
            "world": self.identity.world,
            "tensors": [(spec.name, spec.row_bytes) for spec in specs],
            "row_start": receiver.row_start[indices].tolist(),
            "row_stop": receiver.row_stop[indices].tolist(),
        }

    def _record(self, request: Any, step: str, digests: np.ndarray) -> None:
        if self.recorder is not None:
            self.recorder.digests(request.transaction, step, digests)

    def _recorded(self, transaction: int, outcome: str) -> None:
        if self.recorder is not None:
            timing = {each.name: value for each, value in self.timing.ListFields()}
            self.recorder.end(transaction, {"outcome": outcome, "timing": timing})

    def _begin(self, request: Any) -> MemoryPlan:
        blobs = None
        if request.HasField("delta"):
            blobs = from_delta_proto(request.delta).of(self.identity.replica, self.identity.rank)
        return self.receiver.begin(
            request.transaction,
            request.version,
            request.base_version,
            np.array(request.tensors, np.int64),
            in_flight_bytes=_in_flight_bytes(request.num_streams, blobs, STREAM_BYTES_OF[self.receiver.device.type]),
            blobs=blobs,
        )

    def prepare(self, request: Any) -> np.ndarray:
        self.sources.wait()
        digests = self.receiver.prepare()
        self._record(request, "staged", digests)
        self._data.end_streams(whole=True)
        self._foresee()
        if self._is_pushed:
            self.witness.hear()
        self.timing.stage_stop_s = time.time()
        self.did("stage", request.version, self.timing.stage_stop_s - self.timing.stage_start_s)
        return digests

    def did(self, name: str, version: int, seconds: float) -> None:
        """A phase of a push is over: log it, count it."""
        who = f"{self.identity.replica}.{self.identity.rank}"
        phase(name, version=version, rank=who, num_bytes=self.receiver.staged_bytes, seconds=seconds)
        self.metrics.observe("transfuse_phase_s", seconds, name)

    def install(self, request: Any) -> np.ndarray:
        self.stale = True
        self._pause()
        self.timing.pause_start_s = time.time()
        self._reshard()
        digests = self.receiver.install()
        self._record(request, "installed", digests)
        self.timing.install_stop_s = time.time()
        self.faults.reached("installed")
        return digests

    def confirm(self, request: Any) -> None:
        self.receiver.audit()

    def publish(self, request: Any) -> None:
        installed = self.member.state == "installed"
        if self.receiver.state is State.INSTALLED:  # not so where serving did not go on at the first attempt
            self.receiver.publish()
        self.receiver.version, self.damage = request.version, ""
        self.gauges.digest = self.receiver.known_digest()
        self._resume(request.version, refresh=True)
        self.timing.pause_stop_s = time.time()
        if installed:
            self.sources.remember()
            self.metrics.observe("transfuse_pause_s", self.timing.pause_stop_s - self.timing.pause_start_s)
            self._recorded(request.transaction, "committed")

    def undo(self, request: Any) -> None:
        if self.receiver.state is State.INSTALLED:
            self.receiver.undo()
        self.stale = True  # a peer may have resharded where this rank had not yet

    def abort(self, request: Any) -> None:
        self.receiver.abort()
        self._recorded(request.transaction, "given up")
        self._data.end_streams()
        self.receiver.version = self.member.version
        self._resume(self.member.version, refresh=self.stale)

    def pause(self, request: Any) -> None:
        self.operator_paused = True
        self._pause()
        self.set_serving(False)

    def drain(self, request: Any) -> None:
        self.draining = True

    def resume(self, request: Any) -> None:
        self.operator_paused = self.draining = False
        if not self.stale:  # else the end of the transaction lets it go on
            self._resume(self.member.version, refresh=False)

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
        """Serve `version`, with the right to; an operator's pause outlives a commit."""
        if self.engine.state.startswith("failed"):
            raise MemberError(f"the engine is gone: {self.engine.state}; rebuild the replica")
        if self.identity.rank == 0 and (self.engine.state == "paused" or refresh):
            stays = self.operator_paused or not self.member.grants(version, time.monotonic())
            self.engine.resume(version, refresh=refresh, stay_paused=stays)
            self.set_serving(not stays)
        self.stale = self.stale and not refresh
        if not self.engine.wait_resumed(version, RESUME_TIMEOUT_S):
            raise MemberError(f"serving did not go on within {RESUME_TIMEOUT_S:.0f} s: {self.engine.state}")


def _in_flight_bytes(num_streams: int, blobs: Sequence[BlobSize] | None, stream_bytes: int) -> int:
    """What the streams may hold; a delta, of which every trainer rank sends a blob, is seldom as large as their
    windows."""
    if blobs is None:
        return stream_bytes * num_streams
    return sum(min(stream_bytes, 5 * blob.num_bytes) for blob in blobs) * num_streams // max(1, len(blobs))
