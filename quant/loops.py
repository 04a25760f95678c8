"""The loops of `quant.kernels`, compiled by numba on their first call; imported only where numba is.

Written so that LLVM turns each inner loop into vector code: flat slices, 32-bit lanes, selects instead of branches, and
unsigned indices, which numba does not wrap around. Divisions are true IEEE ones and nothing is contracted, so that the
bytes are those of torch. Two BF16 weights are one little-endian 32-bit word, as their two codes are one byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Function = TypeVar("Function", bound=Callable[..., Any])
U8: TypeAlias = NDArray[np.uint8]
U16: TypeAlias = NDArray[np.uint16]
U32: TypeAlias = NDArray[np.uint32]
U64: TypeAlias = NDArray[np.uint64]
I64: TypeAlias = NDArray[np.int64]
F32: TypeAlias = NDArray[np.float32]

BLOCKS = 256  # a tile of blocks of 16: its scratch of 24 KiB stays in the L1 cache
MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the integer in the low mantissa bits, rounded once, ties to even


def loop(function: Function) -> Function:
    """Compile, with the machine code kept on disk where the cache directory can be written."""
    try:
        compiled: Any = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # no place to cache
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(Function, compiled)


@loop
def amax(bits: U16) -> np.uint16:
    largest = np.uint16(0)
    for i in range(bits.size):
        largest = max(largest, np.uint16(bits[i] & np.uint16(0x7FFF)))
    return largest


@loop
def _fold(words: U32, out: U16) -> None:
    """The larger magnitude of each pair."""
    for i in range(out.size):
        low = np.uint32(words[i] & np.uint32(0x7FFF))
        high = np.uint32((words[i] >> np.uint32(16)) & np.uint32(0x7FFF))
        out[i] = max(low, high)


@loop
def _spread(factors: F32, out: U64) -> None:
    """Each factor eight times: once for every pair of its block."""
    for i in range(factors.size):
        pair = np.uint64(np.float32(factors[i]).view(np.uint32))
        pair |= pair << np.uint64(32)
        out[i, 0] = pair
        out[i, 1] = pair
        out[i, 2] = pair
        out[i, 3] = pair


@loop
def _block_scales(largest: U16, scale: np.float32, codes: U8, factors: F32) -> None:
    """E4M3 of amax / (6 scale), ties to even, and what the weights of the block are divided by."""
    divisor = np.float32(np.float32(6.0) * scale)
    for i in range(codes.size):
        ratio = np.uint32(np.uint32(largest[i]) << np.uint32(16)).view(np.float32) / divisor
        ratio = np.float32(1.0) if ratio == np.float32(0.0) else ratio
        ratio = min(max(ratio, np.float32(2.0**-9)), np.float32(448.0))
        # Below 2^-6 E4M3 has no exponent: multiples of 2^-9, the last mantissa bit of 2^14.
        shifted = np.float32(ratio + np.float32(16384.0))
        bits = np.float32(ratio).view(np.uint32)
        rounded = np.uint32(bits + np.uint32(0x7FFFF) + np.uint32((bits >> np.uint32(20)) & np.uint32(1)))
        if ratio < np.float32(2.0**-6):
            codes[i] = np.uint32(np.float32(shifted).view(np.uint32) & np.uint32(15))
            value = np.float32(shifted - np.float32(16384.0))
        else:
            codes[i] = np.uint32((rounded >> np.uint32(20)) - np.uint32(960))  # (127 - 7) << 3
            value = np.uint32(rounded & np.uint32(0xFFF00000)).view(np.float32)
        factors[i] = np.float32(value * scale)


@loop
def _e2m1(quotient: np.float32) -> np.uint32:
    """Code 0..7: the least of the four lines of the E2M1 grid, each rounded once; a NaN stays at 7."""
    least = np.float32(MAGIC + 7)
    line = np.float32(quotient * np.float32(0.5) + np.float32(MAGIC + 4))
    least = line if line < least else least
    line = np.float32(quotient + np.float32(MAGIC + 2))
    least = line if line < least else least
    line = np.float32(quotient * np.float32(2.0) + np.float32(MAGIC))
    least = line if line < least else least
    return np.uint32(np.float32(least).view(np.uint32) & np.uint32(7))


@loop
def _codes(words: U32, factors: F32, out: U8) -> None:
    """Two codes a byte, the first in the low nibble. A quotient of zero has no sign."""
    zero, none = np.float32(0.0), np.uint32(0)
    for i in range(out.size):
        word, factor = words[i], factors[i]
        first = np.uint32((word & np.uint32(0x7FFF)) << np.uint32(16)).view(np.float32) / factor
        second = np.uint32(word & np.uint32(0x7FFF0000)).view(np.float32) / factor
        sign = np.uint32((word >> np.uint32(12)) & np.uint32(8)) if first > zero else none
        sign_2 = np.uint32((word >> np.uint32(24)) & np.uint32(128)) if second > zero else none
        out[i] = np.uint8(_e2m1(first) | sign | (_e2m1(second) << np.uint32(4)) | sign_2)


@loop
def encode_nvfp4(words: U32, scale: np.float32, weight: U8, block_scale: U8) -> None:
    by_2, by_4, by_8 = np.empty(BLOCKS * 8, np.uint16), np.empty(BLOCKS * 4, np.uint16), np.empty(BLOCKS * 2, np.uint16)
    largest, factors = np.empty(BLOCKS, np.uint16), np.empty(BLOCKS, np.float32)
    wide = np.empty((BLOCKS, 4), np.uint64)
    for start in range(0, block_scale.size, BLOCKS):
        count = min(BLOCKS, block_scale.size - start)
        tile = words[start * 8 : (start + count) * 8]
        _fold(tile, by_2[: count * 8])
        _fold(by_2.view(np.uint32), by_4[: count * 4])
        _fold(by_4.view(np.uint32), by_8[: count * 2])
        _fold(by_8.view(np.uint32), largest[:count])
        _block_scales(largest, scale, block_scale[start : start + count], factors)
        _spread(factors[:count], wide)
        _codes(tile, wide.reshape(-1).view(np.float32), weight[start * 8 : (start + count) * 8])


@loop
def _value(code: np.uint32, factor: np.float32) -> np.uint32:
    """BF16 bits of one code times a factor: product rounded to FP32, then to BF16, ties to even."""
    twice = np.int32((np.uint32(0xC8643210) >> np.uint32((code & np.uint32(7)) << np.uint32(2))) & np.uint32(15))
    product = np.float32(np.float32(np.float32(twice) * np.float32(0.5)) * factor)
    bits = np.float32(product).view(np.uint32)
    rounded = np.uint32((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    rounded = rounded if product == product else np.uint32(0x7FC0)
    sign = np.uint32((code & np.uint32(8)) << np.uint32(12)) if twice > np.int32(0) else np.uint32(0)
    return np.uint32(rounded ^ sign)


@loop
def _values(weight: U8, factors: F32, out: U32) -> None:
    for i in range(out.size):
        byte, factor = np.uint32(weight[i]), factors[i]
        first, second = _value(byte & np.uint32(15), factor), _value(byte >> np.uint32(4), factor)
        out[i] = np.uint32(first | (second << np.uint32(16)))


@loop
def decode_nvfp4(weight: U8, block_scale: U8, scale: np.float32, e4m3: F32, out: U32) -> None:
    """e4m3: the values of the 256 scale bytes."""
    factors = np.empty(BLOCKS, np.float32)
    wide = np.empty((BLOCKS, 4), np.uint64)
    for start in range(0, block_scale.size, BLOCKS):
        count = min(BLOCKS, block_scale.size - start)
        for i in range(count):
            factors[i] = np.float32(e4m3[block_scale[start + i]] * scale)
        _spread(factors[:count], wide)
        span = slice(start * 8, (start + count) * 8)
        _values(weight[span], wide.reshape(-1).view(np.float32), out[span])


@loop
def scatter(src: U8, rows: I64, shift: int, runs: I64, run_items: int, bits: int, local: U8) -> None:
    """Runs of every row to where they lie. Offsets are in bytes, items of `src` and `local` hold 2^bits of them."""
    for i in range(rows.size):
        base = rows[i] + shift
        if run_items == 1:
            for j in range(runs.size):
                local[np.uint64((base + runs[j]) >> bits)] = src[i, j]
        else:
            for j in range(runs.size):
                at, first = np.uint64((base + runs[j]) >> bits), np.uint64(j * run_items)
                for k in range(np.uint64(run_items)):
                    local[at + k] = src[i, first + k]


@loop
def gather(local: U8, rows: I64, shift: int, runs: I64, run_items: int, bits: int, out: U8) -> None:
    """The reverse of scatter."""
    for i in range(rows.size):
        base = rows[i] + shift
        if run_items == 1:
            for j in range(runs.size):
                out[i, j] = local[np.uint64((base + runs[j]) >> bits)]
        else:
            for j in range(runs.size):
                at, first = np.uint64((base + runs[j]) >> bits), np.uint64(j * run_items)
                for k in range(np.uint64(run_items)):
                    out[i, first + k] = local[at + k]


@loop
def locate(rows: I64, runs: I64, run_bytes: int, row_bytes: int, shift: int, positions: I64, at: I64) -> None:
    """Where bytes at increasing `positions` of a tensor lie: one division a row or run that is new, none else."""
    row, start, run, within = -1, 0, 0, 0
    for i in range(positions.size):
        if row < 0 or positions[i] - start >= row_bytes or positions[i] < start:
            row = positions[i] // row_bytes
            start = row * row_bytes
        column = positions[i] - start
        run = column // run_bytes
        within = column - run * run_bytes
        at[i] = rows[row] + runs[run] + within + shift


@loop
def take(words: U64, at: I64, out: U64) -> None:
    for i in range(at.size):
        out[i] = words[np.uint64(at[i])]


@loop
def gather_words(
    local: U8, rows: I64, runs: I64, run_bytes: int, row_bytes: int, shift: int, words: I64, swap: bool, out: U64
) -> None:
    """Little-endian words of 8 bytes of rows; word i of row r has number r * words a row + i, a row ends in zeros."""
    per_row = (row_bytes + 7) // 8
    whole = run_bytes % 8 == 0  # then no word leaves its run
    row, start, stop = np.int64(0), np.int64(0), np.int64(0)
    for i in range(words.size):
        if words[i] >= stop or words[i] < start:
            row = words[i] // per_row
            start, stop = row * per_row, (row + 1) * per_row
        first = (words[i] - start) * 8
        value = np.uint64(0)
        if whole:
            run = first // run_bytes
            at = np.uint64(rows[row] + runs[run] + (first - run * run_bytes) + shift)
            for j in range(8):
                value |= np.uint64(local[at + np.uint64(j)]) << np.uint64(8 * j)
        else:
            base = rows[row] + shift
            for j in range(min(8, row_bytes - first)):
                run = (first + j) // run_bytes
                at = np.uint64(base + runs[run] + (first + j - run * run_bytes))
                value |= np.uint64(local[at]) << np.uint64(8 * j)
        if swap:
            high = value & np.uint64(0xF0F0F0F0F0F0F0F0)
            value = (high >> np.uint64(4)) | ((value ^ high) << np.uint64(4))
        out[i] = value
