"""Rows on the wire: StageRequest messages framed by hand, so that payload bytes bypass the protobuf runtime.

What is written is what the generated class would write; any valid encoding is read. The payload is copied once on the
way out (the join, or into a ring of shared memory) and not at all on the way in (a memoryview).

    0x12 len [0x08 sequence][0x12 len tensor..][0x1a len offset..][0x22 len length..][0x29 checksum][0x32 len payload..]

    message = encode_chunk(1, tensor, offset, length, pieces)
    chunk = decode_request(message)
    check(chunk)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash
from torch import Tensor

from .errors import TransferError

CHUNK_BYTES = 2 << 20  # payload; 1 to 4 MiB measured best, 16 MiB is worse
RING_LESS_BYTES = 8 << 20  # payload of a chunk that finds no room in a ring
MAX_MESSAGE_BYTES = 16 << 20  # a chunk of small pieces is mostly index: 16 bytes a piece
MAX_TICKET_BYTES = 64
MAX_ONWARD = 4096  # ranks in a chain
SMALL_PIECE_BYTES = 4 << 10  # on average: below, joining the pieces first is faster than copying each by itself

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}

Item = TypeVar("Item", np.uint32, np.uint64)
Piece = memoryview | Tensor  # a tensor: uint8 [n] on a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOpen:
    """The first message of a stream."""

    transaction: int
    epoch: int
    trainer_rank: int
    ticket: bytes = b""
    ring_bytes: int = 0
    on_device: bool = False
    group: bytes = b""
    onward: tuple[bytes, ...] = ()  # serialized RankSpec messages


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Chunk:
    """Pieces of tensors: piece i is length[i] bytes of the payload, for byte offset[i] of tensor[i], of those that the
    rank was told of.

    payload: in host memory, or uint8 [n] in that of a GPU. in_ring: it lies in the stream's ring, and the checksum is
    of all but the payload.
    """

    sequence: int
    tensor: npt.NDArray[np.uint32]
    offset: npt.NDArray[np.uint64]
    length: npt.NDArray[np.uint32]
    checksum: int
    payload: memoryview | Tensor
    in_ring: bool = False


class Packet:
    """One chunk to be sent: what it says of its pieces, and the pieces themselves, not copied yet.

    Its messages are made where they are needed: one that carries the payload, one that says where in a ring it lies.
    """

    def __init__(
        self,
        sequence: int,
        tensor: npt.NDArray[np.uint32],
        offset: npt.NDArray[np.uint64],
        length: npt.NDArray[np.uint32],
        pieces: Sequence[Piece],
    ) -> None:
        self.sequence = sequence
        self.pieces = pieces
        self.payload_bytes = int(length.sum(dtype=np.uint64))
        self._columns = [tensor.astype("<u4").tobytes(), offset.astype("<u8").tobytes(), length.astype("<u4").tobytes()]

    @cached_property
    def message(self) -> bytes:
        """A serialized StageRequest with the payload in it."""
        checksum = _checksum([*self._columns, *self._on_host])
        head = self._head(length_field(6, self.payload_bytes), self.payload_bytes, checksum)
        return b"".join([head, *self._on_host])

    @cached_property
    def messages(self) -> list[bytes]:
        """The same in as many messages as their size asks for: a chunk that was made for a ring is larger than one may
        be. All but the last bear the number of the chunk before, so that only the last one acknowledges this."""
        if self.payload_bytes <= RING_LESS_BYTES:
            return [self.message]
        tensor, offset, length = (
            np.frombuffer(column, kind) for column, kind in zip(self._columns, ("<u4", "<u8", "<u4"), strict=True)
        )
        ends, payload, found = np.cumsum(length, dtype=np.uint64), memoryview(b"".join(self._on_host)), []
        begins = ends - length
        for start in range(0, len(payload), RING_LESS_BYTES):
            stop = min(start + RING_LESS_BYTES, len(payload))
            first, last = np.maximum(begins, np.uint64(start)), np.minimum(ends, np.uint64(stop))
            held = first < last
            number = self.sequence - (stop < len(payload))
            columns = tensor[held], (offset + (first - begins))[held], (last - first)[held].astype(np.uint32)
            found.append(encode_chunk(number, *columns, [payload[start:stop]]))
        return found

    def in_ring(self, at: int) -> bytes:
        """A serialized StageRequest whose payload was put into the stream's ring. Its checksum is of what it says, not
        of the payload: nothing lies between the two ends but memory, and the digests are compared of all bytes."""
        return self._head(_varint_field(7, at) + _varint_field(8, self.payload_bytes), 0, _checksum(self._columns))

    def arrive(self) -> None:
        """Return once the payload is where it was put; at once where that was waited for."""

    def put(self, target: npt.NDArray[np.uint8]) -> None:
        """Copy the payload, uint8 [payload_bytes]."""
        pieces, at = self._on_host, 0
        if self.payload_bytes < len(pieces) * SMALL_PIECE_BYTES:
            pieces = [memoryview(b"".join(pieces))]
        for piece in pieces:
            target[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
            at += len(piece)

    @cached_property
    def _on_host(self) -> list[memoryview]:
        return [piece.cpu().numpy().data if isinstance(piece, Tensor) else piece for piece in self.pieces]

    def _head(self, where: bytes, payload_bytes: int, checksum: int) -> bytes:
        """All of the message but the payload; where: the fields that say where that is."""
        fields = b"".join(
            [
                _varint_field(1, self.sequence),
                *(length_field(number, len(column)) + column for number, column in enumerate(self._columns, 2)),
                b"\x29" + checksum.to_bytes(8, "little"),
                where,
            ]
        )
        head = length_field(2, len(fields) + payload_bytes) + fields
        if len(head) + payload_bytes > MAX_MESSAGE_BYTES:
            raise TransferError(
                f"chunk {self.sequence}: a message of {len(head) + payload_bytes} bytes, at most {MAX_MESSAGE_BYTES}"
                f" are taken; send {len(self._columns[0]) // 4} pieces of {payload_bytes} bytes in several chunks"
            )
        return head


def encode_chunk(
    sequence: int,
    tensor: npt.NDArray[np.uint32],
    offset: npt.NDArray[np.uint64],
    length: npt.NDArray[np.uint32],
    pieces: Sequence[Piece],
) -> bytes:
    """One serialized StageRequest that holds a chunk; the concatenated pieces are its payload."""
    return Packet(sequence, tensor, offset, length, pieces).message


def decode_request(message: bytes | memoryview, ring: Piece | None = None) -> StageOpen | Chunk:
    """The StageRequest in a message. The chunk's payload is a view of the message, or of the stream's ring; check() it
    before use."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise TransferError(
            f"a message of {len(message)} bytes, at most {MAX_MESSAGE_BYTES} are taken; send smaller chunks"
        )
    kind, body = 0, memoryview(b"")
    for number, value in _fields(memoryview(message)):
        if number in KINDS and isinstance(value, memoryview):
            kind, body = number, value
    if kind not in KINDS:
        raise TransferError("a message on the stage stream is neither an open nor a chunk; expected a StageRequest")
    return KINDS[kind](body, ring)


