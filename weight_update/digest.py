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
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch import Tensor

from quant.kernels import numba_loops
from quant.variants import bare

Digests = npt.NDArray[np.uint64]  # [n, 2]: one row a tensor
Lanes = tuple[int, int]
Ints = npt.NDArray[np.int64]

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
BLOCK_BYTES = 1 << 20  # rows are taken in blocks of about this size: what a core's cache holds, and bounded scratch


def name_key(name: str) -> int:
    """The key of the tensor with this name; a variant of one format has that of its bare name."""
    return xxhash.xxh3_64_intdigest(bare(name).encode())


def lane_keys(key: int, row_bytes: int) -> tuple[int, int]:
    """The lane keys of a tensor, from which those of its rows are made."""
    k0, k1 = (_mixed(((key ^ seed) + row_bytes * GOLDEN) & MASK) for seed in SEEDS)
    return k0, k1


def lanes_of(keys: npt.NDArray[np.uint64], row_bytes: Ints) -> Digests:
    """The lane keys of many tensors, [n, 2]."""
    ahead = row_bytes.astype(np.uint64) * np.uint64(GOLDEN)
    x = (keys[:, None] ^ np.array(SEEDS, np.uint64)) + ahead[:, None]
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(multiplier)
    mixed: Digests = x ^ (x >> np.uint64(31))
    return mixed


def _mixed(x: int) -> int:
    x = ((x ^ (x >> 30)) * MULTIPLIERS[0]) & MASK
    x = ((x ^ (x >> 27)) * MULTIPLIERS[1]) & MASK
    return x ^ (x >> 31)


def digest_rows(key: int, rows: Tensor, row0: int) -> tuple[int, int]:
    """Digest of rows [row0, row0 + n) of the tensor with this key. rows: uint8 [n, row_bytes]."""
    num_rows, row_bytes = rows.shape
    if num_rows == 0 or row_bytes == 0:
        return 0, 0
    if rows.device.type in ELSEWHERE:
        return ELSEWHERE[rows.device.type](key, rows, row0)
    digest = _digest_torch if rows.device.type != "cpu" or _loops() is None else _digest_numba
    step = max(1, BLOCK_BYTES // max(row_bytes, 64))
    lane0 = lane1 = 0
    for start in range(0, num_rows, step):
        part0, part1 = digest(_words(rows[start : start + step]), key, row_bytes, row0 + start)
        lane0, lane1 = lane0 + part0, lane1 + part1
    return lane0 & MASK, lane1 & MASK


def digest_many(memory: Tensor, at: Ints, num_rows: Ints, row_bytes: Ints, row0: Ints, keys: Digests) -> Digests:
    """Digests of many tensors, [n, 2]: rows [row0[i], row0[i] + num_rows[i]) of tensor i lie at byte at[i] of `memory`,
    uint8 [bytes], one after the other. keys: uint64 [n]."""
    loops, found = _loops(), np.zeros((len(at), 2), np.uint64)
    if loops is not None and memory.device.type == "cpu":
        loops.digest_many(memory.numpy(), at, num_rows, row_bytes, row0, keys, found)
        return found
    for i in range(len(at)):
        rows = memory[at[i] : at[i] + num_rows[i] * row_bytes[i]].view(int(num_rows[i]), int(row_bytes[i]))
        found[i] = digest_rows(int(keys[i]), rows, int(row0[i]))
    return found


def digest_words(key: int, row_bytes: int, at: npt.NDArray[np.int64], words: npt.NDArray[np.uint64]) -> Lanes:
    """What single words add to the digest of a tensor: word i of row r has the number at = r * words a row + i."""
    num_words = -(-row_bytes // 8)
    loops = _loops()
    if not len(at):
        return 0, 0
    if loops is not None:
        lanes = loops.digest_words(words, at, np.uint64(key), np.uint64(row_bytes), num_words)
        return int(lanes[0]), int(lanes[1])
    row, column = (torch.from_numpy(part) for part in np.divmod(at, num_words))
    sums = []
    for seed in SEEDS:
        lane = _mix(torch.tensor([signed((key ^ seed) + row_bytes * GOLDEN)]))
        row_keys = _mix(lane + (row + 1) * signed(GOLDEN))
        mixed = _mix(torch.from_numpy(words.view(np.int64)) ^ (row_keys + column * signed(GOLDEN)))
        sums.append(int(mixed.sum()) & MASK)
    return sums[0], sums[1]


def word_patcher(
    key: int,
    row_bytes: int,
    changes: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int64]],
    words: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.int64]],
) -> Callable[[], Lanes] | None:
    """What writes bytes and digests the words that they are in as they are read back, in one go; None without compiled
    loops.

    changes: memory, place of each byte in it, the bytes, which byte is the first one of each word. words: the same
    memory in words, place of each word in it, their numbers in the tensor.
    """
    loops = _loops()
    if loops is None:
        return None
    memory, at, new, begins = changes
    live, place, numbers = words
    keys = np.uint64(key), np.uint64(row_bytes)
    loops.patch_words(memory, at[:0], new[:0], begins[:0], live, place[:0], numbers[:0], *keys)  # compiled by now
    return partial(loops.patch_words, memory, at, new, begins, live, place, numbers, *keys)


