"""What a service holds: every checkpoint tensor, and the parameters they make up; and the check of a push against it.

manifest = Manifest(tensors=(...), parameters=(...))
indices = check_push(manifest, specs)          # or ManifestError with every mismatch
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from quant.expert_maps import module_of
from quant.formats import FORMATS, TensorSpec
from quant.parameters import ParameterRow
from quant.variants import format_of

from .errors import ManifestError, raise_all

FLOATS = frozenset({"BF16", "F16", "F32", "F64"})
MAX_HINTS = 10  # unknown names for which near ones are searched: each search reads every name
MAX_NAMES = 4  # members of a cut group that are named


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Tensors in a fixed order, which indices on the wire refer to; parameters may be unknown (none).

    index: name -> position in `tensors`. fingerprint: xxh3 of everything, equal on both ends of a push.
    """

    tensors: tuple[TensorSpec, ...]
    parameters: tuple[ParameterRow, ...] = ()
    index: Mapping[str, int] = field(init=False, repr=False, compare=False)
    fingerprint: int = field(init=False, compare=False)
    _specs: Mapping[str, tuple[tuple[TensorSpec, bool], ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index = {spec.name: i for i, spec in enumerate(self.tensors)}
        counts = Counter(spec.name for spec in self.tensors)
        problems = [f"{name}: {count} tensors of this name" for name, count in counts.items() if count > 1]
        problems += [
            f"{row.name}: its tensor {spec.name} {list(spec.shape)} of {spec.dtype} is not among the tensors"
            for row in self.parameters
            for spec, required in _components(row)
            if required and (spec.name not in index or self.tensors[index[spec.name]] != spec)
        ]
        raise_all(ManifestError, "manifest refused", problems)
        held = {
            row.name: tuple((spec, required) for spec, required in _components(row) if spec.name in index)
            for row in self.parameters
        }
        object.__setattr__(self, "_specs", held)
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "fingerprint", _fingerprint(self))

    @cached_property
    def formats(self) -> frozenset[str]:
        """Those whose replicas hold something that others do not; none where all replicas have one format."""
        return frozenset(format_of(spec.name) for spec in self.tensors) - {""}

    @cached_property
    def maps(self) -> npt.NDArray[np.int64]:
        """Which tensors are maps of experts."""
        return np.array([i for i, spec in enumerate(self.tensors) if module_of(spec.name) is not None], np.int64)

    @cached_property
    def num_slots(self) -> Mapping[str, int]:
        """Slots of every module whose experts may be moved."""
        maps = {module: row for row in self.parameters if (module := module_of(row.name)) is not None}
        return {module: self.tensors[self.index[row.name]].num_rows for module, row in maps.items()}

    def held_by(self, format: str) -> npt.NDArray[np.bool_]:
        """Which tensors replicas of this format hold."""
        if not self.formats:
            return np.ones(len(self.tensors), np.bool_)
        return np.array([format_of(spec.name) in ("", format) for spec in self.tensors], np.bool_)

    def tensors_of(self, parameter: ParameterRow) -> tuple[TensorSpec, ...]:
        """The tensors that hold a parameter, in the order of its format's components."""
        return tuple(spec for spec, _ in self._specs[parameter.name])

    def required_of(self, parameter: ParameterRow) -> tuple[str, ...]:
        """Names of the tensors that a push of this parameter must bring; its input scale may stay away."""
        return tuple(spec.name for spec, required in self._specs[parameter.name] if required)


def check_push(manifest: Manifest, specs: Sequence[TensorSpec]) -> npt.NDArray[np.int64]:
    """Positions in the manifest of the tensors of a push; raises ManifestError that lists every mismatch.

    A parameter comes with all its tensors or none; its input scale, which is calibration, may stay away or come alone.
    A fused group comes whole, since its members share a global scale.
    """
    problems = [] if specs else ["the push holds no tensor; push at least one parameter"]
    problems += [*_unknown(manifest, specs), *_repeated(specs), *_unlike(manifest, specs)]
    problems += _cut(manifest, {spec.name for spec in specs})
    raise_all(ManifestError, "push refused, nothing was changed", problems)
    return np.array([manifest.index[spec.name] for spec in specs], np.int64)


def _components(row: ParameterRow) -> Iterator[tuple[TensorSpec, bool]]:
    """The tensors of a parameter, and whether a push of it must bring them."""
    fmt = FORMATS.get(row.format)
    if fmt is None:
        raise ManifestError(f"{row.name}: format {row.format!r}; known: {', '.join(FORMATS)}")
    try:
        specs = fmt.tensors(row.name, row.shape)
    except ValueError as error:
        raise ManifestError(str(error)) from None
    for spec, component in zip(specs, fmt.components, strict=True):
        yield spec, component.kind != "input_scale"


def _fingerprint(manifest: Manifest) -> int:
    content = [
        [[spec.name, spec.dtype, spec.shape] for spec in manifest.tensors],
        [[row.name, row.shape, row.format, row.group, row.aliases] for row in manifest.parameters],
    ]
    return xxhash.xxh3_64_intdigest(json.dumps(content, separators=(",", ":")).encode())


# ---------------------------------------------------------------- mismatches


def _unknown(manifest: Manifest, specs: Sequence[TensorSpec]) -> Iterator[str]:
    names = [spec.name for spec in specs if spec.name not in manifest.index]
    aliases = {alias: row.name for row in manifest.parameters for alias in row.aliases}
    for i, name in enumerate(names):
        near = difflib.get_close_matches(name, manifest.index, n=2, cutoff=0.6) if i < MAX_HINTS else []
        hint = f"nearest: {', '.join(near)}" if near else "leave it out"
        yield f"{name}: " + (f"is tied to {aliases[name]}, push that" if name in aliases else f"unknown; {hint}")


def _repeated(specs: Sequence[TensorSpec]) -> Iterator[str]:
    counts = Counter(spec.name for spec in specs)
    return (f"{name}: given {count} times; give it once" for name, count in counts.items() if count > 1)


def _unlike(manifest: Manifest, specs: Sequence[TensorSpec]) -> Iterator[str]:
    for spec in specs:
        held = manifest.tensors[manifest.index[spec.name]] if spec.name in manifest.index else spec
        if (spec.shape, spec.dtype) == (held.shape, held.dtype):
            continue
        packed = held.dtype not in FLOATS and spec.dtype in FLOATS
        advice = "an implicit float-to-packed cast is refused, encode it first" if packed else "push it as it is held"
        expected = f"{list(held.shape)} of {held.dtype}"
        yield f"{spec.name}: got {list(spec.shape)} of {spec.dtype}, expected {expected}; {advice}"


def _cut(manifest: Manifest, pushed: set[str]) -> Iterator[str]:
    """Parameters and fused groups of which only a part is pushed."""
    groups: dict[str, list[tuple[str, bool]]] = {}
    for row in manifest.parameters:
        required = manifest.required_of(row)
        absent = [name for name in required if name not in pushed]
        brought = len(absent) < len(required)
        if brought and absent:
            yield f"{row.name}: without {', '.join(absent)}; a parameter is pushed with all its tensors"
        if row.group:
            groups.setdefault(row.group, []).append((row.name, brought))
    for group, members in groups.items():
        absent = [name for name, brought in members if not brought]
        if 0 < len(absent) < len(members):
            more = f" and {len(absent) - MAX_NAMES} more" if len(absent) > MAX_NAMES else ""
            named = ", ".join(absent[:MAX_NAMES]) + more
            yield f"fused group {group}: without {named}; its members share a global scale, push all of them"
