"""The digest: equal to its specification, additive, and changed by everything that can go wrong."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weight_update.digest import digest_many, digest_rows, name_key, total

M = 2**64 - 1
KEY = name_key("model.layers.0.mlp.down_proj.weight")

shapes = st.tuples(st.integers(1, 9), st.integers(1, 70))
seeds = st.integers(0, 2**31)


def random_rows(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def specified(name: str, rows: Tensor, row0: int) -> tuple[int, int]:
    """The module's docstring, line by line."""

    def mix(x: int) -> int:
        x &= M
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    t = xxhash.xxh3_64(name.encode("utf-8")).intdigest()
    digest = []
    for seed in (0x243F6A8885A308D3, 0x13198A2E03707344):
        k = mix((t ^ seed) + rows.shape[1] * golden)
        lane = 0
        for r in range(rows.shape[0]):
            row = bytes(rows[r].tolist())
            row += b"\0" * (-len(row) % 8)
            s = mix(k + (row0 + r + 1) * golden)
            for i in range(len(row) // 8):
                lane += mix(int.from_bytes(row[8 * i : 8 * i + 8], "little") ^ ((s + i * golden) & M))
        digest.append(lane & M)
    return digest[0], digest[1]


@settings(deadline=None, max_examples=60)
@given(shapes, seeds, st.integers(0, 2**40))
def test_the_kernel_follows_the_written_specification(shape: tuple[int, int], seed: int, row0: int) -> None:
    rows = random_rows(shape, seed)
    assert digest_rows(name_key("a.b"), rows, row0) == specified("a.b", rows, row0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(shapes, st.integers(0, 9), st.integers(0, 2**40)), min_size=1, max_size=5), seeds)
def test_many_tensors_of_one_memory_follow_it_wherever_they_lie(
    tensors: list[tuple[tuple[int, int], int, int]], seed: int
) -> None:
    memory, at, end = random_rows((1, 5000), seed)[0], [], 0
    for (num_rows, row_bytes), gap, _ in tensors:
        at.append(end + gap)
        end = at[-1] + num_rows * row_bytes
    columns = [np.array(each, np.int64) for each in (at, *zip(*(shape for shape, _, _ in tensors), strict=True))]
    keys = np.array([name_key(f"t{i}") for i in range(len(tensors))], np.uint64)
    row0 = np.array([first for _, _, first in tensors], np.int64)
    found = digest_many(memory, *columns, row0, keys)
    for i, ((num_rows, row_bytes), _, first) in enumerate(tensors):
        rows = memory[at[i] : at[i] + num_rows * row_bytes].view(num_rows, row_bytes)
        assert tuple(found[i].tolist()) == specified(f"t{i}", rows, first)


def test_large_tensors_follow_it_across_blocks() -> None:
    for shape in ((70_000, 16), (3, 1_500_000), (20_000, 3)):
        rows = torch.zeros(shape, dtype=torch.uint8)
        rows[::977, ::131] = 7
        half = shape[0] // 2
        parts = [digest_rows(KEY, rows[:half], 5), digest_rows(KEY, rows[half:], 5 + half)]
        assert digest_rows(KEY, rows, 5) == tuple(sum(lane) & M for lane in zip(*parts, strict=True))
    rows = random_rows((16_500, 65), 3)  # more rows than a block takes, rows that are no whole words
    name = "model.layers.0.mlp.down_proj.weight"
    assert digest_rows(KEY, rows[16_380:16_390], 16_380) == specified(name, rows[16_380:16_390], 16_380)
    pieces = [digest_rows(KEY, rows[a : a + 1], a) for a in range(16_500)]
    assert digest_rows(KEY, rows, 0) == tuple(sum(lane) & M for lane in zip(*pieces, strict=True))


def test_a_fixed_value_for_other_implementations() -> None:
    rows = torch.arange(60, dtype=torch.uint8).view(5, 12)
    assert digest_rows(name_key("x.weight"), rows, 3) == (0x6391606E24993383, 0x493EB0775B5AAA4C)
    assert specified("x.weight", rows, 3) == (0x6391606E24993383, 0x493EB0775B5AAA4C)


