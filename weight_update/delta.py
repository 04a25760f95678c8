"""What changed between two versions, and how it is said in few bytes. Values and pure functions; nobody is talked to.

positions = changed_bytes(old, new)                 # of the rows of one tensor
patch = Patch(tensor=3, first=0, stop=4096, positions=positions, values=new - old)
blob = pack([patch, ...])                           # one a trainer rank and actor rank
patches = unpack(blob, size_of(blob), specs, row_start, row_stop)

A blob, all numbers little-endian; every column is one zstd frame that states its size:

    "TFD1" | planes u32 | segments u64 | changes u64 | dense bytes u64 | bytes of each column u64 [3 + planes]
    column 0   segments, 32 bytes each: tensor u32, kind u32, first u64, stop u64, count u64
    column 1   changes: differences new - old mod 256, which most often are +1 or -1 of a code
    column 2   dense bytes: rows that are sent whole, or the differences of all their bytes
    column 3   changes: byte 0 of every gap to the next changed byte of its segment; column 4: byte 1; ...

Gaps are split into planes since only their lowest byte is noise. Old bytes are known on both sides, hence differences.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from torch import Tensor

from quant.formats import TensorSpec

from .errors import TransferError, raise_all

MAGIC = b"TFD1"
DEVICE_MAGIC, DEVICE_HEAD = b"TFD2", struct.Struct("<4sIQ")
HEAD = struct.Struct("<4sIQQQ")
SEGMENT = np.dtype([("tensor", "<u4"), ("kind", "<u4"), ("first", "<u8"), ("stop", "<u8"), ("count", "<u8")])
MAX_PLANES = 8
COLUMNS = 3  # before the planes
SPARSE, DENSE, RELATIVE = 0, 1, 2  # kinds of segments
SPARSE_SHARE = 32  # at most a byte in this many may be named by position: an actor keeps CHANGE_BYTES for each
CHANGE_BYTES = 144  # what an actor holds for one of them: position, place, word, old and new bytes, what to decode
MAX_WINDOW_BYTES = 8 << 20  # that a frame may make its reader keep
SPARSE_LEVEL, DENSE_LEVEL = 12, 1  # of zstd: sparse columns are small, dense ones hardly shrink

Positions = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Patch:
    """What changed in bytes [first, stop) of one tensor, which are whole rows of its checkpoint form.

    positions: of the changed bytes in the whole tensor, increasing; values: their differences new - old mod 256.
    Without positions, values are all the new bytes, or the differences of all bytes where they are relative.
    """

    tensor: int
    first: int
    stop: int
    positions: Positions | None
    values: Bytes
    relative: bool = False

    @property
    def kind(self) -> int:
        return SPARSE if self.positions is not None else RELATIVE if self.relative else DENSE


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceDelta:
    """Changed bytes in a GPU's memory, of all tensors of a push in order: int32 tensor, int64 position in it, uint8
    new - old.

    As a blob, little-endian and packed by nobody, since the link is faster than what would pack it:

        "TFD2" | 0 u32 | changes u64 | positions u64 each | tensors u32 each | differences u8 each
    """

    tensors: Tensor
    positions: Tensor
    differences: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_bytes(self) -> int:
        return DEVICE_HEAD.size + 13 * len(self)

    def owned(self, row_start: Tensor, row_stop: Tensor, row_bytes: Tensor, numbers: Tensor) -> DeviceDelta:
        """Those in rows [row_start, row_stop) of each tensor of the push, with its number: int64 on the device."""
        which = self.tensors.long()
        rows = self.positions // row_bytes[which]
        kept = (rows >= row_start[which]) & (rows < row_stop[which])
        tensors = numbers.to(torch.int32)[which]
        if bool(kept.all()):
            return DeviceDelta(tensors=tensors, positions=self.positions, differences=self.differences)
        return DeviceDelta(tensors=tensors[kept], positions=self.positions[kept], differences=self.differences[kept])

    def blob(self) -> tuple[Tensor, BlobSize]:
        """uint8 on the device, and what is announced of it."""
        head = torch.frombuffer(bytearray(DEVICE_HEAD.pack(DEVICE_MAGIC, 0, len(self))), dtype=torch.uint8)
        columns = (self.positions, self.tensors, self.differences)
        blob = torch.cat([head.to(self.positions.device), *(each.view(torch.uint8) for each in columns)])
        return blob, BlobSize(num_bytes=len(blob), num_segments=0, num_changes=len(self), dense_bytes=0)

    @classmethod
    def of_blob(
        cls, blob: Tensor, size: BlobSize, row_bytes: Tensor, row_start: Tensor, row_stop: Tensor
    ) -> DeviceDelta:
        """The changes in a blob for a rank that holds these rows; TransferError unless it is of the announced size and
        names nothing but increasing positions in them."""
        count = size.num_changes
        magic, _, stated = DEVICE_HEAD.unpack(blob[: DEVICE_HEAD.size].cpu().numpy().tobytes())
        announced = (DEVICE_MAGIC, count, DEVICE_HEAD.size + 13 * count)
        if (magic, stated, len(blob)) != announced:
            raise TransferError(f"delta: {magic!r}, {stated} changes, {len(blob)} bytes; announced were {announced}")
        edges = np.cumsum([DEVICE_HEAD.size, 8 * count, 4 * count, count]).tolist()
        parts = [blob[a:b] for a, b in pairwise(edges)]
        positions, tensors = parts[0].view(torch.int64), parts[1].view(torch.int32)
        which = tensors.long().clamp(0, len(row_bytes) - 1)
        inside = (tensors == which) & (positions >= (row_start * row_bytes)[which])
        inside &= positions < (row_stop * row_bytes)[which]
        ahead = (which[1:] > which[:-1]) | ((which[1:] == which[:-1]) & (positions[1:] > positions[:-1]))
        if not bool(inside.all() & ahead.all()):
            raise TransferError("delta: changed bytes outside the rows of this rank, or out of order; push again")
        return cls(tensors=tensors, positions=positions, differences=parts[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobSize:
    """All that a rank needs to know of a blob before it takes it: its bytes, and what they become."""

    num_bytes: int
    num_segments: int
    num_changes: int
    dense_bytes: int

    @property
    def unpacked_bytes(self) -> int:
        """Memory that its patches and their undo take on a rank, the blob itself not counted."""
        return self.num_segments * SEGMENT.itemsize + self.num_changes * CHANGE_BYTES + 2 * self.dense_bytes


NOTHING = BlobSize(num_bytes=0, num_segments=0, num_changes=0, dense_bytes=0)  # for a rank in whose rows none changed


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDelta:
    """What one actor rank gets in a delta push: a blob from every trainer rank, in their order."""

    replica: int
    rank: int
    blobs: tuple[BlobSize, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaPlan:
    """A delta push as it is announced: the version that it builds on, and what each rank gets.

    base_digest: of the whole base version.
    """

    base_version: int
    base_digest: str
    ranks: tuple[RankDelta, ...]

    def of(self, replica: int, rank: int) -> tuple[BlobSize, ...]:
        """The blobs of one rank."""
        found = [each for each in self.ranks if (each.replica, each.rank) == (replica, rank)]
        if len(found) != 1:
            raise TransferError(f"delta push: names replica {replica} rank {rank} {len(found)} times; describe again")
        return found[0].blobs


# ---------------------------------------------------------------- comparing


def changed_bytes(old: Tensor, new: Tensor) -> Positions:
    """Where two uint8 tensors of the same size differ: increasing positions, on the host."""
    old, new = old.reshape(-1), new.reshape(-1)
    aligned = all(each.data_ptr() % 8 == 0 and each.storage_offset() % 8 == 0 for each in (old, new))
    whole = old.numel() // 8 * 8 if aligned else 0
    words = (old[:whole].view(torch.int64) != new[:whole].view(torch.int64)).nonzero().flatten()
    inside = (words[:, None] * 8 + torch.arange(8, device=old.device)).flatten()
    inside = inside[old[inside] != new[inside]]
    rest = (old[whole:] != new[whole:]).nonzero().flatten() + whole
    found: Positions = torch.cat([inside, rest]).cpu().numpy()
    return found


def is_sparse(num_changes: int, num_bytes: int) -> bool:
    """Whether so many changed bytes are named by position: that takes the fewest bytes, and an actor has the memory."""
    return num_changes * SPARSE_SHARE <= num_bytes


def is_relative(differences: Bytes, new: Bytes) -> bool:
    """Whether the differences of all bytes take fewer bytes on the wire than the bytes themselves."""
    return len(_compressed(differences, DENSE_LEVEL)) < len(_compressed(new, DENSE_LEVEL))


def patches_of(delta: DeviceDelta, specs: Sequence[TensorSpec]) -> list[Patch]:
    """The same as patches of the host, one a tensor."""
    tensors, positions, differences = (
        each.cpu().numpy() for each in (delta.tensors, delta.positions, delta.differences)
    )
    edges = [0, *(np.flatnonzero(np.diff(tensors)) + 1).tolist(), len(tensors)]
    return [
        Patch(
            tensor=int(tensors[a]),
            first=int(positions[a] // specs[tensors[a]].row_bytes * specs[tensors[a]].row_bytes),
            stop=int((positions[b - 1] // specs[tensors[a]].row_bytes + 1) * specs[tensors[a]].row_bytes),
            positions=positions[a:b],
            values=differences[a:b],
        )
        for a, b in pairwise(edges)
        if a < b
    ]


def cut(patch: Patch, first: int, stop: int) -> Patch | None:
    """The part of a patch in bytes [first, stop) of its tensor, None where nothing is."""
    first, stop = max(first, patch.first), min(stop, patch.stop)
    if first >= stop:
        return None
    if patch.positions is None:
        values = patch.values[first - patch.first : stop - patch.first]
        return replace(patch, first=first, stop=stop, values=values)
    low, high = np.searchsorted(patch.positions, [first, stop]).tolist()
    if low == high:
        return None
    positions, values = patch.positions[low:high], patch.values[low:high]
    return replace(patch, first=first, stop=stop, positions=positions, values=values)


# ---------------------------------------------------------------- packing


def pack(patches: Sequence[Patch]) -> tuple[bytes, BlobSize]:
    """One blob of these patches, and what is announced of it; no byte of no patches."""
    if not patches:
        return b"", NOTHING
    sparse = [patch for patch in patches if patch.positions is not None]
    dense = [patch for patch in patches if patch.positions is None]
    table = np.array(
        [(patch.tensor, patch.kind, patch.first, patch.stop, len(patch.values)) for patch in (*sparse, *dense)],
        SEGMENT,
    )
    gaps = _joined([_gaps(patch) for patch in sparse], np.dtype("<u8"))
    num_planes = (int(gaps.max()).bit_length() + 7) // 8 if len(gaps) else 0
    planes = gaps.view(np.uint8).reshape(-1, 8).T[:num_planes]
    differences = _joined([patch.values for patch in sparse], np.dtype(np.uint8))
    whole = _joined([patch.values for patch in dense], np.dtype(np.uint8))
    columns = [
        _compressed(table.view(np.uint8), SPARSE_LEVEL),
        _compressed(differences, SPARSE_LEVEL),
        _compressed(whole, DENSE_LEVEL),
        *(_compressed(plane, SPARSE_LEVEL) for plane in planes),
    ]
    head = HEAD.pack(MAGIC, num_planes, len(table), len(gaps), len(whole))
    sizes = np.array([len(column) for column in columns], "<u8").tobytes()
    blob = b"".join([head, sizes, *columns])
    size = BlobSize(num_bytes=len(blob), num_segments=len(table), num_changes=len(gaps), dense_bytes=len(whole))
    return blob, size


def _gaps(patch: Patch) -> npt.NDArray[np.uint64]:
    """Bytes that did not change before each one that did."""
    assert patch.positions is not None
    return (np.diff(patch.positions, prepend=patch.first - 1) - 1).astype("<u8")


def _joined(parts: Sequence[npt.NDArray[np.generic]], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def _compressed(column: npt.NDArray[np.generic], level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(np.ascontiguousarray(column).data)


# ---------------------------------------------------------------- unpacking


def unpack(
    blob: memoryview, size: BlobSize, specs: Sequence[TensorSpec], row_start: Rows, row_stop: Rows
) -> list[Patch]:
    """The patches in a blob for a rank that holds these rows of the pushed tensors; TransferError unless it is whole,
    of the announced size, and names nothing but increasing positions in those rows. Allocates what was announced."""
    if size == NOTHING and not len(blob):
        return []
    segments, differences, dense, gaps = _columns(blob, size)
    _check_segments(segments, size, specs, row_start, row_stop)
    patches, change, byte = [], 0, 0
    for tensor, kind, first, stop, count in segments.tolist():
        if kind != SPARSE:
            values, positions = dense[byte : byte + count], None
            byte += count
        else:
            values = differences[change : change + count]
            positions = np.cumsum(gaps[change : change + count] + 1) + (first - 1)
            change += count
            # All of them, not the ends alone: sums of hostile gaps wrap round.
            if not first <= positions.min() <= positions.max() < stop or (np.diff(positions) <= 0).any():
                raise TransferError(f"{specs[tensor].name}: changed bytes leave [{first}, {stop}); push again")
        patches.append(
            Patch(tensor=tensor, first=first, stop=stop, positions=positions, values=values, relative=kind == RELATIVE)
        )
    return patches


def _columns(blob: memoryview, size: BlobSize) -> tuple[npt.NDArray[np.void], Bytes, Bytes, Positions]:
    if len(blob) != size.num_bytes or len(blob) < HEAD.size:
        raise TransferError(f"delta: {len(blob)} bytes arrived, {size.num_bytes} were announced; push again")
    magic, num_planes, *counts = HEAD.unpack_from(blob)
    announced = [size.num_segments, size.num_changes, size.dense_bytes]
    if magic != MAGIC or num_planes > MAX_PLANES or counts != announced:
        raise TransferError(f"delta: {magic!r}, {num_planes} planes, {counts}; announced were {MAGIC!r}, {announced}")
    expected = [counts[0] * SEGMENT.itemsize, counts[1], counts[2], *[counts[1]] * num_planes]
    start = HEAD.size + 8 * len(expected)
    if len(blob) < start:
        raise TransferError(f"delta: {len(blob)} bytes, the sizes of {len(expected)} columns alone take {start}")
    lengths = np.frombuffer(blob[HEAD.size : start], "<u8").tolist()
    if start + sum(lengths) != len(blob):
        raise TransferError(f"delta: its columns take {sum(lengths)} of {len(blob) - start} bytes; push again")
    table, differences, dense, *planes = _frames(blob[start:], lengths, expected)
    gaps = np.zeros(counts[1], np.int64)
    for i, plane in enumerate(planes):
        gaps |= plane.astype(np.int64) << (8 * i)
    return table.view(SEGMENT), differences, dense, gaps


def _frames(blob: memoryview, lengths: Sequence[int], expected: Sequence[int]) -> Iterator[Bytes]:
    at = 0
    for length, num_bytes in zip(lengths, expected, strict=True):
        frame, at = blob[at : at + length], at + length
        try:
            stated = zstandard.frame_content_size(frame)
            if stated != num_bytes:
                raise TransferError(f"delta: a column of {stated} bytes, expected {num_bytes}; push again")
            yield _decompressed(frame, num_bytes)
        except zstandard.ZstdError as error:
            raise TransferError(f"delta: a column is damaged ({error}); push again") from None


def _decompressed(frame: memoryview, num_bytes: int) -> Bytes:
    """Into memory of this size and no other."""
    out, done = np.empty(num_bytes, np.uint8), 0
    with zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).stream_reader(frame) as reader:
        while done < num_bytes and (count := reader.readinto(out.data[done:])):
            done += count
    if done != num_bytes:
        raise TransferError(f"delta: a column ends after {done} of {num_bytes} bytes; push again")
    return out


def _check_segments(
    segments: npt.NDArray[np.void], size: BlobSize, specs: Sequence[TensorSpec], row_start: Rows, row_stop: Rows
) -> None:
    tensor = segments["tensor"].astype(np.int64)
    if len(tensor) and int(tensor.max()) >= len(specs):
        raise TransferError(f"delta: names tensor {int(tensor.max())}, the push has {len(specs)}; push again")
    row_bytes = np.array([spec.row_bytes for spec in specs], np.uint64)[tensor]
    low, high = (rows[tensor].astype(np.uint64) * row_bytes for rows in (row_start, row_stop))
    first, stop, count, kind = (segments[name] for name in ("first", "stop", "count", "kind"))
    outside = (first < low) | (stop > high) | (first >= stop) | (count == 0) | (kind > RELATIVE)
    inside = np.where(outside, 0, stop - first)
    ragged = ~outside & ((first % np.maximum(1, row_bytes) != 0) | (stop % np.maximum(1, row_bytes) != 0))
    wrong = ~outside & np.where(kind != SPARSE, count != inside, count > inside)
    problems = [
        f"{specs[tensor[i]].name}: {count[i]} changes in bytes [{first[i]}, {stop[i]}),"
        f" this rank holds [{low[i]}, {high[i]})"
        for i in np.flatnonzero(outside | ragged | wrong)
    ]
    raise_all(TransferError, "delta refused, nothing of it was written", problems)
    # Each count is bounded by now, so that the sums cannot wrap.
    sums = [int(count[kind == SPARSE].sum()), int(count[kind != SPARSE].sum())]
    if sums != [size.num_changes, size.dense_bytes]:
        raise TransferError(f"delta: its segments hold {sums} changes and bytes, it has {size}; push again")


def check_apart(patches: Sequence[Patch], specs: Sequence[TensorSpec]) -> None:
    """Patches of several trainer ranks do not touch the same rows."""
    ordered = sorted(patches, key=lambda patch: (patch.tensor, patch.first))
    problems = [
        f"{specs[after.tensor].name}: bytes [{after.first}, {after.stop}) come twice"
        for before, after in pairwise(ordered)
        if before.tensor == after.tensor and before.stop > after.first
    ]
    raise_all(TransferError, "delta refused, nothing of it was written", problems)
