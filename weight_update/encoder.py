"""A trainer's rows in checkpoint form, block by block, so that its scratch is bounded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quant.formats import FORMATS, TensorSpec, constants, encode, first_nonfinite
from sharding.routes import as_bytes

from .source import Source

BLOCK_BYTES = 8 << 20  # BF16 bytes encoded at a time


def blocks(source: Source) -> Iterator[tuple[int, Tensor]]:
    """(first row, BF16 rows) of a source to encode, in blocks of bounded size; nothing for checkpoint form."""
    if source.kind == "checkpoint" or source.rows.numel() == 0:
        return
    rows = source.rows.reshape(max(1, source.rows.shape[0]) if source.rows.ndim else 1, -1)
    format_ = FORMATS[source.parameter.format]
    step = max(1, BLOCK_BYTES // (2 * rows.shape[1]) // format_.row_step) * format_.row_step
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
    if not format_.is_quantized:
        yield from ((source.specs[0], first, as_bytes(block)) for first, block in blocks(source))
        return
    specs = {spec.name.rpartition(".")[2]: spec for spec in source.specs}
    parts = {part.suffix: part for part in format_.row_components}
    for first, block in blocks(source):
        for suffix, data in encode(format_, block, scale).items():
            yield specs[suffix], first // parts[suffix].rows, as_bytes(data)
    if source.first == 0 and source.rows.shape[0]:
        whole = constants(format_, source.parameter.shape)
        part = format_.component("global_scale")
        if part is not None and scale is not None:
            whole[part.suffix] = scale
        yield from ((specs[suffix], 0, as_bytes(value)) for suffix, value in whole.items())
