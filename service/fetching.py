"""What a rank gives away: its rows as they lie in memory, read back through the layout while it serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from protos import transfuse_pb2 as pb
from quant.formats import TensorSpec
from weight_update.errors import ManifestError
from weight_update.packing import Packer
from weight_update.receiver import Receiver

BLOCK_BYTES = 1 << 20  # rows that are read at a time: how long an install may have to wait for the lock


def fetched(receiver: Receiver, request: pb.FetchRequest) -> Iterator[bytes]:
    """Serialized chunks of the rows that are asked for, in the order of the manifest.

    No more than a chunk and a block of rows are held. Each block is read under the receiver's lock, so that no install
    tears it; VersionError as soon as the version is another one.
    """
    tensors = receiver.manifest.tensors
    if not len(tensors) == len(request.row_start) == len(request.row_stop):
        raise ManifestError(
            f"fetch: {len(request.row_start)} first and {len(request.row_stop)} last rows, the manifest has"
            f" {len(tensors)} tensors; describe the service again"
        )
    packer = Packer()
    for index, first, stop in _blocks(tensors, request.row_start, request.row_stop):
        rows = receiver.rows(request.version, index, first, stop)
        for chunk in packer.add(index, first * tensors[index].row_bytes, rows.view(-1).numpy().data):
            yield chunk.message
    for chunk in packer.flush():
        yield chunk.message


def _blocks(
    tensors: Sequence[TensorSpec], row_start: Sequence[int], row_stop: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """(tensor, first row, last row + 1)."""
    for index, (spec, start, stop) in enumerate(zip(tensors, row_start, row_stop, strict=True)):
        step = max(1, BLOCK_BYTES // max(1, spec.row_bytes))
        for first in range(start, stop, step):
            yield index, first, min(first + step, stop)
