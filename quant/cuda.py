"""NVFP4 on a CUDA device: any number of matrices in one launch, into checkpoint form or straight into kernel layout.

    batch = plan_batch([Matrix(rows=bf16, weight=codes, block_scale=scales, group=0), ...])
    batch = plan_plain(rows, weight, block_scale, elements, groups, device=device)    # the same by address
    bits = amax(batch)                    # int32 [groups], on the device
    encode_nvfp4(batch, scale_table(global_scales))
    diff = diff_nvfp4(batch, table)       # what is not as it lies at weight and block_scale
    store = plan_batch([Matrix(..., weight=storage, block_scale=storage2, weight_at=placement, scale_at=placement2)])

All matrices of a batch have the same number of elements a row. Nothing here waits for the device except `diff_nvfp4`
and `places_of`.
The bytes are those of `quant.kernels`' torch twins, as long as the global scale lies in SCALES; outside, use the twins.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .steps import Located

Addresses = npt.NDArray[np.int64]

SCALES = (2.0**-60, 2.0**7)  # in which no number on the way leaves FP32's range, and no quotient becomes 0
# Elements that a row is a multiple of -> rows and elements of a tile, and its warps: fastest where the threads of a
# program are one row's, 8 elements each.
TILES = ((1024, (4, 1024, 2)), (512, (8, 512, 2)), (256, (8, 256, 1)), (128, (128, 128, 4)), (64, (128, 64, 4)))
RAGGED_WORDS = 4096
FLAT = (1024, 512, 256, 128, 64, 32, 16)  # rows that are only compared with or written to checkpoint form
DIFF_ELEMENTS = 1024  # the one width at which its bytes were proven
PLAIN_TILES = {256: (16, 256, 2)}  # one warp gives other bytes there
ROOM = 32  # words of codes that a program of a diff notes; with more, compare whole matrices instead
IN_MODULE = dict.fromkeys(("diff_nvfp4", "count_nvfp4", "list_nvfp4"), "cuda_diff_loops")
COUNTED_TILES, LISTED_TILES = 256, 32  # whose notes one program counts, lists


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
class Changed:
    """Changed bytes, in the order of parts and positions, on the device: int32 number of the part, int64 byte in the
    part's tensor, uint8 new less old."""

    part: Tensor
    position: Tensor
    difference: Tensor

    @classmethod
    def empty(cls, count: int, device: torch.device) -> Changed:
        columns = (torch.empty(count, dtype=each, device=device) for each in (torch.int32, torch.int64, torch.uint8))
        part, position, difference = columns
        return cls(part=part, position=position, difference=difference)


@cache
def _loops(name: str = "cuda_loops") -> ModuleType:
    return importlib.import_module(f".{name}", __package__)


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
        plain=plain,
        swap=first.swap,
        keep=(*matrices, vectors),
    )


