"""What the conformance command checks of the steps of layouts, of diffusion linears and of checkpoint conversions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from quant import conversions, kernels
from quant.formats import FORMATS
from quant.layouts import LAYOUTS, LayoutPlan, plan_linear
from quant.steps import (
    BlockMajor,
    GatedInterleave,
    Order,
    RowMajor,
    RowMap,
    ShuffleRows,
    Swizzle8x4,
    Swizzle128x4,
    locate,
)
from quant.whole import CHECKPOINT, Tagged, apply_plan

from .cases_formats import Apart, Case, Produce, Tensors, case
from .fixtures import Fixture

FLASHINFER, SGLANG, MODELOPT = "flashinfer-python", "sglang", "nvidia-modelopt"


def given(fixture: Fixture, name: str) -> Tensor:
    tensor = fixture.find(name)
    if tensor is None:
        raise Apart("special", f"{name} is not stored")
    return tensor


def applied(plan: LayoutPlan, tensors: Mapping[str, Tensor]) -> Tensors:
    # Of one expert alone the plan keeps the number in the name.
    single = {name.replace("moe.", "moe.0.", 1): tensor for name, tensor in tensors.items() if name.startswith("moe.")}
    return dict(apply_plan(plan, Tagged(tag=CHECKPOINT, tensors={**tensors, **single})).tensors)


def as_tensor(storage: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return storage.view(dtype).view(*shape)


# ---------------------------------------------------------------- steps


def placed(matrix: Tensor, maps: tuple[RowMap, ...], order: Order) -> Tensor:
    """The bytes of a matrix after a layout's steps, flat."""
    num_rows = len(matrix)
    rows = matrix.contiguous().view(num_rows, -1).view(torch.uint8)
    located = locate(maps, order, num_rows, rows.shape[1])
    out = torch.zeros(located.num_bytes, dtype=torch.uint8)
    kernels.scatter_rows(rows, located, 0, 0, out)
    return out


def _swizzled(fixture: Fixture, match: re.Match[str]) -> Tensor:
    return placed(given(fixture, f"in.sf_{match['size']}"), (), Swizzle128x4())


def _swizzled_experts(fixture: Fixture, match: re.Match[str]) -> Tensor:
    return torch.cat([placed(expert, (), Swizzle128x4()) for expert in given(fixture, f"in.sf3d_{match['size']}")])


def _offsets(order: Order) -> Produce:
    def produce(fixture: Fixture, match: re.Match[str]) -> Tensor:
        num_rows, columns = given(fixture, f"in.sf_{match['size']}").shape
        located = locate((), order, num_rows, columns)
        at = located.rows[:, None] + (located.runs[:, None] + np.arange(located.run_bytes)).ravel()
        return torch.from_numpy(at).to(torch.int32)

    return produce


def _maps(names: Sequence[str], match: re.Match[str]) -> tuple[RowMap, ...]:
    known: dict[str, RowMap] = {"gated": GatedInterleave(), "shuffle": ShuffleRows(int(match["tile"]))}
    return tuple(known[name] for name in names)


def _rows_mapped(*maps: str, order: Order | None = None) -> Produce:
    """in.mat after row maps ("gated", "shuffle"), flat where an order takes rows apart."""

    def produce(fixture: Fixture, match: re.Match[str]) -> Tensor:
        matrix = given(fixture, f"in.mat_{match['case']}")
        out = placed(matrix, _maps(maps, match), order or RowMajor())
        return out if order else out.view(matrix.shape)

    return produce


def _row_sources(*maps: str) -> Produce:
    """The same maps as the library states them: out[i] = in[source[i]]."""

    def produce(fixture: Fixture, match: re.Match[str]) -> Tensor:
        num_rows = len(given(fixture, f"in.mat_{match['case']}"))
        rows = np.arange(num_rows, dtype=np.int64)
        for step in _maps(maps, match):
            rows = step.place(rows, num_rows)
        return torch.from_numpy(np.argsort(rows))

    return produce


def _blocks(fixture: Fixture, match: re.Match[str]) -> Tensor:
    matrix, block = given(fixture, "in.block"), int(match["size"])
    return placed(matrix, (), BlockMajor(block)).view(-1, len(matrix), block)


def _low_latency(fixture: Fixture, match: re.Match[str]) -> Tensor:
    weight = given(fixture, "in.low_latency_fp8")
    plan = plan_linear(LAYOUTS["trtllm_linear_fp8"], FORMATS["fp8"], "a", *weight.shape)
    scalars = {f"a.{suffix}": torch.ones(()) for suffix in ("weight_scale", "input_scale")}
    return as_tensor(applied(plan, {"a.weight": weight, **scalars})["a.weight"], weight.dtype, (-1, len(weight), 128))


# ---------------------------------------------------------------- diffusion linears and conversions


