"""A form in memory, and what fills it: see `forms`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from quant import cuda as kernels
from quant.formats import FORMATS, TensorSpec
from sharding.routes import Destination

from .digest import Digests
from .encoder import encoded
from .forms import Copied, FormPlan, Ints, Scales
from .gathering import Load, Located
from .source import Source

MAX_DESTINATIONS = 64  # whose tables are kept: 1.5 MB each for twenty thousand tensors


def _rows_of() -> ModuleType:
    return importlib.import_module(".cuda", __package__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Filling:
    """Tables of one step for one place in memory."""

    batch: kernels.Batch | None
    moves: Any


class Form:
    """The form of pushes of the same tensors in memory, uint8 [plan.parts.num_bytes] on the plan's device, zero between
    the parts. Its tables are made once. Everything is enqueued on `stream`, which the caller makes the current one."""

    def __init__(self, plan: FormPlan, memory: Tensor | None = None) -> None:
        self.plan, parts = plan, plan.parts
        if memory is None:
            memory = torch.zeros(parts.num_bytes, dtype=torch.uint8, device=plan.device)
        self.memory = memory
        self.stream: torch.cuda.Stream = torch.cuda.Stream(plan.device)  # type: ignore[no-untyped-call]
        self._values = torch.ones(len(plan.push.sources), dtype=torch.float32, device=plan.device)
        self._scales: Any = None
        base = self.memory.data_ptr()
        self.rows: Any = _rows_of().row_major(
            base + parts.at, parts.row_bytes, parts.row0, parts.num_rows, parts.keys, plan.device
        )
        self._fillings = [self._filling(number, base) for number in range(len(plan.steps))]
        self._fillings_apart: dict[tuple[int, int], Filling] = {}
        self._positions = {spec.name: i for i, spec in enumerate(plan.push.specs)}
        self._loads: dict[tuple[bytes, int], list[list[Load]]] = {}
        self.follow()

    @property
    def num_bytes(self) -> int:
        return self.memory.numel()

    def follow(self) -> None:
        """What the caller's stream was given so far, such as a step of the optimizer, comes before what is enqueued."""
        self.stream.wait_stream(torch.cuda.current_stream(self.plan.device))

    def take(self, scales: Scales) -> None:
        """The global scale of every source, 1.0 where its format has none; before any step is encoded."""
        self._values.copy_(torch.from_numpy(scales))
        self._scales = kernels.scale_table(self._values)

    def encode(self, number: int, scales: Scales) -> None:
        """A step, into its place. What is encoded apart waits for the device where its format must."""
        self._fill(number, self._fillings[number], scales, self.memory, 0)

    def encode_into(self, number: int, scales: Scales, scratch: Tensor, start: int) -> None:
        """A step, into scratch that stands for the form from byte `start` on."""
        base = scratch.data_ptr() - start
        filling = self._fillings_apart.get((number, base))
        if filling is None:
            filling = self._fillings_apart[number, base] = self._filling(number, base)
        self._fill(number, filling, scales, scratch, start)

    def batch(self, number: int) -> kernels.Batch | None:
        """The matrices of a step that are encoded together, their codes and block scales where they lie in the form."""
        return self._fillings[number].batch

    @property
    def scale_table(self) -> Tensor:
        """Of what was taken, for the batches."""
        found: Tensor = self._scales
        return found

    def lies_at(self, copied: Copied) -> Ints:
        """Where what goes as it is lies: the trainer's rows, or global scales that were taken."""
        return np.where(copied.scale_of < 0, copied.address, self._values.data_ptr() + 4 * copied.scale_of)

    def beyond(self, number: int, scales: Scales) -> list[int]:
        """The sources of a step whose scale no batch takes."""
        sources = self.plan.steps[number].matrices.source
        ours = scales[sources]
        return list(dict.fromkeys(sources[(ours < kernels.SCALES[0]) | (ours > kernels.SCALES[1])].tolist()))

    def part_digests(self) -> Digests:
        """What every part adds to the digest of its tensor, [parts, 2]; waits for the device."""
        found: Digests = _rows_of().as_digests(self.rows.digest())
        return found

    def summed(self, lanes: Digests) -> Digests:
        """The same by tensor of the push."""
        found = np.zeros((2, len(self.plan.push.specs)), np.uint64)
        for each, lane in zip(found, lanes.T, strict=True):
            np.add.at(each, self.plan.parts.tensor, lane)  # of two dimensions it takes six times as long
        return found.T

    def loads(self, to: Destination, chunk_bytes: int) -> list[list[Load]]:
        """By step, the chunks of the rows that a destination owns; made once while destinations stay as they are."""
        key = xxhash.xxh3_128_digest(to.row_start.tobytes() + to.row_stop.tobytes()), chunk_bytes
        if key not in self._loads:
            if len(self._loads) >= MAX_DESTINATIONS:
                self._loads.clear()
            parts = self.plan.parts
            index = self.plan.push.columns.index[parts.tensor]
            first = np.maximum(parts.row0, to.row_start[index])
            stop = np.minimum(parts.row0 + parts.num_rows, to.row_stop[index])
            numbers = to.numbers(self.plan.push.columns.index)[parts.tensor]
            steps = [step.parts for step in self.plan.steps]
            self._loads[key] = [
                self._located(each, numbers[each], first[each], stop[each]).loads(chunk_bytes) for each in steps
            ]
        return self._loads[key]

    def _located(self, chosen: slice, numbers: Ints, first: Ints, stop: Ints) -> Located:
        """Rows [first, stop) of some parts, of tensors with these numbers; none where that is empty."""
        parts, owned = self.plan.parts, first < stop
        row_bytes, row0, at = (each[chosen][owned] for each in (parts.row_bytes, parts.row0, parts.at))
        first, stop = first[owned], stop[owned]
        return Located(
            device=self.plan.device,
            tensor=numbers[owned],
            offset=first * row_bytes,
            length=(stop - first) * row_bytes,
            address=self.memory.data_ptr() + at + (first - row0) * row_bytes,
            memory=self.memory,
        )

    # -- tables

    def _filling(self, number: int, base: int) -> Filling:
        step, parts = self.plan.steps[number], self.plan.parts
        at, each, copied = base + parts.at, step.matrices, step.copied
        batch = None
        if len(each.address):
            batch = kernels.plan_plain(
                each.address, at[each.weight], at[each.scale], each.elements, each.source, device=self.plan.device
            )
        address = self.lies_at(copied)
        sizes = (parts.num_rows * parts.row_bytes)[copied.part]
        return Filling(batch=batch, moves=_rows_of().Moves(address, at[copied.part], sizes, self.plan.device))

    def _fill(self, number: int, filling: Filling, scales: Scales, memory: Tensor, start: int) -> None:
        step = self.plan.steps[number]
        if filling.batch is not None:
            kernels.encode_nvfp4(filling.batch, self._scales)
        filling.moves.run()
        for i in [*step.apart, *self.beyond(number, scales)]:
            self._put(self.plan.push.sources[i], torch.tensor(scales[i]), memory, start)

    def _put(self, source: Source, scale: Tensor, memory: Tensor, start: int) -> None:
        """Encode one source and put what it becomes in its place; memory: from byte `start` of the form on."""
        given = scale if FORMATS[source.parameter.format].has_global_scale else None
        for spec, first, data in encoded(source, given):
            at = self._at(spec, first) - start
            memory[at : at + data.numel()].copy_(data.reshape(-1))

    def _at(self, spec: TensorSpec, row: int) -> int:
        """Where a row of a tensor lies in the form."""
        parts, tensor = self.plan.parts, self._positions[spec.name]
        i = self.plan.found.get((tensor, row))
        if i is None:
            among = np.flatnonzero((parts.tensor == tensor) & (parts.row0 <= row))
            i = int(among[np.argmax(parts.row0[among])])
        return int(parts.at[i]) + (row - int(parts.row0[i])) * spec.row_bytes
