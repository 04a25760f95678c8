"""The cold load: a checkpoint goes the same way into the same storages as a push does, without the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.formats import FORMATS, TensorSpec, amax, encode, global_scale
from quant.names import canonical_name, expert_parts
from quant.parameters import ParameterRow
from sharding.routes import as_bytes
from weight_update.chunks import Chunk, decode_request, encode_chunk
from weight_update.errors import ManifestError, raise_all
from weight_update.manifest import Manifest
from weight_update.receiver import Receiver

BLOCK_BYTES = 8 << 20  # BF16 bytes read and encoded at a time
LOAD_TRANSACTION = 1  # before any coordinator is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a checkpoint keeps the rows of one parameter: itself, or rows of one expert of a stacked tensor."""

    name: str
    expert: int | None = None
    row0: int = 0


def cold_load(receiver: Receiver, checkpoint: Checkpoint, group: dist.ProcessGroup | None) -> None:
    """Fill this rank's rows from a checkpoint, BF16 or already in checkpoint form. Collective over the replica.

    Every parameter of the receiver must be there in its shape. Activation scales that the checkpoint lacks become 1.0.
    """
    manifest = receiver.manifest
    entries = _entries(checkpoint)
    encoded = [row for row in manifest.parameters if not _has_checkpoint_form(manifest, row, entries)]
    _check(manifest, encoded, entries, checkpoint)
    scales = _scales(receiver, encoded, entries, checkpoint, group)
    receiver.begin(LOAD_TRANSACTION, receiver.version + 1, receiver.version, np.arange(len(manifest.tensors)))
    names = {row.name for row in encoded}
    for row in manifest.parameters:
        fill = _encoded if row.name in names else _copied
        for spec, first, data in fill(receiver, row, entries, checkpoint, scales):
            receiver.stage(_chunk(manifest.index[spec.name], first, data), transaction=LOAD_TRANSACTION)
    receiver.prepare()
    receiver.install()
    receiver.publish()


def _entries(checkpoint: Checkpoint) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name in checkpoint.names():
        for part in expert_parts(name, checkpoint.spec(name).shape):
            entries[part.name] = Entry(name=name, expert=part.expert, row0=part.row0)
        entries.setdefault(canonical_name(name), Entry(name=name))
    return entries


def _has_checkpoint_form(manifest: Manifest, row: ParameterRow, entries: Mapping[str, Entry]) -> bool:
    specs = [spec for spec in manifest.tensors_of(row) if not spec.name.endswith(".input_scale")]
    return len(specs) > 1 and all(spec.name in entries for spec in specs)


def _check(
    manifest: Manifest, encoded: list[ParameterRow], entries: Mapping[str, Entry], checkpoint: Checkpoint
) -> None:
    problems = []
    for row in encoded:
        entry = entries.get(row.name)
        if entry is None:
            problems.append(f"{row.name}: not in {checkpoint.config_dir}, expected {list(row.shape)} ({row.format})")
            continue
        spec = checkpoint.spec(entry.name)
        shape = spec.shape if entry.expert is None else row.shape
        if shape != row.shape or spec.dtype not in ("BF16", "F32", "F16"):
            problems.append(
                f"{row.name}: {entry.name} of {checkpoint.config_dir} is {list(spec.shape)} {spec.dtype}, the model"
                f" needs {list(row.shape)} BF16, F16 or F32 for format {row.format}"
            )
    raise_all(ManifestError, f"cannot load {checkpoint.config_dir}", problems)


def _owned(receiver: Receiver, spec: TensorSpec) -> tuple[int, int]:
    index = receiver.manifest.index[spec.name]
    return int(receiver.row_start[index]), int(receiver.row_stop[index])


