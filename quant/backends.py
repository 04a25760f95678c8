"""The table of layouts: which kernel wants the bytes of which formats where.

A row is values only; `quant.layouts` says what it means for one module. How to add one: docs/adding_a_row.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .derived import EXPERT_SCALARS, LINEAR_SCALARS
from .formats import FORMATS
from .placements import SCRATCH_ROWS
from .specs import Kind
from .steps import (
    BlockMajor,
    GatedInterleave,
    Order,
    PadRows,
    Part,
    RowMajor,
    RowMap,
    ShuffleRows,
    SwapHalves,
    Swizzle128x4,
    Transposed,
)

TILE_ROWS = 128  # the shuffle is block-diagonal in 32 rows, the swizzle in 128: the unit of sharding of a dense weight

LayoutKind = Literal["linear", "experts", "any"]
RowOrder = Literal["gate_first", "up_first"]
Unit = Literal["tile", "matrix"]
Arch = int | str  # CUDA compute capability (100), or another maker's name ("ascend")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A row of the table.

    formats: whose tensors it can hold; archs: devices whose kernels read it, empty where it needs none.
    maps: row maps of every matrix, after gated_maps of a fused gate/up matrix or single_maps of any other.
    orders: byte order by kind of component, row-major where none is named. derived: rows of DERIVED that its forward
    consumes. multiples: what the sizes of a module must be multiples of, by name. unit: what sharding splits in a
    linear, tiles of 128 rows or nothing. kernel_rows, transposed: the view of the storage that a kernel is fed, rows
    padded to a multiple, or [elements, rows]. swap_nibbles: the checkpoint has the first element in the high nibble.
    scratch_rows: how many rows apply and invert hold at most. seam: what comes between these bytes and the kernel and
    is not done here. kernel: whether the kernel itself has run on these bytes. gemm: the row of `quant.gemms.GEMMS`
    that forward calls where the device has it, "" where forward decodes everywhere.
    """

    name: str
    kind: LayoutKind
    formats: frozenset[str]
    orders: Mapping[Kind, Order] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    archs: frozenset[Arch] = frozenset()
    maps: tuple[RowMap, ...] = ()
    gated_maps: tuple[RowMap, ...] = ()
    single_maps: tuple[RowMap, ...] = ()
    row_order: RowOrder = "gate_first"
    multiples: Mapping[str, int] = field(default_factory=dict)
    unit: Unit = "tile"
    kernel_rows: int = 1
    transposed: bool = False
    swap_nibbles: bool = False
    seam: str = ""
    oracle: str = ""
    kernel: str = "not run"
    gemm: str = ""

    @property
    def family(self) -> str:
        """Rows of one backend share it: "trtllm" for trtllm_linear and trtllm_moe."""
        return self.name.partition("_")[0]

    @property
    def scratch_rows(self) -> int:
        """Rows go straight from where they are to where they lie, unless their bytes change or turn on the way."""
        turned = any(isinstance(order, Transposed) for order in self.orders.values())
        return SCRATCH_ROWS if self.swap_nibbles or turned else 0

    def order_of(self, kind: Kind) -> Order:
        return self.orders.get(kind, RowMajor())

    def part_of(self, half: str) -> Part:
        """Where the gate or the up half goes in the fused matrix."""
        return Part(int((half == "gate") == (self.row_order == "up_first")))

    def serves(self, arch: Arch | None) -> bool:
        return not self.archs or arch in self.archs


BLACKWELL: frozenset[Arch] = frozenset({100, 103})  # TRT-LLM's kernels are built for these, not for sm_120
BLACKWELL_ALL: frozenset[Arch] = BLACKWELL | {120, 121}
FP8_CAPABLE: frozenset[Arch] = BLACKWELL_ALL | {89, 90}
ASCEND: frozenset[Arch] = frozenset({"ascend"})

_NVFP4, _MXFP8 = frozenset({"nvfp4"}), frozenset({"mxfp8"})
_SWIZZLED: Mapping[Kind, Order] = {"block_scale": Swizzle128x4()}
# Of NVFP4: elements are padded to 32, and a scale column is 8 bytes of weight where columns are padded to 4.
_PADDED_32: Mapping[Kind, Order] = {"weight": RowMajor(16), "block_scale": Swizzle128x4()}
_PADDED_SCALES: Mapping[Kind, Order] = {"weight": RowMajor(32), "block_scale": Swizzle128x4()}
_TRTLLM_SCALARS = ("g1_alphas", "g1_scale_c", "g2_alphas", "w13_input_scale_quant")
_NZ_CAST = "torch_npu.npu_format_cast(weight, 29) to FRACTAL_NZ, in place: described only, never run"

