"""Chunks on the wire: valid protobuf, both ways, and nothing damaged gets through."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import transfuse_pb2 as pb
from weight_update.chunks import (
    MAX_MESSAGE_BYTES,
    RING_LESS_BYTES,
    Chunk,
    Packet,
    StageOpen,
    check,
    decode_request,
    encode_chunk,
)
from weight_update.errors import TransferError


@dataclass(frozen=True)
class Pieces:
    """What a sender puts into one chunk."""

    sequence: int
    tensor: list[int]
    offset: list[int]
    pieces: list[bytes]

    @property
    def length(self) -> list[int]:
        return [len(piece) for piece in self.pieces]

    def message(self) -> bytes:
        return encode_chunk(
            self.sequence,
            np.array(self.tensor, np.uint32),
            np.array(self.offset, np.uint64),
            np.array(self.length, np.uint32),
            [memoryview(piece) for piece in self.pieces],
        )

    def checksum(self) -> int:
        """As the proto's comment has it."""
        arrays = np.array(self.tensor, "<u4").tobytes() + np.array(self.offset, "<u8").tobytes()
        arrays += np.array(self.length, "<u4").tobytes()
        return xxhash.xxh3_64_intdigest(arrays + b"".join(self.pieces))

    def generated(self) -> pb.StageRequest:
        chunk = pb.Chunk(
            sequence=self.sequence,
            tensor=self.tensor,
            offset=self.offset,
            length=self.length,
            checksum=self.checksum(),
            payload=b"".join(self.pieces),
        )
        return pb.StageRequest(chunk=chunk)


@st.composite
def chunks(draw: st.DrawFn, min_size: int = 0) -> Pieces:
    pieces = draw(st.lists(st.binary(max_size=200), min_size=min_size, max_size=6))
    count = len(pieces)
    return Pieces(
        draw(st.integers(0, 2**64 - 1)),
        draw(st.lists(st.integers(0, 2**32 - 1), min_size=count, max_size=count)),
        draw(st.lists(st.integers(0, 2**64 - 1), min_size=count, max_size=count)),
        pieces,
    )


def same(chunk: Chunk, sent: Pieces) -> bool:
    arrays = (chunk.tensor.tolist(), chunk.offset.tolist(), chunk.length.tolist(), bytes(chunk.payload))
    return arrays == (sent.tensor, sent.offset, sent.length, b"".join(sent.pieces))


def decoded(message: bytes) -> Chunk:
    chunk = decode_request(message)
    assert isinstance(chunk, Chunk)
    return chunk


@settings(deadline=None)
@given(chunks())
def test_the_generated_class_decodes_and_reencodes_a_hand_framed_chunk(sent: Pieces) -> None:
    request = pb.StageRequest.FromString(sent.message())
    assert request == sent.generated()
    assert request.SerializeToString() == sent.message()


@settings(deadline=None)
@given(chunks())
def test_the_hand_parser_reads_what_the_generated_class_wrote(sent: Pieces) -> None:
    chunk = decoded(sent.generated().SerializeToString())
    assert same(chunk, sent) and chunk.sequence == sent.sequence and chunk.checksum == sent.checksum()
    check(chunk)


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_the_hand_parser_reads_an_open(transaction: int, epoch: int, trainer_rank: int) -> None:
    opening = pb.StageOpen(transaction=transaction, epoch=epoch, trainer_rank=trainer_rank)
    read = decode_request(pb.StageRequest(open=opening).SerializeToString())
    assert read == StageOpen(transaction=transaction, epoch=epoch, trainer_rank=trainer_rank)


def test_every_valid_encoding_is_read_as_the_generated_class_reads_it() -> None:
    tensor, offset = (1).to_bytes(4, "little"), (2).to_bytes(8, "little")
    body = b"".join(
        [
            b"\x08\x05\x08\x87\x00",  # sequence twice, the second with a needless byte
            b"\x15" + tensor + b"\x12\x08" + tensor * 2,  # one unpacked, then two packed
            b"\x19" + offset + b"\x1a\x08" + offset + b"\x19" + offset,
            b"\x22\x04" + tensor + b"\x25" + tensor * 1 + b"\x22\x04" + tensor,
            b"\x7a\x03abc\x78\x01",  # fields of a later release
            b"\x29" + bytes(8) + b"\x29" + bytes(range(8)),
            b"\x32\x02no\x32\x03yes",
        ]
    )
    message = b"\x12" + bytes([len(body)]) + body
    generated, chunk = pb.StageRequest.FromString(message).chunk, decoded(message)
    assert chunk.sequence == generated.sequence == 7
    assert chunk.tensor.tolist() == list(generated.tensor) == [1, 1, 1]
    assert chunk.offset.tolist() == list(generated.offset) == [2, 2, 2]
    assert chunk.length.tolist() == list(generated.length) == [1, 1, 1]
    assert chunk.checksum == generated.checksum
    assert bytes(chunk.payload) == generated.payload == b"yes"
    check(decoded(Pieces(1, [1] * 3, [2] * 3, [b"y", b"e", b"s"]).message()))


