"""The Ray actor of the coordinator. It loads nothing of what only ranks need, and so is back the sooner."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from .garbage import uncollected

with uncollected():
    from weight_update.channels import PLAINTEXT
    from weight_update.security import Security
    from weight_update.store import StoredVersion

    from .control_server import ControlServer
    from .coordinator import CoordinatorShell
    from .keeper import StoreConfig, keep_versions
    from .logs import Seeing, set_up


class CoordinatorActor:
    """The coordinator. Ray restarts it on the same port; its state file tells it what was decided."""

    def __init__(
        self,
        addresses: Sequence[str],
        state_file: str,
        listen: str,
        model: str,
        config_dir: str,
        *,
        min_replicas: int,
        loaded: StoredVersion | None,
        store: StoreConfig | None,
        security: Security = PLAINTEXT,
        seeing: Seeing = Seeing(),  # noqa: B008 - it is frozen
    ) -> None:
        set_up(seeing.log_format)
        self._shell = CoordinatorShell(
            addresses=addresses,
            state_file=Path(state_file),
            source=model,
            loaded=loaded,
            min_replicas=min_replicas,
            security=security,
        )
        self._keeper = keep_versions(self._shell, Path(config_dir), store) if store is not None else None
        self._server = ControlServer(
            self._shell,
            listen=listen,
            tokenizer_dir=Path(config_dir),
            keeper=self._keeper,
            security=security,
            pages=seeing.pages(listen),
            record_dir=seeing.record_dir,
        )

    def address(self) -> str:
        """host:port of Control and Generation."""
        return self._server.address

    def arm(self, point: str, action: str, skip: int = 0) -> None:
        """Plan a failure where the coordinator asks for a step, or around its decision; see service.faults."""
        self._shell.faults.arm(point, action, skip)

    def stalled(self) -> str:
        """The point where an armed stall holds the coordinator; "" where none does."""
        return self._shell.faults.stalled

    def release(self) -> None:
        """End a stall, disarm all points."""
        self._shell.faults.release()

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def stop(self) -> None:
        """End the server and the loop; the ranks go on serving."""
        self._server.stop()
        if self._keeper is not None:
            self._keeper.stop()
        self._shell.stop()


# The coordinator is restarted for as long as the cluster lives; calls may overlap.
REMOTE_COORDINATOR: Any = ray.remote(max_restarts=-1, max_concurrency=4)(CoordinatorActor)  # type: ignore[call-overload]