def words_of(row_bytes: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The words, by number, in which bytes at these positions of a tensor lie; one for every position."""
    row, column = np.divmod(positions, row_bytes)
    words: npt.NDArray[np.int64] = row * -(-row_bytes // 8) + column // 8
    return words


def summed(digests: Digests) -> Lanes:
    """The sum over tensors, whose keys tell them apart. Lane by lane: along rows of two it takes ten times as long."""
    lane0, lane1 = (int(digests[:, lane].sum(dtype=np.uint64)) for lane in range(2))
    return lane0, lane1


def total(digests: Digests) -> str:
    """The digest of a whole version, 32 hex digits."""
    lane0, lane1 = summed(digests.reshape(-1, 2))
    return f"{lane0:016x}{lane1:016x}"


def unlike(found: Digests, wanted: Digests) -> npt.NDArray[np.bool_]:
    """Which tensors' digests are not the same, [n]; lane by lane, too."""
    are: npt.NDArray[np.bool_] = (found[:, 0] != wanted[:, 0]) | (found[:, 1] != wanted[:, 1])
    return are


def _words(rows: Tensor) -> Tensor:
    """[n, row_bytes] as int64 [n, words]; a view where rows are whole words at whole addresses."""
    num_rows, row_bytes = rows.shape
    if row_bytes % 8 == 0:
        rows = rows.contiguous()
        return (rows if rows.data_ptr() % 8 == 0 else rows.clone()).view(torch.int64)
    words = rows.new_zeros((num_rows, -(-row_bytes // 8) * 8))
    words[:, :row_bytes] = rows
    return words.view(torch.int64)


@functools.cache
def _loops() -> ModuleType | None:
    """The compiled loops, None where numba is not installed."""
    return None if numba_loops() is None else importlib.import_module(".loops", __package__)


def _digest_numba(words: Tensor, key: int, row_bytes: int, row0: int) -> tuple[int, int]:
    loops = _loops()
    assert loops is not None
    array = words.numpy().view(np.uint64)
    lane0, lane1 = loops.digest(array, np.uint64(key), np.uint64(row_bytes), np.uint64(row0))
    return int(lane0), int(lane1)


def _digest_cuda(key: int, rows: Tensor, row0: int) -> Lanes:
    found: Lanes = importlib.import_module(".cuda", __package__).digest_of(key, rows, row0)
    return found


# By type of device; where one is not named, the host's loops or the twin.
ELSEWHERE: Mapping[str, Callable[[int, Tensor, int], Lanes]] = {"cuda": _digest_cuda}


# ---------------------------------------------------------------- torch twin


def _digest_torch(words: Tensor, key: int, row_bytes: int, row0: int) -> tuple[int, int]:
    num_rows, num_words = words.shape
    steps = torch.arange(max(num_rows + 1, num_words), device=words.device) * signed(GOLDEN)
    sums = []
    for seed in SEEDS:
        lane = _mix(torch.tensor([signed((key ^ seed) + row_bytes * GOLDEN)], device=words.device))
        row_keys = _mix(lane + (steps[1 : num_rows + 1] + signed(row0 * GOLDEN)))
        sums.append(int(_mix(words ^ (row_keys[:, None] + steps[:num_words])).sum()) & MASK)
    return sums[0], sums[1]


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * signed(MULTIPLIERS[0])
    x = (x ^ _shift(x, 27)) * signed(MULTIPLIERS[1])
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift right: torch shifts the sign of int64 in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def signed(x: int) -> int:
    """The same 64 bits as torch's int64 takes them."""
    x &= MASK
    return x - (1 << 64) if x >> 63 else x
