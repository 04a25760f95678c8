"""What a trainer rank on a CUDA device sends, and what it remembers: `base`, but in one piece of device memory.

    whole = FormWhole(form, scales, keep)                  # every row; encoded step by step while it is sent
    changes = compare_forms(comparisons, scales, base)     # what is not as in the base
    base = whole.confirmed(...)                            # the form itself, or a copy of it in pinned memory

The form is the only copy of the checkpoint form on the device, about 0.28 of the BF16 weights; a comparison takes the
memory of some steps more, 1 GB.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .base import Base, Held, Whole
from .columns import Block
from .comparing import Comparisons
from .delta import DeviceDelta
from .digest import Digests, Lanes
from .filling import Form
from .forms import alike
from .source import PushPlan

Values = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormBase:
    """A committed version in a form. memory: of the device, or pinned: the form's own is then another push's.

    digests: what each part adds to its tensor's.
    """

    version: int
    digest: str
    form: Form
    memory: Tensor
    digests: Digests

    @property
    def num_bytes(self) -> int:
        return self.memory.numel()

    def as_base(self) -> Base:
        """The same tensor by tensor, for a push of other tensors: views of the memory."""
        parts, specs = self.form.plan.parts, self.form.plan.push.specs
        held: dict[str, list[Held]] = {}
        columns = (parts.tensor, parts.row0, parts.num_rows, parts.row_bytes, parts.at, self.digests)
        for tensor, row0, rows, size, at, lanes in zip(*(each.tolist() for each in columns), strict=True):
            data = self.memory[at : at + rows * size].view(rows, size)
            held.setdefault(specs[tensor].name, []).append(Held(first=row0, rows=data, digest=_pair(lanes)))
        return Base(version=self.version, digest=self.digest, held=held)


def _pair(lanes: Sequence[int]) -> Lanes:
    return int(lanes[0]), int(lanes[1])


class FormWhole(Whole):
    """Every row of a push, in a form. keep: where it stays, to be the base of the next push: the form's device, the
    host (pinned), or None for nowhere."""

    def __init__(self, form: Form, scales: Values, *, keep: torch.device | None, taken: Digests | None = None) -> None:
        super().__init__(form.plan.push, {}, keep=keep)
        self.form, self._values = form, scales
        self._events: list[Any] = []
        self.started_s = 0.0  # time.perf_counter() at which the first step was enqueued
        self._lanes = taken  # of the parts
        if taken is not None:
            self._taken, self.digests = True, form.summed(taken)

    def steps(self) -> Iterator[tuple[slice, Any]]:
        """Parts of the form and an event after which they are encoded; the next step is enqueued before a step is
        handed out."""
        steps = self.form.plan.steps
        if self._taken:
            yield from ((step.parts, None) for step in steps)
            return
        self._events, self.started_s = [], time.perf_counter()
        self.form.follow()
        with self._on_stream():
            self.form.take(self._values)
        events = [self._encode(0)]
        for number, step in enumerate(steps):
            events += [self._encode(number + 1)] if number + 1 < len(steps) else []
            yield step.parts, events[number]
        self.settle()

    def take(self) -> None:
        """Encode everything now: the model may change from here on."""
        for _ in self.steps():
            pass

    def settle(self) -> None:
        """Digests of what was encoded; waits for all of it."""
        with self._on_stream():
            self._lanes = self.form.part_digests()
        self.digests[:] = self.form.summed(self._lanes)
        self._taken = True

    def _encode(self, number: int) -> Any:
        with self._on_stream():
            begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            done = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            begun.record()
            self.form.encode(number, self._values)
            done.record()
        self._events.append((begun, done))
        return done

    def _on_stream(self) -> Any:
        return torch.cuda.stream(self.form.stream)

    @property
    def encode_ms(self) -> list[tuple[float, float]]:
        """When each step was encoded, in milliseconds since the first began."""
        if not self._events:
            return []
        first = self._events[0][0]
        return [(first.elapsed_time(begun), first.elapsed_time(done)) for begun, done in self._events]

    def blocks(self) -> Iterator[Block]:
        """Tensor by tensor, as `Whole` has them."""
        plan = self.form.plan
        for parts, event in self.steps():
            if event is not None:
                event.synchronize()
            for i in range(parts.start, parts.stop):
                tensor, first, at = (int(each[i]) for each in (plan.parts.tensor, plan.parts.row0, plan.parts.at))
                rows, size = int(plan.parts.num_rows[i]), int(plan.parts.row_bytes[i])
                yield Block.of((tensor, first, self.form.memory[at : at + rows * size].view(rows, size).cpu()))

    def confirmed(self, base: Any, version: int, digest: str) -> Any:
        """What is known once this push is that version. Of a push of some tensors, the others' rows are kept as they
        were, tensor by tensor."""
        if self._keep is None or not self._kept:
            return None
        assert self._lanes is not None
        memory = self.form.memory
        if self._keep.type == "cpu":
            memory = torch.empty(memory.shape, dtype=torch.uint8, pin_memory=True)
            memory.copy_(self.form.memory)
        found = FormBase(version=version, digest=digest, form=self.form, memory=memory, digests=self._lanes)
        names = {spec.name for spec in self.form.plan.push.specs}
        others = as_base(base).held if base is not None else {}
        if others.keys() <= names:
            return found
        return Base(version=version, digest=digest, held={**others, **found.as_base().held})


def as_base(base: Base | FormBase) -> Base:
    """A base tensor by tensor."""
    return base.as_base() if isinstance(base, FormBase) else base


# ---------------------------------------------------------------- what changed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormChanges:
    """What is not as in a base: bytes of the form by part and position, sorted by both.

    digests: of the push's tensors, as they are now. delta: what is sent of it. changed: 1 for every tensor of the push
    that changes on this rank.
    """

    form: Form
    base: FormBase
    scales: Values
    bytes: Any  # weight_update.cuda.Bytes of the form's parts
    lanes: Digests
    digests: Digests
    delta: DeviceDelta
    changed: npt.NDArray[np.int64]

    mode = "delta"

    @property
    def plan(self) -> PushPlan:
        return self.form.plan.push

    @property
    def device(self) -> torch.device:
        return self.form.plan.device

    @property
    def num_bytes(self) -> int:
        return self.delta.num_bytes

    def whole(self, keep: torch.device | None) -> FormWhole:
        """The same push with every row; the base's own memory is rewritten and means nothing afterwards."""
        self.bytes.apply()
        return FormWhole(self.form, self.scales, keep=keep, taken=self.lanes)

    def confirmed(self, base: Any, version: int, digest: str) -> FormBase:
        """What is known once this push is that version."""
        self.bytes.apply()
        memory = self.base.memory
        if memory is not self.form.memory:
            memory.copy_(self.form.memory)
        return FormBase(version=version, digest=digest, form=self.form, memory=memory, digests=self.lanes)


