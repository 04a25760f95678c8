"""The checkpoint form of what a trainer rank sends, in one piece of a GPU's memory: as many launches for twenty
thousand tensors as for one.

    plan = plan_form(push_plan)              # once for pushes of the same tensors; None where they are on the host
    bits = plan.largest_bits(plan.look())    # of every source
    form = Form(plan)
    form.take(scales)
    for step in range(len(plan.steps)):
        form.encode(step, scales)            # enqueued; it fills the parts plan.steps[step].parts
    form.part_digests()

NVFP4 of BF16 rows and rows that go as they are take a launch a step. Whatever else there is (other formats, FP32
masters, adapters) is encoded source by source and copied to its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from quant import cuda as kernels
from quant.formats import FORMATS, TensorSpec

from .digest import name_key
from .encoder import largest_bits
from .source import PushPlan, Source
from .staging import ALIGN_BYTES

Ints = npt.NDArray[np.int64]
Scales = npt.NDArray[np.float32]  # of every source

STEP_BYTES = 896 << 20  # of BF16, encoded at a time while what came before is on its way: in NVFP4 one chunk, 252 MiB
NVFP4 = "nvfp4"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parts:
    """Rows [row0, row0 + num_rows) of tensors of the push, by position, and where they lie in the form."""

    tensor: Ints
    row0: Ints
    num_rows: Ints
    row_bytes: Ints
    at: Ints
    keys: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def num_bytes(self) -> int:
        return int(self.at[-1] + -(-self.num_rows[-1] * self.row_bytes[-1] // ALIGN_BYTES) * ALIGN_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matrices:
    """Rows that NVFP4 is made of, by address: elements, source, and the parts of codes and block scales."""

    address: Ints
    elements: Ints
    source: Ints
    weight: Ints
    scale: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Copied:
    """Bytes that go as they are, by address, and their parts; of a global scale, its source instead."""

    address: Ints
    part: Ints
    scale_of: Ints  # source, -1 for none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """Sources [first, stop) of the push; parts: slice of what they become. apart: sources encoded one by one."""

    first: int
    stop: int
    parts: slice
    matrices: Matrices
    copied: Copied
    apart: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FormPlan:
    """What fills a form. groups: by source, the fused group whose scale it takes, -1 where its format has none."""

    push: PushPlan
    device: torch.device
    parts: Parts
    steps: Sequence[Step]
    groups: Ints
    names: Sequence[str]  # of groups, by a member
    looked_at: Matrices  # in one launch for the largest magnitudes: its batch
    amax: kernels.Batch | None
    found: Mapping[tuple[int, int], int]  # tensor, first row -> part

    def look(self) -> torch.Tensor | None:
        """Begin to look for the largest magnitudes; None where no kernel does."""
        return None if self.amax is None else kernels.amax(self.amax)

    def largest_bits(self, looked: torch.Tensor | None) -> Ints:
        """BF16 bits of the largest magnitude of every source; waits for what `look` began."""
        sources, seen = self.push.sources, self.looked_at
        bits = np.zeros(len(sources), np.int64)
        if looked is not None:
            found = looked.cpu().numpy()
            bits[: len(found)] = found
        for i in np.setdiff1d(np.arange(len(sources)), seen.source).tolist():
            bits[i] = largest_bits(sources[i])
        return bits


def alike(a: FormPlan, b: FormPlan) -> bool:
    """Whether two plans put the same rows of the same tensors in the same places, wherever they take them from."""
    if a is b:
        return True
    ours, theirs = ((each.parts.keys, each.parts.row0, each.parts.num_rows, each.parts.at) for each in (a, b))
    return a.device == b.device and all(map(np.array_equal, ours, theirs))


def device_of(plan: PushPlan) -> torch.device | None:
    """The CUDA device that all of a push's rows are on, but for what is on the host; None where that is everything."""
    devices = {source.rows.device for source in plan.sources}
    cuda = {each for each in devices if each.type == "cuda"}
    return next(iter(cuda)) if len(cuda) == 1 and devices <= cuda | {torch.device("cpu")} else None


def plan_form(plan: PushPlan) -> FormPlan | None:
    """How the sources of a push fill a form, on the device where they are; None where that is not one CUDA device."""
    device = device_of(plan)
    if device is None:
        return None
    drawn = _Drawing(plan, device)
    bounds = _steps_of(plan.sources)
    steps = [drawn.step(first, stop) for first, stop in bounds]
    parts = drawn.parts()
    if not len(parts):  # other trainer ranks send everything
        return None
    seen = drawn.looked_at()
    columns = (seen.address, seen.weight, seen.scale, seen.elements, seen.source)
    return FormPlan(
        push=plan,
        device=device,
        parts=parts,
        steps=steps,
        groups=drawn.groups,
        names=list(drawn.group_of),
        looked_at=seen,
        amax=kernels.plan_plain(*columns, device=device) if len(seen.address) else None,
        found=drawn.found,
    )


