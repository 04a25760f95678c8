"""Two records side by side: measures, the rows behind them, and the limits that they keep or break.

found = compare(reference, candidate)
found.measures["kl"].value, [verdict for verdict in judge(found, {"max_kl": 0.1}) if not verdict.ok]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from weight_update.errors import PlanError, raise_all

from . import similarity
from .records import Record

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number over everything compared; where: over what it goes, and where it is worst."""

    value: float
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """how: "logits", "tops" (only the likeliest tokens are known) or "latents". rows: per token, probe or step."""

    how: str
    reference: Record
    candidate: Record
    measures: Mapping[str, Measure]
    rows: list[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What an option bounds. least: the measure must not be below it; otherwise not above."""

    option: str
    measures: tuple[str, ...]
    least: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A limit, what was measured, and whether it holds. A NaN breaks every limit."""

    option: str
    measure: str
    measured: float
    allowed: float
    ok: bool
    where: str


LIMITS: dict[str, Limit] = {
    limit.option: limit
    for limit in (
        Limit(option="min_cosine", measures=("cosine",), least=True),
        Limit(option="max_kl", measures=("kl", "kl_at_least"), least=False),
        Limit(option="min_top1", measures=("top1",), least=True),
        Limit(option="max_ppl_ratio", measures=("perplexity_ratio",), least=False),
        Limit(option="min_psnr", measures=("psnr",), least=True),
    )
}

# What is measured, by how it is compared.
MEASURED: dict[str, tuple[str, ...]] = {
    "logits": ("kl", "top1", "perplexity_reference", "perplexity_candidate", "perplexity_ratio"),
    "tops": ("kl_at_least", "top1"),
    "latents": ("cosine", "mae", "rmse", "max_abs", "psnr"),
}

WHY = {
    "logits": "these are language models",
    "tops": "these are language models, and a service tells its likeliest token only",
    "latents": "these are diffusion models",
}


def compare(reference: Record, candidate: Record) -> Comparison:
    """Compare two records of one kind, made from the same question. Raises PlanError where they are not."""
    how = how_compared(reference, candidate)
    problems = [
        f"{name}: the candidate was asked {candidate.asked.get(name)!r:.60}, the reference {value!r:.60}"
        for name, value in reference.asked.items()
        if candidate.asked.get(name) != value
    ]
    problems += [
        f"{name}: shape {list(candidate.tensors[name].shape)}, expected {list(reference.tensors[name].shape)}"
        for name in TENSORS[how]
        if candidate.tensors[name].shape != reference.tensors[name].shape
    ]
    if how == "logits" and not problems and not reference.tensors["targets"].equal(candidate.tensors["targets"]):
        problems.append("the two tokenizers split the text into other tokens")
    raise_all(PlanError, f"{candidate.label} cannot be compared with {reference.label}", problems)
    measures, rows = COMPARERS[how](reference.tensors, candidate.tensors)
    return Comparison(how=how, reference=reference, candidate=candidate, measures=measures, rows=rows)


def how_compared(reference: Record, candidate: Record) -> str:
    """The key of MEASURED for two records: the most that both have."""
    if reference.kind != candidate.kind:
        raise PlanError(f"{candidate.label} put out {candidate.kind}, {reference.label} {reference.kind}; same models?")
    return next(
        how for how, names in TENSORS.items() if all(set(names) <= set(r.tensors) for r in (reference, candidate))
    )


def judge(comparison: Comparison, limits: Mapping[str, float]) -> list[Verdict]:
    """Every limit given, by its name in LIMITS."""
    refuse_unmeasured(comparison.how, limits)
    return [_verdict(comparison, LIMITS[option], allowed) for option, allowed in limits.items()]


def refuse_unmeasured(how: str, limits: Mapping[str, float]) -> None:
    """A limit on what is not measured would pass unseen: raise PlanError that lists all such."""
    known = MEASURED[how]
    problems = [
        f"--{option.replace('_', '-')} needs {' or '.join(LIMITS[option].measures)}; measured are {', '.join(known)}"
        for option in limits
        if set(LIMITS[option].measures).isdisjoint(known)
    ]
    raise_all(PlanError, f"limits that cannot be checked: {WHY[how]}", problems)


def _verdict(comparison: Comparison, limit: Limit, allowed: float) -> Verdict:
    name = next(name for name in limit.measures if name in comparison.measures)
    measure = comparison.measures[name]
    ok = measure.value >= allowed if limit.least else measure.value <= allowed
    return Verdict(
        option=limit.option, measure=name, measured=measure.value, allowed=allowed, ok=ok, where=measure.where
    )


# ---------------------------------------------------------------- language models

Tensors = Mapping[str, Tensor]
Found = tuple[dict[str, Measure], list[Row]]


def _logits(reference: Tensors, candidate: Tensors) -> Found:
    p, q, targets = reference["logits"], candidate["logits"], reference["targets"]
    kl, agree = similarity.token_kl(p, q), similarity.same_top1(p, q)
    lost = {name: similarity.surprisal(logits, targets) for name, logits in (("reference", p), ("candidate", q))}
    levels = {name: similarity.perplexity(values) for name, values in lost.items()}
    over = f"{len(targets)} tokens"
    measures = {
        "kl": Measure(value=kl.mean().item(), where=f"mean of {over}; {_largest(kl, 'token')}"),
        "top1": Measure(value=agree.double().mean().item(), where=f"of {over}; {_first_false(agree, 'token')}"),
        **{f"perplexity_{name}": Measure(value=value, where=f"on {over}") for name, value in levels.items()},
        "perplexity_ratio": Measure(value=_ratio(levels["candidate"], levels["reference"]), where=f"on {over}"),
    }
    columns = zip(targets.tolist(), kl.tolist(), agree.tolist(), *(v.tolist() for v in lost.values()), strict=True)
    names = ("token_id", "kl", "top1", "surprisal_reference", "surprisal_candidate")
    return measures, [{"token": i} | dict(zip(names, row, strict=True)) for i, row in enumerate(columns, 1)]


def _tops(reference: Tensors, candidate: Tensors) -> Found:
    ids, logprobs = ([side[name] for side in (reference, candidate)] for name in ("top_ids", "top_logprobs"))
    kl = similarity.least_kl(ids[0], logprobs[0], ids[1], logprobs[1])
    agree = ids[0] == ids[1]
    over = f"{len(kl)} probes"
    measures = {
        "kl_at_least": Measure(
            value=kl.mean().item(),
            where=f"mean of {over}, a lower bound: only likeliest tokens are known; {_largest(kl, 'probe')}",
        ),
        "top1": Measure(value=agree.double().mean().item(), where=f"of {over}; {_first_false(agree, 'probe')}"),
    }
    columns = zip(kl.tolist(), agree.tolist(), *(side.tolist() for side in (*ids, *logprobs)), strict=True)
    names = ("kl_at_least", "top1", "id_reference", "id_candidate", "logprob_reference", "logprob_candidate")
    return measures, [{"probe": i} | dict(zip(names, row, strict=True)) for i, row in enumerate(columns, 1)]


def _ratio(candidate: float, reference: float) -> float:
    return candidate / reference if reference else float("nan")


def _largest(values: Tensor, what: str) -> str:
    """NaNs count as largest."""
    at = int(values.argmax())
    return f"largest {values[at].item():.3g} at {what} {at + 1}"


def _first_false(values: Tensor, what: str) -> str:
    at = int(values.long().argmin())
    return "none differs" if values[at] else f"first differs at {what} {at + 1}"


# ---------------------------------------------------------------- diffusion

ERRORS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "cosine": similarity.cosine,
    "mae": similarity.mae,
    "rmse": similarity.rmse,
    "max_abs": similarity.max_abs,
}


