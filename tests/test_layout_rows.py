"""Every row of the layout table in every format it holds: the libraries' bytes, and what must hold for all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import kernels
from quant.derived import fp8_scalars_of_multipliers
from quant.formats import FORMATS, TensorSpec
from quant.layouts import (
    LAYOUTS,
    LayoutPlan,
    LayoutTagError,
    Placement,
    apply_bytes,
    apply_rows,
    invert_bytes,
    invert_rows,
    plan_experts,
    plan_linear,
)
from quant.steps import BlockMajor, GatedInterleave, RowMajor, ShuffleRows, SwapHalves, Swizzle8x4, Transposed, locate
from quant.whole import CHECKPOINT, Tagged, apply_plan, invert_plan, stacked
from tests import goldens, reference
from tests.plans import PLANS, Allocated, apply_all, empty, random_tensors, rows_of

TIED = goldens.load("moe_nvfp4_h256i128_tied")
PAIRS = sorted({case.rpartition("-")[0]: case for case in PLANS}.values())  # one shape of every row and format


# ---------------------------------------------------------------- the libraries' bytes


@pytest.mark.parametrize("block", [64, 128, 256])
def test_blocks_of_columns_are_those_of_flashinfer(block: int) -> None:
    tensors = goldens.load("layout_shuffle")
    located = locate((), BlockMajor(block), *tensors["in.block"].shape)
    out = torch.zeros(located.num_bytes, dtype=torch.uint8)
    kernels.scatter_rows(tensors["in.block"], located, 0, 0, out)
    assert torch.equal(out.view(located.dims), tensors[f"out.block_layout_k{block}"])


@pytest.mark.parametrize("name", [key for key in goldens.load("layout_swizzle") if "index8x4" in key])
def test_the_8x4_swizzle_is_that_of_flashinfer(name: str) -> None:
    index = goldens.load("layout_swizzle")[name]
    located = locate((), Swizzle8x4(), *index.shape)
    columns = np.arange(index.shape[1])
    offsets = located.rows[:, None] + located.runs[columns // located.run_bytes] + columns % located.run_bytes
    assert np.array_equal(offsets, index.numpy())


def test_a_low_latency_fp8_linear_is_that_of_flashinfer() -> None:
    weight = goldens.load("layout_shuffle")["in.low_latency_fp8"]
    plan = plan_linear(LAYOUTS["trtllm_linear_fp8"], FORMATS["fp8"], "a", *weight.shape)
    storages = apply_all(plan, random_tensors(plan, 0) | {"a.weight": rows_of(weight)})
    fed = plan.storages[0].kernel_view(storages["a.weight"])
    assert goldens.same("layout_shuffle", "out.low_latency_fp8", fed)


def moe_storages(
    layout: str, fmt: str, experts: dict[str, list[dict[str, Tensor]]]
) -> tuple[LayoutPlan, dict[str, Tensor]]:
    """What the kernel is fed, by leaf; experts: tensors by suffix, of each expert, by projection."""
    hidden, inter = TIED["in.w2_down"].shape[1:]
    plan = plan_experts(LAYOUTS[layout], FORMATS[fmt], "m", len(experts["gate"]), hidden, inter)
    tensors = random_tensors(plan, 0) | {
        f"m.{e}.{half}_proj.{suffix}": rows_of(tensor)
        for half, each in experts.items()
        for e, parts in enumerate(each)
        for suffix, tensor in parts.items()
    }
    storages = apply_all(plan, tensors)
    for placement in plan.placements:
        back = invert_rows(placement, 0, placement.tensor.num_rows, storages[placement.storage], 0)
        assert torch.equal(back, tensors[placement.tensor.name])
    return plan, {spec.leaf: spec.kernel_view(storages[spec.name]) for spec in plan.storages}


HALVES = {"gate": "in.w1_gate", "up": "in.w3_up", "down": "in.w2_down"}


def test_bf16_experts_are_block_major_as_in_sglang() -> None:
    experts = {half: [{"weight": TIED[key][0]}] for half, key in HALVES.items()}
    _, fed = moe_storages("trtllm_moe_bf16", "bf16", experts)
    for leaf in ("w13_weight", "w2_weight"):
        assert goldens.same("moe_bf16_h256i128", f"out.bf16_block.{leaf}", fed[leaf]), leaf


def test_mxfp8_experts_are_those_of_flashinfer() -> None:
    encoded = {half: reference.mxfp8(TIED[key][0]) for half, key in HALVES.items()}
    experts = {half: [{"weight": codes, "weight_scale": scales}] for half, (codes, scales) in encoded.items()}
    _, fed = moe_storages("trtllm_moe_mxfp8", "mxfp8", experts)
    for gemm, matrix in (("gemm1", "w13"), ("gemm2", "w2")):
        assert goldens.same("moe_mxfp8_h256i128", f"out.mxfp8.{gemm}_weights", fed[f"{matrix}_weight"])
        assert goldens.same("moe_mxfp8_h256i128", f"out.mxfp8.{gemm}_weights_scale", fed[f"{matrix}_weight_scale"])


def test_fp8_experts_and_their_scalars_are_those_of_flashinfer() -> None:
    name, inter = "moe_fp8_h256i128", TIED["in.w3_up"].shape[1]
    w13, m13 = reference.fp8_by_multiplier(torch.cat([TIED["in.w3_up"][:2], TIED["in.w1_gate"][:2]], 1))
    w2, m2 = reference.fp8_by_multiplier(TIED["in.w2_down"][:2])
    weights = {"up": w13[:, :inter], "gate": w13[:, inter:], "down": w2}
    experts = {half: [{"weight": each} for each in weight] for half, weight in weights.items()}
    _, fed = moe_storages("trtllm_moe_fp8", "fp8", experts)
    assert goldens.same(name, "out.fp8_per_tensor.gemm1_weights", fed["w13_weight"])
    assert goldens.same(name, "out.fp8_per_tensor.gemm2_weights", fed["w2_weight"])
    stored = goldens.load(name)
    hidden, middle = (stored[f"out.fp8_per_tensor.{key}_scale_global"] for key in ("hidden_states", "intermediate"))
    scalars = fp8_scalars_of_multipliers(m13, m2, hidden, middle)
    names = {"g1_scale_c": "output1_scales_scalar", "g1_alphas": "output1_scales_gate_scalar"}
    for leaf, key in {**names, "g2_alphas": "output2_scales_scalar"}.items():
        assert goldens.same(name, f"out.fp8_per_tensor.{key}", scalars[leaf]), leaf


def test_fp8_scalars_follow_the_scales_of_a_checkpoint() -> None:
    """To the last bit or two: a checkpoint holds reciprocals of flashinfer's multipliers, rounded."""
    plan = plan_experts(LAYOUTS["trtllm_moe_fp8"], FORMATS["fp8"], "m", 2, 64, 32)
    generator = torch.Generator().manual_seed(0)
    scale = {spec.leaf: torch.rand(spec.shape, generator=generator) + 0.1 for spec in plan.storages}
    scale["w13_weight_scale"][..., 1] = scale["w13_weight_scale"][..., 0]
    got = {each.leaf: each.function(*(scale[name.rpartition(".")[2]] for name in each.inputs)) for each in plan.derived}
    h, i = scale["w13_input_scale"].max(), scale["w2_input_scale"].max()
    expected = fp8_scalars_of_multipliers(
        1 / scale["w13_weight_scale"][..., 0], 1 / scale["w2_weight_scale"], 1 / h, 1 / i
    )
    assert got.keys() == {"g1_scale_c", "g1_alphas", "g2_alphas", "w13_input_scale_quant"}
    for leaf, value in expected.items():
        assert torch.allclose(got[leaf], value, rtol=5e-7), leaf


