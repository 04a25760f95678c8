"""Layouts against the libraries' fixtures and a slow reference; exact inverses, shards, subsets of rows."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import kernels
from quant.formats import FORMATS
from quant.layouts import (
    LAYOUTS,
    LayoutPlan,
    choose_layout,
    invert_rows,
    plan_experts,
    plan_linear,
    quantized_names,
)
from quant.steps import GatedInterleave, PadRows, Part, RowMajor, ShuffleRows, Swizzle128x4, locate
from tests import goldens, reference
from tests.plans import (
    BF16,
    EXPERTS,
    LINEAR,
    NVFP4,
    PLANS,
    Storages,
    apply_all,
    experts_shape,
    linear_shape,
    random_tensors,
    rows_of,
)

SHUFFLES = sorted(key.split("_permute_")[1] for key in goldens.load("layout_shuffle") if "w2_permute" in key)
MOE = goldens.names("moe_nvfp4")


def place(located_rows: np.ndarray, matrix: Tensor) -> Tensor:
    out = torch.empty_like(matrix)
    out[torch.from_numpy(located_rows.copy())] = matrix
    return out


@pytest.mark.parametrize("size", ["128x4", "128x8", "256x16", "100x5", "1x1", "130x3", "384x24", "96x4", "300x17"])
def test_swizzle_gives_the_bytes_of_the_libraries(size: str) -> None:
    tensors = goldens.load("layout_swizzle")
    scales = tensors[f"in.sf_{size}"]
    located = locate((), Swizzle128x4(), *scales.shape)
    out = torch.zeros(located.num_bytes, dtype=torch.uint8)
    kernels.scatter_rows(scales, located, 0, 0, out)
    assert torch.equal(out, tensors[f"out.swizzled128x4_{size}"])
    columns = np.arange(scales.shape[1])
    offsets = located.rows[:, None] + located.runs[columns // located.run_bytes] + columns % located.run_bytes
    index = tensors.get(f"out.index128x4_{size}")
    assert index is None or np.array_equal(offsets, index.numpy())


@pytest.mark.parametrize("size", ["4x256x16", "3x96x5"])
def test_experts_are_swizzled_one_by_one(size: str) -> None:
    tensors = goldens.load("layout_swizzle")
    experts = tensors[f"in.sf3d_{size}"]
    located = locate((), Swizzle128x4(), *experts.shape[1:])
    out = torch.zeros(len(experts) * located.num_bytes, dtype=torch.uint8)
    for expert, scales in enumerate(experts):
        kernels.scatter_rows(scales, located, 0, expert * located.num_bytes, out)
    assert torch.equal(out, tensors[f"out.swizzled128x4_3d_{size}"])


@pytest.mark.parametrize("case", SHUFFLES)
def test_shuffle_and_gated_interleave_are_those_of_flashinfer(case: str) -> None:
    tensors = goldens.load("layout_shuffle")
    matrix = tensors[f"in.mat_{case}"]
    num_rows, row_bytes = matrix.shape
    shuffled = ShuffleRows(int(case.rpartition("_t")[2]))
    rows = np.arange(num_rows)
    assert torch.equal(place(shuffled.place(rows, num_rows), matrix), tensors[f"out.shuffle_matrix_a_{case}"])
    assert torch.equal(place(GatedInterleave().place(rows, num_rows), matrix), tensors[f"out.reorder_gated_{case}"])
    both = locate((GatedInterleave(), shuffled), RowMajor(), num_rows, row_bytes).rows // row_bytes
    assert torch.equal(place(both, matrix), matrix[tensors[f"out.w3_w1_permute_{case}"]])
    swizzled = tensors.get(f"out.shuffle_matrix_sf_a_{case}")
    if swizzled is not None:
        located = locate((shuffled,), Swizzle128x4(), num_rows, row_bytes)
        out = torch.zeros(located.num_bytes, dtype=torch.uint8)
        kernels.scatter_rows(matrix, located, 0, 0, out)
        assert torch.equal(out, swizzled)


def moe_tensors(name: str) -> dict[str, Tensor]:
    """Checkpoint tensors of a fixture under the names of a plan."""
    stored = goldens.load(name)
    tensors = {}
    for key, half in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        for suffix in ("weight", "weight_scale", "weight_scale_2"):
            for expert, tensor in enumerate(stored[f"ckpt.{suffix}_{key}"]):
                tensors[f"moe.{expert}.{half}_proj.{suffix}"] = rows_of(tensor)
    for expert in range(4):
        for index, half in enumerate(("gate", "up")):
            tensors[f"moe.{expert}.{half}_proj.input_scale"] = rows_of(stored["in.w13_input_scale"][expert, index])
        tensors[f"moe.{expert}.down_proj.input_scale"] = rows_of(stored["in.w2_input_scale"][expert])
    return tensors


def moe_plan(name: str, layout: str) -> LayoutPlan:
    args = goldens.fixtures()[name]["args"]
    return plan_experts(LAYOUTS[layout], NVFP4, "moe", args["experts"], args["hidden"], args["intermediate"])


def moe_case(name: str, layout: str) -> tuple[LayoutPlan, Storages]:
    plan = moe_plan(name, layout)
    return plan, {key.removeprefix("moe."): t for key, t in apply_all(plan, moe_tensors(name)).items()}


MOE_OUTPUTS = {
    "trtllm_moe": {
        "w13_weight": "out.trtllm.gemm1_weights",
        "w13_weight_scale": "out.trtllm.gemm1_weights_scale",
        "w2_weight": "out.trtllm.gemm2_weights",
        "w2_weight_scale": "out.trtllm.gemm2_weights_scale",
    },
    "cutlass_moe": {
        "w13_weight": "out.swap_w13_to_w31",
        "w13_weight_scale": "out.cutlass.w13_blockscale_swizzled",
        "w2_weight": "ckpt.weight_w2",
        "w2_weight_scale": "out.cutlass.w2_blockscale_swizzled",
    },
}


@pytest.mark.parametrize("layout", MOE_OUTPUTS)
@pytest.mark.parametrize("name", MOE)
def test_experts_get_the_bytes_that_sglang_feeds_the_kernel(name: str, layout: str) -> None:
    _, storages = moe_case(name, layout)
    for leaf, tensor_name in MOE_OUTPUTS[layout].items():
        shape = goldens.fixtures()[name]["tensors"][tensor_name]["shape"]
        assert goldens.same(name, tensor_name, storages[leaf].view(shape)), leaf


@pytest.mark.parametrize("layout", EXPERTS)
@pytest.mark.parametrize("name", MOE)
def test_derived_scalars_of_experts_are_those_of_sglang(name: str, layout: str) -> None:
    plan, storages = moe_case(name, layout)
    shapes = {spec.leaf: spec.shape for spec in plan.storages}
    floats = {leaf: storages[leaf].view(torch.float32).view(shapes[leaf]) for leaf in storages if "scale_2" in leaf}
    floats |= {leaf: storages[leaf].view(torch.float32).view(shapes[leaf]) for leaf in storages if "input" in leaf}
    stored = goldens.load(name)
    w2_scale = stored["in.w2_input_scale"].max()
    expected = {leaf: stored[f"out.trtllm.{leaf}"] for leaf in ("g1_alphas", "g1_alphas_up", "g1_scale_c")} | {
        "g2_alphas": w2_scale * stored["ckpt.weight_scale_2_w2"],
        "w13_input_scale_quant": (1 / stored["in.w13_input_scale"].max()).view(1),
        "w2_input_scale_quant": (1 / w2_scale).view(1),
    }
    assert {derived.leaf for derived in plan.derived} == set(LAYOUTS[layout].derived) & expected.keys()
    for derived in plan.derived:
        value = derived.function(*(floats[full.removeprefix("moe.")] for full in derived.inputs))
        assert tuple(value.shape) == derived.shape and value.dtype == torch.float32
        assert torch.equal(value[0], expected[derived.leaf]), derived.leaf


DIT = {
    "trtllm_linear": "trtllm",
    "cutlass_linear": "cutlass",
    "trtllm_dit": "trtllm",
    "trtllm_dit_swapped": "trtllm_swapped",
    "cutlass_dit": "cutlass",
    "cutlass_dit_swapped": "cutlass_swapped",
}


@pytest.mark.parametrize("layout", DIT)
@pytest.mark.parametrize("name", goldens.names("dit_nvfp4"))
def test_a_linear_gets_the_bytes_that_sglang_feeds_the_kernel(name: str, layout: str) -> None:
    """Ours are whole tiles of 128 rows; what CUTLASS is fed is the first of them, padded to 32, the rest is zero."""
    stored, args = goldens.load(name), goldens.fixtures()[name]["args"]
    plan = plan_linear(LAYOUTS[layout], NVFP4, "a", args["N"], args["K"])
    tensors = random_tensors(plan, 0) | {
        f"a.{suffix}": rows_of(stored[f"ckpt.{suffix}"]) for suffix in ("weight", "weight_scale")
    }
    storages = apply_all(plan, tensors)
    fed = {spec.leaf: spec.kernel_view(storages[spec.name]) for spec in plan.storages}
    prefix = f"out.{DIT[layout]}"
    assert goldens.same(name, f"{prefix}.weight", fed["weight"])
    assert goldens.same(name, f"{prefix}.weight_scale_interleaved", fed["weight_scale"])
    padding_cols = torch.tensor([fed["weight"].shape[1] - args["K"] // 2], dtype=torch.int32)
    assert goldens.same(name, f"{prefix}.weights_padding_cols", padding_cols)
    for placement in plan.placements[:2]:
        back = invert_rows(placement, 0, placement.tensor.num_rows, storages[placement.storage], 0)
        assert torch.equal(back, tensors[placement.tensor.name])


def test_derived_scalars_of_a_linear() -> None:
    plan = plan_linear(LAYOUTS["trtllm_linear"], NVFP4, "a", 128, 64)
    values = {"a.input_scale": torch.tensor([0.3]), "a.weight_scale_2": torch.tensor([0.007])}
    got = {derived.leaf: derived.function(*(values[name] for name in derived.inputs)) for derived in plan.derived}
    assert torch.equal(got["alpha"], torch.tensor([0.3]) * torch.tensor([0.007]))
    assert torch.equal(got["input_scale_inv"], 1 / torch.tensor([0.3]))
    assert [derived.shape for derived in plan.derived] == [(1,), (1,)]
    assert plan_linear(LAYOUTS["plain"], BF16, "a", 128, 64).derived == ()


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(LINEAR),
    num_rows=st.integers(1, 300),
    num_blocks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_linear_lies_where_the_slow_reference_puts_it(layout: str, num_rows: int, num_blocks: int, seed: int) -> None:
    shape = linear_shape(LAYOUTS[layout], NVFP4, num_rows, 16 * num_blocks)
    plan = plan_linear(LAYOUTS[layout], NVFP4, "a", *shape)
    tensors = random_tensors(plan, seed)
    storages = apply_all(plan, tensors)
    expected = reference.linear_storage(layout, tensors["a.weight"].numpy(), tensors["a.weight_scale"].numpy())
    assert np.array_equal(storages["a.weight"].numpy(), expected[0])
    assert np.array_equal(storages["a.weight_scale"].numpy(), expected[1])
    for spec in plan.storages:
        used = sum(p.tensor.num_bytes for p in plan.placements if p.storage == spec.name)
        assert storages[spec.name].count_nonzero() == used and spec.padding == (used < spec.num_bytes)
    for placement in plan.placements:
        whole = tensors[placement.tensor.name]
        assert torch.equal(invert_rows(placement, 0, len(whole), storages[placement.storage], 0), whole)


@settings(max_examples=25, deadline=None)
@given(
    layout=st.sampled_from(EXPERTS),
    num_experts=st.integers(1, 3),
    hidden=st.integers(1, 4),
    inter=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_experts_lie_where_the_slow_reference_puts_them(
    layout: str, num_experts: int, hidden: int, inter: int, seed: int
) -> None:
    shape = experts_shape(LAYOUTS[layout], NVFP4, num_experts, 48 * hidden, 48 * inter)
    plan = plan_experts(LAYOUTS[layout], NVFP4, "a", *shape)
    tensors = random_tensors(plan, seed)
    storages = apply_all(plan, tensors)
    for suffix, scales in (("weight", False), ("weight_scale", True)):
        parts = []
        for e in range(num_experts):
            gate, up, down = (tensors[f"a.{e}.{half}_proj.{suffix}"].numpy() for half in ("gate", "up", "down"))
            parts.append(reference.expert_storage(layout, gate, up, down, scales))
        for matrix, expected in zip(("w13", "w2"), zip(*parts, strict=True), strict=True):
            assert np.array_equal(storages[f"a.{matrix}_{suffix}"].numpy(), np.concatenate(expected)), matrix
    for placement in plan.placements:
        whole = tensors[placement.tensor.name]
        assert torch.equal(invert_rows(placement, 0, len(whole), storages[placement.storage], 0), whole)


def test_scalars_of_experts_are_gate_before_up_in_every_row_order() -> None:
    for layout in EXPERTS:
        plan = plan_experts(LAYOUTS[layout], NVFP4, "a", 3, 64, 64)
        names = [f"a.{e}.{half}_proj.weight_scale_2" for e in range(3) for half in ("gate", "up", "down")]
        values = {name: torch.tensor(float(i)) for i, name in enumerate(names)}
        tensors = random_tensors(plan, 0) | {name: rows_of(value) for name, value in values.items()}
        storages = apply_all(plan, tensors)
        pairs = storages["a.w13_weight_scale_2"].view(torch.float32).view(3, 2)
        assert pairs.tolist() == [[0, 1], [3, 4], [6, 7]]
        assert storages["a.w2_weight_scale_2"].view(torch.float32).tolist() == [2, 5, 8]


def test_steps_are_bijections_in_closed_form() -> None:
    rows = np.arange(384)
    for step in (GatedInterleave(), GatedInterleave(64), ShuffleRows(128), ShuffleRows(64), PadRows(128)):
        assert sorted(step.place(rows, 384)) == rows.tolist()
    assert GatedInterleave(64).place(rows, 384)[[0, 63, 64, 192, 256]].tolist() == [0, 63, 128, 64, 192]
    assert (Part(1, 3).place(rows, 384)[0], Part(1, 3).num_rows(384), PadRows(128).num_rows(385)) == (384, 1152, 512)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plan_experts(LAYOUTS["trtllm_moe"], NVFP4, "m.experts", 4, 80, 48),
            "m.experts: experts of shape (4, 80, 48) in nvfp4 does not fit layout trtllm_moe: hidden 80 is no multiple "
            "of 64; inter 48 is no multiple of 64; what fits: cutlass_moe, plain",
        ),
        (lambda: plan_linear(LAYOUTS["trtllm_moe"], NVFP4, "a", 128, 64), "is for experts, not linear; what fits"),
        (lambda: plan_linear(LAYOUTS["cutlass_linear"], BF16, "a", 128, 64), "holds nvfp4, not bf16; what fits: plain"),
        (
            lambda: plan_linear(LAYOUTS["plain"], NVFP4, "a", 128, 24),
            "nvfp4 wants rows and elements in multiples of (1, 16); what fits: none",
        ),
        (
            lambda: choose_layout("linear", NVFP4, "marlin", (128, 64)),
            "unknown; known: auto, cutedsl, cutedsl_moe, cutlass, ",
        ),
        (
            lambda: choose_layout("experts", NVFP4, "trtllm", (4, 80, 64)),
            "does not fit layout trtllm_moe: hidden 80 is",
        ),
        (lambda: choose_layout("linear", NVFP4, "auto", (4, 24)), "what fits: none"),
        (
            lambda: choose_layout("linear", FORMATS["mxfp4"], "cutlass", (4, 32)),
            "holds nvfp4, not mxfp4; what fits: plain",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("kind", "fmt", "wanted", "arch", "name", "why"),
    [
        ("linear", "nvfp4", "auto", None, "plain", "of no compute capability"),
        ("linear", "nvfp4", "auto", 100, "trtllm_linear", "sm_100"),
        ("linear", "nvfp4", "auto", 120, "cutlass_linear", "sm_120"),
        ("linear", "nvfp4", "auto", 90, "plain", "sm_90"),
        ("linear", "bf16", "auto", 100, "plain", "sm_100"),
        ("experts", "nvfp4", "auto", 100, "trtllm_moe", "sm_100"),
        ("experts", "nvfp4", "trtllm", None, "trtllm_moe", "forward decodes"),
        ("linear", "nvfp4", "trtllm_moe", 100, "trtllm_linear", "asked for trtllm_moe"),
        ("linear", "nvfp4", "cutlass_dit", 100, "cutlass_dit", "asked for cutlass_dit"),
        ("linear", "mxfp8", "auto", 100, "cutlass_linear_mxfp8", "sm_100"),
        ("linear", "mxfp8", "trtllm", 120, "trtllm_linear_mxfp8", "no kernel for sm_120, forward decodes"),
        ("linear", "fp8", "auto", 90, "cutlass_linear_fp8", "sm_90"),
        ("linear", "int8_dynamic", "auto", "ascend", "npu_linear", "serves ascend"),
        ("linear", "int8_dynamic", "auto", 100, "plain", "sm_100"),
        ("experts", "fp8_block", "auto", 103, "trtllm_moe_fp8_block", "sm_103"),
        ("experts", "bf16", "trtllm", 100, "trtllm_moe_bf16", "asked for trtllm"),
        ("experts", "nvfp4", "auto", 120, "cutlass_moe", "sm_120"),
        ("experts", "nvfp4", "plain", 100, "plain", "asked for plain"),
    ],
)
def test_a_layout_is_chosen_and_says_why(
    kind: str, fmt: str, wanted: str, arch: int | str | None, name: str, why: str
) -> None:
    shape = (128, 128) if name == "trtllm_linear_mxfp8" else (128, 64) if kind == "linear" else (4, 128, 128)
    layout, reason = choose_layout(kind, FORMATS[fmt], wanted, shape, arch)  # type: ignore[arg-type]
    assert layout.name == name and why in reason


def test_auto_passes_over_a_layout_that_does_not_fit() -> None:
    assert choose_layout("experts", NVFP4, "auto", (4, 96, 48), 100)[0].name == "cutlass_moe"


def test_the_whitelist_holds_every_name_of_a_plan() -> None:
    names = quantized_names()
    for case in PLANS.values():
        plan = case()
        assert {spec.leaf for spec in plan.storages} | {derived.leaf for derived in plan.derived} <= names
    assert {"weight", "weight_scale_2", "alpha", "w13_weight", "w2_input_scale", "g1_scale_c"} <= names


def test_plans_cross_processes_and_experts_share_their_offsets() -> None:
    plan = plan_experts(LAYOUTS["trtllm_moe"], NVFP4, "a", 64, 128, 64)
    gates = [p for p in plan.placements if p.tensor.name.endswith("gate_proj.weight")]
    assert len(gates) == 64 and all(p.located is gates[0].located for p in gates)
    with pytest.raises(ValueError, match="read-only"):
        gates[0].run_offsets[0] = 1
    copied = pickle.loads(pickle.dumps(plan))
    assert copied.storages == plan.storages and copied.derived == plan.derived
    assert np.array_equal(copied.placements[1].row_offsets, plan.placements[1].row_offsets)