def renumbered(chunk: Chunk, numbers: npt.NDArray[np.int64]) -> Chunk:
    """The same with other numbers for its tensors; it must have been checked."""
    tensor = numbers[chunk.tensor].astype(np.uint32)
    parts = [each.tobytes() for each in (tensor, chunk.offset, chunk.length)]
    checksum = _checksum(parts if chunk.in_ring else [*parts, chunk.payload])
    return replace(chunk, tensor=tensor, checksum=checksum)


def check(chunk: Chunk) -> None:
    """Raise TransferError unless the chunk is whole and its lengths add up."""
    columns = (chunk.tensor, chunk.offset, chunk.length)
    counts = [len(column) for column in columns]
    if len(set(counts)) != 1:
        raise TransferError(f"chunk {chunk.sequence}: {counts} tensors, offsets and lengths; expected one each a piece")
    declared = int(chunk.length.sum(dtype=np.uint64))
    if declared != len(chunk.payload):
        raise TransferError(
            f"chunk {chunk.sequence}: {len(chunk.payload)} payload bytes, its pieces declare {declared}; send it again"
        )
    parts: list[Any] = [column.tobytes() for column in columns]
    checksum = _checksum(parts if chunk.in_ring else [*parts, chunk.payload])
    if checksum != chunk.checksum:
        raise TransferError(
            f"chunk {chunk.sequence}: checksum {checksum:016x}, the sender's is {chunk.checksum:016x};"
            " the bytes changed on the way, send it again"
        )


def _checksum(parts: Iterable[Any]) -> int:
    checksum = xxhash.xxh3_64()
    for part in parts:
        checksum.update(part)
    return checksum.intdigest()


# ---------------------------------------------------------------- protobuf


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_field(number: int, value: int) -> bytes:
    return bytes([number << 3 | VARINT]) + _varint(value) if value else b""


