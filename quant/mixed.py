"""A transformer of BF16 and NVFP4 layers, from a BF16 base and a ModelOpt export of it.

    plan = plan_mixed(export_dir, base_dir, preset="flux1-nvfp4", keep=["*.to_add_out"])
    plan.write(folder, progress)

Every tensor of the export is copied as it is, but for the modules that are kept: those get the base's weight and bias,
lose their scales, and are listed as ignored. Which modules a family needs in BF16 is published knowledge, in PRESETS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from .configs import Quantization
from .excludes import Excludes
from .families import FAMILIES
from .fp8_checkpoint import KEEP_BF16
from .models import fused_group
from .output import ToolError, require
from .probe import ProbeError, Verdict, verify
from .rewriting import Item, Rewrite, Shards, check_bf16_source, plan_rewrite, read_declared, unmatched

# Preset -> globs on full module names that stay BF16 beside NVFP4. flux1-nvfp4: build_modelopt_nvfp4_transformer of
# sglang 0.5.23, for FLUX.1-dev. The others are what quant.families leaves in high precision at the published depth, for
# exports that were made without that filter.
PRESETS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "flux1-nvfp4": (*KEEP_BF16["flux"], "single_transformer_blocks.*.proj_mlp"),
    **{f"{name}-nvfp4": FAMILIES[name].kept(FAMILIES[name].recipe[0]) for name in ("flux2", "wan", "qwen_image")},
}
FROM_BASE = ("weight", "bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Modules:
    """The modules of an export that are in NVFP4, with the shapes of their weights; those of them to keep in BF16."""

    quantized: Mapping[str, tuple[int, ...]]
    kept: frozenset[str]


def plan_mixed(
    export: Path, base: Path, *, preset: str = "none", keep: Sequence[str] = (), swap_nibbles: bool | None = None
) -> Rewrite:
    """Plan the folder; raises ToolError with every reason against it.

    keep: globs on full module names, each of which must match one; swap_nibbles: what the config will say of the
    export's packed weights (the first element is in the high nibble), by default what it says already.
    """
    if preset not in PRESETS:
        raise ToolError(f"preset {preset!r}: unknown; known: {', '.join(PRESETS)}")
    source, plain = Shards(export), Shards(base)
    declared = read_declared(export)
    quantization = declared.quantization()
    if quantization is None or quantization.format != "nvfp4":
        got = "none" if quantization is None else quantization.format
        raise ToolError(f"{export}: declares format {got}; expected a ModelOpt export in nvfp4")
    modules = _modules(source, (*PRESETS[preset], *keep))
    problems = [*unmatched(source.modules(), keep), *_cut_groups(modules)]
    if preset != "none" and not any(map(Excludes(patterns=PRESETS[preset]).matches, source.modules())):
        problems.append(f"preset {preset!r}: matches no module; this is another family")
    for module in sorted(modules.kept):
        bias = f"{module}.bias"
        problems += check_bf16_source(plain, f"{module}.weight", modules.quantized[module])
        problems += check_bf16_source(plain, bias, source.spec(bias).shape) if bias in source else []
    require(f"{export} with {base}", problems)
    swap = quantization.swap_nibbles if swap_nibbles is None else swap_nibbles
    verdict = _verified(source, plain, replace(quantization, swap_nibbles=swap))
    items, dropped = _items(source, plain, modules)
    json_files = declared.updated(modules.kept, swap_weight_nibbles=swap)
    return plan_rewrite(source, items, dropped, json_files, checked=f"nibble order and scale layout {verdict}")


def _verified(source: Shards, base: Shards, quantization: Quantization) -> Verdict:
    """Whether the export's bytes are, in the order that the config will state, those of the base."""

    def rows(name: str, start: int, stop: int) -> Tensor | None:
        return base.rows(name, start, stop) if name in base else None

    try:
        verdict = verify(source, rows, quantization=quantization, metadata=[*source.metadata().values()])
    except ProbeError as error:
        raise ToolError(f"{source.directory} with {base.directory}: {error}") from error
    if verdict.is_of_another_model:
        what = f"{base.directory} is not the base of {source.directory}"
        raise ToolError(f"{what}: {verdict.reason}; give the BF16 model that was quantized")
    return verdict


def _modules(source: Shards, patterns: Sequence[str]) -> _Modules:
    scaled = [name for name in source.modules() if f"{name}.weight_scale" in source]
    packed = {name: source.spec(f"{name}.weight") for name in scaled}
    # uint8 [N, K/2] of a weight [N, K]
    quantized = {name: (*spec.shape[:-1], 2 * spec.shape[-1]) for name, spec in packed.items() if spec.dtype == "U8"}
    excludes = Excludes(patterns=tuple(patterns))
    kept = frozenset(name for name in quantized if excludes.matches(name))
    return _Modules(quantized=quantized, kept=kept)


def _cut_groups(modules: _Modules) -> list[str]:
    """Engines fuse these groups into one weight, which has one format."""
    groups: dict[str, list[str]] = {}
    for module in sorted(modules.quantized):
        group = fused_group(f"{module}.weight")
        if group:
            groups.setdefault(group, []).append(module)
    return [
        f"{', '.join(sorted(kept))} would be BF16 and {', '.join(sorted(set(members) - kept))} not, but engines fuse "
        "them; keep all or none"
        for members in groups.values()
        if (kept := modules.kept & set(members)) and kept != set(members)
    ]


def _items(source: Shards, base: Shards, modules: _Modules) -> tuple[list[Item], dict[str, str]]:
    items: list[Item] = []
    dropped: dict[str, str] = {}
    for name in source.names():
        module = name.rpartition(".")[0]
        if "_quantizer." in name:
            dropped[name] = "state of a quantizer, which no engine reads"
        elif module not in modules.kept:
            items.append(source.copied(name))
        elif name.rpartition(".")[2] not in FROM_BASE:
            dropped[name] = "its module is BF16"
    for module in sorted(modules.kept):
        file = source.file_of[f"{module}.weight"]
        items += [
            base.standing_in(name, source, file) for name in (f"{module}.{leaf}" for leaf in FROM_BASE) if name in base
        ]
    return items, dropped
