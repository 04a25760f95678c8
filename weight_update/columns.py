"""What a push sends, as arrays: of tens of thousands of tensors nothing is then asked one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.formats import TensorSpec
from quant.parameters import ParameterRow

from .digest import Digests, Ints, digest_many, digest_rows, name_key
from .manifest import Manifest

if TYPE_CHECKING:
    from .source import Source

SMALL_BYTES = 16 << 10  # of rows that go with others in one block: a block of their own costs as much as a copy of them
BLOCK_BYTES, BLOCK_ROWS = 1 << 20, 4096  # of a block of such rows

Part = tuple[int, int, Tensor]  # position in the push, first row, the rows: [n, ...], contiguous


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """By position in the push, every tensor of it: index in the manifest, bytes of a row, digest key.

    By number, this rank's sources: position of the first tensor, place in the push's order of parameters. small: those
    of few elements; as_is: of these, those that are sent as they lie in memory. At times there are none.

    num_bytes: of all tensors of the push.
    """

    index: Ints
    row_bytes: Ints
    keys: npt.NDArray[np.uint64]
    position: Ints
    place: Ints
    small: Ints
    as_is: frozenset[int]
    num_bytes: int

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        specs: Sequence[TensorSpec],
        order: Sequence[tuple[str, ParameterRow | None]],
        sources: Sequence[Source],
        small: Sequence[int],
        as_is: Iterable[int],
    ) -> Columns:
        """Of a push of these tensors, and of the sources that this rank has for it."""
        positions = {spec.name: i for i, spec in enumerate(specs)}
        places = {name: i for i, (name, _) in enumerate(order)}
        return cls(
            index=np.array([manifest.index[spec.name] for spec in specs], np.int64),
            row_bytes=np.array([spec.row_bytes for spec in specs], np.int64),
            keys=np.array([name_key(spec.name) for spec in specs], np.uint64),
            position=np.array([positions[source.specs[0].name] for source in sources], np.int64),
            place=np.array([places[source.name] for source in sources], np.int64),
            small=np.array(small, np.int64),
            as_is=frozenset(as_is),
            num_bytes=sum(spec.num_bytes for spec in specs),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows on their way out: num_rows[i] of the tensor at position[i] of the push, from row first[i] on.

    data: uint8 [bytes], all of them, one after the other.
    """

    position: Ints
    first: Ints
    num_rows: Ints
    data: Tensor

    @classmethod
    def of(cls, *parts: Part) -> Block:
        """These rows, in this order."""
        flats = [rows.reshape(-1).view(torch.uint8) for _, _, rows in parts]
        table = np.array([(position, first, rows.shape[0] if rows.ndim else 1) for position, first, rows in parts])
        data = flats[0] if len(flats) == 1 else torch.cat(flats)
        return cls(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy(), data)

    def sizes(self, columns: Columns) -> Ints:
        """Bytes of each tensor's rows."""
        return self.num_rows * columns.row_bytes[self.position]

    def parts(self, columns: Columns) -> list[Part]:
        """The rows of each, uint8 [n, bytes of a row], views."""
        entries = zip(self.position.tolist(), self.first.tolist(), self.num_rows.tolist(), strict=True)
        flats = self.data.split_with_sizes(self.sizes(columns).tolist())
        return [(at, first, flat.view(n, -1)) for (at, first, n), flat in zip(entries, flats, strict=True)]

    def digests(self, columns: Columns) -> Digests:
        """What each of its rows adds to a tensor's digest, [n, 2]."""
        row_bytes, keys = columns.row_bytes[self.position], columns.keys[self.position]
        if len(self.position) == 1:
            rows = self.data.view(int(self.num_rows[0]), -1)
            return np.array([digest_rows(int(keys[0]), rows, int(self.first[0]))], np.uint64)
        sizes = self.num_rows * row_bytes
        return digest_many(self.data, np.cumsum(sizes) - sizes, self.num_rows, row_bytes, self.first, keys)


def blocks_of(parts: Iterable[Part]) -> Iterator[Block]:
    """The same rows; small ones, of which there may be tens of thousands, many in one block."""
    waiting: list[Part] = []
    num_bytes = 0
    for part in parts:
        if part[2].nbytes > SMALL_BYTES:
            yield Block.of(part)
            continue
        waiting.append(part)
        num_bytes += part[2].nbytes
        if num_bytes >= BLOCK_BYTES or len(waiting) == BLOCK_ROWS:
            yield Block.of(*waiting)
            waiting, num_bytes = [], 0
    if waiting:
        yield Block.of(*waiting)
