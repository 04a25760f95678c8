"""An additive, position-keyed digest of checkpoint-form bytes: 2 x 64 bits a tensor.

Each rank digests its own rows and the results add up mod 2^64, whatever the sharding on either side: an order-sensitive
sum of keyed words, after AdHash (Bellare and Micciancio 1997). It detects faults, not forgery.

The function, exactly (all arithmetic on unsigned 64-bit integers, mod 2^64; ^ is xor, >> shifts zeros in):

    mix(x):  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9          the finalizer of splitmix64, a bijection
             x = (x ^ (x >> 27)) * 0x94D049BB133111EB
             return x ^ (x >> 31)
    GOLDEN = 0x9E3779B97F4A7C15
    SEEDS  = 0x243F6A8885A308D3, 0x13198A2E03707344             the first 128 fractional bits of pi

    tensor key        t = xxh3_64 (seed 0) of the tensor's name in UTF-8
    lane key          k[l]    = mix((t ^ SEEDS[l]) + row_bytes * GOLDEN)
    row key           s[l][r] = mix(k[l] + (r + 1) * GOLDEN)    r: index of the row in the whole tensor
    word              w[r][i] = bytes 8i .. 8i+7 of row r, little-endian; a row is zero-padded to whole words
    digest lane l     sum over r, i of mix(w[r][i] ^ (s[l][r] + i * GOLDEN))

Words never cross a row, since shard sums would differ otherwise. A tensor without rows has digest (0, 0). A change of
one word changes both lanes with certainty, since mix is a bijection; any other change is missed once in 2^128.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

Digests = npt.NDArray[np.uint64]  # [n, 2]: one row a tensor

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
BLOCK_BYTES = 1 << 20  # rows are taken in blocks of about this size: what a core's cache holds, and bounded scratch

Words = npt.NDArray[np.uint64]  # [rows, words]


def name_key(name: str) -> int:
    """The key of the tensor with this name."""
    return xxhash.xxh3_64_intdigest(name.encode())


def digest_rows(key: int, rows: Tensor, row0: int) -> tuple[int, int]:
    """Digest of rows [row0, row0 + n) of the tensor with this key. rows: uint8 [n, row_bytes]."""
    num_rows, row_bytes = rows.shape
    if num_rows == 0 or row_bytes == 0:
        return 0, 0
    lanes = [mix((key ^ seed) + row_bytes * GOLDEN) for seed in SEEDS]
    kernel = _compiled() if rows.device.type == "cpu" else None
    digest = _digest_torch if kernel is None else functools.partial(_digest_numpy, kernel)
    step = max(1, BLOCK_BYTES // max(row_bytes, 64))
    sums = [0, 0]
    for start in range(0, num_rows, step):
        words = _words(rows[start : start + step])
        for i, lane in enumerate(lanes):
            sums[i] += digest(words, lane, row0 + start)
    return sums[0] & MASK, sums[1] & MASK


def total(digests: Digests) -> str:
    """The digest of a whole version, 32 hex digits: the sum over its tensors, whose keys tell them apart."""
    lane0, lane1 = digests.reshape(-1, 2).sum(axis=0, dtype=np.uint64).tolist()
    return f"{lane0:016x}{lane1:016x}"


def mix(x: int) -> int:
    """splitmix64's finalizer."""
    x &= MASK
    x = (x ^ (x >> 30)) * MULTIPLIERS[0] & MASK
    x = (x ^ (x >> 27)) * MULTIPLIERS[1] & MASK
    return x ^ (x >> 31)


def _words(rows: Tensor) -> Tensor:
    """[n, row_bytes] as int64 [n, words]; a view where rows are whole words at whole addresses."""
    num_rows, row_bytes = rows.shape
    if row_bytes % 8 == 0:
        rows = rows.contiguous()
        return (rows if rows.data_ptr() % 8 == 0 else rows.clone()).view(torch.int64)
    words = rows.new_zeros((num_rows, -(-row_bytes // 8) * 8))
    words[:, :row_bytes] = rows
    return words.view(torch.int64)


# ---------------------------------------------------------------- numba


def _digest_words(words: Words, lane: np.uint64, row0: np.uint64) -> np.uint64:
    """One lane of a block; LLVM vectorizes the inner loop: 12 GB/s for both lanes on one Zen 4 core."""
    m0, m1, golden = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB), np.uint64(0x9E3779B97F4A7C15)
    s30, s27, s31, one = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(1)
    result = np.uint64(0)
    for r in range(words.shape[0]):
        x = lane + (row0 + np.uint64(r) + one) * golden
        x = (x ^ (x >> s30)) * m0
        x = (x ^ (x >> s27)) * m1
        row_key = x ^ (x >> s31)
        for i in range(words.shape[1]):
            x = words[r, i] ^ (row_key + np.uint64(i) * golden)
            x = (x ^ (x >> s30)) * m0
            x = (x ^ (x >> s27)) * m1
            result += x ^ (x >> s31)
    return result


Kernel = Callable[[Words, np.uint64, np.uint64], np.uint64]


@functools.cache
def _compiled() -> Kernel | None:
    """The compiled kernel; None where numba is not installed."""
    try:
        import numba
    except ImportError:
        return None
    try:
        return numba.njit(nogil=True, cache=True)(_digest_words)
    except RuntimeError:  # neither the source's folder nor the user's cache folder can be written
        return numba.njit(nogil=True)(_digest_words)


def _digest_numpy(kernel: Kernel, words: Tensor, lane: int, row0: int) -> int:
    return int(kernel(words.numpy().view(np.uint64), np.uint64(lane), np.uint64(row0)))


# ---------------------------------------------------------------- torch twin


def _signed(x: int) -> int:
    x &= MASK
    return x - (1 << 64) if x >> 63 else x


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch shifts the sign of int64 in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_torch(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * _signed(MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def _digest_torch(words: Tensor, lane: int, row0: int) -> int:
    num_rows, num_words = words.shape
    steps = torch.arange(max(num_rows + 1, num_words), device=words.device) * _signed(GOLDEN)
    row_keys = _mix_torch(steps[1 : num_rows + 1] + _signed(lane + row0 * GOLDEN))
    return int(_mix_torch(words ^ (row_keys[:, None] + steps[:num_words])).sum()) & MASK
