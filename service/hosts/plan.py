"""Where the tensors of a checkpoint lie in the parameters of another engine's model.

    holdings = plan_holdings(model, parameters_of(ours), "sglang cutlass")

vLLM and SGLang keep Llama-like models alike: q, k and v are rows of one matrix, gate and up of another, and a matrix
carries the sizes of its parts. What their processing after the load makes of a format is a row of SCHEMES. Modules are
read by their attributes; neither engine is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quant.conversions import swizzled_scales
from quant.expert_maps import EXPERT
from quant.formats import FORMATS, TensorSpec
from quant.layouts import Derived, Placement
from quant.parameters import ParameterRow
from quant.steps import PadRows, RowMajor, Swizzle128x4, locate, round_up
from weight_update.errors import PlanError, raise_all
from weight_update.holdings import Holdings

# Fused module -> the checkpoint's modules, in the order of their rows. A model's own packed_modules_mapping goes first.
PACKED: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
RAW = "transfuse"  # raw scales that an engine throws away are kept here, under its module's name


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows [row0, row0 + n) of module `path`, one of num_parts that it packs."""

    path: str
    module: Any
    index: int
    num_parts: int
    row0: int
    num_rows: int  # of the whole module


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What an engine's processing makes of one format in a linear.

    swizzled: the parameter whose block scales lie 128 x 4. derived: value -> its inputs and function. A raw scale that
    the module lacks is kept in memory of ours.
    """

    format: str
    swizzled: str
    derived: Mapping[str, tuple[tuple[str, ...], Callable[..., Tensor]]]


def _largest(scale: Tensor) -> Tensor:
    return scale.max()


def _reciprocal(scale: Tensor) -> Tensor:
    return 1.0 / scale.max()


def _product(input_scale: Tensor, scale_2: Tensor) -> Tensor:
    return input_scale.max() * scale_2.max()


def _swizzled(scale: Tensor) -> Tensor:
    padded = scale.new_zeros(round_up(scale.shape[0], 128), round_up(scale.shape[1], 4), dtype=torch.uint8)
    padded[: scale.shape[0], : scale.shape[1]] = scale.view(torch.uint8)
    return swizzled_scales(padded).view(scale.dtype)


# Sources: vllm 0.33.0 kernels/linear/nvfp4/cutlass.py and quantization/modelopt.py (KNvfp4Static, KNvfp4Dynamic);
# sglang 0.5.23 layers/quantization/modelopt_quant.py (ModelOptFp4LinearMethod, backends other than trtllm and marlin).
SCHEMES: dict[str, Scheme] = {
    "vllm cutlass": Scheme(
        format="nvfp4",
        swizzled="weight_scale",
        derived={
            "weight_global_scale": (("weight_scale_2",), _largest),
            "input_global_scale": (("input_scale",), _largest),
            "input_global_scale_inv": (("input_scale",), _reciprocal),
            "alpha": (("input_scale", "weight_scale_2"), _product),
        },
    ),
    "sglang cutlass": Scheme(
        format="nvfp4",
        swizzled="weight_scale_interleaved",
        derived={
            "input_scale_inv": (("input_scale",), _reciprocal),
            "alpha": (("input_scale", "weight_scale_2"), _product),
        },
    ),
}


def plan_holdings(model: nn.Module, parameters: Sequence[ParameterRow], scheme: str) -> Holdings:
    """All of an engine's model; PlanError that lists what has no place in it, and what would have no source.

    parameters: of the checkpoint, as quant.models.parameters_of names them.
    """
    return _Plan(model, SCHEMES[scheme]).run(parameters)


class _Plan:
    """One planning: what is placed so far."""

    def __init__(self, model: nn.Module, scheme: Scheme) -> None:
        self._modules = dict(model.named_modules())
        self._packed = {**PACKED, **(getattr(model, "packed_modules_mapping", None) or {})}
        self._scheme = scheme
        self._live: Callable[[], dict[str, Tensor]] = lambda: {
            name: parameter.data for name, parameter in model.named_parameters()
        }
        self._held = self._live()
        self._raw: dict[str, Tensor] = {}  # ours
        self._placements: list[Placement] = []
        self._derived: dict[str, Derived] = {}

    def run(self, parameters: Sequence[ParameterRow]) -> Holdings:
        problems = []
        for row in parameters:
            try:
                self._place(row)
            except ValueError as error:
                problems.append(str(error))
        filled = {each.storage for each in self._placements} | self._derived.keys()
        problems += [f"{name}: no checkpoint tensor fills it" for name in self._held if name not in filled]
        raise_all(PlanError, "this model of another engine cannot be planned", problems)
        raw, live = self._raw, self._live
        return Holdings(
            storages=lambda: {**live(), **raw},
            placements=self._placements,
            derived=list(self._derived.values()),
            parameters=parameters,
        )

    def _place(self, row: ParameterRow) -> None:
        path, _, leaf = row.name.rpartition(".")
        part = self._part(row, path)
        if not FORMATS[row.format].is_quantized:
            (spec,) = FORMATS[row.format].tensors(row.name, row.shape)
            self._placements.append(self._rows(part, leaf, spec))
        elif row.format == self._scheme.format:
            self._place_packed(row, part)
        else:
            raise PlanError(f"{row.name}: {row.format} has no scheme in this engine; known: {self._scheme.format}")

    def _part(self, row: ParameterRow, path: str) -> Part:
        if path in self._modules:
            return Part(
                path=path, module=self._modules[path], index=0, num_parts=1, row0=0, num_rows=row.shape[0]
            )
        parent, _, own = path.rpartition(".")
        for fused, parts in self._packed.items():
            name = f"{parent}.{fused}"
            if own in parts and name in self._modules:
                sizes = list(self._modules[name].output_sizes)
                index = list(parts).index(own)
                if len(sizes) != len(parts) or sizes[index] != row.shape[0]:
                    raise PlanError(f"{row.name}: {row.shape[0]} rows; {name} has parts of {sizes} for {list(parts)}")
                return Part(
                    path=name,
                    module=self._modules[name],
                    index=index,
                    num_parts=len(parts),
                    row0=sum(sizes[:index]),
                    num_rows=sum(sizes),
                )
        if EXPERT.match(row.name):
            raise PlanError(f"{row.name}: experts have no scheme in this engine; only dense models can join")
        raise PlanError(f"{row.name}: the engine's model has no module {path}, and none that packs it")

    def _rows(self, part: Part, leaf: str, spec: TensorSpec) -> Placement:
        """Rows of a matrix that lies as the checkpoint has it."""
        name = f"{part.path}.{leaf}"
        if name not in self._held:
            raise PlanError(f"{spec.name}: the engine's model has no parameter {name}")
        held = self._held[name]
        if held.element_size() * held[0].numel() != spec.row_bytes:
            raise PlanError(f"{spec.name}: rows of {spec.row_bytes} bytes; {name} is {list(held.shape)} {held.dtype}")
        return _placed(spec, name, locate((), RowMajor(), part.num_rows, spec.row_bytes), part, held)

    def _place_packed(self, row: ParameterRow, part: Part) -> None:
        fmt = FORMATS[row.format]
        for component, spec in zip(fmt.components, fmt.tensors(row.name, row.shape), strict=True):
            if not component.rows:
                self._placements.append(self._scalar(part, component.suffix, spec))
            elif component.kind == "weight":
                name = f"{part.path}.weight"
                located = locate((PadRows(32),), RowMajor(16), part.num_rows, spec.row_bytes)
                self._placements.append(_placed(spec, name, located, part, self._held[name]))
            else:
                self._placements.append(self._scales(part, spec))
        for leaf, (inputs, function) in self._scheme.derived.items():
            self._derive(part, leaf, inputs, function)

    def _scales(self, part: Part, spec: TensorSpec) -> Placement:
        """Block scales, swizzled; where an engine keeps them raw as well, the swizzled ones follow from those."""
        leaf = self._scheme.swizzled
        raw, held = f"{part.path}.weight_scale", f"{part.path}.{leaf}"
        aliased = held not in self._held  # named twice, listed once
        if aliased or held == raw:
            located = locate((PadRows(128),), Swizzle128x4(), part.num_rows, spec.row_bytes)
            return _placed(spec, raw, located, part, self._held[raw])
        self._derive(part, leaf, ("weight_scale",), _swizzled)
        return self._rows(part, "weight_scale", spec)

    def _scalar(self, part: Part, leaf: str, spec: TensorSpec) -> Placement:
        """One of the raw scales of the parts that a module packs, [parts]."""
        name = f"{part.path}.{leaf}"
        if name not in self._held:
            name = f"{part.path}.{RAW}.{leaf}"
            self._raw.setdefault(name, torch.ones(part.num_parts))
        located = locate((), RowMajor(), 1, spec.row_bytes)
        size = spec.row_bytes * part.num_parts
        return Placement(
            tensor=spec, storage=name, origin=part.index * spec.row_bytes, located=located, unit_bytes=size
        )

    def _derive(self, part: Part, leaf: str, inputs: Sequence[str], function: Callable[..., Tensor]) -> None:
        name = f"{part.path}.{leaf}"
        names = [f"{part.path}.{each}" for each in inputs]
        names = [each if each in self._held else f"{part.path}.{RAW}.{each.rpartition('.')[2]}" for each in names]
        if name in self._held:
            shape = tuple(self._held[name].shape)
            self._derived[name] = Derived(name=name, inputs=tuple(names), function=function, shape=shape)


def _placed(spec: TensorSpec, storage: str, located: Any, part: Part, held: Tensor) -> Placement:
    """A part's rows of a matrix, all of which is one unit."""
    size = held.numel() * held.element_size()
    if located.num_bytes > size:
        raise PlanError(f"{spec.name}: needs {located.num_bytes} bytes, {storage} is {list(held.shape)} {held.dtype}")
    rows = located.rows[part.row0 : part.row0 + spec.num_rows]
    return Placement(tensor=spec, storage=storage, origin=0, located=replace(located, rows=rows), unit_bytes=size)
