"""NVFP4 on a CUDA device: any number of matrices in one launch, into checkpoint form or straight into kernel layout.

    batch = plan_batch([Matrix(rows=bf16, weight=codes, block_scale=scales, group=0), ...])
    bits = amax(batch)                    # int32 [groups], on the device
    encode_nvfp4(batch, scale_table(global_scales))
    diff = diff_nvfp4(batch, table)       # what is not as it lies at weight and block_scale
    store = plan_batch([Matrix(..., weight=storage, block_scale=storage2, weight_at=placement, scale_at=placement2)])

All matrices of a batch have the same number of elements a row. Nothing here waits for the device except `diff_nvfp4`.
The bytes are those of `quant.kernels`' torch twins, as long as the global scale lies in SCALES; outside, use the twins.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from . import kernels
from .specs import EncodeRows, Parts
from .steps import Located

SCALES = (2.0**-60, 2.0**7)  # in which no number on the way leaves FP32's range, and no quotient becomes 0
# Elements that a row is a multiple of -> rows and elements of a tile, and its warps: fastest where the threads of a
# program are one row's, 8 elements each.
TILES = ((1024, (4, 1024, 2)), (512, (8, 512, 2)), (256, (8, 256, 1)), (128, (128, 128, 4)), (64, (128, 64, 4)))
RAGGED_WORDS = 4096
FLAT = (1024, 512, 256, 128, 64, 32, 16)  # rows that are only compared with or written to checkpoint form
DIFF_ELEMENTS = 1024  # the one width at which its bytes were proven
PLAIN_TILES = {256: (16, 256, 2)}  # one warp gives other bytes there
ROOM = 32  # changes that a program of `diff_nvfp4` notes; with more, compare whole matrices instead


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
    def block(self) -> tuple[int, int, int]:
        """Rows and elements of a tile, and warps."""
        return PLAIN_TILES.get(self.elements, tile_of(self.elements)) if self.plain else tile_of(self.elements)

    @property
    def programs(self) -> int:
        """Tiles, those side by side included."""
        return self.num_tiles * -(-self.elements // self.block[1])

    @property
    def even(self) -> bool:
        return self.elements % self.block[1] == 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Changes:
    """Changed bytes of one component of the matrices of a batch, in the order of matrices and positions.

    matrix: int32 [n]. position: int64 [n], byte in the matrix' checkpoint form. difference, value: uint8 [n], new less
    old and new. All on the device.
    """

    matrix: Tensor
    position: Tensor
    difference: Tensor
    value: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Diff:
    """What is not as it was. overflowed: some program found more than it could note; compare whole matrices instead."""

    weight: Changes
    block_scale: Changes
    overflowed: bool


@cache
def _loops() -> ModuleType:
    return importlib.import_module(".cuda_loops", __package__)


def tile_of(elements: int) -> tuple[int, int, int]:
    """(rows, elements, warps) of a tile."""
    for multiple, tile in TILES:
        if elements % multiple == 0:
            return tile
    width = min(512, max(64, 1 << (elements - 1).bit_length()))
    return 2 * RAGGED_WORDS // width, width, 4


def plan_batch(matrices: Sequence[Matrix], *, align: int = 16) -> Batch:
    """The table of a batch, on the matrices' device. Raises ValueError for what does not fit together.

    Of matrices in checkpoint form rows mean nothing, and they are taken as longer or shorter ones that fill tiles.
    """
    first = matrices[0]
    columns, device = first.rows.shape[1], first.rows.device
    _check(matrices, columns, align)
    vectors, plain = Vectors(device), first.weight_at is None
    sizes = np.array([each.rows.numel() for each in matrices], np.int64)
    elements = next(width for width in FLAT if not (sizes % width).any()) if plain else columns
    rows = sizes // elements
    pairs = zip(matrices, rows.tolist(), strict=True)
    fields = [_columns(each, columns, num_rows, vectors) for each, num_rows in pairs]
    step = (PLAIN_TILES.get(elements, tile_of(elements)) if plain else tile_of(elements))[0]
    return Batch(
        elements=elements,
        table=torch.tensor(fields, dtype=torch.int64).to(device),
        tiles=torch.from_numpy(tiles_of(rows, step)).to(device),
        num_tiles=int((-(-rows // step)).sum()),
        num_groups=1 + max(each.group for each in matrices),
        rows_of=tuple(rows.tolist()),
        groups_of=tuple(each.group for each in matrices),
        plain=plain,
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


def _columns(matrix: Matrix, elements: int, num_rows: int, vectors: Vectors) -> list[int]:
    weight, scale = matrix.weight.data_ptr(), matrix.block_scale.data_ptr()
    ahead = [0, 0, 0]
    if matrix.weight_at is not None and matrix.scale_at is not None:
        at, scale_at = matrix.weight_at, matrix.scale_at
        weight, scale = weight + at.shift, scale + scale_at.shift
        rows = (vectors.rows(each.located).data_ptr() + 8 * each.row0 for each in (at, scale_at))
        ahead = [*rows, vectors.columns(scale_at.located, elements // 16).data_ptr()]
    return [matrix.rows.data_ptr(), weight, scale, num_rows, *ahead, matrix.group]


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
    # By a number that lies on the device: torch multiplies by the reciprocal of one that does not.
    divisor = torch.full((), 2688.0, dtype=torch.float32, device=bits.device)
    return torch.where(bits == 0, 1.0, largest / divisor)


def amax(batch: Batch, out: Tensor | None = None) -> Tensor:
    """BF16 bits of the largest magnitude of every group: int32 [groups], on the device."""
    out = torch.zeros(batch.num_groups, dtype=torch.int32, device=batch.table.device) if out is None else out.zero_()
    _launch("amax", batch, batch.table, batch.tiles, out)
    return out


def encode_nvfp4(batch: Batch, table: Tensor) -> None:
    """Write codes and block scales of every matrix; table: `scale_table` of the groups' global scales."""
    _launch("encode_nvfp4", batch, batch.table, batch.tiles, table, PLAIN=batch.plain, SWAP=batch.swap)