def test_fp8_block_experts_are_those_of_flashinfer() -> None:
    encoded = {half: [reference.fp8_in_blocks(each) for each in TIED[key][:2]] for half, key in HALVES.items()}
    experts = {half: [{"weight": w, "weight_scale": s} for w, s in each] for half, each in encoded.items()}
    _, fed = moe_storages("trtllm_moe_fp8_block", "fp8_block", experts)
    for gemm, matrix in (("gemm1", "w13"), ("gemm2", "w2")):
        for leaf, key in (("weight", "weights"), ("weight_scale", "weights_scale")):
            assert goldens.same("moe_fp8_h256i128", f"out.fp8_deepseek.{gemm}_{key}", fed[f"{matrix}_{leaf}"]), leaf


@pytest.mark.parametrize("fmt", ["fp8", "fp8_channel"])
@pytest.mark.parametrize("shape", [(128, 128), (200, 80), (1, 16)])
def test_transposed_fp8_is_a_view_that_keeps_its_storage(fmt: str, shape: tuple[int, int]) -> None:
    plan = plan_linear(LAYOUTS["cutlass_linear_fp8"], FORMATS[fmt], "a", *shape)
    tensors = random_tensors(plan, 0)
    storages = apply_all(plan, tensors)
    fed = plan.storages[0].kernel_view(storages["a.weight"])
    assert fed.shape == shape[::-1] and fed.stride() == (1, shape[1]) and fed.dtype == torch.float8_e4m3fn
    assert fed.data_ptr() == storages["a.weight"].data_ptr()
    assert torch.equal(fed.view(torch.uint8), tensors["a.weight"].t())


