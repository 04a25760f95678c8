"""A trainer's rows in checkpoint form, block by block, so that its scratch is bounded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quant.formats import FORMATS, Format, TensorSpec, amax, constants, encode, first_nonfinite, global_scale
from quant.parameters import ParameterRow
from sharding.routes import as_bytes

from .adapters import merged
from .source import PushPlan, Source

BLOCK_BYTES = 8 << 20  # BF16 bytes encoded at a time
SMALL_ELEMENTS, SMALL_AT_A_TIME = 2048, 4096  # of a source, and sources: their scratch is at most 16 MiB


def rows_at_a_time(fmt: Format, columns: int) -> int:
    """How many rows of BF16 make a block: about BLOCK_BYTES, in whole steps of the format, at least one."""
    return max(1, BLOCK_BYTES // (2 * columns) // fmt.row_step) * fmt.row_step


def global_scales(amaxes: Iterable[tuple[ParameterRow, int]]) -> dict[str, Tensor]:
    """Parameter name -> its global scale, for formats that have one: from the largest amax of its fused group.

    amaxes: each parameter with the BF16 bits of its largest magnitude over all ranks.
    """
    pairs = [(row, row.group or row.name, bits) for row, bits in amaxes if FORMATS[row.format].has_global_scale]
    largest: dict[str, int] = {}
    for _, key, bits in pairs:
        largest[key] = max(largest.get(key, 0), bits)
    return {row.name: global_scale(FORMATS[row.format], largest[key]) for row, key, _ in pairs}


class Scales(Mapping[str, Tensor]):
    """The global scales of a push by parameter, of those whose formats have one; made from a table, since a push may
    have tens of thousands."""

    def __init__(self, grouping: Grouping, values: npt.NDArray[np.float32]) -> None:
        self._grouping, self._table = grouping, values

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self._table[self._grouping.place[name]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._grouping.place)

    def __len__(self) -> int:
        return len(self._grouping.place)

    @property
    def of_sources(self) -> npt.NDArray[np.float32]:
        """By source of the push; 1.0 where there is none."""
        found: npt.NDArray[np.float32] = self._table[self._grouping.sources]
        return found


class Grouping:
    """Which parameters of a push share a global scale: tables that hold for every push of the same plan.

    sources: by source, its place in the plan's order. place: of every parameter that has a scale.
    """

    def __init__(self, plan: PushPlan) -> None:
        places = {name: i for i, (name, _) in enumerate(plan.order)}
        self.sources = np.array([places[source.name] for source in plan.sources], np.int64)
        rows = [(i, row) for i, (_, row) in enumerate(plan.order) if row and FORMATS[row.format].has_global_scale]
        numbers: dict[str, int] = {}
        self._at = np.array([i for i, _ in rows], np.int64)
        self._group = np.array(
            [numbers.setdefault(row.group or row.name, len(numbers)) for _, row in rows], np.int64
        )
        self._divisor = np.array([FORMATS[row.format].global_divisor for _, row in rows], np.float32)
        self._count, self._groups = len(plan.order), len(numbers)
        self.place = {row.name: i for i, row in rows}

    def largest(self, bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """By place in the order, from the bits of every source."""
        found = np.zeros(self._count, np.int64)
        np.maximum.at(found, self.sources, bits)
        return found

    def scales(self, bits: npt.NDArray[np.int64]) -> Scales:
        """From the largest magnitudes over all trainer ranks, in the plan's order: one a fused group, as
        `quant.formats.global_scale` has it."""
        largest, values = np.zeros(self._groups, np.int64), np.ones(self._count, np.float32)
        np.maximum.at(largest, self._group, bits[self._at])
        own = largest[self._group]
        quotients = (own << 16).astype(np.uint32).view(np.float32) / self._divisor
        values[self._at] = np.where(own == 0, np.float32(1), quotients)
        return Scales(self, values)


def sent_rows(source: Source) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows [n, ...]) of what a source sends: views, or what its adapters make of them."""
    at = 0
    for start, stop in source.runs:
        for first, last in source.sent:
            if start <= first and last <= stop:
                begin, end = at + first - start, at + last - start
                rows = source.rows[begin:end] if source.rows.ndim else source.rows
                yield first, merged(rows, [each.of_rows(begin, end) for each in source.updates])
        at += stop - start


