"""Formats: how the numbers of a parameter are encoded, and which checkpoint tensors hold them.

A format is a row of `FORMATS`. Where the bytes lie for a kernel is a layout (`quant.layouts`).

    fmt = FORMATS["nvfp4"]
    scale = global_scale(fmt, amax(weight))
    parts = encode(fmt, weight, scale)               # {"weight": uint8 [N, K/2], "weight_scale": uint8 [N, K/16]}
    decode(fmt, {**parts, "weight_scale_2": scale})  # BF16 [N, K]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import kernels

# safetensors' names
DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

NON_FINITE = 0x7F80  # BF16 bits of infinity; NaNs lie above
E2M1_MAX, E4M3_MAX = 6.0, 448.0

Kind = Literal["weight", "block_scale", "global_scale", "input_scale"]
Parts = Mapping[str, Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"{dtype}: has no name in a checkpoint; known: {', '.join(map(str, _DTYPE_NAMES))}")
    return _DTYPE_NAMES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor in checkpoint form. A row is an index along dim 0; a 0-d tensor has one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One checkpoint tensor of a format. One stored item covers `rows` x `elements` weights; 0 means all of that dim,
    which then is absent from the shape: (0, 0) is a scalar, (1, 0) one item a row."""

    suffix: str
    dtype: str
    kind: Kind
    elements: int
    rows: int = 1

    def shape(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this tensor for a weight of `weight_shape`."""
        if self.rows == self.elements == 1:
            return weight_shape
        *lead, num_rows, num_elements = weight_shape
        covered = ((num_rows, self.rows), (num_elements, self.elements))
        return (*lead, *(-(-size // cover) for size, cover in covered if cover))


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A row of the table. `encode_block` is (rows, elements) that share one block scale: ranks that share such a block
    reduce its amax; with a global scale they also reduce the amax of the tensor, or of its fused group."""

    name: str
    components: tuple[Component, ...]
    encode_block: tuple[int, int]
    oracle: str
    global_divisor: float | None
    encode_rows: Callable[[Tensor, float, Parts], None]
    decode_rows: Callable[[Parts, float, Tensor], None]

    @property
    def has_global_scale(self) -> bool:
        return self.global_divisor is not None

    @property
    def row_components(self) -> tuple[Component, ...]:
        """The components that hold something for every row: what `encode` returns."""
        return tuple(component for component in self.components if component.rows)

    def component(self, kind: Kind) -> Component | None:
        return next((component for component in self.components if component.kind == kind), None)

    def tensors(self, parameter_name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The checkpoint tensors that hold a parameter, in the order of the components."""
        self._check(parameter_name, shape)
        stem = parameter_name.removesuffix(".weight")
        return tuple(
            TensorSpec(
                name=parameter_name if part.suffix == "weight" else f"{stem}.{part.suffix}",
                dtype=part.dtype,
                shape=part.shape(tuple(shape)),
            )
            for part in self.components
        )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        block = self.encode_block[1]
        if len(self.components) == 1:
            return
        if len(shape) < 2 or shape[-1] % block:
            raise ValueError(
                f"{name}: shape {tuple(shape)} does not fit {self.name}; expected two dims and a last one that is a "
                f"multiple of {block}; keep it in bf16"
            )
        if not name.endswith(".weight"):
            raise ValueError(f"{name}: a parameter in {self.name} is named '<module>.weight'; keep it in bf16")


def amax(rows: Tensor) -> int:
    """BF16 bits (0..0x7FFF) of the largest absolute value; 0x7F80 and above mean that one is not finite."""
    _require_bf16(rows)
    return kernels.amax_bits(rows.contiguous())


def first_nonfinite(rows: Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity, None where there is none."""
    _require_bf16(rows)
    found = (rows.view(torch.int16).bitwise_and(NON_FINITE) == NON_FINITE).nonzero()
    return tuple(found[0].tolist()) if len(found) else None


def global_scale(fmt: Format, amax_bits: int) -> Tensor:
    """FP32 scale of a tensor or of a fused group, from the bits of its largest absolute value; 1.0 where it is 0."""
    if fmt.global_divisor is None:
        raise ValueError(f"{fmt.name}: has no global scale; check has_global_scale first")
    if not 0 <= amax_bits < NON_FINITE:
        raise ValueError(f"amax bits {amax_bits:#06x}: NaN or infinity in the weights; expected < {NON_FINITE:#06x}")
    if amax_bits == 0:
        return torch.ones((), dtype=torch.float32)
    largest = torch.tensor(amax_bits << 16, dtype=torch.int32).view(torch.float32)
    return largest / fmt.global_divisor


def encode(fmt: Format, rows: Tensor, scale: Tensor | None = None, out: Parts | None = None) -> dict[str, Tensor]:
    """Encode BF16 rows [n, ...]: uint8 [n, row bytes] for every component that goes by rows, into `out` if given.

    `scale` is the global scale, required exactly where the format has one.
    """
    _require_bf16(rows)
    block = fmt.encode_block[1]
    if not rows.is_contiguous() or (rows.ndim and rows.shape[-1] % block):
        raise ValueError(
            f"rows of shape {tuple(rows.shape)}, strides {rows.stride()}: {fmt.name} expects contiguous rows whose "
            f"last dim is a multiple of {block}"
        )
    if out is None:
        out = {
            part.suffix: torch.empty((len(rows), _row_bytes(part, rows)), dtype=torch.uint8, device=rows.device)
            for part in fmt.row_components
        }
    fmt.encode_rows(rows, _scale_value(fmt, scale), out)
    return dict(out)


def decode(fmt: Format, tensors: Parts, out: Tensor | None = None) -> Tensor:
    """BF16 [n, K] from the tensors of a parameter, by component suffix."""
    component = fmt.component("global_scale")
    scale = tensors[component.suffix] if component else None
    return _decode(fmt, tensors, _scale_value(fmt, scale), out)


def decode_unscaled(fmt: Format, tensors: Parts, out: Tensor | None = None) -> Tensor:
    """BF16 [n, K] without the global scale: code times block scale, which BF16 holds exactly."""
    return _decode(fmt, tensors, 1.0, out)


def _decode(fmt: Format, tensors: Parts, scale: float, out: Tensor | None) -> Tensor:
    weight = fmt.components[0]
    packed = tensors[weight.suffix]
    if out is None:
        per_byte = weight.elements / DTYPES[weight.dtype].itemsize
        num_elements = int(math.prod(packed.shape[1:]) * packed.element_size() * per_byte)
        out = torch.empty((len(packed), num_elements), dtype=torch.bfloat16, device=packed.device)
    parts = {part.suffix: tensors[part.suffix].view(torch.uint8) for part in fmt.row_components}
    fmt.decode_rows(parts, scale, out)
    return out


def _row_bytes(component: Component, rows: Tensor) -> int:
    per_row = component.shape(tuple(rows.shape))[1:]
    return math.prod(per_row) * DTYPES[component.dtype].itemsize


def _scale_value(fmt: Format, scale: Tensor | None) -> float:
    if (scale is not None) != fmt.has_global_scale:
        raise ValueError(f"{fmt.name}: a global scale is {'required' if fmt.has_global_scale else 'not part of it'}")
    if scale is None:
        return 1.0
    value = scale.item()
    if not 0 < value < math.inf:
        raise ValueError(f"{fmt.name}: global scale {value}; expected a positive finite number")
    return value


def _require_bf16(rows: Tensor) -> None:
    if rows.dtype != torch.bfloat16:
        raise ValueError(f"rows of dtype {rows.dtype}: expected torch.bfloat16; cast first, ties to even")


def _encode_bf16(rows: Tensor, scale: float, out: Parts) -> None:
    out["weight"].copy_(rows.reshape(len(rows), -1).view(torch.uint8))


def _decode_bf16(parts: Parts, scale: float, out: Tensor) -> None:
    out.copy_(parts["weight"].view(torch.bfloat16).reshape(out.shape))


def _encode_nvfp4(rows: Tensor, scale: float, out: Parts) -> None:
    kernels.encode_nvfp4_rows(rows, scale, out["weight"], out["weight_scale"])


def _decode_nvfp4(parts: Parts, scale: float, out: Tensor) -> None:
    kernels.decode_nvfp4_rows(parts["weight"], parts["weight_scale"], scale, out)


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            name="bf16",
            components=(Component(suffix="weight", dtype="BF16", kind="weight", elements=1),),
            encode_block=(1, 1),
            oracle="the bytes themselves",
            global_divisor=None,
            encode_rows=_encode_bf16,
            decode_rows=_decode_bf16,
        ),
        Format(
            name="nvfp4",
            components=(
                Component(suffix="weight", dtype="U8", kind="weight", elements=2),
                Component(suffix="weight_scale", dtype="F8_E4M3", kind="block_scale", elements=16),
                Component(suffix="weight_scale_2", dtype="F32", kind="global_scale", elements=0, rows=0),
                Component(suffix="input_scale", dtype="F32", kind="input_scale", elements=0, rows=0),
            ),
            encode_block=(1, 16),
            oracle="nvidia-modelopt 0.47.0, NVFP4QTensor",
            global_divisor=E2M1_MAX * E4M3_MAX,
            encode_rows=_encode_nvfp4,
            decode_rows=_decode_nvfp4,
        ),
    )
}