def length_field(number: int, length: int) -> bytes:
    """Tag and length of a packed or bytes field; the bytes follow. Empty fields are left out, as proto3 does."""
    return bytes([number << 3 | BYTES]) + _varint(length) if length else b""


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for i in range(10):
        if at + i >= len(message):
            break
        byte = message[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value & (1 << 64) - 1, at + i + 1
    raise TransferError(f"malformed message: no number at byte {at} of {len(message)}; send it again")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value): an int for a varint, otherwise the raw bytes. Unknown fields come too."""
    at = 0
    while at < len(message):
        tag, start = _read_varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, at = _read_varint(message, start)
            yield number, value
            continue
        if wire_type == BYTES:
            length, start = _read_varint(message, start)
        elif wire_type in FIXED_BYTES:
            length = FIXED_BYTES[wire_type]
        else:
            raise TransferError(f"malformed message: wire type {wire_type} at byte {at}; send it again")
        if length > len(message) - start:
            raise TransferError(f"malformed message: field {number} at byte {at} is cut short; send it again")
        yield number, message[start : start + length]
        at = start + length


def _read_open(body: memoryview, ring: Piece | None) -> StageOpen:
    found: dict[int, int | memoryview] = {}
    onward: list[bytes] = []
    for number, value in _fields(body):
        if number == 7 and not isinstance(value, int):
            onward.append(bytes(value))
        else:
            found[number] = value
        if len(onward) > MAX_ONWARD:
            raise TransferError(f"stage: more than {MAX_ONWARD} ranks to pass on to; begin shorter chains")
    numbers = [found.get(number, 0) for number in (1, 2, 3, 5, 6)]
    transaction, epoch, trainer_rank, ring_bytes, on_device = (
        value if isinstance(value, int) else 0 for value in numbers
    )
    ticket, group = (found.get(number, b"") for number in (4, 8))
    return StageOpen(
        transaction=transaction,
        epoch=epoch,
        trainer_rank=trainer_rank,
        ticket=b"" if isinstance(ticket, int) else bytes(ticket[:MAX_TICKET_BYTES]),
        ring_bytes=ring_bytes,
        on_device=bool(on_device),
        group=b"" if isinstance(group, int) else bytes(group[:MAX_TICKET_BYTES]),
        onward=tuple(onward),
    )


def _read_chunk(body: memoryview, ring: Piece | None) -> Chunk:
    numbers: dict[int, int] = {}
    parts: dict[int, list[memoryview]] = {}
    for number, value in _fields(body):
        if isinstance(value, int):
            numbers[number] = value
        else:
            parts.setdefault(number, []).append(value)
    # A repeated field may come in several parts, packed or not; of a single one the last part holds.
    columns = {number: part[0] if len(part) == 1 else b"".join(part) for number, part in parts.items()}
    sequence = numbers.get(1, 0)
    payload: Piece = parts[6][-1] if 6 in parts else memoryview(b"")
    if numbers.get(8):
        payload = _in_ring(sequence, numbers.get(7, 0), numbers[8], ring)
    return Chunk(
        sequence=sequence,
        tensor=_column(columns.get(2), np.dtype("<u4")),
        offset=_column(columns.get(3), np.dtype("<u8")),
        length=_column(columns.get(4), np.dtype("<u4")),
        checksum=int.from_bytes(parts[5][-1], "little") if 5 in parts else 0,
        payload=payload,
        in_ring=bool(numbers.get(8)),
    )


def _in_ring(sequence: int, at: int, num_bytes: int, ring: Piece | None) -> Piece:
    held = 0 if ring is None else ring.nbytes
    if ring is None or num_bytes > held or at > held - num_bytes:
        raise TransferError(
            f"chunk {sequence}: its payload is bytes [{at}, {at + num_bytes}) of a ring, this stream's has {held};"
            " open the stream with a ring, or send the payload in the chunk"
        )
    return ring[at : at + num_bytes]


def _column(data: bytes | memoryview | None, dtype: np.dtype[Item]) -> npt.NDArray[Item]:
    if data is None:
        return np.empty(0, dtype)
    if len(data) % dtype.itemsize:
        raise TransferError(
            f"malformed message: {len(data)} bytes of {dtype.itemsize}-byte numbers in a chunk; send it again"
        )
    return np.frombuffer(data, dtype)


KINDS: dict[int, Callable[[memoryview, Piece | None], StageOpen | Chunk]] = {1: _read_open, 2: _read_chunk}
