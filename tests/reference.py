"""Slow references: numbers by search in tables, layouts by loops and by numpy views. They import nothing of ours."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

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


def linear_storage(layout: str, weight: Bytes, scales: Bytes) -> tuple[Bytes, Bytes]:
    """Bytes of the two matrices of a linear, in tiles of 128 rows."""
    if layout == "plain":
        return pad(weight, 128, 1).reshape(-1), pad(scales, 128, 1).reshape(-1)
    if layout == "cutlass_linear":
        return pad(weight, 128, 16).reshape(-1), swizzle_128x4(scales)
    assert layout == "trtllm_linear"
    columns = -scales.shape[1] % 4
    wide = np.pad(pad(weight, 128, 1), ((0, 0), (0, 8 * columns)))
    return shuffle(wide).reshape(-1), swizzle_128x4(shuffle(pad(scales, 128, 4)))


def expert_storage(layout: str, gate: Bytes, up: Bytes, down: Bytes, scales: bool) -> tuple[Bytes, Bytes]:
    """Bytes of w13 and w2 of one expert: of the packed weights, or of the block scales."""
    if layout == "plain":
        return np.concatenate([gate, up]).reshape(-1), down.reshape(-1)
    if layout == "cutlass_moe":
        w13 = np.concatenate([up, gate])
        return (swizzle_128x4(w13), swizzle_128x4(down)) if scales else (w13.reshape(-1), down.reshape(-1))
    assert layout == "trtllm_moe"
    w13, w2 = shuffle(interleave(up, gate)), shuffle(pad(down, 128, 1))
    return (swizzle_128x4(w13), swizzle_128x4(w2)) if scales else (w13.reshape(-1), w2.reshape(-1))