def _steps_of(sources: Sequence[Source]) -> list[tuple[int, int]]:
    ends = np.cumsum([each.rows.nbytes for each in sources])
    cuts = np.flatnonzero(np.diff(ends // STEP_BYTES)) + 1
    edges = [0, *cuts.tolist(), len(sources)]
    return [(a, b) for a, b in pairwise(edges) if a < b]


class _Drawing:
    """Lists that become the tables of a form."""

    def __init__(self, plan: PushPlan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._position = {spec.name: i for i, spec in enumerate(plan.specs)}
        self._rows: list[tuple[int, int, int, int]] = []  # tensor, row0, rows, bytes of a row
        self._looked: list[tuple[int, int, int]] = []
        self.found: dict[tuple[int, int], int] = {}
        self.group_of: dict[str, int] = {}
        self.groups = np.full(len(plan.sources), -1, np.int64)

    def step(self, first: int, stop: int) -> Step:
        begin = len(self._rows)
        matrices: list[tuple[int, int, int, int, int]] = []
        copied: list[tuple[int, int, int]] = []
        apart = []
        for i in range(first, stop):
            source = self._plan.sources[i]
            row, fmt = source.parameter, FORMATS[source.parameter.format]
            if source.kind == "encode" and fmt.has_global_scale:
                self.groups[i] = self.group_of.setdefault(row.group or row.name, len(self.group_of))
            runs = list(_sent(source))
            plain = source.kind == "encode" and self._is_plain(source, runs)
            if plain:
                address = source.rows.data_ptr()
                self._looked += [(address + 2 * at * _columns(source), n * _columns(source), i) for at, _, n in runs]
            if plain and row.format == NVFP4:
                matrices += self._nvfp4(i, source, runs)
                copied += self._scale(i, source)
            elif (plain and not fmt.is_quantized) or (source.kind == "checkpoint" and self._lies(source)):
                copied += self._as_is(source, runs)
            else:
                self._apart(source, runs)
                apart.append(i)
        tables = np.array(matrices, np.int64).reshape(-1, 5).T
        pieces = np.array(copied, np.int64).reshape(-1, 3).T
        return Step(
            first=first,
            stop=stop,
            parts=slice(begin, len(self._rows)),
            matrices=Matrices(
                address=tables[0], elements=tables[1], source=tables[2], weight=tables[3], scale=tables[4]
            ),
            copied=Copied(address=pieces[0], part=pieces[1], scale_of=pieces[2]),
            apart=apart,
        )

    def parts(self) -> Parts:
        tensor, row0, num_rows, row_bytes = np.array(self._rows, np.int64).reshape(-1, 4).T
        ends = np.cumsum(-(-num_rows * row_bytes // ALIGN_BYTES) * ALIGN_BYTES)
        keys = np.array([name_key(self._plan.specs[i].name) for i in tensor.tolist()], np.uint64)
        at = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        return Parts(tensor=tensor, row0=row0, num_rows=num_rows, row_bytes=row_bytes, at=at, keys=keys)

    def looked_at(self) -> Matrices:
        address, elements, source = np.array(self._looked, np.int64).reshape(-1, 3).T
        none = np.zeros_like(address)
        return Matrices(address=address, elements=elements, source=source, weight=none, scale=none)

    def _lies(self, source: Source) -> bool:
        return source.rows.device == self._device and source.rows.is_contiguous() and not source.updates

    def _is_plain(self, source: Source, runs: Sequence[tuple[int, int, int]]) -> bool:
        """Whether these rows are contiguous BF16 on the device, in whole pieces of 32 bytes."""
        if not self._lies(source) or source.rows.dtype != torch.bfloat16 or not runs:
            return False
        columns, address = _columns(source), source.rows.data_ptr()
        return all((address + 2 * at * columns) % 16 == 0 and n * columns % 16 == 0 for at, _, n in runs)

    def _add(self, spec: TensorSpec, row0: int, num_rows: int) -> int:
        tensor = self._position[spec.name]
        self.found[tensor, row0] = len(self._rows)
        self._rows.append((tensor, row0, num_rows, spec.row_bytes))
        return len(self._rows) - 1

    def _nvfp4(
        self, i: int, source: Source, runs: Sequence[tuple[int, int, int]]
    ) -> Iterator[tuple[int, int, int, int, int]]:
        weight, scale = _specs(source, "weight", "weight_scale")
        columns, address = _columns(source), source.rows.data_ptr()
        for at, first, count in runs:
            parts = self._add(weight, first, count), self._add(scale, first, count)
            yield (address + 2 * at * columns, count * columns, i, *parts)

    def _scale(self, i: int, source: Source) -> Iterator[tuple[int, int, int]]:
        if any(first == 0 for first, _ in source.sent):
            yield 0, self._add(_specs(source, "weight_scale_2")[0], 0, 1), i

    def _as_is(self, source: Source, runs: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
        spec, address = source.specs[0], source.rows.data_ptr()
        for at, first, count in runs:
            yield address + at * spec.row_bytes, self._add(spec, first, count), -1

    def _apart(self, source: Source, runs: Sequence[tuple[int, int, int]]) -> None:
        """Room for whatever `encoded` makes of a source."""
        if source.kind == "checkpoint" or not FORMATS[source.parameter.format].is_quantized:
            for _, first, count in runs:
                self._add(source.specs[0], first, count)
            return
        rows = {part.suffix: part.rows for part in FORMATS[source.parameter.format].row_components}
        for spec in source.specs:
            each = rows.get(spec.name.rpartition(".")[2])
            if each is None:  # of the whole tensor, from whoever has its first row
                if any(first == 0 for first, _ in source.sent):
                    self._add(spec, 0, spec.num_rows)
                continue
            for _, first, count in runs:
                self._add(spec, first // each, -(-(first + count) // each) - first // each)


def _sent(source: Source) -> Iterator[tuple[int, int, int]]:
    """(row of what is here, row of the parameter, rows) of everything that a source sends."""
    here = 0
    for start, stop in source.runs:
        for first, last in source.sent:
            if start <= first and last <= stop:
                yield here + first - start, first, last - first
        here += stop - start


def _columns(source: Source) -> int:
    return source.rows.numel() // max(1, source.rows.shape[0]) if source.rows.ndim else 1


def _specs(source: Source, *suffixes: str) -> list[TensorSpec]:
    """By suffix; a module's weight has the parameter's own name."""
    found = {spec.name.rpartition(".")[2]: spec for spec in source.specs}
    return [found[suffix] for suffix in suffixes]
