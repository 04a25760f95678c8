"""Where the experts of the committed version lie, as the coordinator tells trainers and operators."""

from __future__ import annotations

import threading

import numpy as np
import torch

from quant.expert_maps import ExpertMaps, maps_in
from weight_update.chunks import Chunk
from weight_update.digest import Digests, total
from weight_update.errors import MemberError, VersionError
from weight_update.fetch import fetch
from weight_update.manifest import Manifest

from .coordinator import CoordinatorShell


class CommittedMaps:
    """The maps of the version that is served: taken from a replica when they are asked for, once a version."""

    def __init__(self, shell: CoordinatorShell) -> None:
        self._shell = shell
        self._guard = threading.Lock()
        self._known: tuple[int, ExpertMaps] = (0, ExpertMaps())

    def of(self, version: int) -> ExpertMaps:
        """Those of a version; none where no expert can be moved, or no replica serves this version now."""
        wanted = self._shell.manifest.maps
        with self._guard:
            if len(wanted) and self._known[0] != version:
                try:
                    self._known = version, self._taken(wanted, version)
                except (MemberError, VersionError):  # it was replaced a moment ago, or nobody serves
                    return ExpertMaps()
            return self._known[1]

    def _taken(self, wanted: np.ndarray, version: int) -> ExpertMaps:
        shell, tensors = self._shell, self._shell.manifest.tensors
        rows = {int(i): np.zeros(tensors[i].num_bytes, np.uint8) for i in wanted}
        stops = np.zeros(len(tensors), np.int64)
        stops[wanted] = [tensors[i].num_rows for i in wanted]
        serving = shell.protocol.membership.serving()
        donors = [each.spec for each in shell.members if each.id.replica == serving[0]] if serving else []

        def place(chunk: Chunk) -> None:
            assert isinstance(chunk.payload, memoryview)
            payload, at = np.frombuffer(chunk.payload, np.uint8), 0
            pieces = zip(chunk.tensor.tolist(), chunk.offset.tolist(), chunk.length.tolist(), strict=True)
            for i, offset, length in pieces:
                rows[i][offset : offset + length] = payload[at : at + length]
                at += length

        fetch(donors, version, np.zeros_like(stops), stops, place, shell.roster.security)
        found = {tensors[i].name: torch.from_numpy(each) for i, each in rows.items()}
        return maps_in(found, found.__getitem__)


def digest_of_maps(manifest: Manifest, digests: Digests) -> str:
    """Of all maps of a version, 32 hex digits; "" where no expert can be moved."""
    return total(digests[manifest.maps]) if len(manifest.maps) else ""
