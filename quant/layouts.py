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
from dataclasses import dataclass

import torch
from torch import Tensor

from .backends import LAYOUTS, MISSING, TILE_ROWS, Arch, Layout
from .derived import DERIVED, Derived, ModuleKind, derive
from .formats import DTYPES, FORMATS, Component, Format, TensorSpec
from .placements import Placement, apply_bytes, apply_rows, invert_bytes, invert_rows, place_row_major, stack
from .steps import Located, PadRows, RowMajor, locate, round_up

__all__ = [
    "DERIVED",
    "LAYOUTS",
    "MISSING",
    "TILE_ROWS",
    "Arch",
    "Derived",
    "Layout",
    "LayoutPlan",
    "LayoutTagError",
    "ModuleKind",
    "Placement",
    "StorageSpec",
    "apply_bytes",
    "apply_rows",
    "choose_layout",
    "device_arch",
    "device_name",
    "invert_bytes",
    "invert_rows",
    "misfits",
    "place_row_major",
    "plan_experts",
    "plan_linear",
    "quantized_names",
    "stack",
]


class LayoutTagError(RuntimeError):
    """A module runs without its layout applied, or a layout would be applied twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSpec:
    """A live tensor in kernel layout, under its full name. Dim 0 are the units that sharding splits.

    FP8 is stored as uint8, since gloo moves no FP8. `padding`: some bytes belong to no tensor and stay zero.
    kernel_dtype, flat, kernel_rows, transposed: the view that `kernel_view` gives, see there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    padding: bool
    kernel_dtype: torch.dtype
    flat: bool = False
    kernel_rows: int | None = None
    transposed: bool = False

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

    def kernel_view(self, storage: Tensor) -> Tensor:
        """What a kernel is fed: the same memory, whole, units as one matrix, cut to its rows, transposed by strides."""
        view = storage.view(self.kernel_dtype)
        view = view if view.shape == self.shape else view.view(self.shape)
        view = view.flatten(0, 1) if self.flat else view
        view = view if self.kernel_rows in (None, len(view)) else view[: self.kernel_rows]
        return view.t() if self.transposed else view


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPlan:
    """What a layout means for one module."""

    layout: str
    storages: tuple[StorageSpec, ...]
    placements: tuple[Placement, ...]
    derived: tuple[Derived, ...]


def plan_linear(layout: Layout, fmt: Format, prefix: str, num_rows: int, num_elements: int) -> LayoutPlan:
    """Storages, placements and derived scalars of the linear `prefix`, weight [num_rows, num_elements].

    A unit of a matrix is a tile of 128 rows, or the whole matrix where the layout takes rows apart.
    """
    _require_fit(layout, "linear", fmt, prefix, (num_rows, num_elements))
    storages, placements = [], []
    for part, tensor in zip(fmt.components, fmt.tensors(f"{prefix}.weight", (num_rows, num_elements)), strict=True):
        name = f"{prefix}.{part.suffix}"
        if part.rows:
            storage, located = _linear_matrix(layout, part, tensor, name, num_rows)
        else:
            located = locate((), RowMajor(), tensor.num_rows, tensor.row_bytes)
            storage = _storage(name, part, _items(tensor), used_bytes=tensor.num_bytes)
        storages.append(storage)
        placements.append(_placement(layout, part, tensor, storage, located, origin=0))
    return _plan(layout, "linear", fmt, prefix, storages, placements)


