"""FP8 and the MX formats in torch: values to codes and scales, as nvidia-modelopt 0.47.0 rounds them, and back.

Rows are BF16 [n, K]. A block of zeros gets scale 1.0 and codes 0 where modelopt stores scale 0 and NaN codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX, E2M1_MAX = 448.0, 6.0
TILE = 128  # rows and elements of a block of fp8_block
MX_BLOCK = 32

# Half-way points of the E2M1 grid 0, 0.5, 1, 1.5, 2, 3, 4, 6
E2M1_EDGES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Numbers = dict[str, Tensor]


def e4m3(values: Tensor) -> Tensor:
    """To FP8, saturating: not every torch release saturates by itself."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def nonzero_scale(scale: Tensor) -> Tensor:
    """1.0 for a block of zeros, so that it is not divided by 0."""
    return torch.where(scale == 0, 1.0, scale)


def tile_amax(values: Tensor) -> Tensor:
    """Largest magnitude of every tile of 128 x 128, edges padded with zeros: [ceil(n / 128), ceil(K / 128)]."""
    num_rows, num_elements = values.shape
    padded = F.pad(values.abs(), (0, -num_elements % TILE, 0, -num_rows % TILE))
    return padded.view(-(-num_rows // TILE), TILE, -(-num_elements // TILE), TILE).amax((1, 3))


def over_tiles(scale: Tensor, shape: torch.Size) -> Tensor:
    """The scale of its tile for every element."""
    return scale.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)[: shape[0], : shape[1]]


# ---------------------------------------------------------------- FP8


def encode_fp8(rows: Tensor, scale: float) -> Numbers:
    """One scale a tensor. modelopt divides in BF16: the quotient is rounded twice."""
    divisor = torch.tensor(scale, dtype=torch.float32, device=rows.device)
    return {"weight": e4m3((rows.float() / divisor).to(torch.bfloat16).float())}


def encode_fp8_short_scale(rows: Tensor) -> Numbers:
    """modelopt before an export: the scale itself is BF16, and so is the division."""
    scale = rows.abs().amax() / E4M3_MAX
    return {"weight": e4m3((rows / scale).float()), "weight_scale": scale}


def decode_fp8(weight: Tensor, scale: float) -> Tensor:
    """modelopt multiplies BF16 codes by the scale rounded to BF16."""
    factor = torch.tensor(scale, dtype=torch.float32, device=weight.device).to(torch.bfloat16)
    return weight.to(torch.bfloat16) * factor


def encode_fp8_channel(rows: Tensor) -> Numbers:
    values = rows.float()
    scale = nonzero_scale(values.abs().amax(1) / E4M3_MAX)
    return {"weight": e4m3(values / scale.unsqueeze(1)), "weight_scale": scale}


def encode_fp8_block(rows: Tensor, largest: Tensor | None = None) -> Numbers:
    """largest: of every tile, where more than these rows share it."""
    values = rows.float()
    scale = nonzero_scale((tile_amax(values) if largest is None else largest) / E4M3_MAX)
    return {"weight": e4m3(values / over_tiles(scale, rows.shape)), "weight_scale": scale}


def encode_fp8_block_ue8m0(rows: Tensor) -> Numbers:
    """Scales rounded up to a power of two, stored as its exponent + 127."""
    byte = exponent_byte(tile_amax(rows.float()), E4M3_MAX)
    quotient = times_power(rows.float(), 127 - over_tiles(byte, rows.shape).int())
    return {"weight": e4m3(quotient), "weight_scale": byte}


def decode_rows_scaled(weight: Tensor, scale: Tensor) -> Tensor:
    """Codes times the FP32 scale of their row, [n] or [n, 1]."""
    return weight.float() * scale.view(-1, 1)


def decode_fp8_block(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.float() * over_tiles(scale, weight.shape)


def decode_fp8_block_ue8m0(weight: Tensor, byte: Tensor) -> Tensor:
    return times_power(weight.float(), over_tiles(byte, weight.shape).int() - 127)


# ---------------------------------------------------------------- MX


def exponent_byte(largest: Tensor, top: float) -> Tensor:
    """E8M0 byte: the least power of two that brings `largest` to `top` or below, 0 for a block of zeros."""
    # In FP64 the quotient is a power of two only where it really is one.
    mantissa, exponent = torch.frexp(largest.double() / top)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    return torch.where(largest == 0, 0, exponent + 127).to(torch.uint8)


def times_power(values: Tensor, exponent: Tensor) -> Tensor:
    """values * 2^exponent, rounded once: FP32 has no 2^-127 in full precision, nor 2^128 at all."""
    return (values.double() * torch.exp2(exponent.double())).float()


def by_block(values: Tensor, block: int = MX_BLOCK) -> Tensor:
    """[n, K] as [n, K / block, block]."""
    return values.view(len(values), -1, block)


def encode_mxfp8(rows: Tensor) -> Numbers:
    blocks = by_block(rows.float())
    byte = exponent_byte(blocks.abs().amax(2), E4M3_MAX)
    return {"weight": e4m3(times_power(blocks, 127 - byte.int().unsqueeze(2)).view(rows.shape)), "weight_scale": byte}


def decode_mxfp8(weight: Tensor, byte: Tensor) -> Tensor:
    return times_power(by_block(weight.float()), byte.int().unsqueeze(2) - 127).view(weight.shape)


def encode_mxfp4(rows: Tensor) -> Numbers:
    """modelopt's own rounding: ties go toward zero, and an exact zero is stored as -0."""
    blocks = by_block(rows.float())
    byte = exponent_byte(blocks.abs().amax(2), E2M1_MAX)
    quotient = times_power(blocks, 127 - byte.int().unsqueeze(2)).view(rows.shape)
    magnitude, code = quotient.abs(), torch.zeros_like(quotient, dtype=torch.uint8)
    for edge in E2M1_EDGES:  # seven comparisons take a tenth of the time of torch.bucketize
        code += magnitude > edge
    negative = (rows < 0) | (quotient == 0)
    return {"weight": pack_nibbles(code | negative.to(torch.uint8) * 8), "weight_scale": byte}


def decode_mxfp4(packed: Tensor, byte: Tensor) -> Tensor:
    values = e2m1_values(unpack_nibbles(packed))
    return times_power(by_block(values), byte.int().unsqueeze(2) - 127).view(values.shape)


# ---------------------------------------------------------------- nibbles


def e2m1_values(codes: Tensor) -> Tensor:
    table = torch.tensor(E2M1_VALUES, device=codes.device)
    return torch.cat((table, -table))[codes.int()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte, the first in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)


def encode_fp8_multiplier(weight: Tensor) -> Numbers:
    """flashinfer's per-expert form: what weights were multiplied by, 448 / amax, 1.0 for zeros. [experts, n, K]."""
    values = weight.float()
    largest = values.abs().amax((1, 2))
    multiplier = torch.where(largest > 0, E4M3_MAX / largest, 1.0)
    return {"weight": e4m3(values * multiplier[:, None, None]), "multiplier": multiplier}
