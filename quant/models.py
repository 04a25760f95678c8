"""Models of transformers with quantized modules, and what they hold: parameters, placements, storages.

    model = build_model(config_dir, "nvfp4", "trtllm")        # no weight yet, and no BF16 copy of a quantized one ever
    parameters_of(model), placements_of(model), derived_of(model), storage_parameters(model)

All names are checkpoint names: wrapper prefixes are stripped and experts are named one by one.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .excludes import Excludes
from .formats import FORMATS, Format, TensorSpec
from .layouts import (
    LAYOUTS,
    Arch,
    Derived,
    Layout,
    ModuleKind,
    Placement,
    choose_layout,
    device_arch,
    place_row_major,
)
from .modules import QuantExperts, QuantLinear, QuantModule
from .names import canonical_name, expert_parts
from .parameters import ParameterRow
from .pipelines import (
    Component,
    components_of,
    is_pipeline,
    linears_by_format,
    meta_pipeline,
    proved_quantization,
    resolved_formats,
)
from .steps import RowMajor, locate

log = logging.getLogger(__name__)

# Never quantized, wherever they are: ModelOpt's exports leave routers and heads in high precision.
EXCLUDED = ("*lm_head", "*embed_tokens", "*.mlp.gate", "*.router", "*.shared_expert_gate")

# What a whole model can be asked for. FP32 is for the parameters that a class keeps in it.
BUILDABLE = tuple(name for name, row in FORMATS.items() if row.is_quantized or name == "bf16")
PLAIN = {row.rows_dtype: row for row in FORMATS.values() if not row.is_quantized}

# Members share one global scale, from the largest amax of the group, as ModelOpt's export has it.
# In diffusers' classes those that take the same input (of Wan's cross attention, attn2, q takes another one), and in
# FP8 its export fuses none. Pattern, key, formats where it does not hold.
FUSED: tuple[tuple[re.Pattern[str], str, tuple[str, ...]], ...] = (
    (re.compile(r"^(.*\.)[qkv]_proj\.weight$"), "qkv", ()),
    (re.compile(r"^(.*\.)(?:gate|up)_proj\.weight$"), "gate_up", ()),
    (re.compile(r"^(.*\.attn2\.)to_[kv]\.weight$"), "to_kv", ("fp8",)),
    (re.compile(r"^(.*(?<!\.attn2)\.)to_[qkv]\.weight$"), "to_qkv", ("fp8",)),
    (re.compile(r"^(.*\.)add_[qkv]_proj\.weight$"), "add_qkv", ("fp8",)),
)


class ModelError(ValueError):
    """A model cannot be built or described as it is; the message lists every reason."""


def build_model(
    config_dir: Path,
    format_name: str,
    layout: str,
    *,
    exclude: Collection[str] = (),
    device: torch.device | str = "cpu",
    arch: Arch | None = None,
    components: Mapping[str, str | Path] | None = None,
    redundant_experts: int | None = None,
) -> nn.Module:
    """The causal LM of a config.json in BF16, or the Pipeline of a pipeline folder, quantized, every parameter zero.

    format_name: a row of FORMATS; for a pipeline also "auto" (what each component's checkpoint says, else bf16) or
    "transformer=nvfp4,transformer_2=bf16", where components not named are "auto". components: overrides of a pipeline,
    component -> folder or file with its weights. arch: what layout "auto" is chosen for, by default the device of this
    process. redundant_experts: slots of every experts module beyond one an expert; with a number, 0 included, experts
    may be moved between slots. With device "meta" the parameters have no memory yet (sharding gives each rank its
    part); buffers are always real.
    """
    arch = device_arch() if arch is None else arch
    if is_pipeline(config_dir):
        if redundant_experts is not None:
            raise ModelError(f"{config_dir}: redundant experts of a pipeline; leave them out, no pipeline has experts")
        model = _pipeline(components_of(config_dir, components), format_name, layout, exclude, arch)
    else:
        model = _causal_lm(config_dir)
        redundant = redundant_experts
        quantize_model(model, format_name, layout, exclude=exclude, arch=arch, redundant_experts=redundant)
        _rebuild_buffers(model)
    if torch.device(device).type != "meta":
        _allocate(model, device)
    return model.eval()


def _causal_lm(config_dir: Path) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ModelError(f"{config_dir}: building a model needs transformers: {error}") from error
    config = AutoConfig.from_pretrained(config_dir)
    # An export's own quantization would make transformers swap modules; ours are put in later.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    causal_lm: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = causal_lm.from_config(config, dtype=torch.bfloat16)
    return model


def _pipeline(
    components: Mapping[str, Component], formats: str, layout: str, exclude: Collection[str], arch: Arch | None
) -> nn.Module:
    """Every component in the format that is asked for it, its checkpoint's own excludes honoured."""
    model = meta_pipeline(components)
    modules = model.components
    declared = {name: proved_quantization(components[name], module) for name, module in modules.items()}
    chosen = resolved_formats(formats, components, declared)
    for name, module in modules.items():
        linears = linears_by_format(components[name], declared[name], chosen[name], module)
        for fmt, only in linears.items():
            quantize_model(module, fmt, layout, exclude=exclude, arch=arch, prefix=f"{name}.", only=only)
    return model


def _rebuild_buffers(model: nn.Module) -> None:
    """Compute the buffers that no checkpoint holds (rotary tables) again, off the meta device."""
    for path, module in model.named_modules():
        meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not meta:
            continue
        try:
            fresh = type(module)(module.config)
        except (AttributeError, TypeError) as error:
            what = f"{path}: buffers {', '.join(meta)} of {type(module).__name__}"
            raise ModelError(f"{what} cannot be rebuilt from the model's config: {error}") from error
        for name in meta:
            module._buffers[name] = fresh.get_buffer(name)


def _allocate(model: nn.Module, device: torch.device | str) -> None:
    """Zeros for every parameter on the meta device, tied ones staying tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and id(parameter) not in made:
                value = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
                made[id(parameter)] = nn.Parameter(value, requires_grad=False)
            if parameter.is_meta:
                setattr(module, name, made[id(parameter)])


def quantize_model(
    model: nn.Module,
    format_name: str,
    layout: str,
    *,
    exclude: Collection[str] = (),
    arch: Arch | None = None,
    prefix: str = "",
    only: Collection[str] | None = None,
    redundant_experts: int | None = None,
) -> None:
    """Replace the linears and stacked experts of the decoder layers by quantized modules, holding zeros.

    `layout` is "auto", a family or a row's name, see choose_layout; `exclude` adds module name patterns to EXCLUDED.
    A linear whose shape the format cannot hold stays as it is, and so does BF16 where no row of that name holds it.
    prefix: of the model's name in a larger one, part of the new modules' names and of no pattern. only: the modules to
    replace, by default those of the decoder layers. redundant_experts: see build_model. Nothing requires grad
    afterwards. What was chosen and why is logged, once for all modules alike.
    """
    if format_name not in BUILDABLE:
        raise ModelError(f"format {format_name!r}: unknown; known: {', '.join(BUILDABLE)}")
    fmt = FORMATS[format_name]
    model.requires_grad_(False)
    kinds = [each for each in REPLACEMENTS if fmt.is_quantized or _asks_for(layout, each[1], fmt)]
    problems: dict[str, list[str]] = {}
    chosen: Counter[tuple[str, str]] = Counter()
    excludes = Excludes(patterns=(*EXCLUDED, *exclude))
    modules = _in_layers(model) if only is None else ((path, model.get_submodule(path)) for path in only)
    for path, module in list(modules):
        name = canonical_name(path)
        make = next((make for fits, kind, make in kinds if fits(module, fmt)), None)
        if make is None or excludes.matches(name):
            continue
        try:
            made, why = make(module, fmt, layout, prefix + name, arch, redundant_experts)
            model.set_submodule(path, made)
            chosen[made.layout.name, why] += 1
        except ValueError as error:
            problems.setdefault(str(error), []).append(prefix + name)
    if problems:
        lines = [f"{error} (at {names[0]}, {len(names)} modules in all)" for error, names in problems.items()]
        raise ModelError("\n  - ".join([f"{type(model).__name__} cannot be quantized to {format_name}", *lines]))
    if redundant_experts is not None and not any(isinstance(each, QuantExperts) for each in model.modules()):
        raise ModelError(
            f"{type(model).__name__} in {format_name}, layout {layout}: has no experts in slots, so that none can be"
            " moved or doubled; choose a quantized format, or leave redundant experts out"
        )
    for (row, why), count in chosen.items():
        log.info("layout %s for %d modules: %s", row, count, why)


def _asks_for(wanted: str, kind: ModuleKind, fmt: Format) -> bool:
    """Whether a row of this name or family is made for modules of a kind in this format."""
    rows = (row for row in LAYOUTS.values() if row.kind == kind and fmt.name in row.formats)
    return any(wanted in (row.name, row.family) for row in rows)


def _chosen(
    kind: ModuleKind, fmt: Format, wanted: str, shape: tuple[int, ...], arch: Arch | None
) -> tuple[Layout, str]:
    layout, why = choose_layout(kind, fmt, wanted, shape, arch)
    if layout.swap_nibbles:
        raise ValueError(
            f"layout {layout.name}: takes checkpoints with the first element in the high nibble, trainers encode it "
            f"into the low one; what fits: {layout.name.removesuffix('_swapped')}"
        )
    return layout, why


def _in_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules below an item of a module list: transformers keep their decoder layers in one."""
    lists = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return ((path, module) for path, module in model.named_modules() if path.startswith(lists))


def _is_linear(module: nn.Module, fmt: Format) -> bool:
    return isinstance(module, nn.Linear) and fmt.holds((module.out_features, module.in_features))


Made = tuple[QuantModule, str]  # and why its layout was chosen


def _quant_linear(module: Any, fmt: Format, wanted: str, name: str, arch: Arch | None, redundant: int | None) -> Made:
    n, k = module.out_features, module.in_features
    layout, why = _chosen("linear", fmt, wanted, (n, k), arch)
    return QuantLinear(k, n, module.bias is not None, fmt, layout, name, module.weight.device), why


def _is_experts(module: nn.Module, fmt: Format) -> bool:
    """Stacked gated experts of transformers: gate_up_proj [E, 2I, H] and down_proj [E, H, I]."""
    gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not isinstance(gate_up, Tensor) or not isinstance(down, Tensor) or gate_up.ndim != 3:
        return False
    experts, hidden, inter = down.shape
    fits = fmt.holds((inter, hidden)) and fmt.holds((hidden, inter))
    return gate_up.shape == (experts, 2 * inter, hidden) and fits


def _quant_experts(module: Any, fmt: Format, wanted: str, name: str, arch: Arch | None, redundant: int | None) -> Made:
    experts, hidden, inter = module.down_proj.shape
    slots = None if redundant is None else experts + redundant
    layout, why = _chosen("experts", fmt, wanted, (slots or experts, hidden, inter), arch)
    return QuantExperts(experts, hidden, inter, module.act_fn, fmt, layout, name, module.down_proj.device, slots), why


Fits = Callable[[nn.Module, Format], bool]
Make = Callable[[Any, Format, str, str, Arch | None, int | None], Made]
REPLACEMENTS: tuple[tuple[Fits, ModuleKind, Make], ...] = (
    (_is_linear, "linear", _quant_linear),
    (_is_experts, "experts", _quant_experts),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One parameter with everything it means: its row, its placements, and the module that owns it."""

    row: ParameterRow
    placements: tuple[Placement, ...]
    module: nn.Module


def _entries(model: nn.Module) -> list[_Entry]:
    """In the order of the model's modules; a tied parameter stands once, under its first name."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical_name(name))
    found: list[_Entry] = []
    problems: list[str] = []
    for path, module in model.named_modules():
        stored: set[str] = set()
        if isinstance(module, QuantModule):
            found += _quantized(module)
            stored = {name for name, _ in module.storage_parameters()}
        for leaf, parameter in module.named_parameters(recurse=False):
            name = canonical_name(f"{path}.{leaf}" if path else leaf)
            first, *aliases = names[id(parameter)]
            if name in stored or name != first:
                continue
            fmt = PLAIN.get(parameter.dtype)
            if fmt is None or parameter.ndim == 0:
                got = f"{parameter.dtype} {list(parameter.shape)}"
                known = " or ".join(map(str, PLAIN))
                problems.append(f"{name} ({type(module).__name__}): {got}; expected {known} of 1 dim or more")
                continue
            found += _plain(name, fmt, tuple(parameter.shape), tuple(aliases), module)
    if problems:
        what = f"{type(model).__name__}: {len(problems)} parameter(s) not supported"
        raise ModelError("\n  - ".join([what, *problems]))
    return found


def _quantized(module: QuantModule) -> Iterator[_Entry]:
    for matrix in module.matrices:
        name = f"{matrix.prefix}.weight"
        group = fused_group(name, module.fmt.name)
        row = ParameterRow(name=name, shape=matrix.shape, format=module.fmt.name, group=group)
        yield _Entry(row=row, placements=matrix.placements, module=module)


def _plain(
    name: str, fmt: Format, shape: tuple[int, ...], aliases: tuple[str, ...], module: nn.Module
) -> Iterator[_Entry]:
    """A plain parameter lies row-major under its own name; of a stacked one each expert's part does."""
    dtype = fmt.components[0].dtype
    parts = expert_parts(name, shape)
    if not parts:
        spec = TensorSpec(name=name, dtype=dtype, shape=shape)
        row = ParameterRow(name=name, shape=shape, format=fmt.name, aliases=aliases)
        yield _Entry(row=row, placements=(place_row_major(spec, name),), module=module)
    for part in parts:
        spec = TensorSpec(name=part.name, dtype=dtype, shape=(part.row1 - part.row0, shape[2]))
        unit_bytes = shape[1] * spec.row_bytes
        placement = Placement(
            tensor=spec,
            storage=name,
            origin=part.expert * unit_bytes + part.row0 * spec.row_bytes,
            located=locate((), RowMajor(), spec.num_rows, spec.row_bytes),
            unit_bytes=unit_bytes,
        )
        row = ParameterRow(name=part.name, shape=spec.shape, format=fmt.name)
        yield _Entry(row=row, placements=(placement,), module=module)


def fused_group(name: str, format_name: str = "") -> str:
    """The key that the members of a fused group have in common, "" for a parameter that stands alone."""
    for pattern, group, unfused in FUSED:
        match = pattern.match(name)
        if match and format_name not in unfused:
            return match[1] + group
    return ""


def parameters_of(model: nn.Module) -> list[ParameterRow]:
    """Every logical parameter, experts one by one, tied names as aliases."""
    return [entry.row for entry in _entries(model)]


def placements_of(model: nn.Module) -> list[Placement]:
    """Where every checkpoint tensor lies, in the order of parameters_of."""
    return [placement for entry in _entries(model) for placement in entry.placements]


def held_of(model: nn.Module) -> dict[ParameterRow, tuple[TensorSpec, ...]]:
    """Every logical parameter with its checkpoint tensors; of a model on the meta device, too."""
    return {entry.row: tuple(each.tensor for each in entry.placements) for entry in _entries(model)}


def owners_of(model: nn.Module) -> dict[str, nn.Module]:
    """Parameter name -> the module that holds it."""
    return {entry.row.name: entry.module for entry in _entries(model)}


def derived_of(model: nn.Module) -> list[Derived]:
    return [derived for module in model.modules() if isinstance(module, QuantModule) for derived in module.plan.derived]


def storage_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Storage name -> live parameter, derived scalars included, tied ones once.

    Look them up while the model is sharded: while it is unsharded these are gathered copies, whose addresses move.
    """
    return {canonical_name(name): parameter for name, parameter in model.named_parameters()}
