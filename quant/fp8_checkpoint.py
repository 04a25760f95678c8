"""A checkpoint with native FP8 weights, from a ModelOpt export whose weights are still BF16 and the scales it found.

    scales = read_scales(Path("backbone.pt"))                 # or a .safetensors file; nothing in it is executed
    plan = plan_fp8(export_dir, scales, family="auto")
    plan.write(folder, progress)

A scale is one FP32 number a tensor: the calibrated amax divided by 448, the largest E4M3 value. What has no scale stays
BF16, and so do the modules that a family is known to need in BF16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .encodings import E4M3_MAX
from .excludes import Excludes
from .families import family_of, is_served
from .formats import FORMATS, encode, first_nonfinite, typed
from .output import ToolError, require
from .rewriting import (
    PLAIN_DTYPES,
    Declared,
    Item,
    Rewrite,
    Shards,
    check_bf16_source,
    plan_rewrite,
    read_declared,
    unmatched,
)
from .scales import SCALE_NAMES, Scales, scales_of

# Family -> globs on full module names that stay BF16 beside FP8. Source: build_modelopt_fp8_transformer of sglang
# 0.5.23; img_mod and txt_mod are the names there of what diffusers calls img_mod.1 and txt_mod.1.
KEEP_BF16: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "flux": (
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
        "transformer_blocks.*.ff_context.net.0.proj",
        "transformer_blocks.*.ff_context.net.2",
        "single_transformer_blocks.*.norm.linear",
    ),
    "flux2": (
        "time_guidance_embed.timestep_embedder.linear_*",
        "time_guidance_embed.guidance_embedder.linear_*",
        "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.linear",
        "single_stream_modulation.linear",
        "x_embedder",
        "context_embedder",
        "norm_out.linear",
    ),
    "qwen_image": (
        "img_in",
        "txt_in",
        "time_text_embed.timestep_embedder.linear_*",
        "norm_out.linear",
        "proj_out",
        "transformer_blocks.*.img_mlp.net.2",
        "transformer_blocks.*.img_mod.1",
        "transformer_blocks.*.txt_mod.1",
    ),
    "wan": (),  # no list is published: the releases keep what ModelOpt's own filter kept, which an export declares
}
FP8 = FORMATS["fp8"]
MADE = ("weight_scale", "input_scale")
NATIVE = "F8_E4M3"
CLIPS = 1.01  # a weight so far above its amax was calibrated as another one: BF16 explains less than 0.4 %


def plan_fp8(
    export: Path,
    state: Mapping[str, Tensor] | None = None,
    *,
    base: Path | None = None,
    family: str = "auto",
    keep: Sequence[str] = (),
) -> Rewrite:
    """Plan the folder; raises ToolError with every reason against it.

    state: amax or scales by full name, besides those in the export itself. base: where the modules that stay BF16 are
    taken from; needed where the export has them in FP8 already. keep: globs on full module names, besides the family's.
    """
    source, plain = Shards(export), None if base is None else Shards(base)
    declared = read_declared(export)
    quantization = declared.quantization()
    if quantization is not None and quantization.format != "fp8":
        raise ToolError(f"{export}: declares format {quantization.format}; expected fp8, or none")
    kept = Excludes(patterns=(*_family_patterns(family, declared), *keep))
    ignored = Excludes() if quantization is None else quantization.excludes
    own = {name: source.tensor(name) for name in source.names() if name.endswith(SCALE_NAMES)}
    # What is in FP8 already keeps its own scales.
    fates, problems = _sorted_out(source, kept, ignored, own, {**own, **(state or {})})
    problems += unmatched(source.modules(), keep)
    problems += _kept_problems(source, plain, (module for module, fate in fates.items() if fate.did == "kept"))
    if not problems and not any(fate.scales for fate in fates.values()):
        problems.append("no module has scales; give the calibrated state, or export after calibration")
    require(str(export), problems)
    warnings = [f"{name}: has scales, but is no matrix: stays plain" for name, fate in fates.items() if fate.unused]
    items, dropped = _items(source, plain, fates, warnings)
    json_files = declared.updated((name for name, fate in fates.items() if fate.scales is None), quant_algo="FP8")
    return plan_rewrite(source, items, dropped, json_files, warnings)


def _family_patterns(family: str, declared: Declared) -> tuple[str, ...]:
    made = str(declared.config.get("_class_name"))
    found = family_of(made).name if is_served(made) else "none"
    name = found if family == "auto" else family
    if name not in KEEP_BF16:
        raise ToolError(f"family {family!r}: unknown; known: auto, {', '.join(KEEP_BF16)}")
    return KEEP_BF16[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fate:
    """What becomes of a module with a matrix: encoded into FP8, native (FP8 already), plain, or kept (plain by name).

    unused: it has scales, but is no matrix of two dims: engines run FP8 on those only.
    """

    did: Literal["encoded", "native", "plain", "kept"]
    scales: Scales | None = None
    unused: bool = False


def _sorted_out(
    source: Shards, kept: Excludes, ignored: Excludes, own: Mapping[str, Tensor], given: Mapping[str, Tensor]
) -> tuple[dict[str, _Fate], list[str]]:
    """What becomes of each module with a matrix, and what is wrong."""
    fates: dict[str, _Fate] = {}
    problems: list[str] = []
    for spec in map(source.spec, source.names()):
        module = spec.name.removesuffix(".weight")
        if module == spec.name or len(spec.shape) < 2:
            continue
        scales, wrong = scales_of(module, own if spec.dtype == NATIVE else given)
        if kept.matches(module):
            fates[module] = _Fate(did="kept")
        elif spec.dtype not in (*PLAIN_DTYPES, NATIVE):
            problems.append(f"{spec.name}: {spec.dtype}; expected {NATIVE} or one of {', '.join(PLAIN_DTYPES)}")
        elif ignored.matches(module) and spec.dtype != NATIVE:
            fates[module] = _Fate(did="plain")
        elif wrong or (scales is None and spec.dtype == NATIVE):
            problems += wrong or [f"{module}: in {NATIVE} without its scales"]
        elif scales is None or len(spec.shape) > 2:
            fates[module] = _Fate(did="plain", unused=scales is not None)
        else:
            fates[module] = _Fate(did="native" if spec.dtype == NATIVE else "encoded", scales=scales)
    return fates, problems


def _kept_problems(source: Shards, base: Shards | None, modules: Iterable[str]) -> list[str]:
    """What keeps these modules from being BF16 in the output."""
    problems = []
    for spec in (source.spec(f"{module}.weight") for module in sorted(modules)):
        if base is not None:
            problems += check_bf16_source(base, spec.name, spec.shape)
        elif spec.dtype not in PLAIN_DTYPES:
            problems.append(f"{spec.name}: stays BF16, but the export has it in {spec.dtype}; give the base")
    return problems


def _items(
    source: Shards, base: Shards | None, fates: Mapping[str, _Fate], warnings: list[str]
) -> tuple[list[Item], dict[str, str]]:
    items: list[Item] = []
    dropped: dict[str, str] = {}
    for name in source.names():
        module, _, leaf = name.rpartition(".")
        fate = fates.get(module, _Fate(did="plain"))
        if "_quantizer." in name:
            dropped[name] = "state of a quantizer, which no engine reads"
        elif leaf in MADE and fate.did != "native":
            if fate.did != "encoded":
                dropped[name] = "its module is not FP8"
        elif fate.did == "kept" and base is not None and name in base:
            items.append(base.standing_in(name, source, source.file_of[name]))
        elif fate.did == "encoded" and leaf == "weight" and fate.scales is not None:
            items += _encoded(source, name, fate.scales, warnings)
        else:
            items.append(source.copied(name))
    return items, dropped


def _encoded(source: Shards, name: str, scales: Scales, warnings: list[str]) -> Iterator[Item]:
    """The weight in FP8 and its two scales, in the file where the weight was."""
    values = {"weight_scale": scales.weight, "input_scale": scales.input}
    for spec in FP8.tensors(name, source.spec(name).shape):
        value = values.get(spec.name.rpartition(".")[2])
        yield Item(
            spec=spec,
            file=source.file_of[name],
            did="encoded" if value is None else "scale",
            source=str(source.directory),
            read=partial(_encode, source, name, scales.weight, warnings) if value is None else partial(_scalar, value),
        )


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _encode(source: Shards, name: str, scale: float, warnings: list[str]) -> Tensor:
    rows = source.tensor(name).to(torch.bfloat16).contiguous()
    where = first_nonfinite(rows)
    if where is not None:
        raise ToolError(f"{source.directory}: {name} holds {rows[where].item()} at {list(where)}; repair the weights")
    largest = rows.abs().max().item()
    if largest > CLIPS * E4M3_MAX * scale:
        calibrated = f"{E4M3_MAX * scale:.4g}"
        warnings.append(f"{name}: up to {largest:.4g}, calibrated to {calibrated}: is clipped; another model's state?")
    return typed(FP8, encode(FP8, rows, _scalar(scale)), tuple(rows.shape))["weight"]
