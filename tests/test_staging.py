"""Staging: whatever order, cut or repetition the bytes arrive in, the rows are the same; nothing lands outside."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.formats import TensorSpec
from weight_update.chunks import Chunk
from weight_update.errors import BusyError, TransferError
from weight_update.staging import Arena, StagingBuffer, cover, plan_staging

SPECS = (
    TensorSpec(name="a.weight", dtype="U8", shape=(6, 10)),
    TensorSpec(name="a.weight_scale_2", dtype="F32", shape=()),
    TensorSpec(name="norm.weight", dtype="BF16", shape=(7,)),
    TensorSpec(name="empty", dtype="U8", shape=(0, 4)),
)
ROW_START, ROW_STOP = np.array([2, 0, 0, 0]), np.array([5, 1, 7, 0])
FIRST, STOP = [20, 0, 0, 0], [50, 4, 14, 0]  # bytes of each tensor that the rank owns
CONTENT = [np.random.default_rng(i).integers(1, 256, spec.num_bytes, np.uint8) for i, spec in enumerate(SPECS)]


def staging() -> StagingBuffer:
    plan = plan_staging(SPECS, ROW_START, ROW_STOP)
    return StagingBuffer(plan, Arena().reserve(plan.num_bytes))


def chunk_of(pieces: list[tuple[int, int, int]], sequence: int = 1) -> Chunk:
    """(tensor, first byte, stop byte) of the true content."""
    payload = b"".join(CONTENT[t][a:b].tobytes() for t, a, b in pieces)
    return Chunk(
        sequence=sequence,
        tensor=np.array([t for t, _, _ in pieces], np.uint32),
        offset=np.array([a for _, a, _ in pieces], np.uint64),
        length=np.array([b - a for _, a, b in pieces], np.uint32),
        checksum=0,
        payload=memoryview(payload),
    )


@st.composite
def pieces_inside(draw: st.DrawFn) -> tuple[int, int, int]:
    t = draw(st.sampled_from([0, 1, 2]))
    a = draw(st.integers(FIRST[t], STOP[t]))
    return t, a, draw(st.integers(a, STOP[t]))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(pieces_inside(), max_size=4), max_size=12), st.randoms())
def test_any_order_cut_and_repetition_gives_the_same_rows(
    sent: list[list[tuple[int, int, int]]], random: object
) -> None:
    buffer = staging()
    seen: set[tuple[int, int]] = set()
    for pieces in sent:
        staged = buffer.place(chunk_of(pieces))
        seen |= {(t, byte) for t, a, b in pieces for byte in range(a, b)}
        assert staged == len(seen)
    names = [spec.name for spec in SPECS]
    missing = {(names.index(name), byte) for name, (a, b) in buffer.missing() for byte in range(a, b)}
    assert missing == {(t, byte) for t in range(4) for byte in range(FIRST[t], STOP[t])} - seen
    rest = [(t, byte, byte + 1) for t, byte in sorted(missing)]
    random.shuffle(rest)  # type: ignore[attr-defined]
    assert buffer.place(chunk_of(rest)) == 48 == buffer.expected_bytes
    assert buffer.missing() == []
    for t, spec in enumerate(SPECS):
        rows = buffer.rows(t)
        assert rows.shape == (ROW_STOP[t] - ROW_START[t], spec.row_bytes)
        assert rows.flatten().numpy().tobytes() == CONTENT[t][FIRST[t] : STOP[t]].tobytes()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)).map(sorted), max_size=15))
def test_cover_counts_each_byte_once_and_keeps_sorted_disjoint_intervals(intervals: list[list[int]]) -> None:
    edges: list[int] = []
    seen: set[int] = set()
    for start, stop in intervals:
        new = set(range(start, stop)) - seen
        seen |= new
        assert cover(edges, start, stop) == len(new)
        assert edges == sorted(set(edges))
        assert {i for a, b in zip(edges[::2], edges[1::2], strict=True) for i in range(a, b)} == seen


@pytest.mark.parametrize(
    ("piece", "named"),
    [
        ((0, 19, 4), r"a\.weight: 4 bytes at offset 19, this rank takes bytes \[20, 50\) of 60"),
        ((0, 48, 3), r"a\.weight: 3 bytes at offset 48"),
        ((0, 50, 1), r"a\.weight: 1 bytes at offset 50"),
        ((0, 0, 60), r"a\.weight: 60 bytes at offset 0"),
        ((1, 1, 4), r"a\.weight_scale_2: 4 bytes at offset 1, this rank takes bytes \[0, 4\) of 4"),
        ((3, 0, 1), r"empty: 1 bytes at offset 0"),
        ((2, 2**64 - 1, 2), r"norm\.weight: 2 bytes at offset 18446744073709551615"),
        ((2, 2**63, 2), r"norm\.weight: 2 bytes at offset 9223372036854775808"),
        ((2, 2**63 - 1, 2**32 - 1), r"norm\.weight: 4294967295 bytes"),
        ((4, 0, 1), "tensor 4, the push has 4"),
    ],
)
def test_a_piece_outside_is_refused_by_name_and_nothing_of_its_chunk_is_written(
    piece: tuple[int, int, int], named: str
) -> None:
    buffer = staging()
    inside = chunk_of([(0, 20, 50), (1, 0, 4), (2, 0, 14)])
    tensor, offset, length = piece
    bad = Chunk(
        sequence=9,
        tensor=np.append(inside.tensor, np.uint32(tensor)),
        offset=np.append(inside.offset, np.uint64(offset)),
        length=np.append(inside.length, np.uint32(length)),
        checksum=0,
        payload=memoryview(bytes(inside.payload) + b"\xff" * min(length, 100)),
    )
    with pytest.raises(TransferError, match=named):
        buffer.place(bad)
    assert not any(buffer.rows(t).any() for t in range(4))
    assert [name for name, _ in buffer.missing()] == ["a.weight", "a.weight_scale_2", "norm.weight"]


def test_all_pieces_outside_are_named_in_one_message() -> None:
    bad = chunk_of([(0, 0, 4), (0, 20, 24), (0, 52, 56)])
    with pytest.raises(TransferError, match=r"(?s)2 problems.*offset 0.*offset 52"):
        staging().place(bad)


def test_after_close_nothing_is_written() -> None:
    buffer = staging()
    buffer.place(chunk_of([(0, 20, 30)]))
    buffer.close()
    with pytest.raises(BusyError, match="prepared or aborted"):
        buffer.place(chunk_of([(0, 30, 40)]))
    assert not buffer.rows(0)[1:].any()


def test_threads_stage_the_same_bytes_together() -> None:
    spec = TensorSpec(name="w", dtype="U8", shape=(512, 1000))
    plan = plan_staging([spec], np.array([0]), np.array([512]))
    content = np.random.default_rng(0).integers(0, 256, spec.num_bytes, np.uint8)
    buffer = StagingBuffer(plan, Arena().reserve(plan.num_bytes))

    def stream(seed: int) -> None:
        for start in np.random.default_rng(seed).permutation(spec.num_bytes // 1000) * 1000:
            one = np.array([1000], np.uint32)
            chunk = Chunk(
                sequence=1,
                tensor=np.zeros(1, np.uint32),
                offset=np.array([start], np.uint64),
                length=one,
                checksum=0,
                payload=memoryview(content[start : start + 1000]),
            )
            buffer.place(chunk)

    threads = [threading.Thread(target=stream, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert buffer.missing() == [] and buffer.rows(0).flatten().numpy().tobytes() == content.tobytes()


def test_the_arena_is_reused_and_grows_only_when_it_must() -> None:
    arena = Arena()
    first = arena.reserve(1000)
    assert arena.reserve(500).data_ptr() == arena.reserve(1000).data_ptr() == first.data_ptr()
    assert arena.reserve(5000).numel() == 5000
    assert arena.reserve(0).dtype is torch.uint8