def test_without_numba_the_values_are_the_same() -> None:
    program = """
import sys
sys.modules["numba"] = None
import numpy as np, torch
torch.set_num_threads(1)
from weight_update.digest import digest_rows
for seed, shape in enumerate([(1, 1), (3, 8), (7, 36), (5, 100), (40000, 33), (0, 8)]):
    rows = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    print(*digest_rows(12345, rows, 2**33 + seed))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    without = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    for seed, shape in enumerate([(1, 1), (3, 8), (7, 36), (5, 100), (40000, 33), (0, 8)]):
        assert without[seed] == digest_rows(12345, random_rows(shape, seed), 2**33 + seed)


@settings(deadline=None, max_examples=60)
@given(shapes, seeds, st.data())
def test_any_one_bit_changes_both_lanes(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    rows = random_rows(shape, seed)
    row, byte = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[1] - 1))
    before = digest_rows(KEY, rows, 0)
    rows[row, byte] ^= 1 << data.draw(st.integers(0, 7))
    after = digest_rows(KEY, rows, 0)
    assert before[0] != after[0] and before[1] != after[1]


@settings(deadline=None, max_examples=60)
@given(shapes, seeds, st.data())
def test_any_split_of_the_rows_adds_up(shape: tuple[int, int], seed: int, data: st.DataObject) -> None:
    rows = random_rows(shape, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=4)))
    edges = [0, *cuts, shape[0]]
    parts = [digest_rows(KEY, rows[a:b], a) for a, b in pairwise(edges)]
    assert digest_rows(KEY, rows, 0) == (sum(p[0] for p in parts) & M, sum(p[1] for p in parts) & M)


def swapped_words(rows: Tensor) -> Tensor:
    return rows.view(torch.int64)[:, [1, 0, *range(2, rows.shape[1] // 8)]].contiguous().view(torch.uint8)


def swapped_rows(rows: Tensor) -> Tensor:
    return rows[[1, 0, *range(2, len(rows))]].contiguous()


def swapped_tiles(rows: Tensor) -> Tensor:
    return torch.cat([rows[128:256], rows[:128], rows[256:]])


def shuffled_in_32(rows: Tensor) -> Tensor:
    order = torch.arange(len(rows)).view(-1, 4, 8).transpose(1, 2).reshape(-1)
    return rows[order].contiguous()


def nibbles_swapped(rows: Tensor) -> Tensor:
    return (rows >> 4) | (rows << 4)


def first_row_dropped(rows: Tensor) -> Tensor:
    return rows[1:].contiguous()


def last_row_dropped(rows: Tensor) -> Tensor:
    return rows[:-1].contiguous()


def last_word_dropped(rows: Tensor) -> Tensor:
    return rows[:, :-8].contiguous()


def zero_byte_dropped(rows: Tensor) -> Tensor:
    rows[:, -1] = 0
    return rows[:, :-1].contiguous()


def zero_row_added(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.zeros_like(rows[:1])])


@pytest.mark.parametrize(
    "damage",
    [
        swapped_words,
        swapped_rows,
        swapped_tiles,
        shuffled_in_32,
        nibbles_swapped,
        first_row_dropped,
        last_row_dropped,
        last_word_dropped,
        zero_byte_dropped,
        zero_row_added,
    ],
)
def test_damage_changes_both_lanes(damage: object) -> None:
    assert callable(damage)
    for seed in range(5):
        rows = random_rows((384, 48), seed)
        damaged = damage(rows)
        before, after = digest_rows(KEY, rows, 0), digest_rows(KEY, damaged, 0)
        assert before[0] != after[0] and before[1] != after[1]


def test_rows_at_another_place_have_another_digest() -> None:
    rows = random_rows((4, 16), 1)
    assert digest_rows(KEY, rows, 0) != digest_rows(KEY, rows, 1)


def test_two_experts_exchanged_have_another_total() -> None:
    names = [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(2)]
    first, second = random_rows((8, 24), 1), random_rows((8, 24), 2)

    def digest_of(*rows: Tensor) -> str:
        digests = [digest_rows(name_key(name), part, 0) for name, part in zip(names, rows, strict=True)]
        return total(np.array(digests, np.uint64))

    assert digest_of(first, second) != digest_of(second, first)


def test_zeros_are_not_nothing() -> None:
    assert digest_rows(KEY, torch.zeros(3, 8, dtype=torch.uint8), 0) != (0, 0)
    assert digest_rows(KEY, torch.zeros(0, 8, dtype=torch.uint8), 0) == (0, 0)
    assert digest_rows(KEY, torch.zeros(3, 0, dtype=torch.uint8), 0) == (0, 0)


def test_memory_layout_of_the_rows_does_not_matter() -> None:
    rows = random_rows((9, 24), 5)
    wide = torch.zeros(9, 60, dtype=torch.uint8)
    wide[:, 3:27] = rows
    odd = torch.zeros(9 * 24 + 1, dtype=torch.uint8)
    odd[1:] = rows.flatten()
    expected = digest_rows(KEY, rows, 2)
    assert digest_rows(KEY, wide[:, 3:27], 2) == expected
    assert digest_rows(KEY, odd[1:].view(9, 24), 2) == expected


def test_the_total_is_32_hex_digits_and_ignores_the_order_of_tensors() -> None:
    digests = np.array([[1, 2], [M, M], [5, 7]], np.uint64)
    assert total(digests) == "0000000000000005" + "0000000000000008"
    assert total(digests[::-1]) == total(digests)
    assert total(np.zeros((0, 2), np.uint64)) == "0" * 32
