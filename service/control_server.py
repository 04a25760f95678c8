"""The coordinator's door: one gRPC server for Control and Generation, its health, and the pages beside it."""

from __future__ import annotations

import threading
from pathlib import Path

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.channels import PLAINTEXT
from weight_update.flight import Recorder
from weight_update.security import Security
from weight_update.transport import CONTROL_MESSAGE_BYTES

from .control import ControlServicer
from .coordinator import CoordinatorShell
from .guard import Guard, Limits
from .keeper import Keeper
from .metrics import CoordinatorMetrics
from .pages import Pages
from .router import GenerationRouter
from .text import TextCodec
from .wire import bind, make_server, set_serving

SERVICES = ("Control", "Generation")
READINESS_S = 1.0


class ControlServer:
    """Serves Control and Generation on `listen` (host:port, port 0 for any) over a coordinator. keeper: writes the
    version store, where there is one. security, limits: of this door. pages: host:port of metrics and the status page,
    "" for none. record_dir: of the flight recorder.

    gRPC health: Generation is SERVING while a replica serves the committed version, whose bytes were verified; Control
    and the server as a whole, while they answer.
    """

    def __init__(
        self,
        shell: CoordinatorShell,
        *,
        listen: str,
        tokenizer_dir: Path,
        keeper: Keeper | None = None,
        security: Security = PLAINTEXT,
        limits: Limits | None = None,
        pages: str = "",
        record_dir: Path | None = None,
    ) -> None:
        services = [pb.DESCRIPTOR.services_by_name[name] for name in SERVICES]
        self.guard = Guard(security, limits)
        self._server, self._checks = make_server(services, max_message_bytes=CONTROL_MESSAGE_BYTES, guard=self.guard)
        self._names = [service.full_name for service in services]
        codec = TextCodec(tokenizer_dir)
        servicer = ControlServicer(shell, keeper, self.guard)
        servicer.recorder = None if record_dir is None else Recorder(record_dir, "coordinator")
        pb_grpc.add_ControlServicer_to_server(servicer, self._server)
        metrics = CoordinatorMetrics(shell, servicer.status)
        shown = {"/": servicer.page, "/metrics": metrics.text, "/targets": servicer.targets}
        self.pages = Pages(pages, shown, self.guard) if pages else None
        pb_grpc.add_GenerationServicer_to_server(GenerationRouter(shell, codec, security.as_service()), self._server)
        self.address = bind(self._server, listen, security)
        shell.roster.coordinator = self.address
        set_serving(self._checks, self._names[:1], True)
        self._stopped = threading.Event()
        self._readiness = threading.Thread(target=self._watch, args=(shell,), name="readiness", daemon=True)
        self._readiness.start()

    def _watch(self, shell: CoordinatorShell) -> None:
        while not self._stopped.is_set():
            set_serving(self._checks, self._names[1:], is_ready(shell))
            self._stopped.wait(READINESS_S)

    def stop(self) -> None:
        """End all calls."""
        self._stopped.set()
        self._readiness.join()
        if self.pages is not None:
            self.pages.stop()
        set_serving(self._checks, self._names, False)
        self._server.stop(grace=0.5).wait()
        self.guard.stop()


def is_ready(shell: CoordinatorShell) -> bool:
    """Whether a replica serves the committed version and takes requests: what it holds was verified."""
    states = shell.roster.states
    told = [(member.id.replica, states[member.id]) for member in shell.members if member.id in states]
    held_back = {replica for replica, state in told if state.paused or state.gauges.draining}
    return not shell.lost() and bool(shell.leader_addresses().keys() - held_back)