@pytest.mark.parametrize("fmt", ["int8_static", "int8_dynamic", "int4_dynamic"])
def test_npu_weights_are_transposed_in_memory_and_their_scales_are_not(fmt: str) -> None:
    plan = plan_linear(LAYOUTS["npu_linear"], FORMATS[fmt], "a", 200, 80)
    tensors = random_tensors(plan, 0)
    storages = apply_all(plan, tensors)
    fed = plan.storages[0].kernel_view(storages["a.weight"])
    assert fed.shape == (80, 200) and fed.is_contiguous()
    assert torch.equal(fed.view(torch.uint8), tensors["a.weight"].t())
    assert all(
        torch.equal(storages[name].view(tensor.shape), tensor) for name, tensor in tensors.items() if name != "a.weight"
    )
    experts = plan_experts(LAYOUTS["npu_moe"], FORMATS[fmt], "m", 2, 24, 40)
    tensors = random_tensors(experts, 0)
    w13 = apply_all(experts, tensors)["m.w13_weight"].view(2, 24, 80)
    both = torch.cat([tensors["m.1.gate_proj.weight"], tensors["m.1.up_proj.weight"]])
    assert torch.equal(w13[1], both.t())


def test_mxfp8_linears_are_shuffled_and_swizzled_like_nvfp4() -> None:
    for layout, expected in (("trtllm_linear_mxfp8", "trtllm_linear"), ("cutlass_linear_mxfp8", "cutlass_linear")):
        plan = plan_linear(LAYOUTS[layout], FORMATS["mxfp8"], "a", 200, 256)
        tensors = random_tensors(plan, 0)
        storages = apply_all(plan, tensors)
        parts = reference.linear_storage(expected, tensors["a.weight"].numpy(), tensors["a.weight_scale"].numpy())
        assert storages["a.weight"].numpy().tobytes() == parts[0].tobytes()
        assert storages["a.weight_scale"].numpy().tobytes() == parts[1].tobytes()


def test_the_scales_that_marlin_could_hold_are_the_ones_that_are_stated() -> None:
    """Why it has no row: E4M3 * 2^7 in FP16, one shift, the high byte: one to one where the sign is not set."""
    half = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float16) * 2**7
    high = (half.view(torch.int16).to(torch.int32) << 1 >> 8) & 0xFF
    assert len(set(high[:127].tolist())) == 127 and high[128:255].tolist() == high[:127].tolist()


# ---------------------------------------------------------------- what holds for every row


