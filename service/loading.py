"""The cold load: a checkpoint goes the same way into the same storages as a push does, without the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from quant.checkpoint import Checkpoint
from quant.expert_maps import ExpertMaps, Map, dealt_out, module_of
from quant.formats import FORMATS, NON_FINITE, TensorSpec, amax, constants, encode
from quant.models import build_model, held_of
from quant.names import canonical_name, expert_parts
from quant.parameters import ParameterRow
from quant.pipelines import is_pipeline
from quant.variants import bare
from sharding.routes import as_bytes
from weight_update.chunks import Chunk, decode_request, encode_chunk
from weight_update.encoder import BLOCK_BYTES, global_scales, rows_at_a_time
from weight_update.errors import ManifestError, PlanError, raise_all
from weight_update.holdings import Holdings, among, holdings_of
from weight_update.receiver import Receiver

FLOATS = ("BF16", "F32", "F16")
NO_MAPS = ExpertMaps()
LOAD_TRANSACTION = 1  # before any coordinator is there


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a checkpoint keeps the rows of one parameter: itself, or rows of one expert of a stacked tensor."""

    name: str
    expert: int | None = None
    row0: int = 0


def cold_load(
    receiver: Receiver,
    checkpoint: Checkpoint,
    group: dist.ProcessGroup | None,
    owners: Mapping[str, nn.Module],
    maps: ExpertMaps = NO_MAPS,
) -> None:
    """Fill this rank's rows from a checkpoint, BF16 or already in checkpoint form. Collective over the replica.

    owners: parameter name -> module that holds it. maps: where experts that may be moved are to lie, by default as the
    checkpoint says, which a stored version does, else dealt out in turn. Every parameter of the receiver must be there
    in its shape. Activation scales that the checkpoint lacks become 1.0, which means uncalibrated.
    """
    _ColdLoad(receiver, checkpoint, owners, maps).run(group)


def holdings_among(model: nn.Module, config_dir: Path, format: str, formats: Sequence[str]) -> Holdings:
    """What a rank holds, in a service whose replicas have these formats; its own alone where they name no other."""
    own = holdings_of(model)
    if len(formats) < 2:
        return own
    if is_pipeline(config_dir):
        raise PlanError(f"{config_dir}: replicas of several formats ({', '.join(formats)}) hold language models only")
    others = {each: held_of(build_model(config_dir, each, "plain", device="meta")) for each in formats}
    return among(own, format, others)


Filled = Iterator[tuple[TensorSpec, int, Tensor]]