def _dit(layout: str) -> Produce:
    def make(fixture: Fixture) -> Tensors:
        tensors = {f"a.{suffix}": given(fixture, f"ckpt.{suffix}") for suffix in ("weight", "weight_scale")}
        tensors |= {"a.weight_scale_2": given(fixture, "ckpt.weight_scale_2"), "a.input_scale": torch.ones(())}
        num_rows, packed = tensors["a.weight"].shape
        plan = plan_linear(LAYOUTS[layout], FORMATS["nvfp4"], "a", num_rows, 2 * packed)
        storages = applied(plan, tensors)
        fed = {spec.leaf: spec.kernel_view(storages[spec.name]) for spec in plan.storages}
        return {
            "weight": fed["weight"],
            "weight_scale_interleaved": fed["weight_scale"],
            "weights_padding_cols": torch.tensor([fed["weight"].shape[1] - packed], dtype=torch.int32),
        }

    return lambda fixture, match: fixture.once(layout, lambda: make(fixture))[match["part"]]


def _unswizzled(fixture: Fixture, match: re.Match[str]) -> Tensor:
    num_rows, columns = given(fixture, "ckpt.weight_scale").shape
    return conversions.linear_scales(given(fixture, "out.swizzled_ckpt_scale"), num_rows, columns)


def _swizzled_as(scales: Tensor, fixture: Fixture, name: str) -> Tensor:
    flat = placed(scales, (), Swizzle128x4())
    return as_tensor(flat, scales.dtype, fixture.entry["tensors"][name]["shape"])


def _swizzled_checkpoint(fixture: Fixture, match: re.Match[str]) -> Tensor:
    return _swizzled_as(given(fixture, "ckpt.weight_scale"), fixture, match[0])


def _rebased(fixture: Fixture, match: re.Match[str]) -> Tensor:
    """The fixture's parts are the two halves of the rows, the second at half the global scale of the first."""
    scale, block_scale = float(given(fixture, "ckpt.weight_scale_2")), given(fixture, "ckpt.weight_scale")
    half = len(block_scale) // 2
    rows = (half, len(block_scale) - half)
    return conversions.rebase_block_scales(block_scale, (scale, scale / 2), rows)[0]


def _padded(fixture: Fixture, match: re.Match[str]) -> Tensor:
    weight, scale = given(fixture, "ckpt.weight"), given(fixture, "ckpt.weight_scale")
    padded = conversions.pad_rows_and_blocks(weight, scale, columns=match["columns"] is not None)
    if match["swizzled"]:
        return _swizzled_as(padded[1], fixture, match[0])
    return padded[match["part"] == "weight_scale"]


_TILED = r"(?P<case>\d+x\d+_t(?P<tile>\d+))"
_FED = r"\.(?P<part>weight|weight_scale_interleaved|weights_padding_cols)"

LAYOUT_CASES: tuple[Case, ...] = (
    case("Swizzle128x4", FLASHINFER, "layout", r"out\.swizzled128x4_(?P<size>\d+x\d+)", _swizzled),
    case("Swizzle128x4", FLASHINFER, "layout", r"out\.swizzled128x4_3d_(?P<size>[\dx]+)", _swizzled_experts),
    case("Swizzle128x4", FLASHINFER, "layout", r"out\.index128x4_(?P<size>\d+x\d+)", _offsets(Swizzle128x4())),
    case("Swizzle8x4", FLASHINFER, "layout", r"out\.index8x4_(?P<size>\d+x\d+)", _offsets(Swizzle8x4())),
    case("ShuffleRows", FLASHINFER, "layout", r"out\.shuffle_matrix_a_" + _TILED, _rows_mapped("shuffle")),
    case("ShuffleRows", FLASHINFER, "layout", r"out\.(?:row_indices|w2_permute)_" + _TILED, _row_sources("shuffle")),
    case("GatedInterleave", FLASHINFER, "layout", r"out\.reorder_gated_" + _TILED, _rows_mapped("gated")),
    case(
        "GatedInterleave, ShuffleRows",
        FLASHINFER,
        "layout",
        r"out\.w3_w1_permute_(?:sf_)?" + _TILED,
        _row_sources("gated", "shuffle"),
    ),
    case(
        "ShuffleRows, Swizzle128x4",
        FLASHINFER,
        "layout",
        r"out\.shuffle_matrix_sf_a_" + _TILED,
        _rows_mapped("shuffle", order=Swizzle128x4()),
    ),
    case("BlockMajor", FLASHINFER, "layout", r"out\.block_layout_k(?P<size>\d+)", _blocks),
    case("trtllm_linear_fp8", FLASHINFER, "layout", r"out\.low_latency_fp8", _low_latency),
    *(
        case(
            f"{backend}_dit{swapped}", SGLANG, "dit", rf"out\.{backend}{swapped}{_FED}", _dit(f"{backend}_dit{swapped}")
        )
        for backend in ("trtllm", "cutlass")
        for swapped in ("", "_swapped")
    ),
    case("Swizzle128x4", MODELOPT, "dit", r"out\.swizzled_ckpt_scale", _swizzled_checkpoint),
    case("linear_scales", SGLANG, "dit", r"out\.swizzled_ckpt_scale_back_to_linear", _unswizzled),
    case("rebase_block_scales", SGLANG, "dit", r"out\.rebased_partition_scale", _rebased),
    case(
        "pad_rows_and_blocks",
        MODELOPT,
        "dit",
        r"out\.modelopt_pad_row(?P<columns>_col)?(?P<swizzled>_swizzled)?\.(?P<part>weight|weight_scale)",
        _padded,
    ),
)
