"""Slow references of formats: one number at a time, in exact fractions or single FP32 roundings. Import nothing of ours
but the tables of tests.reference."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from tests.reference import E2M1, E4M3, Bytes, bf16_values, nearest

Values = NDArray[np.float32]


def e4m3(value: Fraction) -> int:
    """Byte of a number, saturated; the sign bit of a negative one even where it rounds to zero."""
    return nearest(E4M3, min(abs(value), Fraction(448))) + (128 if value < 0 else 0)


def to_bf16(value: np.float32) -> np.float32:
    """Ties to even, by adding half of what is cut off."""
    bits = int(np.float32(value).view(np.uint32))
    return np.float32(np.uint32((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32))


def exponent_up(value: Fraction) -> int:
    """The least e with 2^e >= value > 0, by search."""
    exponent = -300
    while Fraction(2) ** exponent < value:
        exponent += 1
    return exponent


def fp8(bits: NDArray[np.uint16]) -> tuple[Bytes, np.float32]:
    values = bf16_values(bits)
    scale = np.float32(np.abs(values).max() / np.float32(448))
    codes = [[signed(e4m3(Fraction(float(to_bf16(np.float32(v / scale))))), v) for v in row] for row in values]
    return np.array(codes, np.uint8), scale


def signed(byte: int, value: np.float32) -> int:
    """-0.0 keeps its sign, which a fraction has none of."""
    return byte | (128 if np.signbit(value) else 0)


def fp8_block(bits: NDArray[np.uint16], tile: tuple[int, int]) -> tuple[Bytes, Values]:
    """Per channel where the tile is one row and all elements."""
    values = bf16_values(bits)
    rows, columns = values.shape
    codes = np.zeros((rows, columns), np.uint8)
    scales = np.zeros((-(-rows // tile[0]), -(-columns // tile[1])), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            window = np.s_[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
            scale = np.float32(np.abs(values[window]).max() / np.float32(448))
            scales[i, j] = scale = scale if scale else np.float32(1)
            exact = [[signed(e4m3(Fraction(float(np.float32(v / scale)))), v) for v in row] for row in values[window]]
            codes[window] = exact
    return codes, scales


def mx(bits: NDArray[np.uint16], top: int) -> tuple[list[list[Fraction]], Bytes]:
    """Exact quotients of every value by the scale of its block of 32, and the scale bytes."""
    values = bf16_values(bits)
    scales = np.zeros((len(values), values.shape[1] // 32), np.uint8)
    quotients = []
    for r, row in enumerate(values):
        quotients.append([])
        for b in range(scales.shape[1]):
            block = [Fraction(float(v)) for v in row[32 * b : 32 * b + 32]]
            largest = max(map(abs, block))
            exponent = max(-127, min(127, exponent_up(largest / top))) if largest else -127
            scales[r, b] = exponent + 127
            quotients[-1] += [v / Fraction(2) ** exponent for v in block]
    return quotients, scales


def e2m1_toward_zero(value: Fraction) -> int:
    """Ties go to the smaller code; zero, and what FP32 takes for it, is stored as -0."""
    distances = [abs(entry - abs(value)) for entry in E2M1]
    return distances.index(min(distances)) + (8 if value <= Fraction(1, 2**150) else 0)


def int8_row(values: Values, top: int, least: float) -> tuple[list[int], np.float32]:
    scale = np.float32(max(np.abs(values).max() / np.float32(top), np.float32(least)))
    if scale == 0:
        return [0] * len(values), scale
    return [round_even(np.float32(v / scale), top) for v in values], scale


def round_even(value: np.float32, top: int) -> int:
    return max(-top - 1, min(top, round(Fraction(float(value)))))  # Fraction rounds ties to even
