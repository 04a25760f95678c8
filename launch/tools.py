"""The checkpoint tools: calibrate, build-mixed, convert-fp8. Each plans, says what it would do, and writes one folder.

The folder appears whole, with a report of what was done to every tensor, or not at all: see quant.output.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weight_update.errors import PlanError, WeightUpdateError

from .progress import Bars
from .tables import aligned, mebibytes

if TYPE_CHECKING:
    from quant.rewriting import Rewrite

# Said here since the help loads no table that needs torch; a test compares.
PRESETS = "none, flux1-nvfp4, flux2-nvfp4, wan-nvfp4, qwen_image-nvfp4"
KEEP_LISTS = "auto, none, flux, flux2, qwen_image, wan"
SHOWN = 12  # rows of a table on a terminal; the report has all

Report = dict[str, Any]
Out = Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist yet.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace --out if this command wrote all that is in it, and nobody else.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")]
Keep = Annotated[
    list[str], typer.Option("--keep-bf16", metavar="GLOB", help="Modules to keep in BF16, by full name; repeatable.")
]
Component = Annotated[str, typer.Option(help="Folder of the transformer, where a whole pipeline is named.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, nothing else.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a tool. options: what the report repeats of the command line."""

    tool: str
    out: Path
    inputs: tuple[Path, ...]
    overwrite: bool
    dry_run: bool
    as_json: bool
    options: Mapping[str, Any]


# ---------------------------------------------------------------- commands


