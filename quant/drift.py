"""How far activation scales have drifted: those that a trainer carries along against freshly calibrated ones.

    drift = scale_drift(calibrated={"blocks.0.to_q": 3.1}, carried={"blocks.0.to_q": 2.9})
    drift.rows[0].ratio, drift.geometric_mean

A ratio below 1 clips activations by that factor, one above 1 wastes that much of the range of the format.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .formats import FORMATS, Format
from .output import require
from .rewriting import Shards, read_declared
from .scales import INPUT_AMAX, INPUT_SCALE, read_scales

FAR = 1.25  # a quarter of the range lost or clipped: two E4M3 steps


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftRow:
    """One module: both values, and carried over calibrated."""

    module: str
    calibrated: float
    carried: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """rows: the ratio that is farthest from 1 first. far: how many differ by more than FAR. missing: calibrated, not
    carried; extra: the reverse. The figures are 1.0 where nothing is in both."""

    rows: tuple[DriftRow, ...]
    smallest: float
    geometric_mean: float
    median: float
    largest: float
    far: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def scale_drift(calibrated: Mapping[str, float], carried: Mapping[str, float]) -> Drift:
    """Compare activation scales, or amaxes, of the same kind on both sides, by module.

    Raises ToolError that lists every value that is no positive finite number.
    """
    sides = (("calibrated", calibrated), ("carried", carried))
    problems = [
        f"{name}: {what} {value}"
        for what, values in sides
        for name, value in sorted(values.items())
        if not 0 < value < math.inf
    ]
    require("activation scales that are no positive finite numbers", problems)
    rows = [
        DriftRow(module=name, calibrated=fresh, carried=carried[name], ratio=carried[name] / fresh)
        for name, fresh in sorted(calibrated.items())
        if name in carried
    ]
    ratios = [row.ratio for row in rows] or [1.0]
    return Drift(
        rows=tuple(sorted(rows, key=lambda row: -abs(math.log(row.ratio)))),
        smallest=min(ratios),
        geometric_mean=statistics.geometric_mean(ratios),
        median=statistics.median(ratios),
        largest=max(ratios),
        far=sum(max(ratio, 1 / ratio) > FAR for ratio in ratios),
        missing=tuple(sorted(calibrated.keys() - carried.keys())),
        extra=tuple(sorted(carried.keys() - calibrated.keys())),
    )


def activation_amax(path: Path, fmt: Format) -> dict[str, float]:
    """The largest magnitude of each module's input, by module, that a checkpoint folder or a state file carries.

    A scale times the largest value of its format is that magnitude: a folder names its format, a file is in `fmt`.
    """
    if not path.is_dir():
        return amax_of(read_scales(path), fmt)
    shards, quantization = Shards(path), read_declared(path).quantization()
    names = [name for name in shards.names() if name.endswith((INPUT_SCALE, INPUT_AMAX))]
    return amax_of(
        {name: shards.tensor(name) for name in names}, fmt if quantization is None else FORMATS[quantization.format]
    )


def amax_of(tensors: Mapping[str, Tensor], fmt: Format) -> dict[str, float]:
    """The same of tensors by full name."""
    largest = {INPUT_AMAX: 1.0, INPUT_SCALE: fmt.global_divisor}
    found: dict[str, float] = {}
    for suffix, factor in reversed(largest.items()):  # an amax wins: it is what was measured
        for name, value in tensors.items():
            if name.endswith(suffix) and value.numel() == 1 and factor is not None:
                found[name.removesuffix(suffix)] = value.item() * factor
    return found
