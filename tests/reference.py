"""Slow references: numbers by search in tables, layouts by loops and by numpy views. They import nothing of ours."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]

E2M1 = [Fraction(x) for x in ("0", "1/2", "1", "3/2", "2", "3", "4", "6")]


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def e4m3_value(code: int) -> Fraction:
    """Value of a non-negative E4M3 code: four bits of exponent, three of mantissa, bias 7."""
    exponent, mantissa = divmod(code, 8)
    return Fraction(mantissa, 2**9) if exponent == 0 else Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7)


E4M3 = [e4m3_value(code) for code in range(127)]


def nearest(table: list[Fraction], value: Fraction) -> int:
    """Index of the nearest entry; of two at the same distance the even index."""
    return min(range(len(table)), key=lambda code: (abs(table[code] - value), code % 2))


def nvfp4_scale_2(bits: NDArray[np.uint16]) -> np.float32:
    largest = np.abs(bf16_values(bits)).max(initial=np.float32(0))
    return np.float32(1) if largest == 0 else np.float32(largest / np.float32(2688))


def nvfp4_block(values: NDArray[np.float32], scale_2: np.float32) -> tuple[list[int], int]:
    """Codes and scale byte of one block; every operation rounds once, as a float32."""
    scale = np.float32(np.abs(values).max() / np.float32(np.float32(6) * scale_2))
    scale = np.float32(1) if scale == 0 else np.clip(scale, np.float32(2**-9), np.float32(448))
    byte = nearest(E4M3, Fraction(float(scale)))
    divisor = np.float32(np.float32(float(E4M3[byte])) * scale_2)
    codes = []
    for value in values:
        quotient = np.float32(value / divisor)
        sign = 8 if quotient < 0 else 0
        codes.append(sign + nearest(E2M1, Fraction(float(abs(quotient)))))
    return codes, byte


def nvfp4_encode(bits: NDArray[np.uint16], scale_2: np.float32) -> tuple[Bytes, Bytes]:
    """BF16 bits [n, K] to packed codes [n, K / 2] and scale bytes [n, K / 16]."""
    num_rows, num_elements = bits.shape
    packed, scales = (np.zeros((num_rows, num_elements // width), np.uint8) for width in (2, 16))
    for row in range(num_rows):
        for block in range(num_elements // 16):
            values = bf16_values(bits[row, 16 * block : 16 * block + 16])
            codes, scales[row, block] = nvfp4_block(values, scale_2)
            for pair in range(8):
                packed[row, 8 * block + pair] = codes[2 * pair] + 16 * codes[2 * pair + 1]
    return packed, scales


def pad(matrix: Bytes, rows: int, columns: int) -> Bytes:
    """Zero rows and columns at the end, up to multiples."""
    missing = [(0, -size % multiple) for size, multiple in zip(matrix.shape, (rows, columns), strict=True)]
    return np.pad(matrix, missing)


def swizzle_128x4(scales: Bytes) -> Bytes:
    padded = pad(scales, 128, 4)
    rows, columns = padded.shape
    return padded.reshape(rows // 128, 4, 32, columns // 4, 4).transpose(0, 3, 2, 1, 4).reshape(-1)


def shuffle_source(row: int, block: int = 32) -> int:
    """The row that lands in `row` of shuffle_matrix_a."""
    within = row % block
    return row - within + within % 8 * (block // 8) + within // 8


def shuffle(matrix: Bytes, block: int = 32) -> Bytes:
    return np.stack([matrix[shuffle_source(row, block)] for row in range(len(matrix))])


def interleave(first: Bytes, second: Bytes) -> Bytes:
    """Rows of both in turn."""
    return np.stack([row for pair in zip(first, second, strict=True) for row in pair])


def swap_nibbles(packed: Bytes) -> Bytes:
    """The two hexadecimal digits of every byte in the other order."""
    return np.array([int(f"{byte:02x}"[::-1], 16) for byte in range(256)], np.uint8)[packed]


def in_turns(first: Bytes, second: Bytes, chunk: int) -> Bytes:
    """Chunks of rows of both in turn."""
    starts = range(0, len(first), chunk)
    return np.concatenate([part[at : at + chunk] for at in starts for part in (first, second)])


def linear_storage(layout: str, weight: Bytes, scales: Bytes) -> tuple[Bytes, Bytes]:
    """Bytes of the two matrices of an NVFP4 linear, in tiles of 128 rows."""
    if layout.endswith("_swapped"):
        return linear_storage(layout.removesuffix("_swapped"), swap_nibbles(weight), scales)
    if layout == "plain":
        return pad(weight, 128, 1).reshape(-1), pad(scales, 128, 1).reshape(-1)
    if layout in ("cutlass_linear", "cutlass_dit"):
        return pad(weight, 128, 16).reshape(-1), swizzle_128x4(scales)
    if layout == "swiglu_dit":
        half = len(weight) // 2
        wide, fine = (in_turns(part[half:], part[:half], 64) for part in (weight, scales))
        return wide.reshape(-1), swizzle_128x4(fine)
    assert layout in ("trtllm_linear", "trtllm_dit")
    columns = -scales.shape[1] % 4
    wide = np.pad(pad(weight, 128, 1), ((0, 0), (0, 8 * columns)))
    return shuffle(wide).reshape(-1), swizzle_128x4(shuffle(pad(scales, 128, 4)))


def expert_storage(layout: str, gate: Bytes, up: Bytes, down: Bytes, scales: bool) -> tuple[Bytes, Bytes]:
    """Bytes of w13 and w2 of one expert: of the packed weights, or of the block scales."""
    if layout == "plain":
        return np.concatenate([gate, up]).reshape(-1), down.reshape(-1)
    if layout in ("cutlass_moe", "cutedsl_moe"):
        w13 = in_turns(up, gate, 64 if layout == "cutedsl_moe" else len(up))
        return (swizzle_128x4(w13), swizzle_128x4(down)) if scales else (w13.reshape(-1), down.reshape(-1))
    assert layout == "trtllm_moe"
    w13, w2 = shuffle(interleave(up, gate)), shuffle(pad(down, 128, 1))
    return (swizzle_128x4(w13), swizzle_128x4(w2)) if scales else (w13.reshape(-1), w2.reshape(-1))


def block_major(matrix: Bytes, block: int = 128) -> Bytes:
    """Blocks of columns, one after the other."""
    return np.concatenate([matrix[:, at : at + block].reshape(-1) for at in range(0, matrix.shape[1], block)])


def fp8_by_multiplier(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 of each matrix times 448 / amax, and that multiplier, as flashinfer's MoE preparation quantizes."""
    values = weight.float()
    multiplier = 448 / values.abs().amax(dim=(-1, -2))
    return (values * multiplier[:, None, None]).clamp(-448, 448).to(torch.float8_e4m3fn), multiplier


def fp8_in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 of a matrix over amax / 448 of each block of 128 x 128, and these scales; sizes are multiples of 128."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // 128, 128, columns // 128, 128)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
    return (blocks / scale).to(torch.float8_e4m3fn).view(rows, columns), scale.view(rows // 128, columns // 128)


def mxfp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 of a matrix over the next power of two of amax / 448 of each 32 elements, and its exponent plus 127."""
    blocks = weight.float().unflatten(-1, (-1, 32))
    exponent = (blocks.abs().amax(dim=-1) / 448).log2().ceil().clamp(-127, 127)
    codes = (blocks * torch.exp2(-exponent)[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.view(weight.shape), (exponent + 127).to(torch.uint8)