def _linear_matrix(
    layout: Layout, part: Component, tensor: TensorSpec, name: str, num_rows: int
) -> tuple[StorageSpec, Located]:
    tiled, order = layout.unit == "tile", layout.order_of(part.kind)
    padding = (PadRows(TILE_ROWS // part.rows),) if tiled else ()
    located = locate((*padding, *layout.single_maps, *layout.maps), order, tensor.num_rows, tensor.row_bytes)
    num_units = -(-num_rows // TILE_ROWS) if tiled else 1
    head, *rest = _dims(part, located)
    shape = (num_units, head // num_units, *rest) if tiled else (1, head, *rest)
    # Orders that scatter rows keep their padding, which is part of them.
    cut = isinstance(order, RowMajor) and tiled
    storage = _storage(
        name,
        part,
        shape,
        used_bytes=tensor.num_bytes,
        flat=True,
        kernel_rows=-(-round_up(num_rows, layout.kernel_rows) // part.rows) if cut else None,
        transposed=layout.transposed and part.kind == "weight",
    )
    return storage, located


def _items(tensor: TensorSpec) -> tuple[int, ...]:
    """Shape of the storage of a tensor that goes by no rows: one unit."""
    count = math.prod(tensor.shape)
    return (1,) if count == 1 else (1, count)


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
    return _plan(layout, "experts", fmt, prefix, list(storages.values()), placements)


def _place_matrices(
    layout: Layout, prefix: str, part: Component, half: str, tensors: Sequence[TensorSpec]
) -> tuple[StorageSpec, list[Placement]]:
    """One component of one projection of every expert."""
    matrix, halves = MATRICES[half]
    maps = layout.single_maps if halves == 1 else (layout.part_of(half), *layout.gated_maps)
    spec = tensors[0]
    located = locate((*maps, *layout.maps), layout.order_of(part.kind), spec.num_rows, spec.row_bytes)
    used_bytes = halves * spec.num_bytes * len(tensors)
    storage = _storage(f"{prefix}.{matrix}_{part.suffix}", part, (len(tensors), *_dims(part, located)), used_bytes)
    return storage, [
        _placement(layout, part, tensor, storage, located, e * located.num_bytes) for e, tensor in enumerate(tensors)
    ]


def _place_scalars(
    layout: Layout, prefix: str, part: Component, half: str, tensors: Sequence[TensorSpec]
) -> tuple[StorageSpec, list[Placement]]:
    """[1, experts] for w2, [1, experts, 2] for w13: gate before up, whatever the order of the rows."""
    matrix, halves = MATRICES[half]
    spec = tensors[0]
    shape = (1, len(tensors), halves)[: 1 + halves] + _items(spec)[1:]
    storage = _storage(f"{prefix}.{matrix}_{part.suffix}", part, shape, halves * spec.num_bytes * len(tensors))
    located = locate((), RowMajor(), spec.num_rows, spec.row_bytes)
    index = int(half == "up")
    return storage, [
        _placement(layout, part, tensor, storage, located, (e * halves + index) * spec.num_bytes)
        for e, tensor in enumerate(tensors)
    ]


def _dims(part: Component, located: Located) -> tuple[int, ...]:
    """Of a matrix in items of the component."""
    return (*located.dims[:-1], located.dims[-1] // DTYPES[part.dtype].itemsize)


def _storage(
    name: str,
    part: Component,
    shape: tuple[int, ...],
    used_bytes: int,
    flat: bool = False,
    kernel_rows: int | None = None,
    transposed: bool = False,
) -> StorageSpec:
    kernel_dtype = DTYPES[part.dtype]
    dtype = torch.uint8 if part.dtype.startswith("F8") else kernel_dtype
    return StorageSpec(
        name=name,
        shape=shape,
        dtype=dtype,
        padding=math.prod(shape) * dtype.itemsize > used_bytes,
        kernel_dtype=kernel_dtype,
        flat=flat,
        kernel_rows=kernel_rows,
        transposed=transposed,
    )


def _placement(
    layout: Layout, part: Component, tensor: TensorSpec, storage: StorageSpec, located: Located, origin: int
) -> Placement:
    return Placement(
        tensor=tensor,
        storage=storage.name,
        origin=origin,
        located=located,
        unit_bytes=storage.unit_bytes,
        swap_nibbles=layout.swap_nibbles and part.kind == "weight",
    )


def _plan(
    layout: Layout,
    kind: ModuleKind,
    fmt: Format,
    prefix: str,
    storages: Sequence[StorageSpec],
    placements: Sequence[Placement],
) -> LayoutPlan:
    derived = derive(kind, prefix, layout.derived, _roles(fmt, storages))
    return LayoutPlan(layout=layout.name, storages=tuple(storages), placements=tuple(placements), derived=derived)


def _roles(fmt: Format, storages: Sequence[StorageSpec]) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Which storage (leaf, shape) plays the part of which scale: "w13_global_scale" may be w13_weight_scale_2."""
    scalars = [part for part in fmt.components if not part.rows]
    kinds = {part.suffix: part.kind for part in scalars if part == fmt.component(part.kind)}
    matrices = ("", *(f"{matrix}_" for matrix, _ in MATRICES.values()))
    named = {f"{matrix}{suffix}": f"{matrix}{kind}" for suffix, kind in kinds.items() for matrix in matrices}
    return {named[storage.leaf]: (storage.leaf, storage.shape) for storage in storages if storage.leaf in named}


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
    shapes = {"linear": (shape,), "experts": (shape[1:], shape[:0:-1])}[kind]
    if not all(fmt.holds(weight) for weight in shapes):
        problems.append(f"{fmt.name} wants rows and elements in multiples of {fmt.multiples}")
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
    kind: ModuleKind, fmt: Format, wanted: str, shape: tuple[int, ...], arch: Arch | None = None
) -> tuple[Layout, str]:
    """The layout of a module and why: `wanted` is "auto", a family ("trtllm") or a row's name ("trtllm_moe").

    arch: compute capability of the device (100), None without one. A row of another kind stands for its family.
    """
    device = device_name(arch)
    if wanted == "auto":
        able = next((row for row in _fitting(kind, fmt, shape) if row.serves(arch)), LAYOUTS["plain"])
        _require_fit(able, kind, fmt, kind, shape)
        return able, f"auto: first row that holds {fmt.name} {shape} and serves {device}"
    rows = _wanted_rows(kind, wanted)
    row = next((row for row in rows if not misfits(row, kind, fmt, shape)), rows[0])
    _require_fit(row, kind, fmt, kind, shape)
    return row, f"asked for {wanted}" + ("" if row.serves(arch) else f"; no kernel for {device}, forward decodes")


def device_arch(device: torch.device | None = None) -> Arch | None:
    """What kernels run on: this device, by default the one that this process uses. None for a CPU."""
    if device is not None and device.type not in ("cuda", "npu"):
        return None
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    npu = getattr(torch, "npu", None)  # there once torch-npu is imported
    return "ascend" if npu is not None and npu.is_available() else None


def device_name(arch: Arch | None) -> str:
    """An architecture for people."""
    if arch is None:
        return "a device of no compute capability"
    return f"sm_{arch}" if isinstance(arch, int) else arch


def _wanted_rows(kind: ModuleKind, wanted: str) -> list[Layout]:
    """The row of that name, or the rows of its family, for modules of this kind."""
    if wanted in LAYOUTS and LAYOUTS[wanted].kind in (kind, "any"):
        return [LAYOUTS[wanted]]
    family = LAYOUTS[wanted].family if wanted in LAYOUTS else wanted
    rows = [row for row in LAYOUTS.values() if row.family == family and row.kind in (kind, "any")]
    if not rows:
        known = sorted({row.family for row in LAYOUTS.values()} | LAYOUTS.keys())
        raise ValueError(f"layout {wanted!r}: unknown; known: auto, {', '.join(known)}")
    return rows


def quantized_names() -> frozenset[str]:
    """Names that parameters of quantized modules can have: the whitelist for sharding."""
    suffixes = {part.suffix for fmt in FORMATS.values() for part in fmt.components}
    stacked = {f"{matrix}_{suffix}" for matrix, _ in MATRICES.values() for suffix in suffixes}
    return frozenset(suffixes | stacked | {name for row in LAYOUTS.values() for name in row.derived})


# projection -> matrix that holds it, and how many projections share that matrix
MATRICES = {"gate": ("w13", 2), "up": ("w13", 2), "down": ("w2", 1)}

SIZES: dict[ModuleKind, tuple[str, ...]] = {"linear": ("rows", "elements"), "experts": ("experts", "hidden", "inter")}
