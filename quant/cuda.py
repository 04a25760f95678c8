"""NVFP4 on a CUDA device: any number of matrices in one launch, into checkpoint form or straight into kernel layout.

    batch = plan_batch([Matrix(rows=bf16, weight=codes, block_scale=scales, group=0), ...])
    bits = amax(batch)                    # int32 [groups], on the device
    encode_nvfp4(batch, scale_table(global_scales))
    bits = encode_nvfp4_fused(batch)      # both at once, where no other rank shares a group
    diff = diff_nvfp4(batch, table)       # what is not as it lies at weight and block_scale
    store = plan_batch([Matrix(..., weight=storage, block_scale=storage2, weight_at=placement, scale_at=placement2)])

All matrices of a batch have the same number of elements a row. Nothing here waits for the device except `diff_nvfp4`.
The bytes are those of `quant.kernels`' torch twins, as long as the global scale lies in SCALES; outside, use the twins.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .steps import Located

SCALES = (2.0**-60, 2.0**20)  # in which no intermediate number of the quotient leaves FP32's normal range
TILE_WORDS = 4096  # of two weights, what one program of 4 warps takes
ROOM = 32  # changes that a program of `diff_nvfp4` notes; with more, compare whole matrices instead
GROUP_BYTES = 20 << 20  # of weights between their amax and their encoding: what stays in the L2 cache


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """Where a component of rows [row0, ...) lies: see Placement. shift: origin less base, in bytes."""

    located: Located
    row0: int
    shift: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """Rows to encode and where they go.

    rows: BF16 [n, K], contiguous, K a multiple of 16. weight, block_scale: uint8 memory, of [n, K / 2] and [n, K / 16]
    or of the storages whose bytes weight_at and scale_at locate. group: which global scale is theirs. swap: second code
    of a byte first.
    """

    rows: Tensor
    weight: Tensor
    block_scale: Tensor
    group: int = 0
    weight_at: At | None = None
    scale_at: At | None = None
    swap: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Matrices as the kernels take them. keep: memory that the table names by address."""

    elements: int
    table: Tensor
    tiles: Tensor
    num_tiles: int
    num_groups: int
    rows_of: tuple[int, ...]
    groups_of: tuple[int, ...]
    plain: bool
    swap: bool
    keep: tuple[object, ...]

    @property
    def block(self) -> tuple[int, int]:
        """Rows and elements of a tile."""
        return tile_of(self.elements)

    @property
    def steps(self) -> int:
        """Tiles side by side."""
        return -(-self.elements // self.block[1])

    @property
    def even(self) -> bool:
        return self.elements % self.block[1] == 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Diff:
    """What changed in the matrices of a batch, one part after the other: bytes of all codes, bytes of all block scales.

    Each: int64 [n] matrix, int64 [n] byte in its checkpoint form, increasing, and uint8 [n] new byte. overflowed: some
    program found more than it could note; compare whole matrices instead.
    """

    weight: tuple[Tensor, Tensor, Tensor]
    block_scale: tuple[Tensor, Tensor, Tensor]
    overflowed: bool


@cache
def _loops() -> ModuleType:
    return importlib.import_module(".cuda_loops", __package__)


def tile_of(elements: int) -> tuple[int, int]:
    """(rows, elements) of a tile: the widest that divides a row, or else a power of two that covers it."""
    widths = [width for width in (512, 256, 128, 64) if elements % width == 0]
    width = widths[0] if widths else min(512, max(64, 1 << (elements - 1).bit_length()))
    return 2 * TILE_WORDS // width, width


def plan_batch(matrices: Sequence[Matrix], *, align: int = 16) -> Batch:
    """The table of a batch, on the matrices' device. Raises ValueError for what does not fit together."""
    first = matrices[0]
    elements, device = first.rows.shape[1], first.rows.device
    _check(matrices, elements, align)
    vectors = Vectors(device)
    columns = [_columns(each, elements, vectors) for each in matrices]
    rows = np.array([len(each.rows) for each in matrices], np.int64)
    step = tile_of(elements)[0]
    return Batch(
        elements=elements,
        table=torch.tensor(columns, dtype=torch.int64).to(device),
        tiles=torch.from_numpy(tiles_of(rows, step)).to(device),
        num_tiles=int((-(-rows // step)).sum()),
        num_groups=1 + max(each.group for each in matrices),
        rows_of=tuple(rows.tolist()),
        groups_of=tuple(each.group for each in matrices),
        plain=first.weight_at is None,
        swap=first.swap,
        keep=(*matrices, vectors),
    )


def tiles_of(rows: np.ndarray, step: int) -> np.ndarray:
    """int32 [tiles, 2]: a matrix and its first row, `step` rows at a time."""
    counts = -(-rows // step)
    which = np.repeat(np.arange(len(rows)), counts)
    first = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([which, first * step], axis=1).astype(np.int32)


class Vectors:
    """Offset vectors on a device, each once, however many matrices share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[object, Tensor] = {}

    def rows(self, located: Located) -> Tensor:
        """int64: first byte of every row."""
        return self._once((id(located), "rows"), located, located.rows)

    def runs(self, located: Located) -> Tensor:
        """int32: first byte of every run of a row."""
        return self._once((id(located), "runs"), located, located.runs.astype(np.int32))

    def columns(self, located: Located, row_bytes: int) -> Tensor:
        """int32: every byte of a row."""
        whole = (located.runs[:, None] + np.arange(located.run_bytes)).ravel()[:row_bytes].astype(np.int32)
        return self._once((id(located), "columns"), located, whole)

    def _once(self, key: object, owner: object, values: np.ndarray) -> Tensor:
        if key not in self._held:
            self._held[key] = torch.from_numpy(np.array(values)).to(self._device)
            self._held[(key, "owner")] = owner  # type: ignore[assignment]  # so that no other one gets its id
        return self._held[key]


def _columns(matrix: Matrix, elements: int, vectors: Vectors) -> list[int]:
    weight, scale = matrix.weight.data_ptr(), matrix.block_scale.data_ptr()
    ahead = [0, 0, 0]
    if matrix.weight_at is not None and matrix.scale_at is not None:
        at, scale_at = matrix.weight_at, matrix.scale_at
        weight, scale = weight + at.shift, scale + scale_at.shift
        rows = (vectors.rows(each.located).data_ptr() + 8 * each.row0 for each in (at, scale_at))
        ahead = [*rows, vectors.columns(scale_at.located, elements // 16).data_ptr()]
    return [matrix.rows.data_ptr(), weight, scale, len(matrix.rows), *ahead, matrix.group]


def _check(matrices: Sequence[Matrix], elements: int, align: int) -> None:
    first = matrices[0]
    alike = (first.weight_at is None, first.scale_at is None, first.swap)
    for i, each in enumerate(matrices):
        problems = []
        if each.rows.dtype != torch.bfloat16 or each.rows.ndim != 2 or not each.rows.is_contiguous():
            problems.append(f"rows are {each.rows.dtype} {tuple(each.rows.shape)}; expected contiguous BF16 [n, K]")
        elif each.rows.shape[1] != elements or elements % 16:
            problems.append(f"rows have {each.rows.shape[1]} elements; expected {elements}, a multiple of 16")
        if each.rows.data_ptr() % align or each.weight.data_ptr() % 4:
            problems.append(f"memory at {each.rows.data_ptr():#x}, {each.weight.data_ptr():#x}; expected whole words")
        if (each.weight_at is None, each.scale_at is None, each.swap) != alike:
            problems.append("located otherwise than the first matrix; give them to two batches")
        if each.weight_at is not None and each.weight_at.located.run_bytes != elements // 2:
            problems.append(f"codes in runs of {each.weight_at.located.run_bytes} bytes; expected whole rows")
        if problems:
            raise ValueError(f"matrix {i} of the batch: {'; '.join(problems)}")


def scale_table(scales: Tensor) -> Tensor:
    """FP32 [groups, 3]: each global scale, 6 times it and 1 over that, each rounded once."""
    scales = scales.to(torch.float32).reshape(-1)
    six = scales * 6.0
    return torch.stack([scales, six, 1.0 / six], dim=1)


def scales_of(bits: Tensor) -> Tensor:
    """FP32 global scales from amax bits, int32, on the same device; 1.0 where they are 0."""
    largest = (bits << 16).view(torch.float32)
    return torch.where(bits == 0, 1.0, largest / 2688.0)


def amax(batch: Batch, out: Tensor | None = None) -> Tensor:
    """BF16 bits of the largest magnitude of every group: int32 [groups], on the device."""
    out = torch.zeros(batch.num_groups, dtype=torch.int32, device=batch.table.device) if out is None else out.zero_()
    _launch("amax", batch, batch.num_tiles * batch.steps, batch.table, batch.tiles, out, EVEN=batch.even)
    return out


def encode_nvfp4(batch: Batch, table: Tensor) -> None:
    """Write codes and block scales of every matrix; table: `scale_table` of the groups' global scales."""
    count = batch.num_tiles * batch.steps
    _launch(
        "encode_nvfp4", batch, count, batch.table, batch.tiles, table, EVEN=batch.even, PLAIN=batch.plain,
        SWAP=batch.swap,
    )  # fmt: skip


class Fused:
    """amax and encoding in one launch, planned once: call it to get the amax bits, int32 [groups]."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        device = batch.table.device
        items, expected = _items(batch)
        self._items, self._expected = torch.from_numpy(items).to(device), torch.from_numpy(expected).to(device)
        self._state = torch.zeros(1 + 2 * batch.num_groups, dtype=torch.int32, device=device)

    def __call__(self) -> Tensor:
        batch, groups = self._batch, self._batch.num_groups
        largest = self._state.zero_()[1 + groups :]
        _launch(
            "encode_nvfp4_fused", batch, len(self._items), batch.table, self._items, self._state, largest,
            self._expected, EVEN=batch.even, PLAIN=batch.plain, SWAP=batch.swap,
        )  # fmt: skip
        return largest


def _items(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Work in the order in which it is drawn: the amax of some groups is always ahead of the encoding of others, by
    about GROUP_BYTES of weights."""
    tiles, groups = batch.tiles.cpu().numpy(), np.array(batch.groups_of)
    group = np.repeat(groups[tiles[:, 0]], batch.steps)
    steps = np.tile(np.arange(batch.steps, dtype=np.int32), len(tiles))
    wide = np.repeat(tiles, batch.steps, axis=0)
    order = np.argsort(group, kind="stable")
    wide, steps, group = wide[order], steps[order], group[order]
    ends = np.flatnonzero(np.diff(group, append=-1)) + 1
    parts, begin, ahead = [], 0, max(1, GROUP_BYTES // (4 * TILE_WORDS))
    waiting: list[tuple[int, int]] = []
    for end in ends.tolist():
        parts.append(_kind(0, wide, steps, begin, end))
        waiting.append((begin, end))
        begin = end
        while len(waiting) > 1 and end - waiting[0][0] > ahead:
            parts.append(_kind(1, wide, steps, *waiting.pop(0)))
    parts += [_kind(1, wide, steps, *each)[::-1] for each in waiting]
    return np.concatenate(parts), np.bincount(group, minlength=batch.num_groups).astype(np.int32)


def _kind(kind: int, tiles: np.ndarray, steps: np.ndarray, begin: int, end: int) -> np.ndarray:
    kinds = np.full((end - begin, 1), kind, np.int32)
    return np.ascontiguousarray(np.hstack([kinds, tiles[begin:end], steps[begin:end, None]]).astype(np.int32))


def diff_nvfp4(batch: Batch, table: Tensor) -> Diff:
    """What differs between the matrices, encoded, and what lies at their weight and block_scale."""
    noted = note_nvfp4(batch, table)
    weight, over = _gathered(batch, noted, 0, batch.elements // 8, 4)
    scale, over_scale = _gathered(batch, noted, 1, batch.elements // 16, 1)
    return Diff(weight=weight, block_scale=scale, overflowed=over or over_scale)


def note_nvfp4(batch: Batch, table: Tensor, noted: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
    """The kernel of `diff_nvfp4` alone: counts [2, programs], places and values [2, programs, ROOM]."""
    programs, device = batch.num_tiles * batch.steps, batch.table.device
    if noted is None:
        counts = torch.zeros(2, programs, dtype=torch.int32, device=device)
        noted = (counts, *(torch.empty(2, programs, ROOM, dtype=torch.int32, device=device) for _ in range(2)))
    else:
        noted[0].zero_()
    _launch("diff_nvfp4", batch, programs, batch.table, batch.tiles, table, *noted, ROOM=ROOM, EVEN=batch.even)
    return noted


def _gathered(
    batch: Batch, noted: tuple[Tensor, ...], part: int, per_row: int, width: int
) -> tuple[tuple[Tensor, Tensor, Tensor], bool]:
    """Notes of all programs in the order of matrices and places; words of `width` bytes become bytes."""
    counts, found, new = (each[part] for each in noted)
    here = torch.arange(ROOM, device=counts.device) < counts[:, None]
    program = here.nonzero()[:, 0]
    matrix = batch.tiles[program // batch.steps, 0].long()
    place, value = found[here].long(), new[here]
    order = torch.argsort((matrix << 40) | place)
    matrix, place, value = matrix[order], place[order], value[order]
    if width == 4:
        old = _old_words(batch, matrix, place)
        shifts = torch.arange(0, 32, 8, device=counts.device)
        bytes_new, bytes_old = ((each[:, None] >> shifts) & 255 for each in (value, old))
        differ = bytes_new != bytes_old
        place = (place[:, None] * 4 + torch.arange(4, device=counts.device))[differ]
        matrix, value = matrix[:, None].expand(-1, 4)[differ], bytes_new[differ]
    return (matrix, place, value.to(torch.uint8)), bool((counts > ROOM).any())


def _old_words(batch: Batch, matrix: Tensor, place: Tensor) -> Tensor:
    """The words of codes as they are, int32."""
    out = torch.empty(len(place), dtype=torch.int32, device=place.device)
    addresses = batch.table[matrix, _loops().WEIGHT] + 4 * place
    if len(out):
        grid = (-(-len(out) // 1024),)
        _loops().fetch_words[grid](addresses, out, len(out), BLOCK=1024)
    return out


def _launch(name: str, batch: Batch, programs: int, *arguments: object, **constants: object) -> None:
    rows, width = batch.block
    if programs:
        getattr(_loops(), name)[(programs,)](
            *arguments, K=batch.elements, BN=rows, BK=width, FIELDS=_loops().FIELDS, num_warps=4, **constants
        )
