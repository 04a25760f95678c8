"""Are the nibble order and the scale layout of an NVFP4 checkpoint what it declares? Its bytes are asked.

    verdict = verify(checkpoint, rows_of(base_checkpoint))      # raises ProbeError where another reading fits better
    verdict.status, verdict.reason                              # "verified", "relative error 0.095; next 0.31 with ..."

Sampled rows are decoded under each hypothesis and compared with BF16 rows of the same weights. Block maxima cannot
tell the order of nibbles: a swap stays inside its block. BF16 rows are those of the model that was quantized, or, where
that is not at hand, of the first BF16 push, which a few steps of training have hardly moved:

    verify(checkpoint, lambda name, start, stop: pushed[name][start:stop] if name in pushed else None)

Without any, metadata and padding bytes say what they can, and the rest is "unverified".
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Protocol, get_args

import torch
from torch import Tensor

from .configs import NVFP4_ROWS, Quantization, ScaleLayout
from .conversions import linear_scales, swap_nibbles
from .formats import FORMATS, TensorSpec, decode
from .inference import COMFY_MARKER, Metadata, embedded
from .specs import Parts

log = logging.getLogger(__name__)

# BF16 rows [start, stop) of a weight by its name in the checkpoint, None where there are none. Of a packed weight only
# the first part is asked for (q of a qkv).
Base = Callable[[str, int, int], Tensor | None]

TILE_ROWS = 128  # of swizzled scales
NUM_MODULES, NUM_ROWS = 4, 32
PADDED_COLUMNS = 32  # codes of 16 bytes, to a multiple of which ComfyUI's files are padded
# Relative error of unrelated rows is 1.4, of NVFP4 0.1: above this a base is of another model.
RESEMBLES = 0.7


class ProbeError(ValueError):
    """The bytes of a checkpoint fit another reading better than the declared one; the message shows all errors."""


class Rows(Protocol):
    """What is read of a checkpoint."""

    def names(self) -> tuple[str, ...]: ...
    def spec(self, name: str) -> TensorSpec: ...
    def rows(self, name: str, row_start: int = 0, row_stop: int | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """One way to read the bytes."""

    swap_nibbles: bool
    scale_layout: ScaleLayout

    @classmethod
    def declared_by(cls, quantization: Quantization) -> Hypothesis:
        """How a checkpoint says that it is to be read."""
        return cls(swap_nibbles=quantization.swap_nibbles, scale_layout=quantization.scale_layout)

    def __str__(self) -> str:
        return f"{'high' if self.swap_nibbles else 'low'} nibble first, {self.scale_layout} scales"


FIELDS = ("swap_nibbles", "scale_layout")
HYPOTHESES = tuple(
    Hypothesis(swap_nibbles=swap, scale_layout=at) for swap, at in product((False, True), get_args(ScaleLayout))
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The first rows of a weight as stored, and in BF16.

    codes: U8 [n, K/2]. scales: E4M3 [m, >= K/group], the stored rows from 0 to n, or to the end of the tile of 128 that
    holds row n where the tensor has so many. global_scale: F32. base: BF16 [<= n, <= K]; what is beyond is padding.
    """

    name: str
    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    base: Tensor
    format: str = "nvfp4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is certain: names of FIELDS, why, and the relative error of every reading that the shapes allow."""

    verified: frozenset[str]
    reason: str
    errors: Mapping[Hypothesis, float] = field(default_factory=dict)

    @property
    def is_of_another_model(self) -> bool:
        """Whether there were BF16 rows to compare with, and no reading makes the bytes resemble them."""
        return bool(self.errors) and min(self.errors.values()) > RESEMBLES

    @property
    def status(self) -> str:
        return "verified" if self.verified == frozenset(FIELDS) else "unverified"

    def __str__(self) -> str:
        open_fields = ", ".join(sorted(set(FIELDS) - self.verified))
        return f"{self.status}{f' ({open_fields})' if open_fields else ''}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How an NVFP4 checkpoint is read, and how certain that is. component: of a pipeline, "" of a language model."""

    component: str = ""
    declared: Hypothesis
    verdict: Verdict


def verify(
    checkpoint: Rows, base: Base | None = None, *, quantization: Quantization, metadata: Metadata = ()
) -> Verdict:
    """Compare what `quantization` declares with the stored bytes (not those of a view); logs and returns the verdict.

    metadata: of the header of each shard. Raises ProbeError where another reading fits better, or metadata and padding
    say otherwise. A checkpoint that is not in NVFP4 has neither nibbles nor such scales: verified.
    """
    if quantization.format not in NVFP4_ROWS:
        return Verdict(verified=frozenset(FIELDS), reason=f"{quantization.format} has neither")
    declared = Hypothesis.declared_by(quantization)
    verdict = check(
        declared,
        () if base is None else samples(checkpoint, base, quantization.format),
        stated=stated_by_metadata(checkpoint.names(), metadata),
        padding=list(islice(padded_scales(checkpoint, quantization.format), NUM_MODULES)),
    )
    log.log(logging.INFO if verdict.status == "verified" else logging.WARNING, "%s: %s", declared, verdict)
    return verdict