def test_the_payload_is_a_view_of_the_message() -> None:
    message = Pieces(1, [0], [0], [b"x" * 1000]).message()
    assert decoded(message).payload.obj is message


@settings(deadline=None, max_examples=300)
@given(chunks(min_size=1), st.data())
def test_a_flipped_bit_is_refused_or_changes_no_row(sent: Pieces, data: st.DataObject) -> None:
    message = bytearray(sent.message())
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    try:
        chunk = decode_request(bytes(message))
        if isinstance(chunk, Chunk):
            check(chunk)
    except TransferError:
        return
    # The sequence number is only echoed, so that a change of it puts no byte in a wrong place.
    assert isinstance(chunk, Chunk) and same(chunk, sent)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=60))
def test_garbage_raises_nothing_but_a_transfer_error(message: bytes) -> None:
    try:
        chunk = decode_request(message)
        if isinstance(chunk, Chunk):
            check(chunk)
    except TransferError:
        pass


@settings(deadline=None)
@given(chunks(min_size=1), st.data())
def test_a_truncated_message_is_refused(sent: Pieces, data: st.DataObject) -> None:
    message = sent.message()
    with pytest.raises(TransferError):
        check(decoded(message[: data.draw(st.integers(0, len(message) - 1))]))


def test_a_truncated_open_is_refused() -> None:
    opening = pb.StageRequest(open=pb.StageOpen(transaction=2**63, epoch=3, trainer_rank=300)).SerializeToString()
    for size in range(len(opening)):
        with pytest.raises(TransferError):
            decode_request(opening[:size])


def test_pieces_that_do_not_add_up_are_refused() -> None:
    request = Pieces(3, [0, 1], [0, 0], [b"abcd", b"ef"]).generated()
    request.chunk.length[1] = 3
    with pytest.raises(TransferError, match=r"chunk 3: 6 payload bytes, its pieces declare 7"):
        check(decoded(request.SerializeToString()))
    request.chunk.length.append(0)
    with pytest.raises(TransferError, match=r"chunk 3: \[2, 2, 3\] tensors, offsets and lengths"):
        check(decoded(request.SerializeToString()))


def test_a_corrupted_payload_names_the_chunk_and_both_checksums() -> None:
    sent = Pieces(3, [0], [0], [b"abcd"])
    message = sent.message().replace(b"abcd", b"abce")
    expected = rf"chunk 3: checksum [0-9a-f]{{16}}, the sender's is {sent.checksum():016x}"
    with pytest.raises(TransferError, match=expected):
        check(decoded(message))


def test_messages_above_the_limit_are_neither_made_nor_read() -> None:
    with pytest.raises(TransferError, match=f"at most {MAX_MESSAGE_BYTES} are taken"):
        Pieces(1, [0], [0], [bytes(MAX_MESSAGE_BYTES)]).message()
    with pytest.raises(TransferError, match=f"at most {MAX_MESSAGE_BYTES} are taken"):
        decode_request(bytes(MAX_MESSAGE_BYTES + 1))


def test_a_message_that_is_neither_open_nor_chunk_is_refused() -> None:
    for message in (b"", b"\x1a\x01a", b"\x08\x01"):
        with pytest.raises(TransferError, match="neither an open nor a chunk"):
            decode_request(message)


def test_a_chunk_made_for_a_ring_goes_in_several_messages_where_there_is_none() -> None:
    sizes = np.array([RING_LESS_BYTES - 5, 9, RING_LESS_BYTES + 100], np.uint32)
    data = np.random.default_rng(0).integers(0, 256, int(sizes.sum()), np.uint8)
    pieces = [memoryview(part) for part in np.split(data, np.cumsum(sizes)[:-1])]
    packet = Packet(7, np.arange(3, dtype=np.uint32), np.full(3, 50, np.uint64), sizes, pieces)
    placed = {t: np.zeros(50 + int(size), np.uint8) for t, size in enumerate(sizes)}
    numbers = []
    for message in packet.messages:
        chunk = decode_request(message)
        assert isinstance(chunk, Chunk)
        check(chunk)
        numbers.append(chunk.sequence)
        read = 0
        for tensor, offset, length in zip(chunk.tensor, chunk.offset.tolist(), chunk.length.tolist(), strict=True):
            placed[int(tensor)][offset : offset + length] = chunk.payload[read : read + length]
            read += length
    assert numbers == [6, 6, 7]
    assert np.array_equal(np.concatenate([placed[t][50:] for t in range(3)]), data)