@pytest.mark.parametrize("case", PLANS)
def test_every_row_inverts_both_ways(case: str) -> None:
    plan = PLANS[case]()
    tensors = random_tensors(plan, 0)
    storages = apply_all(plan, tensors)
    for placement in plan.placements:
        whole = tensors[placement.tensor.name]
        back = invert_rows(placement, 0, len(whole), storages[placement.storage], 0)
        assert torch.equal(back, whole), placement.tensor.name
    # apply(invert(y)) == y for any y whose padding is zero, and what is no padding is in exactly one tensor
    again = {p.tensor.name: invert_rows(p, 0, p.tensor.num_rows, storages[p.storage], 0) for p in plan.placements}
    assert all(torch.equal(storages[name], value) for name, value in apply_all(plan, again).items())
    for spec in plan.storages:
        used = sum(p.tensor.num_bytes for p in plan.placements if p.storage == spec.name)
        assert storages[spec.name].count_nonzero() == used and spec.padding == (used < spec.num_bytes)


@pytest.mark.parametrize("case", PAIRS)
def test_a_whole_module_goes_in_one_call_a_tensor_and_never_twice(case: str) -> None:
    plan = PLANS[case]()
    tensors = random_tensors(plan, 1)
    at = stacked(plan)
    assert len(at) <= 3 * len({spec.leaf for spec in plan.storages})
    source = {p.tensor.name: torch.cat(_experts_of(p, tensors)) for p in at}
    kernel = apply_plan(plan, Tagged(tag=CHECKPOINT, tensors=source))
    assert all(torch.equal(kernel.tensors[name], value) for name, value in apply_all(plan, tensors).items())
    back = invert_plan(plan, kernel)
    assert back.tag == CHECKPOINT and all(torch.equal(back.tensors[name], value) for name, value in source.items())
    with pytest.raises(LayoutTagError, match=f"cannot apply layout {plan.layout}.*in order '{plan.layout}'"):
        apply_plan(plan, kernel)
    with pytest.raises(LayoutTagError, match=r"cannot invert .*in order 'checkpoint'"):
        invert_plan(plan, back)


def _experts_of(placement: Placement, tensors: dict[str, Tensor]) -> list[Tensor]:
    prefix, _, rest = placement.tensor.name.partition(".")
    named = tensors.get(placement.tensor.name)
    if named is not None:
        return [named]
    number = (f"{prefix}.{e}.{rest}" for e in range(99))
    return [tensors[name] for name in number if name in tensors]


@pytest.mark.parametrize("case", PAIRS)
@settings(max_examples=5, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99))
def test_any_bytes_are_written_and_read_without_touching_another(case: str, data: st.DataObject, seed: int) -> None:
    plan = PLANS[case]()
    tensors = random_tensors(plan, seed)
    storages = apply_all(plan, tensors)
    at = {placement.tensor.name.rpartition(".")[2]: placement for placement in plan.placements}
    for placement in at.values():
        whole, local = tensors[placement.tensor.name], storages[placement.storage]
        chosen = data.draw(st.lists(st.integers(0, whole.numel() - 1), min_size=1, max_size=9, unique=True))
        positions, values = np.array(chosen), torch.arange(1, len(chosen) + 1, dtype=torch.uint8)
        before = local.clone()
        apply_bytes(placement, positions, values, local, 0)
        assert int((local != before).sum()) <= len(chosen)
        whole.view(-1)[torch.tensor(chosen)] = values
        assert torch.equal(invert_bytes(placement, positions, local, 0), values)
    assert all(torch.equal(storages[name], value) for name, value in apply_all(plan, tensors).items())


@pytest.mark.parametrize(("positions", "base"), [([-1], 0), ([10**9], 0), ([0], 1 << 20)])
def test_bytes_outside_a_tensor_or_a_shard_are_refused(positions: list[int], base: int) -> None:
    plan = plan_linear(LAYOUTS["trtllm_linear"], FORMATS["nvfp4"], "a", 128, 64)
    local = empty(plan)["a.weight"]
    with pytest.raises(ValueError, match=r"^a\.weight.* lie outside "):
        apply_bytes(plan.placements[0], np.array(positions), torch.ones(1, dtype=torch.uint8), local, base)
    assert not local.any()


