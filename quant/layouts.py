"""Layouts: where the bytes of checkpoint tensors lie for one kernel.

A layout is a row of `LAYOUTS`; a plan is what a row means for one module: its storages, the placement of every
checkpoint tensor in them, and its derived scalars.

    layout, why = choose_layout("linear", FORMATS["nvfp4"], "auto", (N, K))
    plan = plan_linear(layout, FORMATS["nvfp4"], "model.layers.0.mlp.down_proj", N, K)
    apply_rows(plan.placements[0], rows, row0, local_bytes, base)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from .derived import DERIVED, Derived, ModuleKind, derive
from .formats import DTYPES, FORMATS, Component, Format, Kind, TensorSpec
from .placements import Placement, apply_rows, invert_rows, place_row_major
from .steps import (
    GatedInterleave,
    Located,
    Order,
    PadRows,
    Part,
    RowMajor,
    RowMap,
    ShuffleRows,
    Swizzle128x4,
    locate,
)

__all__ = [
    "DERIVED",
    "LAYOUTS",
    "TILE_ROWS",
    "Derived",
    "Layout",
    "LayoutPlan",
    "LayoutTagError",
    "ModuleKind",
    "Placement",
    "StorageSpec",
    "apply_rows",
    "choose_layout",
    "invert_rows",
    "misfits",
    "place_row_major",
    "plan_experts",
    "plan_linear",
    "quantized_names",
]

TILE_ROWS = 128  # the shuffle is block-diagonal in 32 rows, the swizzle in 128: the unit of sharding of a dense weight

LayoutKind = Literal["linear", "experts", "any"]
RowOrder = Literal["gate_first", "up_first"]


class LayoutTagError(RuntimeError):
    """A module runs without its layout applied, or a layout would be applied twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSpec:
    """A live tensor in kernel layout, under its full name. Dim 0 are the units that sharding splits.

    FP8 is stored as uint8, since gloo moves no FP8. `padding`: some bytes belong to no tensor and stay zero.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    padding: bool

    @property
    def leaf(self) -> str:
        """The name in its module."""
        return self.name.rpartition(".")[2]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def unit_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPlan:
    storages: tuple[StorageSpec, ...]
    placements: tuple[Placement, ...]
    derived: tuple[Derived, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A row of the table.

    formats: whose tensors it can hold; archs: compute capabilities whose kernels read it, empty where it needs none.
    maps: row maps of every matrix, after gated_maps of a fused gate/up matrix or single_maps of any other.
    orders: byte order by kind of component. derived: rows of DERIVED that this layout's forward consumes.
    multiples: what the sizes of a module must be multiples of, by name.
    """

    name: str
    kind: LayoutKind
    formats: frozenset[str]
    orders: Mapping[Kind, Order]
    derived: tuple[str, ...]
    archs: frozenset[int] = frozenset()
    maps: tuple[RowMap, ...] = ()
    gated_maps: tuple[RowMap, ...] = ()
    single_maps: tuple[RowMap, ...] = ()
    row_order: RowOrder = "gate_first"
    multiples: Mapping[str, int] = field(default_factory=dict)
    oracle: str = ""

    @property
    def family(self) -> str:
        """Rows of one backend share it: "trtllm" for trtllm_linear and trtllm_moe."""
        return self.name.partition("_")[0]

    def part_of(self, half: str) -> Part:
        """Where the gate or the up half goes in the fused matrix."""
        return Part(int((half == "gate") == (self.row_order == "up_first")))