def _latents(reference: Tensors, candidate: Tensors) -> Found:
    a, b = reference["latents"], candidate["latents"]
    rows = [
        {"step": step, "sample": sample}
        | {name: error(a[step, sample], b[step, sample]) for name, error in ERRORS.items()}
        for step in range(a.shape[0])
        for sample in range(a.shape[1])
    ]
    frames = _frames(reference, candidate)
    measures = {name: _worst(rows, name, least=name == "cosine") for name in ERRORS}
    return measures | {"psnr": _worst(frames, "psnr", least=True)}, rows + frames


def _frames(reference: Tensors, candidate: Tensors) -> list[Row]:
    """PSNR of every frame: of the VAE's, in [0, 1], where both have them; else the last latents are the frames.

    Latents have no fixed range: there the peak is that of the reference's sample. [C, F, H, W] has F frames, all other
    shapes are one.
    """
    if "frames" in reference and "frames" in candidate:
        pairs = zip(reference["frames"], candidate["frames"], strict=True)
        peaks = [1.0] * len(reference["frames"])
    else:
        last = (reference["latents"][-1], candidate["latents"][-1])
        pairs = zip(*(each.transpose(1, 2) if each.ndim == 5 else each[:, None] for each in last), strict=True)
        peaks = [(sample.max() - sample.min()).item() for sample in last[0]]
    return [
        {"frame": frame, "sample": sample, "psnr": similarity.psnr(*both, peaks[sample])}
        for sample, (a, b) in enumerate(pairs)
        for frame, both in enumerate(zip(a, b, strict=True))
    ]


def _worst(rows: list[Row], name: str, *, least: bool) -> Measure:
    """NaN is worse than any number."""
    sign = 1.0 if least else -1.0
    row = min(rows, key=lambda row: (row[name] == row[name], sign * row[name]))
    unit = next(iter(row))
    return Measure(
        value=row[name], where=f"{'least' if least else 'largest'}, at {unit} {row[unit]} of sample {row['sample']}"
    )


# How records are compared: what both must hold, the most telling first, and the function that compares.
TENSORS: dict[str, tuple[str, ...]] = {
    "logits": ("targets", "logits"),
    "tops": ("top_ids", "top_logprobs"),
    "latents": ("latents",),
}
COMPARERS: dict[str, Callable[[Tensors, Tensors], Found]] = {"logits": _logits, "tops": _tops, "latents": _latents}