# ---------------------------------------------------------------- what changed


@dataclass(frozen=True, slots=True, eq=False)
class Notes:
    """What `note_nvfp4` writes: int32 [programs], and twice int32 [programs, ROOM]."""

    counts: Tensor
    notes: Tensor
    values: Tensor


def diff_nvfp4(batch: Batch, table: Tensor) -> Diff:
    """What differs between the matrices, encoded, and what lies at their weight and block_scale, in checkpoint form."""
    if not batch.plain:
        raise ValueError("a diff: only against checkpoint form")
    programs, device = batch.programs, batch.table.device
    if batch.elements != DIFF_ELEMENTS:
        return Diff(weight=_changes(0, device), block_scale=_changes(0, device), overflowed=True)
    noted = note_nvfp4(batch, table)
    shape = {"TILES": 4, "ROOM": ROOM, "K": batch.elements, "FIELDS": _loops().FIELDS}
    arguments = (batch.table, batch.tiles, noted.counts, noted.notes, noted.values, programs)
    grid = (-(-programs // 4),)
    counts = torch.empty(2, programs, dtype=torch.int32, device=device)
    _loops().count_notes[grid](*arguments, counts, **shape)
    before = counts.cumsum(1)
    ends = torch.cat([before[:, -1], noted.counts.amax().long()[None]]).tolist()
    if ends[2] > ROOM:
        return Diff(weight=_changes(0, device), block_scale=_changes(0, device), overflowed=True)
    before -= counts
    weight, scale = _changes(ends[0], device), _changes(ends[1], device)
    out = [(part.matrix, part.position, part.difference, part.value) for part in (weight, scale)]
    if ends[0] or ends[1]:
        _loops().sort_notes[grid](*arguments, before, *out[0], *out[1], **shape)
    return Diff(weight=weight, block_scale=scale, overflowed=False)


def note_nvfp4(batch: Batch, table: Tensor, noted: Notes | None = None) -> Notes:
    """The first kernel of `diff_nvfp4` alone."""
    if noted is None:
        count, device = batch.programs, batch.table.device
        places = (torch.empty(count, ROOM, dtype=torch.int32, device=device) for _ in range(2))
        noted = Notes(torch.zeros(count, dtype=torch.int32, device=device), *places)
    else:
        noted.counts.zero_()
    _launch(
        "diff_nvfp4", batch, batch.table, batch.tiles, table, noted.counts, noted.notes, noted.values, ROOM=ROOM
    )  # fmt: skip
    return noted


def _changes(count: int, device: torch.device) -> Changes:
    return Changes(
        matrix=torch.empty(count, dtype=torch.int32, device=device),
        position=torch.empty(count, dtype=torch.int64, device=device),
        difference=torch.empty(count, dtype=torch.uint8, device=device),
        value=torch.empty(count, dtype=torch.uint8, device=device),
    )


def _launch(name: str, batch: Batch, *arguments: object, **constants: object) -> None:
    rows, width, warps = batch.block
    if batch.programs:
        getattr(_loops(), name)[(batch.programs,)](
            *arguments, K=batch.elements, BN=rows, BK=width, EVEN=batch.even, FIELDS=_loops().FIELDS, num_warps=warps,
            **constants,
        )  # fmt: skip


# ---------------------------------------------------------------- rows of one matrix, as the table of formats has them


def amax_bits(rows: Tensor) -> int:
    """BF16 bits of the largest absolute value of contiguous rows; waits for the device."""
    if rows.numel() % 16 or rows.data_ptr() % 16 or not rows.numel():
        return kernels.amax_bits_torch(rows)
    none = torch.empty(0, dtype=torch.uint8, device=rows.device)
    return int(amax(plan_batch([Matrix(rows=rows.view(-1, 16), weight=none, block_scale=none)])))


def _encode_nvfp4(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    if not SCALES[0] <= scale <= SCALES[1]:
        kernels.encode_nvfp4_rows_torch(rows, scale, out["weight"], out["weight_scale"])
    elif rows.numel():
        rows = rows if rows.data_ptr() % 16 == 0 else rows.clone()
        batch = plan_batch([Matrix(rows=rows, weight=out["weight"], block_scale=out["weight_scale"])])
        encode_nvfp4(batch, scale_table(torch.tensor([scale], device=rows.device)))


def _encode_fp8(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    if rows.numel():
        divisor = torch.tensor([scale], dtype=torch.float32, device=rows.device)
        grid = (-(-rows.numel() // 2048),)
        _loops().encode_fp8[grid](rows, divisor, out["weight"], rows.numel(), BLOCK=2048)


def _encode_fp8_channel(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    if rows.numel():
        scales = out["weight_scale"].view(torch.float32)
        _loops().encode_fp8_channel[(len(rows),)](rows, out["weight"], scales, rows.shape[1], BK=1024)


def _encode_fp8_block(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    if rows.numel():
        scales, (n, k) = out["weight_scale"].view(torch.float32), rows.shape
        grid = (-(-n // 128), -(-k // 128))
        _loops().encode_fp8_block[grid](rows, out["weight"], scales, n, k, TILE=128, num_warps=16)


def _encode_mx(rows: Tensor, scale: float, given: Parts, out: Parts, *, fp4: bool) -> None:
    if rows.numel():
        blocks = rows.numel() // 32
        bits, grid = rows.view(torch.int16), (-(-blocks // 128),)
        _loops().encode_mx[grid](bits, out["weight"], out["weight_scale"], blocks, BLOCKS=128, FP4=fp4)


ENCODERS: dict[str, EncodeRows] = {
    "nvfp4": _encode_nvfp4,
    "fp8": _encode_fp8,
    "fp8_channel": _encode_fp8_channel,
    "fp8_block": _encode_fp8_block,
    "mxfp8": partial(_encode_mx, fp4=False),
    "mxfp4": partial(_encode_mx, fp4=True),
}