@pytest.mark.skipif(kernels.numba_loops() is None, reason="without numba index arrays are scratch too")
@pytest.mark.parametrize("case", PAIRS)
def test_scratch_is_no_more_than_the_row_says_and_nothing_moves(case: str) -> None:
    plan = PLANS[case]()
    tensors, storages = random_tensors(plan, 2), empty(plan)
    views = {spec.name: spec.kernel_view(storages[spec.name]) for spec in plan.storages}
    where = {name: (view.data_ptr(), view.shape, view.stride()) for name, view in views.items()}
    for placement in plan.placements:
        whole, local = tensors[placement.tensor.name], storages[placement.storage]
        out = torch.empty_like(whole)
        with Allocated() as allocated:
            apply_rows(placement, whole, 0, local, 0)
            invert_rows(placement, 0, len(whole), local, 0, out=out)
        held = 2 if placement.swap_nibbles else 1  # both halves of a piece whose nibbles are swapped
        bound = LAYOUTS[plan.layout].scratch_rows * placement.tensor.row_bytes
        assert held * max(allocated.sizes, default=0) <= bound, placement.tensor.name
        assert torch.equal(out, whole)
    assert where == {name: (view.data_ptr(), view.shape, view.stride()) for name, view in views.items()}


# ---------------------------------------------------------------- shards


STEPS = (ShuffleRows(128), ShuffleRows(64), GatedInterleave(1), GatedInterleave(16), SwapHalves())
ORDERS = (RowMajor(), RowMajor(16), Transposed(1), Transposed(2), BlockMajor(4))


def unit_sizes(num_bytes: int) -> Iterator[int]:
    return (size for size in range(1, num_bytes + 1) if num_bytes % size == 0)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), step=st.sampled_from(STEPS), order=st.sampled_from(ORDERS), blocks=st.integers(1, 4))
def test_shards_equal_the_shard_of_the_whole_at_every_boundary_and_others_are_refused(
    data: st.DataObject, step: ShuffleRows, order: RowMajor, blocks: int
) -> None:
    num_rows, row_bytes = 32 * blocks, 8
    located = locate((step,), order, num_rows, row_bytes)
    spec = TensorSpec(name="a", dtype="U8", shape=(num_rows, row_bytes))
    pitch = located.dims[-1] if isinstance(order, RowMajor) else located.num_bytes
    unit_bytes = pitch * data.draw(st.sampled_from(list(unit_sizes(located.num_bytes // pitch))))
    placement = Placement(tensor=spec, storage="a", origin=0, located=located, unit_bytes=unit_bytes)
    source = torch.randint(1, 256, (num_rows, row_bytes), dtype=torch.uint8)
    whole = torch.zeros(located.num_bytes, dtype=torch.uint8)
    apply_rows(placement, source, 0, whole, 0)
    num_units = located.num_bytes // unit_bytes
    start, stop = sorted(data.draw(st.tuples(st.integers(0, num_units), st.integers(0, num_units))))
    unit_of = np.array([int(offset) // unit_bytes for offset in placement.row_offsets])
    inside = [row for row in range(num_rows) if start <= unit_of[row] < stop]
    if inside and inside != list(range(inside[0], inside[-1] + 1)):
        with pytest.raises(ValueError, match=re.escape(f"units [{start}, {stop}) of a are not contiguous; shard this")):
            placement.rows_of_units(start, stop)
        return
    row0, row1 = placement.rows_of_units(start, stop)
    assert list(range(row0, row1)) == inside
    local = torch.zeros((stop - start) * unit_bytes, dtype=torch.uint8)
    apply_rows(placement, source[row0:row1], row0, local, start * unit_bytes)
    assert torch.equal(local, whole[start * unit_bytes : stop * unit_bytes])