def _blocks(
    receiver: Receiver, row: ParameterRow, entries: Mapping[str, Entry], checkpoint: Checkpoint
) -> Iterator[tuple[int, Tensor]]:
    """(first row, BF16 rows [n, columns]) of the rows of a parameter that this rank owns."""
    entry = entries[row.name]
    start, stop = _owned(receiver, receiver.manifest.tensors_of(row)[0])
    columns = math.prod(row.shape[1:])
    step = max(1, BLOCK_BYTES // (2 * columns))
    for first in range(start, stop, step):
        last = min(first + step, stop)
        if entry.expert is None:
            rows = checkpoint.rows(entry.name, first, last)
        else:
            rows = checkpoint.rows(entry.name, entry.expert, entry.expert + 1)[
                0, entry.row0 + first : entry.row0 + last
            ]
        yield first, rows.to(torch.bfloat16).reshape(last - first, columns).contiguous()


def _scales(
    receiver: Receiver,
    encoded: list[ParameterRow],
    entries: Mapping[str, Entry],
    checkpoint: Checkpoint,
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    """The global scale of every fused group, from the largest amax over the replica's ranks."""
    quantized = [row for row in encoded if FORMATS[row.format].has_global_scale]
    bits = torch.zeros(len(quantized), dtype=torch.int64)
    for i, row in enumerate(quantized):
        bits[i] = max((amax(block) for _, block in _blocks(receiver, row, entries, checkpoint)), default=0)
    if group is not None:
        dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=group)
    values = bits.tolist()
    bad = [row.name for row, value in zip(quantized, values, strict=True) if value >= 0x7F80]
    raise_all(ManifestError, f"cannot load {checkpoint.config_dir}", [f"{name}: NaN or Inf" for name in bad])
    largest: dict[str, int] = {}
    for row, value in zip(quantized, values, strict=True):
        key = row.group or row.name
        largest[key] = max(largest.get(key, 0), value)
    return {row.name: global_scale(FORMATS[row.format], largest[row.group or row.name]) for row in quantized}


Filled = Iterator[tuple[TensorSpec, int, Tensor]]


def _encoded(
    receiver: Receiver,
    row: ParameterRow,
    entries: Mapping[str, Entry],
    checkpoint: Checkpoint,
    scales: Mapping[str, Tensor],
) -> Filled:
    specs = {spec.name.rpartition(".")[2]: spec for spec in receiver.manifest.tensors_of(row)}
    scale = scales.get(row.name)
    for first, block in _blocks(receiver, row, entries, checkpoint):
        if scale is None:
            yield receiver.manifest.tensors_of(row)[0], first, as_bytes(block)
            continue
        for suffix, rows in encode(FORMATS[row.format], block, scale).items():
            yield specs[suffix], first, as_bytes(rows)
    if scale is None:
        return
    calibrated = entries.get(specs["input_scale"].name)
    input_scale = checkpoint.rows(calibrated.name) if calibrated else torch.ones(())
    for spec, value in ((specs["weight_scale_2"], scale), (specs["input_scale"], input_scale)):
        if _owned(receiver, spec) == (0, 1):
            yield spec, 0, as_bytes(value.to(torch.float32).reshape(()))


def _copied(
    receiver: Receiver,
    row: ParameterRow,
    entries: Mapping[str, Entry],
    checkpoint: Checkpoint,
    scales: Mapping[str, Tensor],
) -> Filled:
    for spec in receiver.manifest.tensors_of(row):
        start, stop = _owned(receiver, spec)
        if start == stop:
            continue
        if spec.name not in entries:
            yield spec, 0, as_bytes(torch.ones((), dtype=torch.float32))
            continue
        data = as_bytes(checkpoint.rows(entries[spec.name].name, start, stop))
        if data.numel() != (stop - start) * spec.row_bytes:
            found = checkpoint.spec(entries[spec.name].name)
            raise ManifestError(
                f"{spec.name}: {checkpoint.config_dir} has {list(found.shape)} {found.dtype}, the model needs"
                f" {list(spec.shape)} {spec.dtype} (rows {start}:{stop} on this rank); wrong checkpoint or format?"
            )
        yield spec, start, data


def _chunk(index: int, first: int, data: Tensor) -> Chunk:
    """The chunk that a push would send for these rows."""
    payload = memoryview(data.numpy().reshape(-1))
    tensor, offset = np.array([index], np.uint32), np.array([first * data.shape[1]], np.uint64)
    chunk = decode_request(encode_chunk(0, tensor, offset, np.array([len(payload)], np.uint32), [payload]))
    assert isinstance(chunk, Chunk)
    return chunk