def check(
    declared: Hypothesis,
    samples: Sequence[Sample],
    *,
    stated: Mapping[str, object] | None = None,
    padding: Sequence[Padded] = (),
) -> Verdict:
    """The verdict on the declared reading: by the samples, or without them by metadata (`stated`) and padding bytes.

    Raises ProbeError where the declared reading fits worse than another.
    """
    errors = fits(samples) if samples else {}
    if errors:
        best = min(errors, key=lambda each: errors[each])
        if errors[best] <= RESEMBLES:
            return _by_errors(declared, errors, best)
        why = f"the BF16 rows are of another model: relative error {errors[best]:.3g} at best"
    else:
        why = "no BF16 rows to compare with"
    return _by_evidence(declared, dict(stated or {}), _layouts_of_padding(padding), why, errors)


def fits(samples: Sequence[Sample], hypotheses: Iterable[Hypothesis] = HYPOTHESES) -> dict[Hypothesis, float]:
    """Relative error |decoded - base| / |base| over all samples of each reading that the shapes allow."""
    possible = [
        each for each in hypotheses if all(_is_possible(each.scale_layout, sample.scales) for sample in samples)
    ]
    norm = math.sqrt(sum(_squares(sample.base.double()) for sample in samples))
    found = {}
    for each in possible:
        error = math.sqrt(sum(_squares(_decoded(sample, each) - sample.base.double()) for sample in samples))
        # A NaN among the scales: no encoder writes it.
        found[each] = math.inf if math.isnan(error) else error / norm if norm else error
    return found


def _squares(values: Tensor) -> float:
    return float((values * values).sum())


def _is_possible(layout: ScaleLayout, stored: Tensor) -> bool:
    return layout == "linear" or (len(stored) % TILE_ROWS == 0 and stored.shape[1] % 4 == 0)