class _ColdLoad:
    """One load: what the receiver needs, and where the checkpoint keeps it."""

    def __init__(
        self, receiver: Receiver, checkpoint: Checkpoint, owners: Mapping[str, nn.Module], maps: ExpertMaps
    ) -> None:
        self._receiver = receiver
        self._manifest = receiver.manifest
        self._checkpoint = checkpoint
        self._owners = owners
        self._entries = _entries(checkpoint)
        self._maps = ExpertMaps({row.name.rpartition(".")[0]: self._map(row, maps) for row in self._of_maps()})
        names = [spec.name for spec in self._manifest.tensors] + [row.name for row in self._manifest.parameters]
        named = {name: self._entries.get(self._maps.logical(bare(name))) for name in names}
        self._entries = {name: entry for name, entry in named.items() if entry is not None}

    def run(self, group: dist.ProcessGroup | None) -> None:
        receiver, manifest = self._receiver, self._manifest
        here = {spec.name for i, spec in enumerate(manifest.tensors) if not receiver.is_absent(i)}
        rows = [row for row in manifest.parameters if manifest.tensors_of(row)[0].name in here]
        rows = [row for row in rows if module_of(row.name) is None]
        encoded = [row for row in rows if not self._has_checkpoint_form(row)]
        encoded_names = {row.name for row in encoded}
        problems = [each for row in rows for each in self._problems(row, row.name in encoded_names)]
        raise_all(ManifestError, f"cannot load {self._checkpoint.config_dir}", problems)
        scales = self._scales(encoded, group)
        everything = np.arange(len(manifest.tensors))
        receiver.begin(LOAD_TRANSACTION, receiver.version + 1, receiver.version, everything)
        for row in rows:
            filled = self._encoded(row, scales.get(row.name)) if row.name in encoded_names else self._copied(row)
            for spec, first, data in filled:
                receiver.stage(_chunk(manifest.index[spec.name], first, data), transaction=LOAD_TRANSACTION)
        for name, each in self._maps.tensors():
            start, stop = self._owned(manifest.tensors[manifest.index[name]])
            if start < stop:
                chunk = _chunk(manifest.index[name], start, as_bytes(each[start:stop]))
                receiver.stage(chunk, transaction=LOAD_TRANSACTION)
        receiver.prepare()
        receiver.install()
        receiver.publish()

    # -- what is there

    def _of_maps(self) -> list[ParameterRow]:
        return [row for row in self._manifest.parameters if module_of(row.name) is not None]

    def _map(self, row: ParameterRow, maps: ExpertMaps) -> Map:
        """Of the module whose map this is."""
        module, (num_slots,) = row.name.rpartition(".")[0], row.shape
        if module in maps.of:
            return maps.of[module]
        if row.name in self._entries and self._checkpoint.spec(self._entries[row.name].name).shape == row.shape:
            stored = self._checkpoint.rows(self._entries[row.name].name)
            return tuple(map(int, stored.tolist()))
        return dealt_out(num_slots, int(getattr(self._owners[row.name], "num_experts", num_slots)))

    def _has_checkpoint_form(self, row: ParameterRow) -> bool:
        parts = zip(self._manifest.tensors_of(row), FORMATS[row.format].components, strict=True)
        specs = [spec for spec, part in parts if part.kind != "input_scale"]
        return len(specs) > 1 and all(spec.name in self._entries for spec in specs)

    def _problems(self, row: ParameterRow, encode_it: bool) -> Iterator[str]:
        """Why a parameter cannot be loaded: each problem names tensor, checkpoint, shapes, dtype and module class."""
        if not encode_it:
            for spec in self._manifest.tensors_of(row):
                entry = self._entries.get(spec.name)
                found = self._checkpoint.spec(entry.name) if entry else spec
                if (found.shape or (1,), found.dtype) != (spec.shape or (1,), spec.dtype):
                    yield self._misfit(row, spec.name, f"{list(found.shape)} {found.dtype}", spec)
            return
        entry = self._entries.get(row.name)
        wanted = TensorSpec(name=row.name, dtype="BF16", shape=row.shape)
        if entry is None:
            yield self._misfit(row, row.name, "no such tensor", wanted)
            return
        found = self._checkpoint.spec(entry.name)
        shape = found.shape if entry.expert is None else row.shape
        if shape != row.shape or found.dtype not in FLOATS:
            yield self._misfit(row, entry.name, f"{list(found.shape)} {found.dtype}", wanted)

    def _misfit(self, row: ParameterRow, name: str, found: str, wanted: TensorSpec) -> str:
        start, stop = self._owned(self._manifest.tensors_of(row)[0])
        owner = self._owners.get(bare(row.name))
        held_by = "" if owner is None else f" in {type(owner).__name__}"
        return (
            f"{name}: {self._checkpoint.config_dir} has {found}; expected {list(wanted.shape)} {wanted.dtype}"
            f" (rows {start}:{stop} on this rank) for format {row.format}{held_by}; wrong checkpoint or --format?"
        )

    def _owned(self, spec: TensorSpec) -> tuple[int, int]:
        index = self._manifest.index[spec.name]
        return int(self._receiver.row_start[index]), int(self._receiver.row_stop[index])

    # -- rows

    def _blocks(self, row: ParameterRow) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows [n, columns] in the format's rows_dtype) of the rows of a parameter that this rank owns."""
        entry = self._entries[row.name]
        fmt = FORMATS[row.format]
        start, stop = (fmt.components[0].rows * at for at in self._owned(self._manifest.tensors_of(row)[0]))
        columns = math.prod(row.shape[1:])
        step = rows_at_a_time(fmt, columns)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if entry.expert is None:
                rows = self._checkpoint.rows(entry.name, first, last)
            else:
                stacked = self._checkpoint.rows(entry.name, entry.expert, entry.expert + 1)
                rows = stacked[0, entry.row0 + first : entry.row0 + last]
            yield first, rows.to(fmt.rows_dtype).reshape(last - first, columns).contiguous()

    def _scales(self, encoded: list[ParameterRow], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
        """The global scale of every fused group, from the largest amax over the replica's ranks."""
        quantized = [row for row in encoded if FORMATS[row.format].is_quantized]
        bits = torch.zeros(len(quantized), dtype=torch.int64)
        for i, row in enumerate(quantized):
            bits[i] = max((amax(block) for _, block in self._blocks(row)), default=0)
        if group is not None:
            dist.all_reduce(bits, op=dist.ReduceOp.MAX, group=group)
        values = bits.tolist()
        bad = [f"{row.name}: NaN or Inf" for row, value in zip(quantized, values, strict=True) if value >= NON_FINITE]
        raise_all(ManifestError, f"cannot load {self._checkpoint.config_dir}", bad)
        return global_scales(zip(quantized, values, strict=True))

    def _encoded(self, row: ParameterRow, scale: Tensor | None) -> Filled:
        specs = {spec.name.rpartition(".")[2]: spec for spec in self._manifest.tensors_of(row)}
        fmt = FORMATS[row.format]
        if not fmt.is_quantized:
            spec = self._manifest.tensors_of(row)[0]
            yield from ((spec, first, as_bytes(block)) for first, block in self._blocks(row))
            return
        whole = {part.suffix: self._calibrated(specs[part.suffix]) for part in fmt.components if not part.rows}
        whole |= constants(fmt, row.shape)
        part = fmt.component("global_scale")
        if part is not None and scale is not None:
            whole[part.suffix] = scale
        parts = {part.suffix: part for part in fmt.row_components}
        for first, block in self._blocks(row):
            for suffix, rows in encode(fmt, block, scale, given=whole).items():
                yield specs[suffix], first // parts[suffix].rows, as_bytes(rows)
        for suffix, value in whole.items():
            spec = specs[suffix]
            if self._owned(spec) == (0, spec.num_rows):
                yield spec, 0, as_bytes(value.reshape(spec.shape))

    def _calibrated(self, spec: TensorSpec) -> Tensor:
        """An activation scale or offset of the checkpoint; 1.0 where it has none."""
        entry = self._entries.get(spec.name)
        return self._checkpoint.rows(entry.name).to(torch.float32) if entry else torch.ones(spec.shape)

    def _copied(self, row: ParameterRow) -> Filled:
        for spec in self._manifest.tensors_of(row):
            start, stop = self._owned(spec)
            entry = self._entries.get(spec.name)
            if start == stop:
                continue
            if entry is None:
                yield spec, start, as_bytes(torch.ones(1))
                continue
            step = max(1, BLOCK_BYTES // spec.row_bytes)
            for first in range(start, stop, step):
                last = min(first + step, stop)
                rows = self._checkpoint.rows(entry.name, first, last)
                yield spec, first, as_bytes(rows).reshape(last - first, spec.row_bytes)


def _entries(checkpoint: Checkpoint) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name in checkpoint.names():
        for part in expert_parts(name, checkpoint.spec(name).shape):
            entries[part.name] = Entry(name=name, expert=part.expert, row0=part.row0)
        entries.setdefault(canonical_name(name), Entry(name=name))
    return entries


def _chunk(index: int, first: int, data: Tensor) -> Chunk:
    """The chunk that a push would send for these rows."""
    payload = data.reshape(-1).numpy().data
    tensor, offset = np.array([index], np.uint32), np.array([first * data.shape[1]], np.uint64)
    chunk = decode_request(encode_chunk(0, tensor, offset, np.array([len(payload)], np.uint32), [payload]))
    assert isinstance(chunk, Chunk)
    return chunk