def build_mixed(
    export: Annotated[Path, typer.Argument(help="ModelOpt export in NVFP4: a folder, or a pipeline's.")],
    base: Annotated[Path, typer.Option(help="The BF16 model that was quantized: a folder, or a pipeline's.")],
    out: Out,
    preset: Annotated[str, typer.Option(help=f"Modules that a family needs in BF16: {PRESETS}.")] = "none",
    keep_bf16: Keep = [],  # noqa: B006 - typer copies it
    swap_weight_nibbles: Annotated[
        bool | None,
        typer.Option(help="Write that the export has the first weight in the high nibble. Default: as it says itself."),
    ] = None,
    component: Component = "transformer",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Build a transformer of BF16 and NVFP4 layers.

    Tensors are copied from the export; those of modules kept in BF16 come from the base and lose their scales.
    """
    with refusals():
        from quant.mixed import plan_mixed
        from quant.rewriting import weights_folder

        source, plain = weights_folder(export, component), weights_folder(base, component)
        plan = plan_mixed(source, plain, preset=preset, keep=keep_bf16, swap_nibbles=swap_weight_nibbles)
        job = Job(
            tool="transfuse build-mixed",
            out=out,
            inputs=(source, plain),
            overwrite=overwrite,
            dry_run=dry_run,
            as_json=as_json,
            options={"preset": preset, "keep_bf16": keep_bf16, "swap_weight_nibbles": swap_weight_nibbles},
        )
        _run(job, plan.report(), _writer(plan))


def convert_fp8(
    export: Annotated[Path, typer.Argument(help="ModelOpt export with BF16 weights: a folder, or a pipeline's.")],
    out: Out,
    state: Annotated[
        Path | None, typer.Option(help="Amax or scales, as .safetensors or a torch.save of a state dict.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Where modules kept in BF16 come from; else the export.")] = None,
    family: Annotated[str, typer.Option(help=f"Whose list of modules to keep in BF16: {KEEP_LISTS}.")] = "auto",
    keep_bf16: Keep = [],  # noqa: B006 - typer copies it
    component: Component = "transformer",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Write native FP8 weights from a ModelOpt export.

    A scale is the calibrated amax over 448. Modules without one stay as they are. Nothing in --state is executed.
    """
    with refusals():
        from quant.fp8_checkpoint import plan_fp8
        from quant.rewriting import weights_folder
        from quant.scales import read_scales

        source = weights_folder(export, component)
        plain = None if base is None else weights_folder(base, component)
        scales = None if state is None else read_scales(state)
        plan = plan_fp8(source, scales, base=plain, family=family, keep=keep_bf16)
        job = Job(
            tool="transfuse convert-fp8",
            out=out,
            inputs=tuple(path for path in (source, plain, state) if path is not None),
            overwrite=overwrite,
            dry_run=dry_run,
            as_json=as_json,
            options={"family": family, "keep_bf16": keep_bf16},
        )
        _run(job, plan.report(), _writer(plan))


def calibrate(
    model: Annotated[
        Path,
        typer.Argument(help="BF16 causal LM (also .gguf, or 'smollm2') or diffusers transformer, or its pipeline."),
    ],
    out: Out,
    data: Annotated[
        Path | None, typer.Option(help="Recorded inputs (.safetensors), or prompts (.txt a line each, .jsonl).")
    ] = None,
    prompt: Annotated[list[str], typer.Option(help="A prompt to calibrate with; repeatable.")] = [],  # noqa: B006
    format: Annotated[str, typer.Option(help="nvfp4 or fp8.")] = "nvfp4",
    keep_bf16: Keep = [],  # noqa: B006 - typer copies it
    max_calls: Annotated[int, typer.Option(min=1, help="Calls of the model at most.")] = 512,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a prompt at most.")] = 2048,
    against: Annotated[
        Path | None, typer.Option(help="Also print how far the activation scales of this folder or state drifted.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda:0.")] = "cpu",
    component: Component = "transformer",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Calibrate a model and export it quantized.

    nvidia-modelopt runs the model on the data, and exports weights with the activation scales that it saw.
    """
    with refusals():
        from quant.calibration import prompt_calls, read_calls

        source = _model_folder(model, component)
        calls = prompt_calls(prompt, source, max_length) if prompt else []
        calls += read_calls(data, source, max_calls=max_calls, max_length=max_length) if data else []
        job = Job(
            tool="transfuse calibrate",
            out=out,
            inputs=tuple(path for path in (source, data, against) if path is not None),
            overwrite=overwrite,
            dry_run=dry_run,
            as_json=as_json,
            options={"format": format, "keep_bf16": keep_bf16, "calls": len(calls[:max_calls])},
        )
        carried = _carried(against, format)
        planned = _to_calibrate(source, format, calls, keep_bf16, device)
        _run(job, planned, _calibration(source, format, calls[:max_calls], keep_bf16, device, carried))


# ---------------------------------------------------------------- what they do


Write = Callable[[Path, Bars], Report]


def _run(job: Job, planned: Report, write: Write) -> None:
    """Write the folder and its report, unless the run is a dry one; print what was done."""
    from quant.output import check_output, output_folder, write_report

    report: Report = {"tool": job.tool, "inputs": [str(path) for path in job.inputs], "options": dict(job.options)}
    start_s = time.monotonic()
    if job.dry_run:
        check_output(job.out, job.tool, job.inputs, job.overwrite)
        report |= {"dry_run": True, **planned}
    else:
        bars = Bars()
        with output_folder(job.out, job.tool, job.inputs, job.overwrite) as folder, bars.show():
            report |= write(folder, bars)
            report["seconds"] = round(time.monotonic() - start_s, 3)
            write_report(folder, report)
    text = _as_text(job, report)
    sys.stdout.write((json.dumps({"out": str(job.out), **report}) if job.as_json else text) + "\n")
    sys.stdout.flush()


def _writer(plan: Rewrite) -> Write:
    def write(folder: Path, bars: Bars) -> Report:
        plan.write(folder, lambda done, total: bars.update("write tensors", done, total))
        return plan.report()

    return write


def _model_folder(model: Path, component: str) -> Path:
    """The folder of a model's weights; a GGUF file is converted first."""
    from quant.checkpoint import PACKAGED, open_checkpoint
    from quant.rewriting import weights_folder

    if model.suffix != ".gguf" and str(model) not in PACKAGED:
        return weights_folder(model, component)
    bars = Bars()
    with (
        bars.show(),
        open_checkpoint(model, progress=lambda done, total: bars.update("convert", done, total)) as opened,
    ):
        return opened.config_dir


def _to_calibrate(source: Path, format_name: str, calls: list[Any], keep: list[str], device: str) -> Report:
    """What a calibration would do, found without reading a weight; refuses what it would refuse."""
    from quant.calibration import kept_modules, linears, load_model, require_device, require_recipe

    require_recipe(format_name, calls)
    require_device(device)
    model = load_model(source, "meta")
    kept, found = set(kept_modules(model, keep)), linears(model)
    return {
        "calls": len(calls),
        "counts": {"linears": len(found), "kept in BF16": sum(name in kept for name in found)},
        "kept": sorted(kept),
        "note": "the recipe keeps more, such as heads and routers",
    }


def _calibration(
    source: Path, format_name: str, calls: list[Any], keep: list[str], device: str, carried: Mapping[str, float] | None
) -> Write:
    from quant.calibration import export, exported, load_model, quantized
    from quant.drift import activation_amax, scale_drift
    from quant.formats import FORMATS

    def write(folder: Path, bars: Bars) -> Report:
        bars.update("load model", 0, 0)
        model = load_model(source, device)
        bars.update("load model", 1, 1)
        made = quantized(model, format_name, calls, keep, lambda done, total: bars.update("calibrate", done, total))
        bars.update("export", 0, 0)
        export(made, source, folder)
        bars.update("export", 1, 1)
        report = exported(folder)
        if carried is not None:
            report["drift"] = asdict(scale_drift(activation_amax(folder, FORMATS[format_name]), carried))
        return report

    return write


def _carried(against: Path | None, format_name: str) -> dict[str, float] | None:
    """The activation scales to compare with, read before anything that takes long."""
    from quant.drift import activation_amax
    from quant.formats import FORMATS
    from quant.output import ToolError

    if against is None:
        return None
    found = activation_amax(against, FORMATS[format_name])
    if not found:
        raise ToolError(f"{against}: carries no activation scales; expected tensors '<module>.input_scale'")
    return found


# ---------------------------------------------------------------- around a command


@contextmanager
def refusals() -> Iterator[None]:
    """Input that does not fit is a plan that does not fit; SIGTERM ends a run as Ctrl-C does, with its clean-up."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Bars().show("load libraries"):
        from quant.checkpoint import CheckpointError
        from quant.excludes import ConfigError
        from quant.output import ToolError
    try:
        yield
    except (CheckpointError, ConfigError, ToolError) as error:
        raise PlanError(str(error)) from error
    except OSError as error:
        raise WeightUpdateError(f"{error}; nothing was written") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_text(job: Job, report: Report) -> str:
    counts = ", ".join(f"{count} {did}" for did, count in report.get("counts", {}).items())
    size = f", {mebibytes(report['bytes'])}" if "bytes" in report else ""
    did = "would write" if job.dry_run else f"wrote in {report['seconds']:.1f} s"
    modules = f", {report['quantized_modules']} modules quantized" if "quantized_modules" in report else ""
    done = counts or f"{len(report['tensors'])} tensors"
    head = f"{job.tool}: {did} {job.out}: {done}{modules}{size}"
    warnings = [f"warning: {warning}" for warning in report.get("warnings", ())]
    drift = [drift_text(report["drift"])] if "drift" in report else []
    checked = [report["checked"]] if report.get("checked") else []
    return "\n".join([head, *checked, *warnings, *drift])


def drift_text(drift: Mapping[str, Any]) -> str:
    """A drift for people: its summary, and the modules that are farthest off."""
    rows = [
        {name: f"{row[name]:.4g}" if name != "module" else row[name] for name in row} for row in drift["rows"][:SHOWN]
    ]
    figures = ", ".join(
        f"{name.replace('_', ' ')} {drift[name]:.3f}" for name in ("smallest", "geometric_mean", "median", "largest")
    )
    missing = f", {len(drift['missing'])} not carried, {len(drift['extra'])} not calibrated"
    head = f"carried over calibrated, {len(drift['rows'])} modules: {figures}; {drift['far']} far off{missing}"
    return "\n".join([head, aligned(rows)])