def fits(form: Form, base: Any) -> bool:
    """Whether a base can be compared with a push through this form."""
    return isinstance(base, FormBase) and alike(base.form.plan, form.plan)


def compare_forms(comparisons: Comparisons, scales: Values, base: FormBase) -> FormChanges:
    """Encode and compare with the base, some steps of the form at a time."""
    form = comparisons.form
    table = torch.from_numpy(form.plan.parts.tensor.astype(np.int32)).to(form.plan.device)
    form.follow()
    with torch.cuda.stream(form.stream):
        if base.memory is not form.memory:
            form.memory.copy_(base.memory, non_blocking=True)
        form.take(scales)
        found = comparisons.changed(scales)
        changes = form.rows.changes(found.part, found.position, found.difference)
        lanes = base.digests + _loops().as_digests(changes.moved)
        changed = np.zeros(len(form.plan.push.specs), np.int64)
        changed[form.plan.parts.tensor[torch.unique_consecutive(found.part).cpu().numpy()]] = 1
        tensors = table.index_select(0, found.part)
        delta = DeviceDelta(tensors=tensors, positions=found.position, differences=found.difference)
    return FormChanges(
        form=form,
        base=base,
        scales=scales,
        bytes=changes,
        lanes=lanes,
        digests=form.summed(lanes),
        delta=delta,
        changed=changed,
    )


def _loops() -> ModuleType:
    return importlib.import_module(".cuda", __package__)