def _decoded(sample: Sample, hypothesis: Hypothesis) -> Tensor:
    """Rows of a sample under a hypothesis, FP64, cut to the rows and columns of its base."""
    fmt = FORMATS[sample.format]
    group = fmt.encode_block[1]
    num_rows, num_bytes = sample.codes.shape
    scales = _logical(sample.scales, hypothesis.scale_layout)[:num_rows, : 2 * num_bytes // group]
    codes = swap_nibbles(sample.codes) if hypothesis.swap_nibbles else sample.codes
    parts: Parts = {
        "weight": codes.contiguous(),
        "weight_scale": scales.contiguous().view(torch.float8_e4m3fn),
        "weight_scale_2": sample.global_scale.float().reshape(()),
    }
    rows, columns = sample.base.shape
    return decode(fmt, parts)[:rows, :columns].double()


def _logical(stored: Tensor, layout: ScaleLayout) -> Tensor:
    """Bytes of stored scales in rows and columns, padding included."""
    as_bytes = stored.contiguous().view(torch.uint8)
    return as_bytes if layout == "linear" else linear_scales(as_bytes, *stored.shape)


def _by_errors(declared: Hypothesis, errors: dict[Hypothesis, float], best: Hypothesis) -> Verdict:
    if declared not in errors:
        raise ProbeError(f"declared is {declared}, but scales of these shapes are not swizzled; {_shown(errors)}")
    if errors[best] < errors[declared]:
        raise ProbeError(
            f"declared is {declared}, but {best} fits the BF16 rows better. Relative errors: {_shown(errors)}. "
            f"Correct swap_weight_nibbles or checkpoint_weight_scale_layout in config.json's quantization_config, or "
            f"give the base that this checkpoint was made from"
        )
    rivals = {each: error for each, error in errors.items() if each != declared}
    verified = frozenset(
        name
        for name in FIELDS
        if all(
            error > errors[declared] for each, error in rivals.items() if getattr(each, name) != getattr(declared, name)
        )
    )
    return Verdict(verified=verified, reason=f"relative errors of sampled rows: {_shown(errors)}", errors=errors)


def _shown(errors: Mapping[Hypothesis, float]) -> str:
    return "; ".join(f"{each} {error:.3g}" for each, error in sorted(errors.items(), key=lambda item: item[1]))


# ---------------------------------------------------------------- without BF16 rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """Stored scales that are larger than they need be: E4M3 [R, C], of which [num_rows, num_columns] are scales."""

    name: str
    scales: Tensor
    num_rows: int
    num_columns: int


def stated_by_metadata(names: Iterable[str], metadata: Metadata = ()) -> dict[str, object]:
    """FIELDS that the headers state, or that ComfyUI's markers imply: its kernels take high nibble first, swizzled."""
    is_comfy = any(name.endswith(COMFY_MARKER) for name in names)
    found: dict[str, object] = {"swap_nibbles": True, "scale_layout": "swizzled"} if is_comfy else {}
    return found | {name: getattr(each, name) for each in embedded(metadata) for name in each.stated}


def _layouts_of_padding(padded: Sequence[Padded]) -> tuple[ScaleLayout, ...]:
    """The layouts under which all padding bytes are zero, as every writer leaves them."""
    return tuple(
        layout for layout in get_args(ScaleLayout) if padded and all(_zero_padding(each, layout) for each in padded)
    )


def _zero_padding(padded: Padded, layout: ScaleLayout) -> bool:
    if not _is_possible(layout, padded.scales):
        return False
    logical = _logical(padded.scales, layout)
    return not logical[padded.num_rows :].any() and not logical[:, padded.num_columns :].any()


def _by_evidence(
    declared: Hypothesis,
    stated: dict[str, object],
    layouts: tuple[ScaleLayout, ...],
    why: str,
    errors: Mapping[Hypothesis, float],
) -> Verdict:
    said = {f"metadata: {name} {value}": (name, value) for name, value in stated.items()}
    if len(layouts) == 1:
        said[f"padding bytes: scale_layout {layouts[0]}"] = ("scale_layout", layouts[0])
    against = [text for text, (name, value) in said.items() if getattr(declared, name) != value]
    if against:
        raise ProbeError(
            f"declared is {declared}, but {'; '.join(against)} ({why}). Correct the config, or compare with BF16 rows"
        )
    reason = "; ".join([why, *said])
    return Verdict(verified=frozenset(name for name, _ in said.values()), reason=reason, errors=errors)


# ---------------------------------------------------------------- reading


def rows_of(base: Rows, rename: Callable[[str], str] = lambda name: name) -> Base:
    """The rows of a BF16 checkpoint. rename: a quantized weight's name -> its name here, or that of its first part."""
    names = frozenset(base.names())

    def rows(name: str, start: int, stop: int) -> Tensor | None:
        found = rename(name)
        return base.rows(found, start, stop).to(torch.bfloat16) if found in names else None

    return rows


def samples(checkpoint: Rows, base: Base, format: str = "nvfp4") -> list[Sample]:
    """First rows of up to NUM_MODULES weights that the base has too, spread over the checkpoint."""
    return list(islice(_samples(checkpoint, base, format), NUM_MODULES))


def _samples(checkpoint: Rows, base: Base, format: str) -> Iterator[Sample]:
    modules = _modules(checkpoint)
    step = max(1, len(modules) // NUM_MODULES)
    for module in (each for offset in range(step) for each in modules[offset::step]):
        weight = f"{module}.weight"
        num_rows = min(NUM_ROWS, checkpoint.spec(weight).num_rows)
        rows = base(weight, 0, num_rows)
        # One value a part where a packed weight has several: the first rows are of the first part.
        global_scale = checkpoint.rows(f"{module}.weight_scale_2").flatten()[0]
        # An all-zero weight has a global scale of 0 and tells nothing; other columns are another model's.
        columns = 2 * checkpoint.spec(weight).shape[1]
        if rows is None or not 0 < global_scale < math.inf or not 0 <= columns - rows.shape[1] < PADDED_COLUMNS:
            continue
        yield Sample(
            name=weight,
            codes=checkpoint.rows(weight, 0, num_rows),
            scales=checkpoint.rows(f"{weight}_scale", 0, min(TILE_ROWS, checkpoint.spec(f"{weight}_scale").num_rows)),
            global_scale=global_scale,
            base=rows,
            format=format,
        )


def padded_scales(checkpoint: Rows, format: str = "nvfp4") -> Iterator[Padded]:
    """The last tile of scales that have more rows or columns than the codes need."""
    for module in _modules(checkpoint):
        num_rows, num_bytes = checkpoint.spec(f"{module}.weight").shape
        stored_rows, stored_columns = checkpoint.spec(f"{module}.weight_scale").shape
        num_columns = 2 * num_bytes // FORMATS[format].encode_block[1]
        if (stored_rows, stored_columns) != (num_rows, num_columns):
            first = (stored_rows - 1) // TILE_ROWS * TILE_ROWS
            yield Padded(
                name=module,
                scales=checkpoint.rows(f"{module}.weight_scale", first, stored_rows),
                num_rows=num_rows - first,
                num_columns=num_columns,
            )


def _modules(checkpoint: Rows) -> list[str]:
    """Modules with packed codes, a matrix of E4M3 scales and a global scale."""
    names = frozenset(checkpoint.names())
    modules = [name.removesuffix(".weight_scale_2") for name in sorted(names) if name.endswith(".weight_scale_2")]
    whole = [each for each in modules if {f"{each}.weight", f"{each}.weight_scale"} <= names]
    return [
        each
        for each in whole
        if checkpoint.spec(f"{each}.weight").dtype == "U8" and len(checkpoint.spec(f"{each}.weight_scale").shape) == 2
    ]
