"""Deltas made by hand, for receivers: what changed between two contents, from several trainer ranks, in chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quant.formats import TensorSpec
from tests.rig import Content, chunk_of
from weight_update.chunks import Chunk
from weight_update.delta import BlobSize, Patch, cut, pack
from weight_update.receiver import Receiver

NUM_TRAINERS = 2


def changed(content: Content, names: Sequence[str], seed: int) -> Content:
    """The same content, some bytes of these tensors other ones: few, many or none. Single numbers stay numbers."""
    rng = np.random.default_rng(seed)
    new = dict(content)
    for name in names:
        data = content[name].copy()
        if data.size == 4:
            new[name] = rng.uniform(0.1, 9, data.shape).astype(np.float32)[:, :1].view(np.uint8)
            continue
        flat, share = data.reshape(-1), rng.choice([0, 0.001, 0.02, 0.3, 1])
        count = int(np.ceil(share * len(flat)))
        at = rng.choice(len(flat), count, replace=False)
        flat[at] = rng.integers(0, 256, count, np.uint8)
        new[name] = data
    return new


def patches(specs: Sequence[TensorSpec], old: Content, new: Content, trainer: int, seed: int) -> list[Patch]:
    """What one of the trainer ranks has to say: the rows are split between them, the kinds are dice."""
    found = []
    for i, spec in enumerate(specs):
        rng = np.random.default_rng((seed, i))  # the trainer ranks split alike
        half = int(rng.integers(0, spec.num_rows + 1))
        first, stop = (0, half * spec.row_bytes) if trainer == 0 else (half * spec.row_bytes, spec.num_bytes)
        before, after = old[spec.name].reshape(-1)[first:stop], new[spec.name].reshape(-1)[first:stop]
        at = np.flatnonzero(before != after)
        if not len(at):
            continue
        positions, relative, values = None, False, after.copy()
        match int(rng.integers(0, 3)):
            case 0:
                positions, values = at + first, (after - before)[at]
            case 1:
                relative, values = True, after - before
        found.append(Patch(tensor=i, first=first, stop=stop, positions=positions, values=values, relative=relative))
    return found


def blobs_for(
    receiver: Receiver, tensors: Sequence[int], old: Content, new: Content, seed: int
) -> list[tuple[bytes, BlobSize]]:
    """What each trainer rank sends to this rank."""
    specs = [receiver.manifest.tensors[i] for i in tensors]
    found = []
    for trainer in range(NUM_TRAINERS):
        parts = [
            cut(
                patch,
                int(receiver.row_start[tensors[patch.tensor]]) * specs[patch.tensor].row_bytes,
                int(receiver.row_stop[tensors[patch.tensor]]) * specs[patch.tensor].row_bytes,
            )
            for patch in patches(specs, old, new, trainer, seed)
        ]
        found.append(pack([part for part in parts if part is not None]))
    return found


def chunks_of(blobs: Sequence[tuple[bytes, BlobSize]], seed: int) -> list[Chunk]:
    """The blobs in pieces, in any order, some of them twice."""
    rng = np.random.default_rng(seed)
    pieces = []
    for trainer, (blob, _) in enumerate(blobs):
        middle = int(rng.integers(0, len(blob) + 1))  # of a trainer rank in whose rows nothing changed it is empty
        pieces += [(trainer, 0, blob[:middle]), (trainer, middle, blob[middle:])]
    order = [*rng.permutation(len(pieces)), *rng.integers(0, len(pieces), 2)]
    return [chunk_of([pieces[i]]) for i in order]


def send_delta(
    receiver: Receiver, transaction: int, version: int, tensors: Sequence[int], old: Content, new: Content, seed: int
) -> None:
    """Begin a delta on this rank and stage all of it."""
    blobs = blobs_for(receiver, tensors, old, new, seed)
    receiver.begin(transaction, version, receiver.version, np.array(tensors), blobs=[size for _, size in blobs])
    for chunk in chunks_of(blobs, seed):
        receiver.stage(chunk, transaction=transaction)
