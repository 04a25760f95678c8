"""`transfuse compare`: two checkpoints, two formats, or two versions of a live service, with limits for CI.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weight_update.errors import PlanError

from .progress import Bars
from .sides import SAMPLE, Asked, Side
from .tables import aligned

if TYPE_CHECKING:
    from .comparison import Comparison, Verdict
    from .records import Record

NAMES = ("reference", "candidate")
SIDE = "A checkpoint (as for serve), HOST:PORT of a service, or a file of --save."

Reference = Annotated[str, typer.Argument(help=f"What is right. {SIDE}")]
Candidate = Annotated[str, typer.Argument(help=f"What is judged. {SIDE} Left out only with --save.")]
Format = Annotated[str, typer.Option(help="Of the candidate, if a checkpoint. Default: what it says of itself.")]
Layout = Annotated[str, typer.Option(help="Of the candidate, if a checkpoint.")]
ReferenceFormat = Annotated[
    str, typer.Option(help="Of the reference, if a checkpoint. Default: what it says of itself.")
]
ReferenceLayout = Annotated[str, typer.Option(help="Of the reference, if a checkpoint.")]
Over = Annotated[str, typer.Option(metavar="CHECKPOINT", help="The candidate's weights replace these, in place.")]
Component = Annotated[
    list[str], typer.Option(metavar="NAME=PATH", help="Of the candidate, a pipeline: other weights; repeatable.")
]
Text = Annotated[Path | None, typer.Option(help="Text file of language models. Default: a short one of our own.")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Of the text; of a service, words to go on from.")]
Size = Annotated[str, typer.Option(metavar="[F x]HxW", help="Of the latents of diffusion models: pixels / 8 for most.")]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Samples = Annotated[int, typer.Option(min=1, help="Samples, each from the next seed.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the first sample's noise.")]
Guidance = Annotated[float, typer.Option(help="What guidance-distilled models take as input.")]
CfgScale = Annotated[str, typer.Option(metavar="SCALE[,SCALE_2]", help="Classifier-free guidance; 0 for none.")]
Conditioning = Annotated[
    str, typer.Option(metavar="FILE", help="Safetensors of what text encoders give. Default: random numbers.")
]
MaxKl = Annotated[float | None, typer.Option(help="Limit: mean KL of next tokens, in nats.")]
MinTop1 = Annotated[float | None, typer.Option(help="Limit: share of equal likeliest tokens, 0 to 1.")]
MaxPplRatio = Annotated[float | None, typer.Option(help="Limit: perplexity, candidate over reference.")]
MinCosine = Annotated[float | None, typer.Option(help="Limit: cosine of latents, at every step.")]
MinPsnr = Annotated[float | None, typer.Option(help="Limit: PSNR of every frame, in dB.")]
Save = Annotated[Path | None, typer.Option(metavar="FILE", help="Keep what the reference was asked and put out.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of report.html and its plots as PNG.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be compared, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]


def compare(
    reference: Reference,
    candidate: Candidate = "",
    format: Format = "",
    layout: Layout = "auto",
    component: Component = [],  # noqa: B006 - typer copies it
    over: Over = "",
    reference_format: ReferenceFormat = "",
    reference_layout: ReferenceLayout = "auto",
    text: Text = None,
    max_tokens: MaxTokens = 256,
    size: Size = "64x64",
    steps: Steps = 8,
    samples: Samples = 1,
    seed: Seed = 0,
    guidance: Guidance = 0.0,
    cfg_scale: CfgScale = "0",
    conditioning: Conditioning = "",
    max_kl: MaxKl = None,
    min_top1: MinTop1 = None,
    max_ppl_ratio: MaxPplRatio = None,
    min_cosine: MinCosine = None,
    min_psnr: MinPsnr = None,
    save: Save = None,
    out: Out = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Compare outputs, with limits for CI.

    Language models: KL, top-1 agreement and perplexity on a text. Diffusion: cosine and errors of the latents of every
    step from one seed, and the PSNR of frames. Exit code 1 where a limit is broken. A version of a live service is kept
    with --save FILE, and FILE compared with the service later.
    """
    sides = [Side(source=reference, format=reference_format, layout=reference_layout)]
    if candidate:
        other = Side(source=candidate, format=format, layout=layout, first=over, components=_components(component))
        sides.append(other)
    noise: dict[str, Any] = {"seed": seed, "num_samples": samples, "num_steps": steps, "guidance": guidance}
    noise |= {**_size(size), **_scales(cfg_scale), "conditioning": conditioning}
    asked = Asked(text=_read(text), max_tokens=max_tokens, **noise)
    limits = (min_cosine, max_kl, min_top1, max_ppl_ratio, min_psnr)
    _perform(sides, asked, _given(*limits), Wanted(save=save, out=out, dry_run=dry_run, as_json=as_json))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command leaves behind."""

    save: Path | None
    out: Path | None
    dry_run: bool
    as_json: bool


def _perform(sides: Sequence[Side], asked: Asked, limits: Mapping[str, float], wanted: Wanted) -> None:
    if len(sides) == 1 and (wanted.save is None or limits):
        raise typer.BadParameter("CANDIDATE is missing; only --save FILE, without limits, does with one side")
    if wanted.dry_run:
        plan = {"sides": [asdict(side) | {"kind": side.kind} for side in sides], "limits": dict(limits)} | asdict(asked)
        _print(plan, _planned(sides, asked, limits), wanted.as_json)
        return
    found, verdicts = _run(sides, asked, limits, wanted.save)
    if found is None:
        said = f"saved in {wanted.save}; compare it with: transfuse compare {wanted.save} CANDIDATE"
        _print({"saved": str(wanted.save)}, said, wanted.as_json)
        return
    if wanted.out is not None:
        from .compare_report import write_report

        write_report(wanted.out, found, verdicts)
    _print(as_values(found, verdicts), as_text(found, verdicts, wanted.out), wanted.as_json)
    if not all(verdict.ok for verdict in verdicts):
        raise typer.Exit(1)


# ---------------------------------------------------------------- what is given


def _given(
    min_cosine: float | None,
    max_kl: float | None,
    min_top1: float | None,
    max_ppl_ratio: float | None,
    min_psnr: float | None,
) -> dict[str, float]:
    """The limits that are set, under their names in comparison.LIMITS."""
    limits = {"min_cosine": min_cosine, "max_kl": max_kl, "min_top1": min_top1, "max_ppl_ratio": max_ppl_ratio}
    return {name: limit for name, limit in (limits | {"min_psnr": min_psnr}).items() if limit is not None}


def _components(given: Sequence[str]) -> tuple[str, ...]:
    for each in given:
        name, separator, path = each.partition("=")
        if not (name and separator and path):
            raise typer.BadParameter(f"--component {each!r}: expected NAME=PATH, for instance transformer=export")
    return tuple(given)


def _size(given: str) -> dict[str, int]:
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+)", given)
    if match is None:
        raise typer.BadParameter(f"--size {given!r}: expected HxW or FxHxW, for instance 64x64 or 16x60x104")
    return {"num_frames": int(match[1] or 1), "height": int(match[2]), "width": int(match[3])}


def _scales(given: str) -> dict[str, float]:
    try:
        first, second = [*map(float, given.split(",")), *([] if "," in given else [0.0])]
    except ValueError:
        raise typer.BadParameter(f"--cfg-scale {given!r}: expected a number, or two with a comma") from None
    return {"cfg_scale": first, "cfg_scale_2": second}


def _read(path: Path | None) -> str:
    if path is None:
        return SAMPLE
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read as UTF-8 text: {error}") from error


# ---------------------------------------------------------------- what is done


def _run(
    sides: Sequence[Side], asked: Asked, limits: Mapping[str, float], save: Path | None
) -> tuple[Comparison | None, list[Verdict]]:
    """Make or read the records, and compare them; with one side there is nothing to compare."""
    bars = Bars()
    with bars.show("load libraries"):
        from quant.checkpoint import CheckpointError
        from quant.families import FamilyError
        from quant.models import ModelError
        from quant.pipelines import PipelineError

        from .comparison import compare, judge, refuse_unmeasured
        from .recording import plan_records
        from .records import save as save_record
    try:
        plan = plan_records(sides, asked)
        refuse_unmeasured(plan.how, limits)
        made: list[Record] = []
        for side, what in zip(sides, NAMES, strict=False):
            with bars.show(what):
                made.append(plan.record(side, partial(bars.update, what)))
    except (CheckpointError, FamilyError, ModelError, PipelineError) as error:
        raise PlanError(str(error)) from error
    if save is not None:
        save_record(made[0], save)
    if len(made) == 1:
        return None, []
    with bars.show("compare"):
        found = compare(*map(plan.with_frames, made))
    return found, judge(found, limits)


# ---------------------------------------------------------------- what is printed


def as_values(found: Comparison, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """For JSON, which has neither infinities nor NaN: they become the strings "inf", "-inf" and "nan"."""
    return {
        "ok": all(verdict.ok for verdict in verdicts),
        "how": found.how,
        **{
            name: {"label": record.label, "versions": list(record.versions)}
            for name, record in zip(NAMES, (found.reference, found.candidate), strict=True)
        },
        "measures": {name: _plain(asdict(measure)) for name, measure in found.measures.items()},
        "limits": [_plain(asdict(verdict)) for verdict in verdicts],
        "rows": [_plain(row) for row in found.rows],
    }


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def as_text(found: Comparison, verdicts: Sequence[Verdict], out: Path | None) -> str:
    """For people; a broken limit stands last, where it is seen."""
    rows = [
        {"measure": name, "value": f"{measure.value:.6g}", "where": measure.where}
        for name, measure in found.measures.items()
    ]
    head = f"reference  {found.reference.label}\ncandidate  {found.candidate.label}\n"
    lines = [head, aligned(rows), *([f"\nreport in {out / 'report.html'}"] if out else [])]
    return "\n".join(lines + [verdict_text(verdict) for verdict in sorted(verdicts, key=lambda each: not each.ok)])


def verdict_text(verdict: Verdict) -> str:
    """One limit: which, measured, allowed, where."""
    option = "--" + verdict.option.replace("_", "-")
    said = f"{verdict.measure} {verdict.measured:.6g}, limit {verdict.allowed:g} ({verdict.where})"
    return f"{'kept  ' if verdict.ok else 'BROKEN'} {option}: {said}"


def _planned(sides: Sequence[Side], asked: Asked, limits: Mapping[str, float]) -> str:
    rows = [{"side": name, **asdict(side), "kind": side.kind} for name, side in zip(NAMES, sides, strict=False)]
    bounds = ", ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in limits.items()) or "none"
    return f"{aligned(rows)}\n\ntext of {len(asked.text)} characters; limits: {bounds}; nothing was built or asked"


def _print(value: Any, text: str, as_json: bool) -> None:
    sys.stdout.write((json.dumps(value) if as_json else text) + "\n")
    sys.stdout.flush()