def plan_plain(
    rows: Addresses,
    weight: Addresses,
    block_scale: Addresses,
    elements: Addresses,
    groups: Addresses,
    *,
    device: torch.device,
    keep: tuple[object, ...] = (),
) -> Batch:
    """The batch of matrices in checkpoint form that are named by address, int64 [n] each: no object is made of any.

    rows: of contiguous BF16 at multiples of 16 bytes, elements of them, multiples of 16. weight: multiples of 4. For
    `amax` alone weight and block_scale may be 0. keep: the memory.
    """
    wrong = np.flatnonzero((rows % 16 != 0) | (weight % 4 != 0) | (elements % 16 != 0) | (elements == 0))
    if len(wrong):
        i = int(wrong[0])
        raise ValueError(
            f"matrix {i} of the batch: {elements[i]} elements at {rows[i]:#x}, codes at {weight[i]:#x}; expected"
            " multiples of 16, 16 and 4"
        )
    width = next(width for width in FLAT if not (elements % width).any())
    counts, step = elements // width, PLAIN_TILES.get(width, tile_of(width))[0]
    none = np.zeros_like(rows)
    fields = np.stack([rows, weight, block_scale, counts, none, none, none, groups], axis=1)
    return Batch(
        elements=width,
        table=torch.from_numpy(fields).to(device),
        tiles=torch.from_numpy(tiles_of(counts, step)).to(device),
        num_tiles=int((-(-counts // step)).sum()),
        num_groups=1 + int(groups.max()),
        plain=True,
        swap=False,
        keep=keep,
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


class Notes:
    """What `note_nvfp4` writes of as many programs: see the kernel. most: int32 [1], above ROOM where some word of
    codes found no room, so that whole matrices are to be compared instead."""

    def __init__(self, programs: int, device: torch.device) -> None:
        self.nums = torch.empty(programs, dtype=torch.int32, device=device)
        self.words = [torch.empty(programs, ROOM, dtype=torch.int32, device=device) for _ in range(3)]
        self.most = torch.zeros(1, dtype=torch.int32, device=device)

    def of(self, first: int, programs: int) -> tuple[Tensor, ...]:
        """Those of some programs."""
        stop = first + programs
        return self.nums[first:stop], *(each[first:stop] for each in self.words)


def is_noted(batch: Batch) -> bool:
    """Whether `note_nvfp4` takes a batch: in checkpoint form, in whole pieces of DIFF_ELEMENTS weights."""
    return batch.plain and batch.elements == DIFF_ELEMENTS


def tiles_a_matrix(elements: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many slots the codes of matrices with so many elements take in a diff, and their block scales, too."""
    return -(-(elements // DIFF_ELEMENTS) // tile_of(DIFF_ELEMENTS)[0])


def places_of(batch: Batch) -> Tensor:
    """Places for a batch alone: part 2 i is matrix i's codes, 2 i + 1 its block scales."""
    tiles = tiles_a_matrix(batch.table[:, 3].cpu().numpy() * batch.elements)
    part = np.arange(len(tiles))
    ahead, none = 2 * (np.cumsum(tiles) - tiles), np.zeros_like(part)
    columns = np.stack([ahead, ahead + tiles, 2 * part, 2 * part + 1, none, none], axis=1)
    return torch.from_numpy(columns).to(batch.table.device)


def note_nvfp4(batch: Batch, scales: Tensor, notes: Notes, first: int = 0) -> None:
    """Encode the matrices of a batch that `is_noted`, and note what is not as it lies at their weight and block_scale.

    scales: a `scale_table`. first: of the programs of the notes.
    """
    nums, *words = notes.of(first, batch.programs)
    nums.zero_()
    _launch("diff_nvfp4", batch, batch.table, batch.tiles, scales, nums, *words, ROOM=ROOM)


def count_nvfp4(batch: Batch, places: Tensor, notes: Notes, counts: Tensor, first: int = 0) -> None:
    """counts: int32, by slot, how many bytes changed. places: int64 [matrices, 6]: slot of the first tile of codes and
    of block scales, numbers of both parts, first byte of both in their tensors."""
    nums, *_ = notes.of(first, batch.programs)
    arguments = (batch.tiles, places, nums, batch.programs, counts, notes.most)
    grid = (-(-batch.programs // COUNTED_TILES),)
    run(
        "count_nvfp4", batch.table.device, grid, *arguments, BLOCK=COUNTED_TILES, ROOM=ROOM, BN=batch.block[0]
    )  # fmt: skip


def list_nvfp4(batch: Batch, places: Tensor, before: Tensor, notes: Notes, out: Changed, first: int = 0) -> None:
    """What was noted of a batch, each byte to its place in `out`. before: int64, by slot, how many come before its."""
    nums, *words = notes.of(first, batch.programs)
    columns = (out.part, out.position, out.difference)
    shape = {"TILES": LISTED_TILES, "ROOM": ROOM, "K": batch.elements, "BN": batch.block[0]}
    grid = (-(-batch.programs // LISTED_TILES),)
    arguments = (batch.tiles, places, before, nums, *words, batch.programs, *columns)
    run("list_nvfp4", batch.table.device, grid, *arguments, **shape)


def diff_nvfp4(batch: Batch, scales: Tensor, made: tuple[Tensor, Notes] | None = None) -> Changed | None:
    """What differs between the matrices, encoded, and what lies at their weight and block_scale, by parts as of
    `places_of`. None where a comparison of whole matrices is needed. Waits for the count.

    made: places and notes, made once for several diffs.
    """
    if not is_noted(batch):
        return None
    device = batch.table.device
    places, notes = made or (places_of(batch), Notes(batch.programs, device))
    counts = torch.empty(2 * batch.programs, dtype=torch.int32, device=device)
    note_nvfp4(batch, scales, notes)
    count_nvfp4(batch, places, notes, counts)
    ends = counts.cumsum(0)
    total, most = torch.cat([ends[-1:], notes.most]).tolist()
    if most > ROOM:
        return None
    found = Changed.empty(total, device)
    list_nvfp4(batch, places, ends - counts, notes, found)
    return found


def _launch(name: str, batch: Batch, *arguments: object, **constants: object) -> None:
    rows, width, warps = batch.block
    if batch.programs:
        shape = {"K": batch.elements, "BN": rows, "BK": width, "EVEN": batch.even, "FIELDS": _loops().FIELDS}
        run(name, batch.table.device, (batch.programs,), *arguments, **shape, num_warps=warps, **constants)


def run(name: str, device: torch.device, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Launch where the memory is: Triton launches on the current device, which may be another one."""
    with torch.cuda.device(device):
        getattr(_loops(IN_MODULE.get(name, "cuda_loops")), name)[grid](*arguments, **constants)
