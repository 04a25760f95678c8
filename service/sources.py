"""Where a rank's bytes come from when no trainer sends them: what earlier commits overwrote, a donor, or the store."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from weight_update.channels import PLAINTEXT
from weight_update.chunks import Chunk, decode_request, renumbered
from weight_update.delta import Patch
from weight_update.errors import MemberError, WeightUpdateError
from weight_update.fetch import fetch
from weight_update.history import KEEP, KEEP_BYTES, History
from weight_update.install import MemoryPlan
from weight_update.packing import Packer
from weight_update.receiver import Receiver
from weight_update.security import Security
from weight_update.store import Store

log = logging.getLogger(__name__)

POLL_S = 0.1


class Sources:
    """The ways back of one rank, and its bytes on their way from elsewhere. store: set where one can be read. security:
    of the connections to donors."""

    def __init__(
        self,
        receiver: Receiver,
        *,
        keep: int = KEEP,
        keep_bytes: int = KEEP_BYTES,
        security: Security = PLAINTEXT,
    ) -> None:
        self._security = security
        self._receiver = receiver
        self.store: Store | None = None
        self.history = History(
            receiver.manifest.tensors, receiver.row_start, receiver.row_stop, keep=keep, keep_bytes=keep_bytes
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="sources")
        self._cancelled = threading.Event()
        self._filling: Any = None  # a future, while rows come from elsewhere
        self._remembering: Any = None

    def remember(self) -> None:
        """Keep what the last commit overwrote; packed while the model serves again."""
        self._remembering = self._pool.submit(self._remember)

    def _remember(self) -> None:
        if self.history.takes(self._receiver.last_undo_bytes):
            reverse = self._receiver.last_undo()
            if reverse is not None:
                self.history.add(reverse)

    def settle(self) -> None:
        """Return once the last commit is remembered: the next one takes the memory of its undo."""
        if self._remembering is not None:
            self._remembering.result()
            self._remembering = None

    def kept(self) -> tuple[int, ...]:
        """Versions that this rank can restore, from memory or from the store."""
        stored = () if self.store is None else (each.version for each in self.store.versions())
        found = {*self.history.versions(self._receiver.version), *stored} - {self._receiver.version}
        return tuple(sorted(found))

    def begin(self, request: Any) -> MemoryPlan:
        """Open a transaction whose bytes are kept here, stored, or a donor's; they come while the model serves."""
        receiver, tensors = self._receiver, np.array(request.tensors, np.int64)
        self._cancelled.clear()
        ids = request.transaction, request.version, request.base_version
        if request.restores and request.restores in self.history.versions(receiver.version):
            patches = _renumbered(self.history.back(receiver.version, request.restores), self._numbers(tensors))
            return receiver.begin(*ids, tensors, blobs=(), patches=patches)
        plan = receiver.begin(*ids, tensors)
        fill = self._from_donors if request.donors else self._from_store
        self._filling = self._pool.submit(fill, request)
        return plan

    def wait(self) -> None:
        """Return once everything is staged; raises what went wrong, and once it was given up."""
        filling, self._filling = self._filling, None
        while filling is not None:
            if self._cancelled.wait(0 if filling.done() else POLL_S):
                raise MemberError("the transaction was given up while its rows were on their way")
            if filling.done():
                filling.result()
                return

    def cancel(self) -> None:
        """The transaction is given up."""
        self._cancelled.set()

    def _numbers(self, tensors: np.ndarray) -> np.ndarray:
        """By index in the manifest, the place of each of these tensors among them; -1 for the others."""
        numbers = np.full(len(self._receiver.manifest.tensors), -1)
        numbers[tensors] = np.arange(len(tensors))
        return numbers

    def _from_donors(self, request: Any) -> None:
        receiver, numbers = self._receiver, self._numbers(np.array(request.tensors, np.int64))
        fetch(
            request.donors,
            request.version,
            receiver.row_start,
            receiver.row_stop,
            lambda chunk: self._stage(request, renumbered(chunk, numbers)),
            self._security,
        )

    def _from_store(self, request: Any) -> None:
        if self.store is None:
            raise MemberError(f"version {request.restores}: this rank keeps it no more, and has no store")
        for chunk in _stored(self.store, self._receiver, request):
            self._stage(request, chunk)

    def _stage(self, request: Any, chunk: Chunk) -> None:
        if self._cancelled.is_set():
            raise MemberError("given up")
        self._receiver.stage(chunk, transaction=request.transaction)


def _renumbered(patches: list[Patch], numbers: np.ndarray) -> list[Patch]:
    """Patches of tensors of the manifest with other numbers; those without one change nothing in the end."""
    found = ((patch, int(numbers[patch.tensor])) for patch in patches)
    return [replace(patch, tensor=number) for patch, number in found if number >= 0]


def _stored(store: Store, receiver: Receiver, request: Any) -> Iterator[Chunk]:
    """This rank's rows of a stored version."""
    packer = Packer()
    for position, index in enumerate(request.tensors):
        first, stop = int(receiver.row_start[index]), int(receiver.row_stop[index])
        rows = store.read(request.restores, index)[first:stop].contiguous()
        row_bytes = receiver.manifest.tensors[index].row_bytes
        yield from _decoded(packer.add(position, first * row_bytes, rows.view(-1).numpy().data))
    yield from _decoded(packer.flush())


def _decoded(messages: Any) -> Iterator[Chunk]:
    for each in messages:
        chunk = decode_request(each.message)
        assert isinstance(chunk, Chunk)
        yield chunk


__all__ = ["Sources", "WeightUpdateError"]
