"""Rows of many tensors on a CUDA device: copied through their layouts and digested, a launch for each kind of row.

    table = Table(writes)                        # once a receiver
    chosen = table.select(indices)               # once a transaction
    chosen.scatter(staged)                       # staged rows into live storages
    lanes = chosen.digest(staged)                # of what arrived; chosen.digest() of what lies there: int64 [n, 2]
    changes = chosen.changes(tensors, positions, differences)
    changes.apply(); changes.undo(); changes.read_back()
    form = row_major(at, row_bytes, row0, num_rows, keys, device)      # the same of rows that lie as they come
    moves = Moves(sources, targets, sizes, device)  # pieces of memory; moves.run()
    compared = Compared(columns, device)         # pieces of memory; compared.count(counts), compared.list(before, out)

Nothing here waits for the device. staged: int64 [n] on the device, the address of the first of this rank's rows of
each tensor, rows one after the other, at multiples of 16 bytes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.cuda import Changed, Vectors, tiles_of
from quant.steps import Located

from .digest import Digests, lane_keys, lanes_of, signed
from .live import Write

Indices = npt.NDArray[np.int64]

BLOCK = 256  # changed bytes that one program takes
COPY_ITEMS, MAX_ROWS = 4096, 128  # that one program moves
MOVE_BYTES = {True: 32 << 10, False: 1 << 10}  # of a piece, that one program moves: by words of 16 bytes, by bytes
COMPARE_BYTES = 4096  # that one program compares
MOVE_STEP = {True: 8 << 10, False: 1 << 10}
DIGEST_WORDS, SPAN_WORDS, DIGEST_UNROLL, DIGEST_WARPS = 8, 512, 4, 4
# Rows of at most so many words -> rows that a program takes, and words of each at a time where they move by 16 bytes,
# and where by fewer: few threads a short row, since each makes its keys anew; fastest of what was tried on an H100.
DIGEST_SHAPES = ((8, (128, 2, 2)), (32, (128, 4, 2)), (63, (64, 8, 2)), (sys.maxsize, (32, 8, 8)))


@cache
def _loops() -> ModuleType:
    return importlib.import_module(".cuda_loops", __package__)


def _run(name: str, programs: int, first: Tensor, *others: object, **constants: object) -> None:
    """Launch where the first argument is: Triton launches on the current device, which may be another one."""
    with torch.cuda.device(first.device):
        getattr(_loops(), name)[(programs,)](first, *others, **constants)


@dataclass(frozen=True, slots=True)
class Kind:
    """What rows have in common that one launch takes. item: bytes that may move at a time through the layout, 16 where
    a row is one run; single: there is one row."""

    row_bytes: int
    run_bytes: int
    item: int
    swap: bool
    single: bool

    @property
    def copy_shape(self) -> dict[str, int | bool]:
        item = min(self.item, 4)
        width = _width(self.row_bytes // item, 256)
        rows = 1 if self.single else max(1, min(MAX_ROWS, COPY_ITEMS // width))
        return {"ITEM": item, "BN": rows, "BW": width, "WIDE": self.item == 16}

    def digest_shape(self, staged: bool) -> dict[str, int | bool]:
        words = -(-self.row_bytes // 8)
        whole = next(item for item in (16, 8, 4, 1) if self.row_bytes % item == 0)
        item = whole if staged else self.item
        item = item if item != 4 or self.row_bytes % 8 == 0 else 1
        rows, wide, narrow = next(shape for most, shape in DIGEST_SHAPES if words <= most)
        width = min(DIGEST_WORDS if self.single else wide if item == 16 else narrow, _power(words))
        spans = [span for span in range(SPAN_WORDS, 0, -width) if span % width == 0 and words % span == 0]
        span = spans[0] if spans else min(SPAN_WORDS, -(-words // width) * width)
        return {"ITEM": item, "BN": 1 if self.single else rows, "BW": width, "SPAN": span}


def _power(size: int) -> int:
    return 1 << (max(1, size) - 1).bit_length()


def _width(items: int, most: int) -> int:
    """The widest power of two that divides a row, or else covers it."""
    dividing = [width for width in (256, 128, 64, 32) if width <= most and items % width == 0]
    return dividing[0] if dividing else min(most, _power(items))


class Table:
    """What the kernels know of a receiver's tensors, on its device."""

    def __init__(self, writes: Sequence[Write]) -> None:
        self.device = writes[0].local.device
        self._vectors = Vectors(self.device)
        self._aligned: dict[int, tuple[int, Located]] = {}
        rows = [self._columns(write) for write in writes]
        self._table = np.array(rows, np.int64).reshape(len(writes), -1)
        self._kinds = [self._kind(write, row[0]) for write, row in zip(writes, rows, strict=True)]
        self._num_rows = np.array([write.num_rows for write in writes], np.int64)

    def select(self, indices: Sequence[int]) -> Chosen:
        """Some of the tensors, in this order."""
        kinds: dict[Kind, list[int]] = {}
        for place, index in enumerate(indices):
            if self._num_rows[index]:
                kinds.setdefault(self._kinds[index], []).append(place)
        chosen = np.asarray(indices, np.int64)
        table = torch.from_numpy(self._table[chosen]).to(self.device)
        return Chosen(table, kinds, self._num_rows[chosen], self._vectors)

    def _columns(self, write: Write) -> list[int]:
        placement, spec = write.placement, write.placement.tensor
        located = placement.located
        key0, key1 = (signed(key) for key in lane_keys(write.key, spec.row_bytes))
        return [
            write.local.data_ptr() + placement.origin - write.base,
            self._vectors.rows(located).data_ptr() + 8 * write.row0,
            self._vectors.runs(located).data_ptr(),
            located.run_bytes,
            spec.row_bytes,
            write.row0,
            write.num_rows,
            key0,
            key1,
            int(placement.swap_nibbles),
        ]

    def _kind(self, write: Write, address: int) -> Kind:
        located, row_bytes = write.placement.located, write.placement.tensor.row_bytes
        step = self._step(located) | address
        whole = located.run_bytes == row_bytes
        items = (16,) if whole else ()
        item = next((i for i in (*items, 8, 4) if step % i == 0 and located.run_bytes % i == 0), 1)
        return Kind(row_bytes, located.run_bytes, item, write.placement.swap_nibbles, write.num_rows == 1)

    def _step(self, located: Located) -> int:
        """What all offsets are multiples of, or-ed together."""
        if id(located) not in self._aligned:
            parts = [np.bitwise_or.reduce(each) if len(each) else 0 for each in (located.rows, located.runs)]
            self._aligned[id(located)] = (int(parts[0] | parts[1]), located)
        return self._aligned[id(located)][0]


