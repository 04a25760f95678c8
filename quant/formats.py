"""Formats: how the numbers of a parameter are encoded, and which checkpoint tensors hold them.

A format is a row of `FORMATS`. Where the bytes lie for a kernel is a layout (`quant.layouts`). Another library's names
and dtypes for the same bytes are a dialect (`quant.dialects`).

    fmt = FORMATS["nvfp4"]
    scale = global_scale(fmt, amax(weight))
    parts = encode(fmt, weight, scale)               # {"weight": uint8 [N, K/2], "weight_scale": uint8 [N, K/16]}
    decode(fmt, {**parts, "weight_scale_2": scale})  # BF16 [N, K]

A new row: its numbers in quant/numerics_*.py, its components in quant/encodings.py, its prefix in launch/cases.py; then
`transfuse conformance tests/golden` and tests/test_formats.py must pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from . import cuda_rows, kernels
from .encodings import FORMATS, as_rows
from .specs import DTYPES, Component, EncodeRows, Format, Kind, Parts, TensorSpec, dtype_name

__all__ = [
    "DTYPES",
    "FORMATS",
    "Component",
    "Format",
    "Kind",
    "Parts",
    "TensorSpec",
    "amax",
    "constants",
    "decode",
    "decode_unscaled",
    "dtype_name",
    "encode",
    "first_nonfinite",
    "global_scale",
    "typed",
]

NON_FINITE = 0x7F80  # BF16 bits of infinity; NaNs lie above

# By type of device; where one is not named, torch and the loops of the host serve.
AMAX: Mapping[str, Callable[[Tensor], int]] = {"cuda": cuda_rows.amax_bits}
ENCODERS: Mapping[str, Mapping[str, EncodeRows]] = {"cuda": cuda_rows.ENCODERS}


def amax(rows: Tensor) -> int:
    """BF16 bits (0..0x7FFF) of the largest absolute value; 0x7F80 and above mean that one is not finite."""
    _require_bf16(rows)
    return AMAX.get(rows.device.type, kernels.amax_bits)(rows.contiguous())


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


def constants(fmt: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The components that follow from the shape alone."""
    return {part.suffix: torch.tensor(shape) for part in fmt.components if part.kind == "shape"}


def encode(
    fmt: Format, rows: Tensor, scale: Tensor | None = None, out: Parts | None = None, given: Parts | None = None
) -> dict[str, Tensor]:
    """Encode rows [n, ...] of fmt.rows_dtype: uint8 [n, row bytes] for every component that goes by rows, into `out`
    if given.

    `scale` is the global scale, required exactly where the format has one; `given` holds what else it needs. Rows
    start at a multiple of fmt.row_step. Finite values are the caller's to check, by `amax`.
    """
    _require(rows, fmt.rows_dtype)
    if not rows.is_contiguous() or not fmt.holds(tuple(rows.shape)):
        by_rows = f" and rows a multiple of {fmt.multiples[0]}" if fmt.multiples[0] > 1 else ""
        raise ValueError(
            f"rows of shape {tuple(rows.shape)}, strides {rows.stride()}: {fmt.name} expects contiguous rows whose "
            f"last dim is a multiple of {fmt.multiples[1]}{by_rows}"
        )
    missing = [name for name in fmt.needs if name not in (given or {})]
    if missing:
        raise ValueError(f"{fmt.name}: needs {', '.join(missing)}, which no weight has; calibrate, or push it encoded")
    if out is None:
        out = {
            part.suffix: torch.empty(_byte_shape(part, tuple(rows.shape)), dtype=torch.uint8, device=rows.device)
            for part in fmt.row_components
        }
    _encoder(fmt, rows.device)(rows, _scale_value(fmt, scale), given or {}, out)
    return dict(out)


def _encoder(fmt: Format, device: torch.device) -> EncodeRows:
    """What encodes rows on a device: the format's own, or what the device has for it."""
    if device.type not in ENCODERS or not fmt.is_quantized:
        return fmt.encode_rows
    return ENCODERS[device.type].get(fmt.name, partial(_encode_on_host, fmt.encode_rows))


def _encode_on_host(encode_rows: EncodeRows, rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    """Where a device has no kernel. Not the same torch there: it divides by a number as it multiplies by 1 / number."""
    parts = {name: torch.empty_like(part, device="cpu") for name, part in out.items()}
    encode_rows(rows.cpu(), scale, {name: value.cpu() for name, value in given.items()}, parts)
    for name, part in parts.items():
        out[name].copy_(part)


def typed(fmt: Format, parts: Parts, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """What `encode` returns for a weight of `shape`, in the dtypes and shapes of a checkpoint."""
    found = {part.suffix: part for part in fmt.row_components}
    return {
        suffix: tensor.reshape(-1).view(DTYPES[found[suffix].dtype]).view(found[suffix].shape(shape))
        for suffix, tensor in parts.items()
    }


def decode(fmt: Format, tensors: Parts, out: Tensor | None = None) -> Tensor:
    """BF16 [n, K] (FP32 of a format that keeps it) from the tensors of a parameter, by component suffix."""
    component = fmt.component("global_scale")
    scale = tensors[component.suffix] if component else None
    return _decode(fmt, tensors, _scale_value(fmt, scale), out)


def decode_unscaled(fmt: Format, tensors: Parts, out: Tensor | None = None) -> Tensor:
    """BF16 [n, K] without the global scale. With one, this is code times block scale, which BF16 holds exactly."""
    return _decode(fmt, tensors, 1.0, out)


def _decode(fmt: Format, tensors: Parts, scale: float, out: Tensor | None) -> Tensor:
    weight = fmt.components[0]
    packed = tensors[weight.suffix]
    if out is None:
        per_byte = weight.elements / DTYPES[weight.dtype].itemsize
        num_elements = int(math.prod(packed.shape[1:]) * packed.element_size() * per_byte)
        shape = (len(packed) * weight.rows, num_elements)
        out = torch.empty(shape, dtype=fmt.rows_dtype, device=packed.device)
    parts = {part.suffix: as_rows(tensors[part.suffix]) for part in fmt.row_components}
    needed = {name: tensors[name] for name in fmt.needs if name in tensors}
    fmt.decode_rows({**parts, **needed}, scale, out)
    return out


def _byte_shape(component: Component, shape: tuple[int, ...]) -> tuple[int, int]:
    num_rows, *per_row = component.shape(shape)
    return num_rows, math.prod(per_row) * DTYPES[component.dtype].itemsize


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
    _require(rows, torch.bfloat16)


def _require(rows: Tensor, dtype: torch.dtype) -> None:
    if rows.dtype != dtype:
        raise ValueError(f"rows of dtype {rows.dtype}: expected {dtype}; cast first, ties to even")
