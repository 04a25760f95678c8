"""Several deltas, one after the other, as one: how a rank goes back over many versions in one commit.

patches = compose([newest.patches, older.patches, oldest.patches])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from .delta import DENSE, SPARSE, Patch, cut


def compose(chain: Sequence[Sequence[Patch]]) -> list[Patch]:
    """What leads where these deltas lead, applied in this order; tensors mean the same in all of them."""
    by_tensor: dict[int, list[Patch]] = {}
    for patches in chain:
        for patch in patches:
            by_tensor.setdefault(patch.tensor, []).append(patch)
    return [composed for patches in by_tensor.values() for composed in _of_tensor(patches)]


def _of_tensor(patches: Sequence[Patch]) -> Iterator[Patch]:
    """Rows are taken apart where a patch begins or ends, so that each patch covers a run of them or none of it."""
    edges = sorted({edge for patch in patches for edge in (patch.first, patch.stop)})
    for first, stop in pairwise(edges):
        parts = [part for patch in patches if (part := cut(patch, first, stop)) is not None]
        whole = [i for i, part in enumerate(parts) if part.kind == DENSE]
        if whole:
            yield _written(parts[whole[-1]], parts[whole[-1] + 1 :])
        elif any(part.kind != SPARSE for part in parts):
            values = np.zeros(stop - first, np.uint8)
            start = Patch(tensor=parts[0].tensor, first=first, stop=stop, positions=None, values=values, relative=True)
            yield _written(start, parts)
        elif parts:
            yield from _summed(parts, first, stop)


def _written(start: Patch, parts: Sequence[Patch]) -> Patch:
    """Whole rows, or the differences of whole rows, with further differences on top."""
    values = start.values.copy()
    for part in parts:
        if part.positions is None:
            values += part.values
        else:
            values[part.positions - start.first] += part.values  # each position once in a patch
    return Patch(
        tensor=start.tensor,
        first=start.first,
        stop=start.stop,
        positions=None,
        values=values,
        relative=start.relative,
    )


def _summed(parts: Sequence[Patch], first: int, stop: int) -> Iterator[Patch]:
    """Single bytes: differences at the same position add up, and may end at nothing."""
    positions = np.concatenate([part.positions for part in parts if part.positions is not None])
    order = np.argsort(positions, kind="stable")
    positions, values = positions[order], np.concatenate([part.values for part in parts])[order]
    begins = np.flatnonzero(np.diff(positions, prepend=-1))
    sums = np.add.reduceat(values, begins, dtype=np.uint8)
    kept = np.flatnonzero(sums)
    if len(kept):
        yield Patch(
            tensor=parts[0].tensor, first=first, stop=stop, positions=positions[begins][kept], values=sums[kept]
        )
