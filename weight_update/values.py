"""Values on the wire: manifests, digests and delta plans, to their messages and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

from protos import transfuse_pb2 as pb
from quant.expert_maps import ExpertMaps
from quant.formats import TensorSpec
from quant.parameters import ParameterRow

from .delta import BlobSize, DeltaPlan, RankDelta
from .digest import Digests
from .errors import TransferError
from .links import Place
from .manifest import Manifest


def to_spec_proto(spec: TensorSpec) -> pb.TensorSpec:
    """One tensor of a manifest, for the wire."""
    return pb.TensorSpec(name=spec.name, dtype=spec.dtype, shape=spec.shape)


def from_spec_proto(spec: pb.TensorSpec) -> TensorSpec:
    """One tensor of a manifest, from the wire."""
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=tuple(spec.shape))


def hash_of_specs(request: pb.BeginRequest) -> int:
    """Of the tensors of a push, never 0."""
    return xxhash.xxh3_64_intdigest(pb.Manifest(tensors=request.tensors).SerializeToString()) or 1


class Specs:
    """Tensors of pushes from the wire; those of the last push again where another one names the same."""

    def __init__(self) -> None:
        self._last: tuple[int, tuple[TensorSpec, ...]] = 0, ()

    def of(self, request: pb.BeginRequest) -> tuple[TensorSpec, ...] | None:
        """The very object of the last push where its tensors are the same; None where they must be said."""
        if not request.tensors:
            named = self._last if request.tensors_hash else (0, ())  # of a lease's renewal: none
            return named[1] if named[0] == request.tensors_hash else None
        said = hash_of_specs(request)
        if self._last[0] != said:
            self._last = said, tuple(from_spec_proto(spec) for spec in request.tensors)
        return self._last[1]


def to_manifest_proto(manifest: Manifest) -> pb.Manifest:
    """A manifest for the wire."""
    parameters = [
        pb.ParameterSpec(
            name=row.name,
            shape=row.shape,
            format=row.format,
            group=row.group,
            tensors=[manifest.index[spec.name] for spec in manifest.tensors_of(row)],
            aliases=row.aliases,
        )
        for row in manifest.parameters
    ]
    tensors = [to_spec_proto(spec) for spec in manifest.tensors]
    return pb.Manifest(tensors=tensors, parameters=parameters, fingerprint=manifest.fingerprint)


def from_manifest_proto(message: pb.Manifest) -> Manifest:
    """A manifest from the wire; a fingerprint that does not fit means that the two ends' versions differ."""
    manifest = Manifest(
        tensors=tuple(from_spec_proto(spec) for spec in message.tensors),
        parameters=tuple(
            ParameterRow(
                name=row.name, shape=tuple(row.shape), format=row.format, group=row.group, aliases=tuple(row.aliases)
            )
            for row in message.parameters
        ),
    )
    if manifest.fingerprint != message.fingerprint:
        raise TransferError(
            f"manifest fingerprint: service says {message.fingerprint:016x}, computed {manifest.fingerprint:016x};"
            " install the same release of transfuse on both ends"
        )
    return manifest


def to_place_proto(place: Place) -> pb.Place:
    """Where a process is, for the wire."""
    return pb.Place(host=place.host, processes=place.processes, user=place.user, gpu=place.gpu, nccl=place.nccl)


def from_place_proto(message: pb.Place) -> Place:
    """Where a process is, from the wire."""
    return Place(
        host=message.host, processes=message.processes, user=message.user, gpu=message.gpu, nccl=message.nccl
    )


def from_maps_proto(messages: Sequence[pb.ExpertMap]) -> ExpertMaps:
    """Maps from the wire."""
    return ExpertMaps({each.module: tuple(each.physical_to_logical) for each in messages})


def to_maps_proto(maps: ExpertMaps) -> list[pb.ExpertMap]:
    """Maps for the wire."""
    return [pb.ExpertMap(module=module, physical_to_logical=each) for module, each in maps.of.items()]


def to_digests_proto(digests: Digests) -> pb.Digests:
    """[n, 2] uint64 to its message."""
    lane0, lane1 = (digests[:, lane].astype("<u8").tobytes() for lane in range(2))
    return pb.Digests(lane0=lane0, lane1=lane1)


def from_digests_proto(message: pb.Digests) -> Digests:
    """A message to [n, 2] uint64."""
    if len(message.lane0) != len(message.lane1) or len(message.lane0) % 8:
        raise TransferError(f"digests: {len(message.lane0)} and {len(message.lane1)} bytes, not 8 a tensor in each")
    return np.stack([np.frombuffer(lane, "<u8").astype(np.uint64) for lane in (message.lane0, message.lane1)], axis=1)


def to_delta_proto(plan: DeltaPlan) -> pb.Delta:
    """What a delta push brings, for the wire."""
    ranks = [
        pb.RankDelta(
            replica=each.replica,
            rank=each.rank,
            blobs=[
                pb.BlobSize(**{field.name: getattr(blob, field.name) for field in pb.BlobSize.DESCRIPTOR.fields})
                for blob in each.blobs
            ],
        )
        for each in plan.ranks
    ]
    return pb.Delta(base_version=plan.base_version, base_digest=plan.base_digest, ranks=ranks)


def from_delta_proto(message: pb.Delta) -> DeltaPlan:
    """What a delta push brings, from the wire."""
    ranks = tuple(
        RankDelta(
            replica=each.replica,
            rank=each.rank,
            blobs=tuple(
                BlobSize(**{field.name: getattr(blob, field.name) for field in pb.BlobSize.DESCRIPTOR.fields})
                for blob in each.blobs
            ),
        )
        for each in message.ranks
    )
    return DeltaPlan(base_version=message.base_version, base_digest=message.base_digest, ranks=ranks)