_NPU: tuple[tuple[str, LayoutKind], ...] = (("npu_linear", "linear"), ("npu_moe", "experts"))

_UNTESTED = "never run; forward calls flashinfer's {} where it is: UNTESTED"
_MM_FP4, _MOE_FP4 = _UNTESTED.format("mm_fp4"), _UNTESTED.format("trtllm_fp4_block_scale_routed_moe")

_DIT = "sglang 0.5.23 multimodal_gen _process_backend_weights"
_TRTLLM_MOE = "flashinfer 0.7.2 fused_moe.prepare"

# In the order that "auto" prefers.
LAYOUTS: dict[str, Layout] = {
    row.name: row
    for row in (
        Layout(
            name="trtllm_linear",
            kind="linear",
            formats=_NVFP4,
            archs=BLACKWELL,
            maps=(ShuffleRows(128),),
            orders=_PADDED_SCALES,
            kernel_rows=128,
            derived=LINEAR_SCALARS,
            oracle=f"{_DIT} (trtllm) on flashinfer index functions",
            kernel=_MM_FP4,
            gemm="mm_fp4_trtllm",
        ),
        Layout(
            name="cutlass_linear",
            kind="linear",
            formats=_NVFP4,
            archs=BLACKWELL_ALL,
            orders=_PADDED_32,
            kernel_rows=32,
            derived=LINEAR_SCALARS,
            oracle=f"{_DIT} (cutlass)",
            kernel=_MM_FP4,
            gemm="mm_fp4_cutlass",
        ),
        Layout(
            name="trtllm_linear_mxfp8",
            kind="linear",
            formats=_MXFP8,
            archs=BLACKWELL,
            maps=(ShuffleRows(128),),
            orders=_SWIZZLED,
            multiples={"elements": 128},  # whole words of four scales: no padding of columns is specified
            kernel_rows=128,
            oracle="flashinfer 0.7.2 shuffle_matrix_a, shuffle_matrix_sf_a",
        ),
        Layout(
            name="cutlass_linear_mxfp8",
            kind="linear",
            formats=_MXFP8,
            archs=BLACKWELL_ALL,
            orders=_SWIZZLED,
            oracle="flashinfer 0.7.2 block_scale_interleave",
        ),
        Layout(
            name="cutlass_linear_fp8",
            kind="linear",
            formats=frozenset({"fp8", "fp8_channel"}),
            archs=FP8_CAPABLE,
            transposed=True,  # a view [elements, rows] of strides (1, elements): the storage stays as it is
            derived=LINEAR_SCALARS,
            oracle="torch.Tensor.t of the checkpoint's weight",
            kernel="torch._scaled_mm, run on sm_90",
            gemm="scaled_mm",
        ),
        Layout(
            name="trtllm_linear_fp8",
            kind="linear",
            formats=frozenset({"fp8"}),
            archs=BLACKWELL,
            maps=(ShuffleRows(128),),
            orders={"weight": BlockMajor(128)},
            multiples={"rows": 32, "elements": 128},
            unit="matrix",  # blocks of columns: no unit holds whole rows
            derived=LINEAR_SCALARS,
            oracle="flashinfer 0.7.2 prepare_low_latency_gemm_weights",
        ),
        Layout(
            name="trtllm_moe",
            kind="experts",
            formats=_NVFP4,
            archs=BLACKWELL,
            gated_maps=(GatedInterleave(),),
            single_maps=(PadRows(TILE_ROWS),),
            maps=(ShuffleRows(128),),
            orders=_SWIZZLED,
            row_order="up_first",
            multiples={"hidden": 64, "inter": 64},
            derived=_TRTLLM_SCALARS,
            oracle="sglang 0.5.23 prepare_static_weights_for_trtllm_fp4_moe on flashinfer index functions",
            kernel=_MOE_FP4,
            gemm="trtllm_fp4_moe",
        ),
        Layout(
            name="cutlass_moe",
            kind="experts",
            formats=_NVFP4,
            archs=BLACKWELL_ALL,
            orders=_SWIZZLED,
            row_order="up_first",
            derived=EXPERT_SCALARS,
            oracle="sglang 0.5.23 swizzle_blockscale",
        ),
        Layout(
            name="trtllm_moe_mxfp8",
            kind="experts",
            formats=_MXFP8,
            archs=BLACKWELL,
            gated_maps=(GatedInterleave(),),
            maps=(ShuffleRows(128),),
            orders=_SWIZZLED,
            row_order="up_first",
            multiples={"hidden": 128, "inter": 128},
            oracle=f"{_TRTLLM_MOE}.prepare_trtllm_fp8_block_weights(MXFP8)",
        ),
        Layout(
            name="trtllm_moe_fp8",
            kind="experts",
            formats=frozenset({"fp8"}),
            archs=BLACKWELL,
            gated_maps=(GatedInterleave(),),
            maps=(ShuffleRows(128),),
            row_order="up_first",
            multiples={"hidden": 32, "inter": 16},
            derived=_TRTLLM_SCALARS,
            oracle=f"{_TRTLLM_MOE}.prepare_trtllm_fp8_per_tensor_weights",
        ),
        Layout(
            name="trtllm_moe_fp8_block",
            kind="experts",
            formats=frozenset({"fp8_block"}),
            archs=BLACKWELL,
            row_order="up_first",
            multiples={"hidden": 128, "inter": 128},
            oracle=f"{_TRTLLM_MOE}.prepare_trtllm_fp8_block_weights(DeepSeekFp8)",
        ),
        Layout(
            name="trtllm_moe_bf16",
            kind="experts",
            formats=frozenset({"bf16"}),
            archs=BLACKWELL,
            gated_maps=(GatedInterleave(),),
            maps=(ShuffleRows(128),),
            orders={"weight": BlockMajor(128)},
            row_order="up_first",
            multiples={"hidden": 64, "inter": 64},
            oracle="sglang 0.5.23 _apply_trtllm_bf16_block_layout on flashinfer convert_to_block_layout",
        ),
        *(
            Layout(
                name=f"{backend}_dit{'_swapped' if swapped else ''}",
                kind="linear",
                formats=_NVFP4,
                archs=archs,
                maps=maps,
                orders=orders,
                kernel_rows=kernel_rows,
                swap_nibbles=swapped,
                derived=LINEAR_SCALARS,
                oracle=f"{_DIT} ({backend}), _prepare_nvfp4_weight_bytes",
                kernel=_MM_FP4,
                gemm=f"mm_fp4_{backend}",
            )
            for backend, archs, maps, orders, kernel_rows in (
                ("trtllm", BLACKWELL, (ShuffleRows(128),), _PADDED_SCALES, 128),
                ("cutlass", BLACKWELL_ALL, (), _PADDED_32, 32),
            )
            for swapped in (False, True)
        ),
        Layout(
            name="cutedsl_moe",
            kind="experts",
            formats=_NVFP4,
            archs=BLACKWELL,
            gated_maps=(GatedInterleave(64),),
            orders=_SWIZZLED,
            row_order="up_first",
            multiples={"inter": 64},
            derived=EXPERT_SCALARS,
            seam="convert_sf_to_mma_layout of the block scales, a copy of the library's own: not made here",
            oracle="formula of flashinfer 0.7.2 _interleave_linear_and_gate; no fixture",
        ),
        Layout(
            name="swiglu_dit",
            kind="linear",
            formats=_NVFP4,
            archs=BLACKWELL_ALL,
            maps=(SwapHalves(), GatedInterleave(64)),
            orders=_SWIZZLED,
            multiples={"rows": 128, "elements": 64},
            unit="matrix",  # a tile takes rows from both halves
            derived=LINEAR_SCALARS,
            oracle="formula of sglang 0.5.23 SwiGLU FC1 fusion; no fixture",
        ),
        *(
            Layout(
                name=name,
                kind=kind,
                formats=frozenset({"int8_static", "int8_dynamic", "int4_dynamic"}),
                archs=ASCEND,
                orders={"weight": Transposed(1)},
                unit="matrix",
                seam=_NZ_CAST,
                oracle="formula of sglang 0.5.23 ModelSlim schemes; no fixture",
                kernel="never run",
            )
            for name, kind in _NPU
        ),
        Layout(
            name="plain",
            kind="any",
            formats=frozenset(FORMATS),
            derived=(*LINEAR_SCALARS, *EXPERT_SCALARS),
            oracle="the checkpoint itself",
            kernel="none; forward decodes",
        ),
    )
}

# What is known to be wanted and has no row, and why.
MISSING: dict[str, str] = {
    "marlin (int4_group, nvfp4)": "its repack moves single codes between bytes, which no sum of byte offsets says; "
    "its scale transform is one to one on the 127 scales that are not negative and not NaN, and on no others",
    "megamoe, deep_gemm": "the library's own transform rebinds storage and has no stated formula",
}
