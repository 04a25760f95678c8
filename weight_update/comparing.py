"""What is not as it lies in a form: single bytes, in the order of parts and positions.

    found = Comparisons(form).changed(scales)    # on the form's stream, which the caller makes the current one

Codes are compared as they are encoded, and rows that go as they are where the trainer has them: nothing is written.
What does not go so (other formats, a scale that no batch takes, more changes than are noted) is encoded into scratch
first, some steps at a time, and compared there.

Every part has slots, one for each piece of it that a program looks at. The programs count, the counts are summed up,
and the same programs, or others over what was noted, put each byte to its place.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quant import cuda as kernels
from quant.cuda import Changed

from .filling import Form
from .forms import Ints, Scales

STEPS = 4  # at a time: 1 GB of scratch in NVFP4, or 170 MB of notes


class Comparisons:
    """Of one form: tables of every few steps, made once, and the memory that they share."""

    def __init__(self, form: Form) -> None:
        self.form, count = form, len(form.plan.steps)
        self._stretches = [range(start, min(start + STEPS, count)) for start in range(0, count, STEPS)]
        self._tables: dict[tuple[range, bool], Comparison] = {}
        self._scratch = form.memory[:0]
        self._notes: dict[int, kernels.Notes] = {}

    def changed(self, scales: Scales) -> Changed:
        """All that differs; waits for the counts of each few steps while the next ones are looked at."""
        found = list(self._found(scales))
        columns = zip(*((each.part, each.position, each.difference) for each in found), strict=True)
        part, position, difference = map(torch.cat, columns)
        return Changed(part=part, position=position, difference=difference)

    def _found(self, scales: Scales) -> Iterator[Changed]:
        direct = [self._direct(stretch, scales) for stretch in self._stretches]
        ahead: Begun | None = None
        for number, stretch in enumerate(self._stretches):
            begun = ahead or self._begun(direct[number], number, scales)
            following = direct[number + 1] if number + 1 < len(direct) else None
            ahead = self._begun(following, number + 1, scales)
            found = None if begun is None else begun.finish()
            yield self._whole(stretch, scales) if found is None else found

    def _whole(self, stretch: range, scales: Scales) -> Changed:
        nothing = kernels.Notes(0, self.form.plan.device)
        found = self._comparison(stretch, direct=False).begin(scales, nothing).finish()
        assert found is not None, "nothing is noted where everything is encoded first"
        return found

    def _begun(self, comparison: Comparison | None, number: int, scales: Scales) -> Begun | None:
        if comparison is None:
            return None
        side = number % 2  # what is listed must not be noted anew
        notes = self._notes.get(side)
        if notes is None or len(notes.nums) < comparison.programs:
            notes = self._notes[side] = kernels.Notes(comparison.programs, self.form.plan.device)
        return comparison.begin(scales, notes)

    def _direct(self, stretch: range, scales: Scales) -> Comparison | None:
        """The comparison without scratch, where there may be one."""
        form = self.form
        takes = all(batch is None or kernels.is_noted(batch) for batch in map(form.batch, stretch))
        if not takes or any(form.plan.steps[number].apart or form.beyond(number, scales) for number in stretch):
            return None
        return self._comparison(stretch, direct=True)

    def _comparison(self, stretch: range, *, direct: bool) -> Comparison:
        key = stretch, direct
        if key not in self._tables:
            self._tables[key] = Comparison(self.form, stretch, None if direct else self._whole_scratch())
        return self._tables[key]

    def _whole_scratch(self) -> Tensor:
        """What all stretches have in common, as large as the largest takes."""
        if not len(self._scratch):
            sizes = [_region(self.form, each)[1] for each in self._stretches]
            self._scratch = torch.zeros(max(sizes), dtype=torch.uint8, device=self.form.plan.device)
        return self._scratch


def _region(form: Form, stretch: range) -> tuple[slice, int]:
    """The parts of some steps, and the bytes from the first to the end of the last."""
    parts, steps = form.plan.parts, form.plan.steps
    chosen = slice(steps[stretch.start].parts.start, steps[stretch.stop - 1].parts.stop)
    last = chosen.stop - 1
    return chosen, int(parts.at[last] + parts.num_rows[last] * parts.row_bytes[last] - parts.at[chosen.start])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noted:
    """Matrices of a step. places: see `kernels.count_nvfp4`. first: of the programs of the notes."""

    batch: kernels.Batch
    places: Tensor
    first: int


class Comparison:
    """Tables of some steps of a form. scratch: where all of them is encoded first; None compares without."""

    def __init__(self, form: Form, stretch: range, scratch: Tensor | None = None) -> None:
        self._form, self._stretch, self._scratch = form, stretch, scratch
        parts, steps = form.plan.parts, [form.plan.steps[number] for number in stretch]
        chosen, _ = _region(form, stretch)
        self._start = int(parts.at[chosen.start])
        sizes, first = parts.num_rows * parts.row_bytes, parts.row0 * parts.row_bytes
        slots = -(-sizes // _loops().COMPARE_BYTES)
        if scratch is None:
            for step in steps:
                tiles = kernels.tiles_a_matrix(step.matrices.elements)
                slots[step.matrices.weight] = slots[step.matrices.scale] = tiles
            part = np.concatenate([step.copied.part for step in steps])
            address = np.concatenate([form.lies_at(step.copied) for step in steps])
        else:
            part = np.arange(chosen.start, chosen.stop)
            address = scratch.data_ptr() + parts.at[chosen] - self._start
        slot = np.cumsum(slots) - slots
        slot -= slot[chosen.start]
        self._num_slots = int(slots[chosen].sum())
        self._noted = list(_noted(form, stretch, slot, first)) if scratch is None else []
        was = form.memory.data_ptr() + parts.at[part]
        columns = [address, was, sizes[part], slot[part], part, first[part]]
        self._pieces: Any = _loops().Compared(columns, form.plan.device)

    @property
    def programs(self) -> int:
        """That note something."""
        return sum(each.batch.programs for each in self._noted)

    def begin(self, scales: Scales, notes: kernels.Notes) -> Begun:
        """Count; nothing is waited for."""
        form = self._form
        counts = torch.empty(self._num_slots, dtype=torch.int32, device=form.plan.device)
        if self._scratch is not None:
            for number in self._stretch:
                form.encode_into(number, scales, self._scratch, self._start)
        notes.most.zero_()
        for each in self._noted:
            kernels.note_nvfp4(each.batch, form.scale_table, notes, each.first)
            kernels.count_nvfp4(each.batch, each.places, notes, counts, each.first)
        self._pieces.count(counts)
        return Begun(self, counts, notes)

    def put(self, before: Tensor, notes: kernels.Notes, out: Changed) -> None:
        """Every changed byte to its place. before: int64, by slot, how many come before its."""
        for each in self._noted:
            kernels.list_nvfp4(each.batch, each.places, before, notes, out, each.first)
        self._pieces.list(before, out)


def _noted(form: Form, stretch: range, slot: Ints, first: Ints) -> Iterator[Noted]:
    programs = 0
    for number in stretch:
        batch, matrices = form.batch(number), form.plan.steps[number].matrices
        weight, scale = matrices.weight, matrices.scale
        if batch is not None:
            columns = [slot[weight], slot[scale], weight, scale, first[weight], first[scale]]
            places = torch.from_numpy(np.stack(columns, axis=1)).to(form.plan.device)
            yield Noted(batch=batch, places=places, first=programs)
            programs += batch.programs


class Begun:
    """Some steps that are being counted."""

    def __init__(self, comparison: Comparison, counts: Tensor, notes: kernels.Notes) -> None:
        self._comparison, self._notes, ends = comparison, notes, counts.cumsum(0)
        self._before = ends - counts
        self._told = torch.empty(2, dtype=torch.int64, pin_memory=True)
        self._told.copy_(torch.stack([counts.sum(), notes.most[0].long()]), non_blocking=True)
        self._counted = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._counted.record()

    def finish(self) -> Changed | None:
        """What changed, None where more did than was noted; waits for the counts."""
        self._counted.synchronize()
        count, most = self._told.tolist()
        if most > kernels.ROOM:
            return None
        found = Changed.empty(count, self._before.device)
        self._comparison.put(self._before, self._notes, found)
        return found


def _loops() -> ModuleType:
    return importlib.import_module(".cuda", __package__)
