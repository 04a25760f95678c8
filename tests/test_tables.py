"""Tables that stand for thousands of tensors say what a loop over them would say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quant.formats import FORMATS, TensorSpec, global_scale
from quant.parameters import ParameterRow
from weight_update.columns import Columns
from weight_update.delta import BlobSize, DeviceDelta, patches_of
from weight_update.digest import lane_keys, lanes_of, name_key
from weight_update.encoder import Grouping
from weight_update.errors import TransferError
from weight_update.gathering import Located
from weight_update.manifest import Manifest
from weight_update.packing import CHUNK_PIECES
from weight_update.source import PushPlan, Source


def test_lane_keys_of_many_are_those_of_each() -> None:
    keys = np.array([name_key(name) for name in ("a", "b.weight", "c" * 70)], np.uint64)
    row_bytes = np.array([1, 1024, 2**31], np.int64)
    each = [lane_keys(int(key), int(size)) for key, size in zip(keys, row_bytes, strict=True)]
    assert (lanes_of(keys, row_bytes) == np.array(each, np.uint64)).all()


def test_scales_of_a_table_are_those_of_each_group() -> None:
    """Fused groups, a tensor of zeros, formats without a scale, sources that share a parameter."""
    rows = [
        ParameterRow(name=f"p{i}", shape=(16, 16), format=format, group=group)
        for i, (format, group) in enumerate((("nvfp4", "g"), ("nvfp4", "g"), ("bf16", ""), ("fp8", ""), ("nvfp4", "")))
    ]
    held = torch.zeros(16, 16, dtype=torch.bfloat16)
    runs = ((0, 16),)
    sources = tuple(
        Source(name=row.name, kind="encode", parameter=row, specs=(), rows=held, runs=runs, sent=runs)
        for row in (*rows, rows[1])
    )
    order = tuple((row.name, row) for row in rows)
    columns = Columns.of(Manifest(tensors=(), parameters=()), (), order, (), (), ())
    plan = PushPlan(
        sources=sources, specs=(), logical_bytes=0, carried_over=0, widened=(), order=order, columns=columns
    )
    grouping = Grouping(plan)
    largest = grouping.largest(np.array([0x3C00, 0x3C81, 0x4000, 0x3F80, 0, 0x3D03]))
    assert largest.tolist() == [0x3C00, 0x3D03, 0x4000, 0x3F80, 0]
    scales = grouping.scales(largest)
    shared, alone = global_scale(FORMATS["nvfp4"], 0x3D03), global_scale(FORMATS["fp8"], 0x3F80)
    assert dict(scales) == {"p0": shared, "p1": shared, "p3": alone, "p4": torch.ones(())}
    assert scales.of_sources.tolist() == [float(shared), float(shared), 1.0, float(alone), 1.0, float(shared)]


def located(length: list[int]) -> Located:
    sizes = np.array(length, np.int64)
    return Located(
        device=torch.device("cpu"),
        tensor=np.arange(len(sizes)),
        offset=np.arange(len(sizes)) * 1000,
        length=sizes,
        address=(1 << 20) + np.arange(len(sizes)) * 4096,
        memory=torch.empty(0),
    )


@pytest.mark.parametrize("chunk_bytes", [16, 48, 1 << 20])
def test_pieces_are_cut_into_chunks_without_loss(chunk_bytes: int) -> None:
    whole = located([32, 4, 0, 100, 16, 1])
    chunks = list(whole.ordered().cut(chunk_bytes))
    assert all(int(chunk.length.sum()) <= chunk_bytes and chunk.length.min() > 0 for chunk in chunks)
    found = {
        (int(tensor), int(offset) + i): int(address) + i
        for chunk in chunks
        for tensor, offset, address, length in zip(
            chunk.tensor, chunk.offset, chunk.address, chunk.length, strict=True
        )
        for i in range(length)
    }
    expected = {
        (t, 1000 * t + i): (1 << 20) + 4096 * t + i for t, size in enumerate(whole.length.tolist()) for i in range(size)
    }
    assert found == expected and sum(int(chunk.length.sum()) for chunk in chunks) == len(expected)
    assert (chunks[0].length[: 2 if chunk_bytes > 40 else 1] % 16 == 0).all()


def test_a_chunk_has_no_more_pieces_than_a_message_takes() -> None:
    chunks = list(located([1] * (CHUNK_PIECES + 3)).cut(1 << 20))
    assert [len(chunk.tensor) for chunk in chunks] == [CHUNK_PIECES, 3]


SPECS = (TensorSpec(name="a", dtype="U8", shape=(4, 10)), TensorSpec(name="b", dtype="U8", shape=(3, 8)))


def changes() -> DeviceDelta:
    return DeviceDelta(
        tensors=torch.tensor([0, 0, 1, 1], dtype=torch.int32),
        positions=torch.tensor([3, 39, 0, 17]),
        differences=torch.tensor([1, 255, 7, 9], dtype=torch.uint8),
    )


def columns(*rows: tuple[int, int, int]) -> list[torch.Tensor]:
    """Bytes of a row, first and last-plus-one row of every tensor."""
    return [torch.tensor(each) for each in zip(*rows, strict=True)]


def test_a_blob_of_a_device_comes_back_as_it_was() -> None:
    blob, size = changes().blob()
    back = DeviceDelta.of_blob(blob, size, *columns((10, 0, 4), (8, 0, 3)))
    for name in ("tensors", "positions", "differences"):
        assert torch.equal(getattr(back, name), getattr(changes(), name)), name
    patches = patches_of(back, SPECS)
    assert [(each.tensor, each.first, each.stop) for each in patches] == [(0, 0, 40), (1, 0, 24)]
    assert [each.positions.tolist() for each in patches if each.positions is not None] == [[3, 39], [0, 17]]


def test_a_destination_gets_the_changes_of_its_rows() -> None:
    row_bytes, row_start, row_stop = columns((10, 0, 2), (8, 1, 3))
    owned = changes().owned(row_start, row_stop, row_bytes, torch.tensor([0, 1]))
    assert owned.positions.tolist() == [3, 17] and owned.tensors.tolist() == [0, 1]


def test_a_destination_that_lacks_a_tensor_counts_the_others() -> None:
    row_bytes, row_start, row_stop = columns((10, 4, 4), (8, 0, 3))
    owned = changes().owned(row_start, row_stop, row_bytes, torch.tensor([-1, 0]))
    assert owned.positions.tolist() == [0, 17] and owned.tensors.tolist() == [0, 0]
    assert owned.tensors.dtype == torch.int32


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("positions", [39, 3, 0, 17]),
        ("positions", [3, 3, 0, 17]),
        ("positions", [3, 40, 0, 17]),
        ("positions", [-1, 39, 0, 17]),
        ("tensors", [0, 0, 1, 2]),
        ("tensors", [1, 0, 1, 1]),
        ("tensors", [-1, 0, 1, 1]),
    ],
)
def test_a_blob_that_leaves_the_rows_or_its_order_is_refused(field: str, values: list[int]) -> None:
    given = {name: getattr(changes(), name) for name in ("tensors", "positions", "differences")}
    given[field] = torch.tensor(values, dtype=given[field].dtype)
    blob, size = DeviceDelta(**given).blob()
    with pytest.raises(TransferError, match="outside the rows"):
        DeviceDelta.of_blob(blob, size, *columns((10, 0, 4), (8, 0, 3)))


def test_a_blob_of_another_size_is_refused() -> None:
    blob, size = changes().blob()
    other = BlobSize(num_bytes=size.num_bytes, num_segments=0, num_changes=3, dense_bytes=0)
    with pytest.raises(TransferError, match="announced"):
        DeviceDelta.of_blob(blob, other, *columns((10, 0, 4), (8, 0, 3)))