def blocks(source: Source) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows in the format's rows_dtype) of what a source sends and is to be encoded, in blocks of bounded
    size; nothing for checkpoint form."""
    if source.kind == "checkpoint" or source.rows.numel() == 0:
        return
    fmt = FORMATS[source.parameter.format]
    for first, part in sent_rows(source):
        rows = part.reshape(part.shape[0] if part.ndim else 1, -1)
        step = rows_at_a_time(fmt, rows.shape[1])
        for start in range(0, rows.shape[0], step):
            # A view where the rows are contiguous in that dtype already; otherwise scratch of one block.
            block = rows[start : start + step].to(dtype=fmt.rows_dtype)
            yield first + start, block.contiguous()


def largest_bits(source: Source) -> int:
    """BF16 bits of the largest magnitude in what this rank sends of a source, 0 of nothing."""
    return max((amax(_cut(block)) for _, block in blocks(source)), default=0)


def largest_bits_of(sources: Sequence[Source], small: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The same of many sources. small: those of a few bytes, of which models may have tens of thousands; they are
    looked at together."""
    bits = np.zeros(len(sources), np.int64)
    for i in np.setdiff1d(np.arange(len(sources)), small).tolist():
        bits[i] = largest_bits(sources[i])
    for start in range(0, len(small), SMALL_AT_A_TIME):
        part = small[start : start + SMALL_AT_A_TIME]
        rows = [sources[i].rows.view(-1) for i in part.tolist()]
        values = torch.cat(rows).view(torch.int16).numpy().view(np.uint16) & 0x7FFF
        ends = np.cumsum([each.numel() for each in rows])
        bits[part] = np.maximum.reduceat(values, np.concatenate([[0], ends[:-1]]))
    return bits


def is_small(source: Source) -> bool:
    """Whether a source is BF16 of few elements that lie in host memory one after the other."""
    rows = source.rows
    return (
        source.kind == "encode"
        and not source.updates
        and rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and 0 < rows.numel() <= SMALL_ELEMENTS
        and rows.is_contiguous()
    )


def is_sent_as_is(source: Source) -> bool:
    """Whether what a small source sends are its rows, as they lie in memory."""
    return source.parameter.format == "bf16" and len(source.runs) == 1 and source.sent == source.runs


def _cut(block: Tensor) -> Tensor:
    """FP32 rows as BF16, cut and not rounded, so that what is finite stays so; BF16 rows as they are."""
    if block.dtype == torch.bfloat16:
        return block
    return (block.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def nonfinite_index(source: Source) -> tuple[int, ...]:
    for first, block in blocks(source):
        found = first_nonfinite(_cut(block))
        if found is not None:
            return (first + found[0], *found[1:])[: max(1, len(source.parameter.shape))]
    raise AssertionError("amax saw a value that is not finite, and no element is")


def encoded(source: Source, scale: Tensor | None) -> Iterator[tuple[TensorSpec, int, Tensor]]:
    """(tensor, first row, [n, row bytes] uint8) of everything that a source sends."""
    if source.kind == "checkpoint":
        if source.rows.numel():
            yield from ((source.specs[0], first, as_bytes(rows)) for first, rows in sent_rows(source))
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
    if any(first == 0 for first, _ in source.sent):
        whole = constants(format_, source.parameter.shape)
        part = format_.component("global_scale")
        if part is not None and scale is not None:
            whole[part.suffix] = scale
        yield from ((specs[suffix], 0, as_bytes(value)) for suffix, value in whole.items())