def plan_linear(layout: Layout, fmt: Format, prefix: str, num_rows: int, num_elements: int) -> LayoutPlan:
    """Storages, placements and derived scalars of the linear `prefix`, weight [num_rows, num_elements].

    A unit of a matrix is a tile of 128 rows.
    """
    _require_fit(layout, "linear", fmt, prefix, (num_rows, num_elements))
    num_tiles = -(-num_rows // TILE_ROWS)
    maps = (PadRows(TILE_ROWS), *layout.single_maps, *layout.maps)
    storages, placements = [], []
    for part, tensor in zip(fmt.components, fmt.tensors(f"{prefix}.weight", (num_rows, num_elements)), strict=True):
        name = f"{prefix}.{part.suffix}"
        if part.rows:
            located = locate(maps, layout.orders[part.kind], tensor.num_rows, tensor.row_bytes)
            shape = _matrix_shape(part, located, num_tiles, located.num_bytes // num_tiles)
            storage = _storage(name, part, shape, used_bytes=tensor.num_bytes)
        else:
            located = locate((), RowMajor(), 1, tensor.row_bytes)
            storage = _storage(name, part, (1,), used_bytes=tensor.num_bytes)
        storages.append(storage)
        placements.append(_placement(tensor, storage, located, origin=0))
    return _plan(layout, "linear", prefix, storages, placements)


def plan_experts(layout: Layout, fmt: Format, prefix: str, num_experts: int, hidden: int, inter: int) -> LayoutPlan:
    """Storages, placements and derived scalars of the stacked experts `prefix`.

    w13 holds gate and up of every expert, w2 down. A unit of a matrix is an expert; the scalars of all experts are one.
    """
    _require_fit(layout, "experts", fmt, prefix, (num_experts, hidden, inter))
    storages: dict[str, StorageSpec] = {}
    placements: list[Placement] = []
    for half, shape in {"gate": (inter, hidden), "up": (inter, hidden), "down": (hidden, inter)}.items():
        experts = [fmt.tensors(f"{prefix}.{e}.{half}_proj.weight", shape) for e in range(num_experts)]
        for part, tensors in zip(fmt.components, zip(*experts, strict=True), strict=True):
            place = _place_matrices if part.rows else _place_scalars
            storage, placed = place(layout, prefix, part, half, tensors)
            storages[storage.name] = storage
            placements += placed
    return _plan(layout, "experts", prefix, list(storages.values()), placements)


def _place_matrices(
    layout: Layout, prefix: str, part: Component, half: str, tensors: Sequence[TensorSpec]
) -> tuple[StorageSpec, list[Placement]]:
    """One component of one projection of every expert."""
    matrix, halves = MATRICES[half]
    maps = layout.single_maps if halves == 1 else (layout.part_of(half), *layout.gated_maps)
    spec = tensors[0]
    located = locate((*maps, *layout.maps), layout.orders[part.kind], spec.num_rows, spec.row_bytes)
    shape = _matrix_shape(part, located, len(tensors), located.num_bytes)
    used_bytes = halves * spec.num_bytes * len(tensors)
    storage = _storage(f"{prefix}.{matrix}_{part.suffix}", part, shape, used_bytes)
    return storage, [_placement(tensor, storage, located, e * located.num_bytes) for e, tensor in enumerate(tensors)]


def _place_scalars(
    layout: Layout, prefix: str, part: Component, half: str, tensors: Sequence[TensorSpec]
) -> tuple[StorageSpec, list[Placement]]:
    """[1, experts] for w2, [1, experts, 2] for w13: gate before up, whatever the order of the rows."""
    matrix, halves = MATRICES[half]
    item_bytes = tensors[0].row_bytes
    shape = (1, len(tensors), halves)[: 1 + halves]
    storage = _storage(f"{prefix}.{matrix}_{part.suffix}", part, shape, halves * item_bytes * len(tensors))
    located = locate((), RowMajor(), 1, item_bytes)
    index = int(half == "up")
    return storage, [
        _placement(tensor, storage, located, (e * halves + index) * item_bytes) for e, tensor in enumerate(tensors)
    ]


def _matrix_shape(part: Component, located: Located, num_units: int, unit_bytes: int) -> tuple[int, ...]:
    """[units, rows, items] where rows stay whole, else [units, bytes]."""
    if not located.pitch:
        return (num_units, unit_bytes)
    return (num_units, unit_bytes // located.pitch, located.pitch // DTYPES[part.dtype].itemsize)


def _storage(name: str, part: Component, shape: tuple[int, ...], used_bytes: int) -> StorageSpec:
    dtype = torch.uint8 if part.dtype.startswith("F8") else DTYPES[part.dtype]
    padding = math.prod(shape) * dtype.itemsize > used_bytes
    return StorageSpec(name=name, shape=shape, dtype=dtype, padding=padding)


def _placement(tensor: TensorSpec, storage: StorageSpec, located: Located, origin: int) -> Placement:
    return Placement(tensor=tensor, storage=storage.name, origin=origin, located=located, unit_bytes=storage.unit_bytes)


def _plan(
    layout: Layout, kind: ModuleKind, prefix: str, storages: Sequence[StorageSpec], placements: Sequence[Placement]
) -> LayoutPlan:
    shapes = {storage.leaf: storage.shape for storage in storages}
    derived = derive(kind, prefix, layout.derived, shapes)
    return LayoutPlan(storages=tuple(storages), placements=tuple(placements), derived=derived)


def misfits(layout: Layout, kind: ModuleKind, fmt: Format, shape: tuple[int, ...]) -> list[str]:
    """Why a layout cannot hold a module; shape is (rows, elements) of a linear, (experts, hidden, inter) of experts."""
    sizes = dict(zip(SIZES[kind], shape, strict=True))
    problems = [
        f"{name} {sizes[name]} is no multiple of {multiple}"
        for name, multiple in layout.multiples.items()
        if sizes.get(name, 0) % multiple
    ]
    if layout.kind not in (kind, "any"):
        problems.append(f"is for {layout.kind}, not {kind}")
    if fmt.name not in layout.formats:
        problems.append(f"holds {', '.join(sorted(layout.formats))}, not {fmt.name}")
    return problems


def _fitting(kind: ModuleKind, fmt: Format, shape: tuple[int, ...]) -> list[Layout]:
    return [row for row in LAYOUTS.values() if not misfits(row, kind, fmt, shape)]


def _require_fit(layout: Layout, kind: ModuleKind, fmt: Format, name: str, shape: tuple[int, ...]) -> None:
    problems = misfits(layout, kind, fmt, shape)
    if problems:
        fitting = ", ".join(row.name for row in _fitting(kind, fmt, shape))
        raise ValueError(
            f"{name}: {kind} of shape {shape} in {fmt.name} does not fit layout {layout.name}: "
            f"{'; '.join(problems)}; what fits: {fitting or 'none'}"
        )


def choose_layout(
    kind: ModuleKind, fmt: Format, wanted: str, shape: tuple[int, ...], arch: int | None = None
) -> tuple[Layout, str]:
    """The layout of a module and why: `wanted` is "auto", a family ("trtllm") or a row's name ("trtllm_moe").

    arch: compute capability of the device (100), None without one. A row of another kind stands for its family.
    """
    device = "a device of no compute capability" if arch is None else f"sm_{arch}"
    if wanted == "auto":
        able = next(row for row in _fitting(kind, fmt, shape) if not row.archs or arch in row.archs)
        return able, f"auto: first row that holds {fmt.name} {shape} and serves {device}"
    family = LAYOUTS[wanted].family if wanted in LAYOUTS else wanted
    row = next((row for row in LAYOUTS.values() if row.family == family and row.kind in (kind, "any")), None)
    if row is None:
        known = sorted({row.family for row in LAYOUTS.values()} | LAYOUTS.keys())
        raise ValueError(f"layout {wanted!r}: unknown; known: auto, {', '.join(known)}")
    _require_fit(row, kind, fmt, kind, shape)
    served = not row.archs or arch in row.archs
    return row, f"asked for {wanted}" + ("" if served else f"; no kernel for {device}, forward decodes")


def quantized_names() -> frozenset[str]:
    """Names that parameters of quantized modules can have: the whitelist for sharding."""
    suffixes = {part.suffix for fmt in FORMATS.values() for part in fmt.components}
    stacked = {f"{matrix}_{suffix}" for matrix, _ in MATRICES.values() for suffix in suffixes}
    return frozenset(suffixes | stacked | {name for row in LAYOUTS.values() for name in row.derived})


# projection -> matrix that holds it, and how many projections share that matrix
MATRICES = {"gate": ("w13", 2), "up": ("w13", 2), "down": ("w2", 1)}

SIZES: dict[ModuleKind, tuple[str, ...]] = {"linear": ("rows", "elements"), "experts": ("experts", "hidden", "inter")}


_LINEAR_SCALARS = ("alpha", "input_scale_inv")
_EXPERT_SCALARS = ("g1_alphas", "g1_alphas_up", "g2_alphas", "w13_input_scale_quant", "w2_input_scale_quant")
_NVFP4 = frozenset({"nvfp4"})
_PLAIN: Mapping[Kind, Order] = {"weight": RowMajor(), "block_scale": RowMajor()}

# In the order that "auto" prefers.
LAYOUTS: dict[str, Layout] = {
    row.name: row
    for row in (
        Layout(
            name="trtllm_linear",
            kind="linear",
            formats=_NVFP4,
            archs=frozenset({100, 103}),
            maps=(ShuffleRows(128),),
            # a scale column is 8 bytes of weight, and columns are padded to 4
            orders={"weight": RowMajor(32), "block_scale": Swizzle128x4()},
            derived=_LINEAR_SCALARS,
            oracle="sglang 0.5.23 _process_backend_weights (trtllm) on flashinfer index functions",
        ),
        Layout(
            name="cutlass_linear",
            kind="linear",
            formats=_NVFP4,
            archs=frozenset({100, 103, 120, 121}),
            # elements are padded to 32
            orders={"weight": RowMajor(16), "block_scale": Swizzle128x4()},
            derived=_LINEAR_SCALARS,
            oracle="sglang 0.5.23 _process_backend_weights (cutlass)",
        ),
        Layout(
            name="trtllm_moe",
            kind="experts",
            formats=_NVFP4,
            archs=frozenset({100, 103}),
            gated_maps=(GatedInterleave(),),
            single_maps=(PadRows(TILE_ROWS),),
            maps=(ShuffleRows(128),),
            orders={"weight": RowMajor(), "block_scale": Swizzle128x4()},
            row_order="up_first",
            multiples={"hidden": 64, "inter": 64},
            derived=("g1_alphas", "g1_scale_c", "g2_alphas", "w13_input_scale_quant"),
            oracle="sglang 0.5.23 prepare_static_weights_for_trtllm_fp4_moe on flashinfer index functions",
        ),
        Layout(
            name="cutlass_moe",
            kind="experts",
            formats=_NVFP4,
            archs=frozenset({100, 103, 120, 121}),
            orders={"weight": RowMajor(), "block_scale": Swizzle128x4()},
            row_order="up_first",
            derived=_EXPERT_SCALARS,
            oracle="sglang 0.5.23 swizzle_blockscale",
        ),
        Layout(
            name="plain",
            kind="any",
            formats=frozenset(FORMATS),
            orders=_PLAIN,
            derived=(*_LINEAR_SCALARS, *_EXPERT_SCALARS),
            oracle="the checkpoint itself",
        ),
    )
}
