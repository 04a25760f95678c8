"""Rows on their way out of a trainer rank: many tensors in one block, cut to what ranks own; plans that are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quant.expert_maps import ExpertMaps
from quant.formats import TensorSpec
from quant.names import IDENTITY
from quant.parameters import ParameterRow
from sharding.routes import Destination
from weight_update import packing
from weight_update.chunks import Chunk, Packet, check, decode_request
from weight_update.columns import Block, Columns, blocks_of
from weight_update.confirmed import Confirmed
from weight_update.door import Door
from weight_update.errors import ManifestError
from weight_update.manifest import Manifest
from weight_update.ranks import Ranks
from weight_update.retained import Retained
from weight_update.source import PushPlan
from weight_update.wishes import Places, Wish

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
    told = [i for i, (_, _, start, stop) in enumerate(held) if start < stop]  # the rank counts these alone
    assert pieces(stream.chunks) == {
        (number, offset): bytes([content[i].view(-1)[offset]])
        for number, i in enumerate(told)
        for offset in range(held[i][2] * held[i][1], held[i][3] * held[i][1])
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


def test_the_plan_of_the_last_push_serves_the_next_one_while_every_tensor_is_where_it_was() -> None:
    model = Model()
    plan = planner()
    first = plan(model)
    model.a.weight.data.fill_(5.0)
    assert plan(model) is first and first.sources[0].rows.eq(5).all()
    assert plan(model, scope=["a.weight"]) is not first


def _untied(model: Model) -> None:
    model.c.weight = nn.Parameter(model.b.weight.detach().clone())


CHANGES = {
    "dtype": lambda model: model.a.float(),
    "memory": lambda model: setattr(model.a.weight, "data", model.a.weight.detach().clone()),
    "layout in memory": lambda model: setattr(model.a.weight, "data", model.a.weight.data.view(4, 3).t()),
    "what is trained": lambda model: model.a.requires_grad_(False),
    "what is tied": _untied,
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_serves_no_push_of_tensors_that_are_not_alike(change: str) -> None:
    model: Any = Model()
    plan = planner()
    first = plan(model)
    assert plan(model) is first
    CHANGES[change](model)
    fresh = plan(model)
    assert fresh is not first
    assert all(source.rows.data_ptr() in {each.data_ptr() for each in model.parameters()} for source in fresh.sources)


def test_a_plan_is_not_kept_where_a_tensor_is_tied_by_its_bytes_alone() -> None:
    """Whether they are still equal must be looked at."""
    model = Model()
    _untied(model)
    plan = planner()
    plan(model)
    with torch.no_grad():
        model.c.weight.neg_()
    with pytest.raises(ManifestError, match=r"c\.weight"):
        plan(model)


def planner() -> Callable[..., PushPlan]:
    """Plans pushes as one trainer does, one after the other."""
    retained = Retained(Ranks(None), IDENTITY, None, Confirmed())
    places = Places(maps=ExpertMaps(), moved=frozenset(), problems=[])

    def plan(model: nn.Module, scope: Any = "all") -> PushPlan:
        return retained.plan(MANIFEST, Wish(model, scope, None, None, 0, False, "error", None), places)

    return plan
