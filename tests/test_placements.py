"""Placements: shards, subsets of rows, alignment, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quant import kernels
from quant.formats import FORMATS, TensorSpec
from quant.layouts import LAYOUTS, Placement, apply_rows, invert_rows, place_row_major, plan_linear
from quant.steps import RowMajor, ShuffleRows, locate
from tests.plans import PLANS, apply_all, empty, random_tensors

NVFP4 = FORMATS["nvfp4"]


def shards(num_units: int, world: int) -> list[tuple[int, int]]:
    """torch.chunk over units: ranks at the end may get none."""
    step = -(-num_units // world)
    return [(min(rank * step, num_units), min((rank + 1) * step, num_units)) for rank in range(world)]


@pytest.mark.parametrize("case", PLANS)
@pytest.mark.parametrize("world", [2, 3, 7])
def test_applying_to_shards_is_a_shard_of_applying(case: str, world: int) -> None:
    plan = PLANS[case]()
    tensors = random_tensors(plan, 1)
    whole = apply_all(plan, tensors)
    for spec in plan.storages:
        placements = [p for p in plan.placements if p.storage == spec.name]
        num_rows = dict.fromkeys((p.tensor.name for p in placements), 0)
        for start, stop in shards(spec.shape[0], world):
            base = start * spec.unit_bytes
            local = torch.zeros((stop - start) * spec.unit_bytes, dtype=torch.uint8)
            for placement in placements:
                row0, row1 = placement.rows_of_units(start, stop)
                source = tensors[placement.tensor.name]
                apply_rows(placement, source[row0:row1], row0, local, base)
                assert torch.equal(invert_rows(placement, row0, row1 - row0, local, base), source[row0:row1])
                num_rows[placement.tensor.name] += row1 - row0
            assert torch.equal(local, whole[spec.name][base : base + len(local)])
        assert num_rows == {p.tensor.name: p.tensor.num_rows for p in placements}


@pytest.mark.parametrize("case", PLANS)
def test_any_rows_are_written_without_touching_another_byte(case: str) -> None:
    plan = PLANS[case]()
    old, new = random_tensors(plan, 2), random_tensors(plan, 3)
    storages = apply_all(plan, old)
    rng = np.random.default_rng(0)
    for placement in plan.placements:
        name = placement.tensor.name
        row0, row1 = sorted(rng.integers(0, placement.tensor.num_rows + 1, 2).tolist())
        apply_rows(placement, new[name][row0:row1], row0, storages[placement.storage], 0)
        old[name][row0:row1] = new[name][row0:row1]
    expected = apply_all(plan, old)
    assert all(torch.equal(storages[name], expected[name]) for name in expected)


@pytest.mark.parametrize("case", PLANS)
def test_numba_and_torch_place_bytes_alike(case: str) -> None:
    plan = PLANS[case]()
    tensors = random_tensors(plan, 4)
    ours, twins = empty(plan), empty(plan)
    for placement in plan.placements:
        whole = tensors[placement.tensor.name]
        apply_rows(replace(placement, swap_nibbles=False), whole, 0, ours[placement.storage], 0)  # kernels only move
        kernels.scatter_rows_torch(whole, placement.located, 0, placement.origin, twins[placement.storage])
        back = torch.empty_like(whole)
        kernels.gather_rows_torch(twins[placement.storage], placement.located, 0, placement.origin, back)
        assert torch.equal(back, whole)
    assert all(torch.equal(ours[name], twins[name]) for name in ours)


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
@pytest.mark.parametrize(
    ("layout", "fmt", "index"),
    [("trtllm_linear", "nvfp4", 1), ("trtllm_dit_swapped", "nvfp4", 0), ("npu_linear", "int8_dynamic", 0)],
)
def test_memory_need_not_be_aligned(layout: str, fmt: str, index: int, offset: int) -> None:
    plan = plan_linear(LAYOUTS[layout], FORMATS[fmt], "a", 130, 128)
    placement, num_bytes = plan.placements[index], plan.storages[index].num_bytes
    tensors = random_tensors(plan, 5)
    source, expected = tensors[placement.tensor.name], apply_all(plan, tensors)[placement.storage]
    storage = torch.zeros(num_bytes + offset, dtype=torch.uint8)[offset:]
    apply_rows(placement, source, 0, storage, 0)
    assert torch.equal(storage, expected)
    assert torch.equal(invert_rows(placement, 3, 100, storage, 0), source[3:103])


def test_runs_of_four_bytes_may_lie_anywhere() -> None:
    source = torch.randint(1, 256, (5, 4), dtype=torch.uint8)
    for shift, located in ((0, locate((), RowMajor(6), 5, 4)), (2, locate((), RowMajor(), 5, 4))):
        out, twin = torch.zeros(2, 40, dtype=torch.uint8)
        kernels.scatter_rows(source, located, 0, shift, out)
        kernels.scatter_rows_torch(source, located, 0, shift, twin)
        assert torch.equal(out, twin) and out.count_nonzero() == 20


def test_a_row_of_a_strided_source_is_taken_as_it_reads() -> None:
    plan = plan_linear(LAYOUTS["plain"], NVFP4, "a", 128, 64)
    wide = torch.randint(0, 256, (128, 64), dtype=torch.uint8)
    storage = torch.zeros(plan.storages[0].num_bytes, dtype=torch.uint8)
    apply_rows(plan.placements[0], wide[:, ::2], 0, storage, 0)
    assert torch.equal(storage.view(128, 32), wide[:, ::2])


@pytest.mark.parametrize("case", PLANS)
def test_placements_state_where_every_byte_lies(case: str) -> None:
    """The offsets of all placements are distinct, inside the storage, and a row lies within its unit."""
    plan = PLANS[case]()
    for spec in plan.storages:
        taken = np.zeros(spec.num_bytes, np.int64)
        for placement in (p for p in plan.placements if p.storage == spec.name):
            columns = np.arange(placement.tensor.row_bytes)
            runs = placement.run_offsets[columns // placement.run_bytes] + columns % placement.run_bytes
            offsets = placement.row_offsets[:, None] + runs
            np.add.at(taken, offsets.ravel(), 1)
            assert placement.unit_bytes == spec.unit_bytes
            assert np.array_equal(offsets // spec.unit_bytes, offsets[:, :1] // spec.unit_bytes + 0 * offsets)
        assert taken.max() == 1 and (taken.min() == 0) == spec.padding


def test_a_plain_tensor_is_its_own_storage() -> None:
    for shape in ((5, 3), (7,), (), (0, 4)):
        spec = TensorSpec(name="model.norm.weight", dtype="BF16", shape=shape)
        placement = place_row_major(spec, "model.norm.weight")
        source = torch.randint(0, 256, (spec.num_rows, spec.row_bytes), dtype=torch.uint8)
        storage = torch.zeros(spec.num_bytes, dtype=torch.uint8)
        apply_rows(placement, source, 0, storage, 0)
        assert torch.equal(storage.view(source.shape), source)
        assert placement.rows_of_units(1, 3) == (min(1, spec.num_rows), min(3, spec.num_rows))


def placement_of(num_rows: int = 300) -> tuple[Placement, Tensor]:
    plan = plan_linear(LAYOUTS["cutlass_linear"], NVFP4, "a", num_rows, 64)
    return plan.placements[0], torch.zeros(plan.storages[0].num_bytes, dtype=torch.uint8)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, local: apply_rows(p, zeros(4, 31), 0, local, 0), "expected torch.uint8 [n, 32]"),
        (lambda p, local: apply_rows(p, torch.zeros(4, 32), 0, local, 0), "expected torch.uint8 [n, 32]"),
        (lambda p, local: apply_rows(p, zeros(4, 32), 297, local, 0), "rows [297, 301) lie outside [0, 300)"),
        (lambda p, local: apply_rows(p, zeros(4, 32), -1, local, 0), "lie outside [0, 300)"),
        (lambda p, local: apply_rows(p, zeros(4, 32), 0, local[:-1].view(-1)[:96], 0), "outside the shard's [0, 96)"),
        (lambda p, local: apply_rows(p, zeros(4, 32), 0, local, 32), "outside the shard"),
        (lambda p, local: apply_rows(p, zeros(4, 32), 0, local.view(3, -1), 0), "expected contiguous torch.uint8"),
        (lambda p, local: invert_rows(p, 299, 2, local, 0), "rows [299, 301) lie outside"),
        (lambda p, local: invert_rows(p, 0, 300, local[: 128 * 32], 0), "outside the shard's [0, 4096)"),
    ],
)
def test_rows_outside_a_tensor_or_a_shard_are_refused(call: Callable[..., object], message: str) -> None:
    placement, local = placement_of()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(placement, local)
    assert str(error.value).startswith("a.weight in a.weight: ")
    assert local.count_nonzero() == 0


def test_a_shard_that_cuts_interleaved_rows_is_refused() -> None:
    spec = TensorSpec(name="a.weight", dtype="U8", shape=(128, 8))
    located = locate((ShuffleRows(),), RowMajor(), 128, 8)
    placement = Placement(tensor=spec, storage="a.weight", origin=0, located=located, unit_bytes=16 * 8)
    with pytest.raises(ValueError, match="not contiguous"):
        placement.rows_of_units(0, 1)
    assert placement.rows_of_units(0, 2) == (0, 32)
