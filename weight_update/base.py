"""What a trainer rank sends of its weights, and what it remembers of them once the service has confirmed it.

    whole = Whole(plan, scales, keep=torch.device("cpu"))      # every row
    changes = compare(plan, scales, base)                      # what is not as in the base
    base = whole.confirmed(base, version, digest)              # only after the commit

The bytes that are kept are those of the checkpoint form, so the next push compares what would be sent and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from quant.formats import TensorSpec

from .delta import DENSE, RELATIVE, SPARSE, Patch, changed_bytes, kind_of
from .digest import MASK, Digests, Lanes, digest_rows, digest_words, name_key, words_of
from .encoder import encoded
from .source import PushPlan

Scales = Mapping[str, Tensor]
Block = tuple[int, TensorSpec, int, Tensor]  # position in the push, tensor, first row, uint8 [rows, row_bytes]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Held:
    """Rows of one tensor in checkpoint form, uint8 [n, row_bytes] from row `first`, and what they add to its digest."""

    first: int
    rows: Tensor
    digest: Lanes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Base:
    """What this trainer rank knows of a committed version: the rows that it sent of it, or of one before."""

    version: int
    digest: str
    held: Mapping[str, Held]

    @property
    def num_bytes(self) -> int:
        return sum(held.rows.nbytes for held in self.held.values())


class Whole:
    """Every row of a push. keep: where its bytes stay, to be the base of the next push; None sends them unkept."""

    mode = "full"

    def __init__(self, plan: PushPlan, scales: Scales, *, keep: torch.device | None) -> None:
        self._plan, self._scales, self._kept = plan, scales, keep is not None
        self._keep = keep
        self.digests = np.zeros((len(plan.specs), 2), np.uint64)
        self.held: dict[str, Held] = {}
        self._taken = False

    @classmethod
    def of(cls, plan: PushPlan, held: Mapping[str, Held]) -> Whole:
        """The push of rows that are in checkpoint form already."""
        whole = cls(plan, {}, keep=torch.device("cpu"))
        whole.held, whole._taken = dict(held), True
        whole.digests = digests_of(plan, held)
        return whole

    def take(self) -> None:
        """Encode everything now: the model may change from here on. Held on the host where nothing is kept after."""
        self._keep = self._keep or torch.device("cpu")
        for _ in self.blocks():
            pass

    def blocks(self) -> Iterator[Block]:
        """All rows, encoded as they are asked for unless they were taken before."""
        if self._taken:
            for i, spec in enumerate(self._plan.specs):
                if spec.name in self.held:
                    yield i, spec, self.held[spec.name].first, self.held[spec.name].rows.cpu()
            return
        self.digests[:] = 0
        positions = {spec.name: i for i, spec in enumerate(self._plan.specs)}
        for source in self._plan.sources:
            parts: dict[str, list[tuple[int, Tensor]]] = {}
            for spec, first, data in encoded(source, self._scales.get(source.name)):
                lanes = digest_rows(name_key(spec.name), data, first)
                self.digests[positions[spec.name]] += np.array(lanes, np.uint64)
                yield positions[spec.name], spec, first, data
                if self._keep is not None:
                    parts.setdefault(spec.name, []).append((first, data))
            self._hold(parts, positions)
        self._taken = self._keep is not None

    def _hold(self, parts: Mapping[str, list[tuple[int, Tensor]]], positions: Mapping[str, int]) -> None:
        for name, blocks in parts.items():
            lane0, lane1 = self.digests[positions[name]].tolist()
            rows = torch.cat([data for _, data in blocks]).to(self._keep)  # a copy, even of one block
            self.held[name] = Held(first=blocks[0][0], rows=rows, digest=(lane0, lane1))

    def confirmed(self, base: Base | None, version: int, digest: str) -> Base | None:
        """What is known once this push is that version; base: what was known of the version before."""
        if not self._kept:
            return None
        carried = {} if base is None else base.held
        return Base(version=version, digest=digest, held={**carried, **self.held})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Changes:
    """What is not as in a base: patches of tensors of the push by position, the digests of all its rows on this rank,
    and tensors that come whole."""

    plan: PushPlan
    base: Base
    patches: tuple[Patch, ...]
    digests: Digests
    whole: Mapping[str, Held] = field(default_factory=dict)

    mode = "delta"

    @property
    def changed(self) -> frozenset[int]:
        """Positions in the push of the tensors that change on this rank."""
        return frozenset(patch.tensor for patch in self.patches)

    @property
    def num_bytes(self) -> int:
        """About what the patches take before they are packed."""
        dense = sum(len(patch.values) for patch in self.patches if patch.kind == DENSE)
        return dense + sum(2 * int(np.count_nonzero(patch.values)) for patch in self.patches if patch.kind != DENSE)

    def applied(self) -> dict[str, Held]:
        """The rows of the push, all of them; the base's own memory is rewritten and means nothing afterwards."""
        held = {spec.name: self.base.held[spec.name] for spec in self.plan.specs if spec.name in self.base.held}
        for patch in self.patches:
            if patch.positions is not None:
                name = self.plan.specs[patch.tensor].name
                _add(held[name].rows, patch)
        held |= self.whole
        lanes = {spec.name: tuple(self.digests[i].tolist()) for i, spec in enumerate(self.plan.specs)}
        return {name: replace(each, digest=lanes[name]) for name, each in held.items()}

    def confirmed(self, base: Base | None, version: int, digest: str) -> Base:
        """What is known once this push is that version."""
        return Base(version=version, digest=digest, held={**self.base.held, **self.applied()})


