"""What compressed-tensors 0.20.0 computes where it rounds otherwise than modelopt, from BF16 or FP32 weights.

Fed BF16, as llm-compressor does, it computes amax / range in BF16: the dtype of `weight` decides. A zero zero-point is
added to FP8 codes, so that -0.0 becomes +0.0, and a scale of 0 becomes the dtype's epsilon. Names are its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics_float import (
    E2M1_EDGES,
    E4M3_MAX,
    Numbers,
    by_block,
    e2m1_values,
    e4m3,
    over_tiles,
    pack_nibbles,
    tile_amax,
    times_power,
    unpack_nibbles,
)

NVFP4_BLOCK = 16
LEAST_SCALE = 0.125  # E4M3 byte 0x20, where a block scale of NVFP4 rounds to zero


def nvfp4(weight: Tensor) -> Numbers:
    """nvfp4-pack-quantized. weight_global_scale divides: 2688 / amax, 1.0 where that is not finite."""
    top = 2688 / weight.abs().amax().clamp(min=torch.finfo(weight.dtype).tiny)
    # One dim, so that times a BF16 tensor it stays FP32.
    divisor = torch.where(top.isfinite(), top.float(), 1.0).view(1)
    block = by_block(weight.abs(), NVFP4_BLOCK).amax(2)
    scale = e4m3((divisor * (block / 6)).float())
    scale = torch.where(scale.float() == 0, LEAST_SCALE, scale.float()).to(torch.float8_e4m3fn)
    factor = (scale.float() / divisor).unsqueeze(2)
    quotient = (by_block(weight.float(), NVFP4_BLOCK) / factor).view(weight.shape)
    return {"weight_packed": pack_e2m1(quotient), "weight_scale": scale, "weight_global_scale": divisor}


def nvfp4_values(packed: Tensor, scale: Tensor, divisor: Tensor) -> Tensor:
    """What nvfp4 dequantizes to: code * scale / divisor."""
    values = e2m1_values(unpack_nibbles(packed))
    factor = (scale.float() / divisor).unsqueeze(2)
    return (by_block(values, NVFP4_BLOCK) * factor).view(values.shape).to(torch.bfloat16)


def fp8_tensor(weight: Tensor) -> Numbers:
    return _fp8(weight, _scale(weight.abs().amax().view(1), E4M3_MAX))


def fp8_channel(weight: Tensor) -> Numbers:
    return _fp8(weight, _scale(weight.abs().amax(1, keepdim=True), E4M3_MAX))


def fp8_block(weight: Tensor) -> Numbers:
    scale = _scale(tile_amax(weight), E4M3_MAX)
    return {**_fp8(weight, over_tiles(scale, weight.shape)), "weight_scale": scale}


def int8_channel(weight: Tensor) -> Numbers:
    """The range is half of the 255 steps."""
    scale = _scale(weight.abs().amax(1, keepdim=True), 127.5)
    return {"weight": (weight / scale).clamp(-128, 127).round().to(torch.int8), "weight_scale": scale}


def mxfp8(weight: Tensor) -> Numbers:
    quotient, byte = _mx(weight, 8)
    return {"weight": e4m3(quotient), "weight_scale": byte}


def mxfp4(weight: Tensor) -> Numbers:
    quotient, byte = _mx(weight, 2)
    return {"weight_packed": pack_e2m1(quotient), "weight_scale": byte}


def _fp8(weight: Tensor, scale: Tensor) -> Numbers:
    return {"weight": e4m3(weight / scale + 0.0), "weight_scale": scale}


def _scale(largest: Tensor, top: float) -> Tensor:
    scale = largest / top
    return torch.where(scale == 0, torch.finfo(largest.dtype).eps, scale)


def _mx(weight: Tensor, top_exponent: int) -> tuple[Tensor, Tensor]:
    """Quotients and scale bytes: the exponent of amax, the next one from mantissa 1.75 on, less that of the top code.

    Where that rounds beyond FP32 the library divides by infinity and stores 1.0: the block is lost.
    """
    blocks = by_block(weight.float())
    exponent = (blocks.abs().amax(2).view(torch.int32) + (1 << 21)) >> 23
    lost = exponent == 255
    byte = torch.where(lost, 127, (exponent - top_exponent).clamp(min=0)).to(torch.uint8)
    quotient = times_power(blocks, 127 - byte.int().unsqueeze(2)) * torch.where(lost, 0.0, 1.0).unsqueeze(2)
    return quotient.view(weight.shape), byte


def pack_e2m1(quotient: Tensor) -> Tensor:
    """Packed codes, ties to the even code, saturated; the sign is that of x < 0."""
    edges = torch.tensor(E2M1_EDGES, device=quotient.device)
    magnitude = quotient.abs()
    below, above = torch.bucketize(magnitude, edges), torch.bucketize(magnitude, edges, right=True)
    code = torch.where(below % 2 == 0, below, above).to(torch.uint8)
    return pack_nibbles(code | (quotient < 0).to(torch.uint8) * 8)