class Chosen:
    """Tensors of one transaction."""

    def __init__(
        self,
        table: Tensor,
        kinds: dict[Kind, list[int]],
        num_rows: npt.NDArray[np.int64],
        keep: object = None,
    ) -> None:
        self.table, self._keep = table, keep  # memory that the table names
        self.device = table.device
        self._copies: list[tuple[Kind, dict[str, int | bool], Tensor]] = []
        self._digests: list[tuple[Kind, dict[str, int | bool], dict[str, int | bool], Tensor]] = []
        for kind, places in kinds.items():
            shape, rows = kind.copy_shape, num_rows[places]
            self._copies.append((kind, shape, self._tiles(places, rows, int(shape["BN"]))))
            live, staged = kind.digest_shape(False), kind.digest_shape(True)
            self._digests.append((kind, live, staged, self._tiles(places, rows, int(live["BN"]))))

    def _tiles(self, places: list[int], rows: npt.NDArray[np.int64], step: int) -> Tensor:
        tiles = tiles_of(rows, step)
        tiles[:, 0] = np.array(places, np.int32)[tiles[:, 0]]
        return torch.from_numpy(tiles).to(self.device)

    def compile(self) -> None:
        """Have every kernel made that an install needs; nothing runs. The first install would wait for them, seconds
        in which nothing is served."""
        rows = torch.zeros(len(self.table), dtype=torch.int64, device=self.device)
        none = (torch.empty(0, dtype=each, device=self.device) for each in (torch.int32, torch.int64, torch.uint8))
        self.scatter(rows, dry=True)
        self.digest(rows, dry=True)
        self.digest(dry=True)
        self.changes(*none).compile()

    def scatter(self, staged: Tensor, *, back: bool = False, dry: bool = False) -> None:
        """Staged rows to where they lie; back: the other way. dry: the kernels are made and not run."""
        for kind, shape, tiles in self._copies:
            steps = 0 if dry else -(-(kind.row_bytes // int(shape["ITEM"])) // int(shape["BW"]))
            _run(
                "copy_rows", len(tiles) * steps, self.table, staged, tiles, ROW=kind.row_bytes, RUN=kind.run_bytes,
                BACK=back, SWAP=kind.swap, FIELDS=_loops().FIELDS, num_warps=1 if kind.single else 4, **shape,
            )  # fmt: skip

    def digest(self, staged: Tensor | None = None, *, dry: bool = False) -> Tensor:
        """Digests of the rows as they arrived, or as they lie in the storages: int64 [n, 2]. dry: as of `scatter`."""
        out = torch.zeros(len(self.table), 2, dtype=torch.int64, device=self.device)
        for kind, live, arrived, tiles in self._digests:
            shape = live if staged is None else arrived
            words = -(-kind.row_bytes // 8)
            spans = 0 if dry else -(-words // int(shape["SPAN"]))
            _run(
                "digest_rows", len(tiles) * spans, self.table, self.table if staged is None else staged, tiles, out,
                ROW=kind.row_bytes, RUN=kind.run_bytes, SWAP=kind.swap, STAGED=staged is not None,
                UNROLL=DIGEST_UNROLL, FIELDS=_loops().FIELDS, num_warps=1 if kind.single else DIGEST_WARPS, **shape,
            )  # fmt: skip
        return out

    def changes(self, tensors: Tensor, positions: Tensor, differences: Tensor) -> Bytes:
        """Single bytes: int32 tensor of this choice, int64 position in it, uint8 new - old, sorted by both."""
        return Bytes(self, tensors, positions, differences)


class Bytes:
    """Changed bytes of tensors, found where they lie. Reads what is there now."""

    def __init__(self, chosen: Chosen, tensors: Tensor, positions: Tensor, differences: Tensor) -> None:
        self._chosen, self._tensors, self._positions = chosen, tensors, positions
        count, device = len(positions), positions.device
        self._at = torch.empty(count, dtype=torch.int64, device=device)
        self._old, self._new = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
        # Of the digests, mod 2^64: what the words with changed bytes add to them as they are, and what that will be.
        lanes = torch.zeros(2, len(chosen.table), 2, dtype=torch.int64, device=device)
        self.taken, into = lanes[0], lanes[1]
        self._plan = (tensors, positions, differences, count, self._at, self._old, self._new, self.taken, into)
        if count:
            self._run("plan_bytes", *self._plan)
        self.moved = into - self.taken

    def apply(self) -> None:
        """Write the new bytes."""
        self._put(self._new)

    def undo(self) -> None:
        """Write the old bytes."""
        self._put(self._old)

    def compile(self) -> None:
        """Have the kernels made; of no bytes they change nothing."""
        out = torch.zeros_like(self.moved)
        self._run("plan_bytes", *self._plan)
        self._run("digest_bytes", self._tensors, self._positions, len(self._positions), out)
        _run("put_bytes", 0, self._at, self._new, 0, BLOCK=1024)

    def _run(self, name: str, *arguments: object) -> None:
        programs = -(-len(self._positions) // BLOCK)
        _run(name, programs, self._chosen.table, *arguments, BLOCK=BLOCK, FIELDS=_loops().FIELDS)

    def _put(self, values: Tensor) -> None:
        if len(values):
            _run("put_bytes", -(-len(values) // 1024), self._at, values, len(values), BLOCK=1024)

    def read_back(self) -> Tensor:
        """What the words with changed bytes add to the digests as they lie now: int64 [n, 2]."""
        out = torch.zeros(len(self._chosen.table), 2, dtype=torch.int64, device=self._positions.device)
        if len(self._positions):
            self._run("digest_bytes", self._tensors, self._positions, len(self._positions), out)
        return out


def row_major(
    at: Indices, row_bytes: Indices, row0: Indices, num_rows: Indices, keys: Digests, device: torch.device
) -> Chosen:
    """Rows [row0[i], row0[i] + num_rows[i]) of tensors, one after the other from address at[i], a multiple of 16. keys:
    uint64 [n], of the tensors."""
    lanes = lanes_of(keys, row_bytes).view(np.int64)
    offsets = {
        int(size): torch.arange(int(num_rows[row_bytes == size].max(initial=0)), device=device) * int(size)
        for size in np.unique(row_bytes)
    }
    none = torch.zeros(1, dtype=torch.int32, device=device)
    rows_at = np.array([offsets[size].data_ptr() for size in row_bytes.tolist()], np.int64)
    runs_at, plain = np.full_like(at, none.data_ptr()), np.zeros_like(at)
    columns = (at, rows_at, runs_at, row_bytes, row_bytes, row0, num_rows, lanes[:, 0], lanes[:, 1], plain)
    kinds: dict[Kind, list[int]] = {}
    alike, which = np.unique(np.stack([row_bytes, num_rows == 1], axis=1), axis=0, return_inverse=True)
    for i, (size, single) in enumerate(alike.tolist()):
        item = next(item for item in (16, 8, 4, 1) if size % item == 0)
        places = np.flatnonzero((which.ravel() == i) & (num_rows > 0) & (row_bytes > 0)).tolist()
        if places:
            kinds[Kind(size, size, item, False, bool(single))] = places
    table = torch.from_numpy(np.stack(columns, axis=1)).to(device)
    return Chosen(table, kinds, num_rows, keep=(offsets, none))


class Moves:
    """Pieces of memory that go elsewhere: addresses on the device or on one that it reaches, and bytes. Targets may be
    relative to an address that `run` is given, a multiple of 16."""

    def __init__(self, sources: Indices, targets: Indices, sizes: Indices, device: torch.device) -> None:
        wide = ((sources | targets | sizes) & 15) == 0
        self._launches: list[tuple[bool, Tensor, int, int]] = []
        for is_wide, chosen in ((True, wide), (False, ~wide)):
            pieces = np.stack([each[chosen] for each in (sources, targets, sizes)], axis=1)
            if len(pieces):
                tiles = _blocks_of(pieces[:, 2], MOVE_BYTES[is_wide])
                both = np.concatenate([pieces.ravel(), tiles])
                self._launches.append((is_wide, torch.from_numpy(both).to(device), len(pieces), len(tiles)))

    def run(self, base: int = 0) -> None:
        """On the current stream."""
        for wide, table, pieces, tiles in self._launches:
            tiles_at = table[3 * pieces :]
            shape = {"BLOCK": MOVE_BYTES[wide], "STEP": MOVE_STEP[wide], "num_warps": 4 if wide else 1}
            _run("move_pieces", tiles, table, tiles_at, base, WIDE=wide, **shape)


class Compared:
    """Pieces of memory that are looked at for what changed: addresses of what is and of what was, bytes, slot of the
    first COMPARE_BYTES, number of the part, its first byte in its tensor; each int64 [n], on the device."""

    def __init__(self, columns: Sequence[Indices], device: torch.device) -> None:
        pieces = np.stack(columns, axis=1)
        wide = (np.bitwise_or.reduce(pieces[:, :3], axis=1) & 15) == 0
        self._launches: list[tuple[bool, Tensor, Tensor]] = []
        for is_wide, chosen in ((True, pieces[wide]), (False, pieces[~wide])):
            tiles = _blocks_of(chosen[:, 2], COMPARE_BYTES)
            if len(tiles):
                table, which = torch.from_numpy(chosen).to(device), torch.from_numpy(tiles).to(device)
                self._launches.append((is_wide, table, which))

    def count(self, counts: Tensor) -> None:
        """int32, by slot: how many bytes changed."""
        self._run("count_changed", counts)

    def list(self, before: Tensor, out: Changed) -> None:
        """Each changed byte to its place. before: int64, by slot, how many come before its."""
        self._run("list_changed", before, out.part, out.position, out.difference)

    def _run(self, name: str, *arguments: Tensor) -> None:
        for wide, pieces, tiles in self._launches:
            _run(name, len(tiles), pieces, tiles, *arguments, BLOCK=COMPARE_BYTES, WIDE=wide, num_warps=4)


def _blocks_of(sizes: Indices, block: int) -> Indices:
    """int64: a piece << 32 | which block of it."""
    counts = -(-sizes // block)
    which = np.repeat(np.arange(len(sizes)), counts)
    return (which << 32) | (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts))


def as_digests(lanes: Tensor) -> Digests:
    """int64 [n, 2] of a device as digests of the host; waits for it."""
    found: Digests = lanes.cpu().numpy().view(np.uint64)
    return found


def digest_of(key: int, rows: Tensor, row0: int) -> tuple[int, int]:
    """Digest of rows [row0, row0 + n) of one tensor, uint8 [n, row_bytes]; waits for the device."""
    rows = rows.contiguous()
    rows = rows if rows.data_ptr() % 16 == 0 else rows.clone()
    num_rows, row_bytes = rows.shape
    kind = Kind(row_bytes, row_bytes, 1, False, num_rows == 1)
    key0, key1 = (signed(each) for each in lane_keys(key, row_bytes))
    spec = [0, 0, 0, row_bytes, row_bytes, row0, num_rows, key0, key1, 0]
    packed = torch.tensor([*spec, rows.data_ptr()], dtype=torch.int64).to(rows.device)
    chosen = Chosen(packed[:10].view(1, -1), {kind: [0]}, np.array([num_rows], np.int64))
    lane0, lane1 = as_digests(chosen.digest(packed[10:])).tolist()[0]
    return int(lane0), int(lane1)
