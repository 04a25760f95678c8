"""What a trainer rank sends of its weights, and what it remembers of them once the service has confirmed it.

    whole = Whole(plan, scales, keep=torch.device("cpu"))      # every row
    changes = compare(plan, scales, base)                      # what is not as in the base
    base = whole.confirmed(base, version, digest)              # only after the commit

The bytes that are kept are those of the checkpoint form, so the next push compares what would be sent and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.formats import TensorSpec

from .columns import Block, Part, blocks_of
from .delta import DENSE, Patch, changed_bytes, is_relative, is_sparse
from .digest import MASK, Digests, Lanes, digest_rows, digest_words, name_key, words_of
from .encoder import BLOCK_BYTES, encoded
from .source import PushPlan

Scales = Mapping[str, Tensor]

# Of the rows of a source that is encoded in one piece, whatever its format; the pieces of a larger one are held as one.
SOURCE_BYTES = BLOCK_BYTES // 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """Rows of one tensor in checkpoint form, uint8 [n, row_bytes] from row `first`, and what they add to its digest.

    One source's. A tensor that the trainer keeps in parts, such as q, k and v of one projection, has one for each part.
    """

    first: int
    rows: Tensor
    digest: Lanes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """What this trainer rank knows of a committed version: the rows that it sent of it, or of one before, by tensor."""

    version: int
    digest: str
    held: Mapping[str, Sequence[Held]]

    @property
    def num_bytes(self) -> int:
        return sum(each.rows.nbytes for parts in self.held.values() for each in parts)

    def rows_at(self, name: str, first: int) -> Held | None:
        """The part of a tensor that begins at this row."""
        return next((each for each in self.held.get(name, ()) if each.first == first), None)


class Whole:
    """Every row of a push. keep: where its bytes stay, to be the base of the next push; None sends them unkept."""

    mode = "full"

    def __init__(self, plan: PushPlan, scales: Scales, *, keep: torch.device | None) -> None:
        self.plan, self._scales, self._kept = plan, scales, keep is not None
        self._keep = keep
        self.digests = np.zeros((len(plan.specs), 2), np.uint64)
        self.held: dict[str, list[Held]] = {}
        self._taken = False

    @property
    def device(self) -> torch.device | None:
        """The GPU that the weights are on, None where they are on the host."""
        return _gpu_of(self.plan)

    @classmethod
    def of(cls, changes: Changes) -> Whole:
        """The same push with every row; the base of the changes means nothing afterwards."""
        whole = cls(changes.plan, {}, keep=torch.device("cpu"))
        whole.held, whole._taken = changes.applied(), True
        whole.digests = changes.digests
        return whole

    def take(self) -> None:
        """Encode everything now: the model may change from here on. Held on the host where nothing is kept after."""
        self._keep = self._keep or torch.device("cpu")
        for _ in self.blocks():
            pass

    def blocks(self) -> Iterator[Block]:
        """All rows, encoded as they are asked for unless they were taken before."""
        if self._taken:
            held = ((i, each) for i, spec in enumerate(self.plan.specs) for each in self.held.get(spec.name, ()))
            yield from blocks_of((i, each.first, each.rows.cpu()) for i, each in held)
            return
        self.digests[:] = 0
        self.held = {}
        for block in blocks_of(_small_parts(self.plan, self._scales)):
            yield from self._passed(block, self.held)
        for number, source in enumerate(self.plan.sources):
            if source.rows.nbytes > SOURCE_BYTES:
                parts: dict[str, list[Held]] = {}
                for part in _encoded(self.plan, self._scales, number):
                    yield from self._passed(Block.of(part), parts)
                for name, pieces in parts.items():
                    self.held.setdefault(name, []).extend(map(_stacked, _stacks(pieces)))
        self._taken = self._keep is not None

    def _passed(self, block: Block, held: dict[str, list[Held]]) -> Iterator[Block]:
        """The block, its digests counted; afterwards a copy of its rows is held, where they are kept."""
        columns = self.plan.columns
        digests = block.digests(columns)
        np.add.at(self.digests, block.position, digests)
        yield block
        if self._keep is None:
            return
        kept = replace(block, data=block.data.to(self._keep, copy=True))
        for (position, first, rows), (lane0, lane1) in zip(kept.parts(columns), digests.tolist(), strict=True):
            own = rows.clone() if rows.storage_offset() % 8 else rows  # it is read by words later
            each = Held(first=first, rows=own, digest=(lane0, lane1))
            held.setdefault(self.plan.specs[position].name, []).append(each)

    def confirmed(self, base: Base | None, version: int, digest: str) -> Base | None:
        """What is known once this push is that version; base: what was known of the version before."""
        if not self._kept:
            return None
        carried = {} if base is None else base.held
        return Base(version=version, digest=digest, held={**carried, **self.held})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Changes:
    """What is not as in a base: patches of tensors of the push by position, and the digests of all its rows on this
    rank.

    held: all its rows, by tensor; those that are patched byte by byte are still as in the base, whose memory they are.
    """

    plan: PushPlan
    base: Base
    patches: tuple[Patch, ...]
    digests: Digests
    held: Mapping[str, list[Held]]

    mode = "delta"

    @property
    def device(self) -> torch.device | None:
        """The GPU that the weights are on, None where they are on the host."""
        return _gpu_of(self.plan)

    def whole(self, keep: torch.device | None) -> Whole:
        """The same push with every row; the base means nothing afterwards."""
        return Whole.of(self)

    @property
    def changed(self) -> npt.NDArray[np.int64]:
        """1 for every tensor of the push that changes on this rank, 0 for the others."""
        found = np.zeros(len(self.plan.specs), np.int64)
        found[[patch.tensor for patch in self.patches]] = 1
        return found

    @property
    def num_bytes(self) -> int:
        """About what the patches take before they are packed."""
        dense = sum(len(patch.values) for patch in self.patches if patch.kind == DENSE)
        return dense + sum(2 * int(np.count_nonzero(patch.values)) for patch in self.patches if patch.kind != DENSE)

    def applied(self) -> dict[str, list[Held]]:
        """The rows of the push, all of them; the base's own memory is rewritten and means nothing afterwards."""
        for patch in self.patches:
            if patch.positions is not None:
                spec = self.plan.specs[patch.tensor]
                old = self.base.rows_at(spec.name, patch.first // spec.row_bytes)
                assert old is not None
                _add(old.rows, patch)
        return dict(self.held)

    def confirmed(self, base: Base | None, version: int, digest: str) -> Base:
        """What is known once this push is that version."""
        return Base(version=version, digest=digest, held={**self.base.held, **self.applied()})


def _gpu_of(plan: PushPlan) -> torch.device | None:
    return next((source.rows.device for source in plan.sources if source.rows.is_cuda), None)


def _small_parts(plan: PushPlan, scales: Scales) -> Iterator[Part]:
    """The rows of sources of which nothing is encoded in several blocks."""
    positions = plan.columns.position.tolist()
    for number, source in enumerate(plan.sources):
        if number in plan.columns.as_is:
            yield positions[number], source.first, source.rows
        elif source.rows.nbytes <= SOURCE_BYTES:
            yield from _encoded(plan, scales, number)


def _encoded(plan: PushPlan, scales: Scales, number: int) -> Iterator[Part]:
    position, source = int(plan.columns.position[number]), plan.sources[number]
    place = {spec.name: position + i for i, spec in enumerate(source.specs)}
    for spec, first, data in encoded(source, scales.get(source.name)):
        yield place[spec.name], first, data.cpu()


def compare(plan: PushPlan, scales: Scales, base: Base) -> Changes:
    """Encode everything and compare it with the base, a source at a time, and those of a few bytes many at a time."""
    digests = np.zeros((len(plan.specs), 2), np.uint64)
    patches: list[Patch] = []
    everything: dict[str, list[Held]] = {}
    for (position, first, rows), old, is_same in _beside(plan, scales, base):
        spec = plan.specs[position]
        patch, held = None, old
        if held is None or not is_same:
            patch, held = _compared(position, spec, old, first, rows)
        patches += [patch] if patch is not None else []
        digests[position] += np.array(held.digest, np.uint64)
        everything.setdefault(spec.name, []).append(held)
    return Changes(plan=plan, base=base, patches=tuple(patches), digests=digests, held=everything)


def _beside(plan: PushPlan, scales: Scales, base: Base) -> Iterator[tuple[Part, Held | None, bool]]:
    """All rows, in memory of their own unless they are known to be as in the base; what it has in their place; and
    whether they are known to be."""

    def old_of(position: int, first: int) -> Held | None:
        return base.rows_at(plan.specs[position].name, first)

    for block in blocks_of(_small_parts(plan, scales)):
        parts = block.parts(plan.columns)
        olds = [old_of(position, first) for position, first, _ in parts]
        for (position, first, rows), old, is_same in zip(parts, olds, _are_same(parts, olds), strict=True):
            yield (position, first, rows if is_same else rows.clone()), old, is_same
    for number, source in enumerate(plan.sources):
        if source.rows.nbytes > SOURCE_BYTES:
            found: dict[int, list[Held]] = {}
            for position, first, rows in _encoded(plan, scales, number):
                found.setdefault(position, []).append(Held(first=first, rows=rows, digest=(0, 0)))
            for position, held in found.items():
                for below in _stacks(held):
                    rows, first = torch.cat([each.rows for each in below]), below[0].first
                    yield (position, first, rows), old_of(position, first), False


def _are_same(parts: Sequence[Part], olds: Sequence[Held | None]) -> list[bool]:
    """Which rows are those of the base, of many that are looked at together; of one alone it is not asked."""
    alike = [
        (i, rows.view(-1), old.rows.view(-1))
        for i, ((_, _, rows), old) in enumerate(zip(parts, olds, strict=True))
        if old is not None and old.rows.device == rows.device and old.rows.shape == rows.shape
    ]
    same = [False] * len(parts)
    if len(parts) > 1 and alike:
        new, old = torch.cat([each for _, each, _ in alike]), torch.cat([each for _, _, each in alike])
        ends = np.cumsum([each.numel() for _, each, _ in alike])
        changed = np.searchsorted(ends, (new != old).nonzero().flatten().numpy(), "right")
        for at in set(range(len(alike))).difference(changed.tolist()):
            same[alike[at][0]] = True
    return same


def _stacks(held: Iterable[Held]) -> Iterator[list[Held]]:
    """Rows that lie one below the other."""
    stack: list[Held] = []
    for each in held:
        if stack and each.first != stack[-1].first + len(stack[-1].rows):
            yield stack
            stack = []
        stack.append(each)
    if stack:
        yield stack


def _stacked(stack: Sequence[Held]) -> Held:
    lanes = (0, 0)
    for each in stack:
        lanes = _sum(lanes, each.digest)
    rows = stack[0].rows if len(stack) == 1 else torch.cat([each.rows for each in stack])
    return Held(first=stack[0].first, rows=rows, digest=lanes)


def _compared(at: int, spec: TensorSpec, old: Held | None, first: int, new: Tensor) -> tuple[Patch | None, Held]:
    """The patch of rows of one tensor, none where nothing changed, and what is held of them: of those that are patched
    byte by byte the old ones, with the digest of the new."""
    key, begin = name_key(spec.name), first * spec.row_bytes
    stop, flat, relative = begin + new.numel(), new.view(-1).numpy(), False
    if old is not None and old.rows.shape == new.shape:
        rows = new.to(old.rows.device)
        found = changed_bytes(old.rows, rows)
        if not len(found):
            return None, old
        if is_sparse(len(found), new.numel()):
            index = torch.from_numpy(found).to(rows.device)
            difference = (rows.view(-1)[index] - old.rows.view(-1)[index]).cpu().numpy()
            patch = Patch(tensor=at, first=begin, stop=stop, positions=found + begin, values=difference)
            return patch, replace(old, digest=_moved(key, spec.row_bytes, old, rows, found, begin))
        differences = (rows - old.rows).cpu().view(-1).numpy()
        if relative := is_relative(differences, flat):
            flat = differences
    held = Held(first=first, rows=new if old is None else new.to(old.rows.device), digest=digest_rows(key, new, first))
    return Patch(tensor=at, first=begin, stop=stop, positions=None, values=flat, relative=relative), held


def _moved(key: int, row_bytes: int, old: Held, rows: Tensor, found: np.ndarray, begin: int) -> Lanes:
    """The digest with the words of the changed bytes taken out as they were and put in as they are."""
    words = words_of(row_bytes, found)
    words = words[np.diff(words, prepend=-1) != 0]
    at = words + begin // row_bytes * -(-row_bytes // 8)
    out, into = (digest_words(key, row_bytes, at, _words(each, words)) for each in (old.rows, rows))
    rest = (old.digest[0] - out[0], old.digest[1] - out[1])
    return _sum(rest, into)


def _sum(a: Lanes, b: Lanes) -> Lanes:
    return (a[0] + b[0]) & MASK, (a[1] + b[1]) & MASK


def _words(rows: Tensor, words: np.ndarray) -> np.ndarray:
    """Words of 8 bytes of contiguous rows by number; the last one of a row is filled up with zeros."""
    row_bytes = rows.shape[1]
    if row_bytes % 8 == 0:
        found: np.ndarray = rows.view(-1).view(torch.int64)[torch.from_numpy(words).to(rows.device)].cpu().numpy()
        return found.view(np.uint64)
    row, word = np.divmod(words, -(-row_bytes // 8))
    column = word[:, None] * 8 + np.arange(8)
    inside = column < row_bytes
    index = torch.from_numpy((row[:, None] * row_bytes + column)[inside]).to(rows.device)
    out = np.zeros(column.shape, np.uint8)
    out[inside] = rows.view(-1)[index].cpu().numpy()
    return out.view("<u8").astype(np.uint64).ravel()


def _add(rows: Tensor, patch: Patch) -> None:
    assert patch.positions is not None
    index = torch.from_numpy(patch.positions - patch.first).to(rows.device)
    flat = rows.view(-1)
    flat[index] += torch.from_numpy(patch.values).to(rows.device)
