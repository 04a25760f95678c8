"""Rows on their way out of a trainer rank: many tensors in one block, cut to what ranks own; plans that are kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quant.formats import TensorSpec
from quant.parameters import ParameterRow
from sharding.routes import Destination
from weight_update import packing
from weight_update.adapters import Adapted
from weight_update.chunks import Chunk, Packet, check, decode_request
from weight_update.columns import Block, Columns, blocks_of
from weight_update.door import Door
from weight_update.manifest import Manifest
from weight_update.plans import LastPlan
from weight_update.sharing import plan_push
from weight_update.source import PushPlan, named_items

Held = tuple[int, int, int, int]  # rows, bytes of a row, and the rows [start, stop) that the ranks own


class Stream:
    """What a door sends, decoded."""

    def __init__(self, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.chunks: list[Chunk] = []

    def send(self, packet: Packet) -> None:
        chunk = decode_request(packet.message)
        assert isinstance(chunk, Chunk)
        check(chunk)
        self.chunks.append(chunk)


def pieces(chunks: list[Chunk]) -> dict[tuple[int, int], bytes]:
    """(tensor, byte) -> its value, each sent once."""
    found: dict[tuple[int, int], bytes] = {}
    for chunk in chunks:
        at = 0
        columns = (chunk.tensor.tolist(), chunk.offset.tolist(), chunk.length.tolist())
        for tensor, offset, length in zip(*columns, strict=True):
            for i in range(length):
                assert (tensor, offset + i) not in found
                found[tensor, offset + i] = bytes(chunk.payload[at + i : at + i + 1])
            at += length
    return found


def owned(rows: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, rows), st.integers(0, rows)).map(lambda pair: (min(pair), max(pair)))


tensors = st.integers(1, 8).flatmap(
    lambda rows: st.tuples(st.just(rows), st.integers(1, 9), owned(rows)).map(lambda each: (each[0], each[1], *each[2]))
)


@settings(deadline=None, max_examples=100)
@given(st.lists(tensors, min_size=1, max_size=12), st.integers(1, 80), st.integers(1, 6), st.integers(0, 2**31))
def test_ranks_get_each_byte_of_their_rows_once_however_chunks_are_cut(
    held: list[Held], chunk_bytes: int, at_a_time: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    content = [torch.from_numpy(rng.integers(0, 256, (rows, size), np.uint8)) for rows, size, _, _ in held]
    specs = [TensorSpec(name=f"t{i}", dtype="U8", shape=tuple(rows.shape)) for i, rows in enumerate(content)]
    manifest = Manifest(tensors=tuple(reversed(specs)))
    columns = Columns.of(manifest, specs, [], [], [], [])
    by_index = [(start, stop) for _, _, start, stop in reversed(held)]
    starts, stops = (np.array(each, np.int64) for each in zip(*by_index, strict=True))
    stream: Any = Stream(chunk_bytes)
    door = Door(Destination(ranks=(0,), row_start=starts, row_stop=stops), [stream])
    whole = [(i, 0, rows) for i, rows in enumerate(content)]
    for first in range(0, len(whole), at_a_time):
        for block in blocks_of(whole[first : first + at_a_time]):
            door.send(block, columns)
    door.flush()
    assert pieces(stream.chunks) == {
        (i, offset): bytes([content[i].view(-1)[offset]])
        for i, (_, size, start, stop) in enumerate(held)
        for offset in range(start * size, stop * size)
    }
    assert all(len(chunk.payload) == chunk_bytes for chunk in stream.chunks[:-1])


def test_a_chunk_takes_no_more_pieces_than_its_message_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK_PIECES", 7)
    specs = [TensorSpec(name=f"t{i}", dtype="U8", shape=(1, 3)) for i in range(20)]
    columns = Columns.of(Manifest(tensors=tuple(specs)), specs, [], [], [], [])
    stream: Any = Stream(1 << 20)
    everything = Destination(ranks=(0,), row_start=np.zeros(20, np.int64), row_stop=np.ones(20, np.int64))
    door = Door(everything, [stream])
    door.send(Block.of(*((i, 0, torch.full((1, 3), i, dtype=torch.uint8)) for i in range(20))), columns)
    door.flush()
    assert [len(chunk.tensor) for chunk in stream.chunks] == [7, 7, 6]
    assert set(pieces(stream.chunks)) == {(i, byte) for i in range(20) for byte in range(3)}


# ---------------------------------------------------------------- the plan of the last push


class Model(nn.Module):
    """Two matrices, the second tied to a third name."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
        self.b = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
        self.c = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
        self.c.weight = self.b.weight


MANIFEST = Manifest(
    tensors=tuple(TensorSpec(name=f"{name}.weight", dtype="BF16", shape=(3, 4)) for name in "ab"),
    parameters=(
        ParameterRow(name="a.weight", shape=(3, 4), format="bf16"),
        ParameterRow(name="b.weight", shape=(3, 4), format="bf16", aliases=("c.weight",)),
    ),
)


def last_of(model: Any) -> LastPlan | None:
    plan, problems = plan_push(MANIFEST, model, "all")
    assert plan is not None, problems
    return LastPlan.of("key", named_items(model), plan)


def rows_of(plan: PushPlan | None) -> dict[str, Tensor]:
    assert plan is not None
    return {source.name: source.rows for source in plan.sources}


def test_the_plan_of_the_last_push_serves_the_next_one_with_the_rows_of_today() -> None:
    model = Model()
    last = last_of(model)
    assert last is not None and all(not source.rows.numel() for source in last.plan.sources)  # it keeps none alive
    model.a.weight.data = torch.full((3, 4), 5.0, dtype=torch.bfloat16)
    rows = rows_of(last.again("key", named_items(model)))
    assert rows["a.weight"].eq(5).all() and rows["b.weight"].data_ptr() == model.b.weight.data_ptr()
    fresh, _ = plan_push(MANIFEST, model, "all")
    assert fresh is not None and list(rows) == [source.name for source in fresh.sources]
    again = last.again("key", named_items(model))
    assert again is not None and (again.specs, again.order) == (fresh.specs, fresh.order)


def _untied(model: Model) -> None:
    model.c.weight = nn.Parameter(model.b.weight.detach().clone())


CHANGES = {
    "dtype": lambda model: model.a.float(),
    "shape": lambda model: setattr(model.a, "weight", nn.Parameter(torch.ones(4, 4).bfloat16())),
    "layout in memory": lambda model: setattr(model.a, "weight", nn.Parameter(torch.ones(4, 3).bfloat16().t())),
    "a tensor more": lambda model: setattr(model, "d", nn.Linear(4, 3, dtype=torch.bfloat16)),
    "a tensor less": lambda model: delattr(model, "a"),
    "what is trained": lambda model: model.a.requires_grad_(False),
    "what is tied": _untied,
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_serves_no_push_of_tensors_that_are_not_alike(change: str) -> None:
    model: Any = Model()
    last = last_of(model)
    assert last is not None and last.again("key", named_items(model)) is not None
    CHANGES[change](model)
    assert last.again("key", named_items(model)) is None


def test_it_serves_no_push_of_another_scope_or_manifest_and_none_of_an_adapted_model() -> None:
    model = Model()
    last = last_of(model)
    assert last is not None and last.again("another", named_items(model)) is None
    given = named_items(model)
    adapted = Adapted(items=given.items, trainable=given.trainable, low_rank={}, has_adapters=True)
    assert last.again("key", adapted) is None


def test_a_plan_is_not_kept_where_a_tensor_is_tied_by_its_bytes_alone() -> None:
    model = Model()
    _untied(model)
    assert last_of(model) is None  # whether they are still equal must be looked at