def compare(plan: PushPlan, scales: Scales, base: Base) -> Changes:
    """Encode everything and compare it with the base, a tensor at a time."""
    positions = {spec.name: i for i, spec in enumerate(plan.specs)}
    digests = np.zeros((len(plan.specs), 2), np.uint64)
    patches: list[Patch] = []
    whole: dict[str, Held] = {}
    for source in plan.sources:
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        specs = {spec.name: spec for spec in source.specs}
        for spec, first, data in encoded(source, scales.get(source.name)):
            parts.setdefault(spec.name, []).append((first, data))
        for name, blocks in parts.items():
            at = positions[name]
            new = torch.cat([data for _, data in blocks])
            patch, held = _compared(at, specs[name], base.held.get(name), blocks[0][0], new)
            patches += [patch] if patch is not None else []
            digests[at] = held.digest
            if patch is not None and patch.positions is None:
                whole[name] = held
    return Changes(plan=plan, base=base, patches=tuple(patches), digests=digests, whole=whole)


def _compared(at: int, spec: TensorSpec, old: Held | None, first: int, new: Tensor) -> tuple[Patch | None, Held]:
    """The patch of one tensor, none where nothing changed, and its rows as they are now."""
    key, begin = name_key(spec.name), first * spec.row_bytes
    stop = begin + new.numel()
    relative = False
    if old is not None and old.first == first and old.rows.shape == new.shape:
        rows = new.to(old.rows.device)
        found = changed_bytes(old.rows, rows)
        if not len(found):
            return None, old
        kind = kind_of(len(found), new.numel())
        if kind == SPARSE:
            index = torch.from_numpy(found).to(rows.device)
            difference = (rows.view(-1)[index] - old.rows.view(-1)[index]).cpu().numpy()
            patch = Patch(tensor=at, first=begin, stop=stop, positions=found + begin, values=difference)
            return patch, replace(old, digest=_moved(key, spec.row_bytes, old, rows, found, begin))
        relative = kind == RELATIVE
    held = Held(first=first, rows=new if old is None else new.to(old.rows.device), digest=digest_rows(key, new, first))
    values = (rows - old.rows).cpu() if old is not None and relative else new
    flat = values.view(-1).numpy()
    return Patch(tensor=at, first=begin, stop=stop, positions=None, values=flat, relative=relative), held


def _moved(key: int, row_bytes: int, old: Held, rows: Tensor, found: np.ndarray, begin: int) -> Lanes:
    """The digest with the words of the changed bytes taken out as they were and put in as they are."""
    words = words_of(row_bytes, found)
    words = words[np.diff(words, prepend=-1) != 0]
    at = words + begin // row_bytes * -(-row_bytes // 8)
    out, into = (digest_words(key, row_bytes, at, _words(each, words)) for each in (old.rows, rows))
    lanes = [(lane - a + b) & MASK for lane, a, b in zip(old.digest, out, into, strict=True)]
    return lanes[0], lanes[1]


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


def digests_of(plan: PushPlan, held: Mapping[str, Held]) -> Digests:
    """What this rank's rows add to the digests of the pushed tensors, [n, 2]."""
    none = (0, 0)
    lanes = [held[spec.name].digest if spec.name in held else none for spec in plan.specs]
    return np.array(lanes, np.uint64).reshape(-1, 2)
