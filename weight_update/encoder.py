"""A trainer's rows in checkpoint form, block by block, so that its scratch is bounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.formats import FORMATS, TensorSpec, encode, first_nonfinite
from sharding.routes import as_bytes

from .source import Source

BLOCK_BYTES = 8 << 20  # BF16 bytes encoded at a time


def blocks(source: Source) -> Iterator[tuple[int, Tensor]]:
    """(first row, BF16 rows) of a source to encode, in blocks of bounded size; nothing for checkpoint form."""
    if source.kind == "checkpoint" or source.rows.numel() == 0:
        return
    rows = source.rows.reshape(max(1, source.rows.shape[0]) if source.rows.ndim else 1, -1)
    step = max(1, BLOCK_BYTES // (2 * rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        # A view where the rows are contiguous BF16 on the host already; otherwise scratch of one block.
        block = rows[start : start + step].to(device="cpu", dtype=torch.bfloat16)
        yield source.first + start, block.contiguous()


def nonfinite_index(source: Source) -> tuple[int, ...]:
    for first, block in blocks(source):
        found = first_nonfinite(block)
        if found is not None:
            return (first + found[0], *found[1:])[: max(1, len(source.parameter.shape))]
    raise AssertionError("amax saw a value that is not finite, and no element is")


def encoded(source: Source, scale: Tensor | None) -> Iterator[tuple[TensorSpec, int, Tensor]]:
    """(tensor, first row, [n, row bytes] uint8) of everything that a source sends."""
    if not source.sends:
        return
    if source.kind == "checkpoint":
        if source.rows.numel():
            yield source.specs[0], source.first, as_bytes(source.rows.cpu())
        return
    format_ = FORMATS[source.parameter.format]
    for first, block in blocks(source):
        if scale is None:
            yield source.specs[0], first, as_bytes(block)
            continue
        encoded = encode(format_, block, scale)
        for spec in source.specs:
            data = encoded.get(spec.name.rpartition(".")[2])
            if data is not None:
                yield spec, first, as_bytes(data)
    if scale is not None and source.first == 0 and source.rows.shape[0]:
        spec = next(spec for spec in source.specs if spec.shape == ())
        yield spec, 0, as_bytes(scale)
