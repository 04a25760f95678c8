"""What the tensors of a checkpoint say of its quantization, and all that is said of it put together.

inferred = infer_from_tensors(specs, metadata)          # of all shards
quantization = read(config_json, hf_quant_config, specs, metadata)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .configs import (
    QUANT_ALGOS,
    Config,
    Quantization,
    ScaleLayout,
    agreed,
    merge,
    parse,
    require_stated_swap,
    row_group_size,
)
from .excludes import ConfigError, Dialect, require_agreement
from .formats import TensorSpec

Specs = Mapping[str, TensorSpec]
Metadata = Sequence[Mapping[str, str]]  # of the header of each shard
Rename = Callable[[str], Iterable[str]]

# Weights that share a scale -> the row of a module whose codes are U8 and whose scales are a matrix of E4M3
ROW_OF_GROUP = {16: "nvfp4", 32: "w4a8_nvfp4"}
# q, k and v (and more) in one weight, as Black Forest Labs name it
PACKED_QKV = re.compile(r"(?:^|\.)(?:double_blocks\.\d+\.(?:img|txt)_attn\.qkv|single_blocks\.\d+\.linear1)\.weight$")
COMFY_MARKER = ".comfy_quant"  # ComfyUI's note in a tensor beside a weight that it has quantized
HEADER = "the header of a shard"


def read(
    config_json: Config,
    hf_quant_config: Config,
    specs: Iterable[TensorSpec],
    metadata: Metadata = (),
    *,
    swap_nibbles: bool | None = None,
) -> Quantization | None:
    """The quantization of a directory, None where the weights are plain; raises ConfigError with every reason.

    Declared is what the files say, or else a shard's header; what the tensors of all shards say is merged into it.
    A group size that nobody says is that of the format. swap_nibbles: the order, stated by who knows the repository,
    for files that do not state it.
    """
    # Diffusion exports list whole names; those of language models may name one part.
    dialect: Dialect = "glob_full" if "_class_name" in config_json else "per_part"
    inside = config_json.get("quantization_config")
    if inside and not isinstance(inside, dict):
        raise ConfigError(f"config.json quantization_config: expected a JSON object, got {type(inside).__name__}")
    flat = parse(inside, "config.json quantization_config", dialect) if inside else None
    nested = parse(hf_quant_config, "hf_quant_config.json", dialect) if hf_quant_config else None
    declared = agreed(flat, nested) or next(iter(embedded(metadata)), None)
    found = merge(declared, infer_from_tensors(specs, metadata))
    if found is None:
        return None
    if swap_nibbles is not None and "swap_nibbles" not in found.stated:
        found = replace(found, swap_nibbles=swap_nibbles, stated=found.stated | {"swap_nibbles"})
    require_stated_swap(found)
    return replace(found, group_size=found.group_size or row_group_size(found.format))


def infer_from_tensors(
    specs: Iterable[TensorSpec], metadata: Metadata = (), rename: Rename = lambda name: (name,)
) -> Quantization | None:
    """What names, dtypes and shapes say, of all shards together; None where no module is in NVFP4.

    rename: a tensor's name in the checkpoint -> its names in the model. A module is in NVFP4 if its weight is U8 and
    its scales are a matrix of E4M3, or a header lists it as such; a scalar scale is FP8. Every other module with a
    weight is excluded, by its whole name. Raises ConfigError where a module of the model would be both.
    """
    found = {spec.name: spec for spec in specs}
    quantized = _quantized(found, metadata)
    if not quantized:
        return None
    said = embedded(metadata)
    group_size = _group_size(quantized)
    stated_layouts = [each.scale_layout for each in said if "scale_layout" in each.stated]
    layout = _layout_of_shapes(quantized) or next(iter(stated_layouts), None)
    packed_qkv = any(map(PACKED_QKV.search, found)) or any(each.packed_qkv for each in said)
    is_comfy = any(name.endswith(COMFY_MARKER) for name in found)
    stated = {"swap_nibbles"} if any("swap_nibbles" in each.stated for each in said) else set()
    return Quantization(
        format=ROW_OF_GROUP[group_size or 16],
        group_size=group_size,
        exclude=_others(found, quantized, rename),
        # Whole names only: as a part, 'proj_out' of the model would exclude that of every block.
        dialect="glob_full",
        swap_nibbles=is_comfy or any(each.swap_nibbles for each in said),
        packed_qkv=packed_qkv,
        scale_layout=layout or ("swizzled" if is_comfy or packed_qkv else "linear"),
        stated=frozenset(stated | ({"scale_layout"} if layout else set())),
        source="the tensors",
    )


Quantized = Mapping[str, tuple[TensorSpec, TensorSpec | None]]  # module -> its weight and its scales


def _quantized(found: Specs, metadata: Metadata) -> Quantized:
    listed = _listed_modules(metadata)
    pairs = {
        name.removesuffix(".weight"): (spec, found.get(f"{name}_scale"))
        for name, spec in found.items()
        if name.endswith(".weight") and spec.dtype == "U8" and len(spec.shape) == 2
    }
    return {module: pair for module, pair in pairs.items() if module in listed or _is_matrix(pair[1])}


def _is_matrix(scale: TensorSpec | None) -> bool:
    return scale is not None and scale.dtype == "F8_E4M3" and len(scale.shape) == 2 and scale.num_bytes > 0


def _listed_modules(metadata: Metadata) -> set[str]:
    """Modules that a header lists under a format with U8 codes and E4M3 scales."""
    tables = [_json(each["_quantization_metadata"]) for each in metadata if each.get("_quantization_metadata")]
    layers = [table.get("layers", {}) for table in tables]
    for each in layers:
        if not isinstance(each, Mapping) or not all(isinstance(layer, Mapping) for layer in each.values()):
            raise ConfigError(f"{HEADER}: _quantization_metadata: expected an object a layer, got {each!r:.80}")
    formats = {name: str(layer.get("format")) for each in layers for name, layer in each.items()}
    return {name for name, algo in formats.items() if QUANT_ALGOS.get(algo.upper()) in ROW_OF_GROUP.values()}


def embedded(metadata: Metadata) -> list[Quantization]:
    """The configs in the headers of shards, of either form."""
    texts = [each["quantization_config"] for each in metadata if each.get("quantization_config")]
    return [parse(_json(text), HEADER) for text in texts]


def _json(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{HEADER}: no JSON: {error}; in {text[:80]!r}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{HEADER}: expected a JSON object, got {text[:80]!r}")
    return value


def _group_size(quantized: Quantized) -> int | None:
    """The largest that fits a module: padding of scale columns only makes it look smaller."""
    ratios = {2 * weight.shape[1] / scale.shape[1] for weight, scale in _matrices(quantized)}
    return max((group for group in ROW_OF_GROUP if group in ratios), default=None)


def _layout_of_shapes(quantized: Quantized) -> ScaleLayout | None:
    """What shapes prove: swizzled scales are whole tiles of 128 x 4, which may hold more rows than the weight."""
    pairs = _matrices(quantized)
    if any(scale.shape[0] % 128 or scale.shape[1] % 4 for _, scale in pairs):
        return "linear"
    return "swizzled" if any(scale.shape[0] > weight.shape[0] for weight, scale in pairs) else None


def _matrices(quantized: Quantized) -> list[tuple[TensorSpec, TensorSpec]]:
    return [(weight, scale) for weight, scale in quantized.values() if scale is not None and _is_matrix(scale)]


def _others(found: Specs, quantized: Quantized, rename: Rename) -> tuple[str, ...]:
    """Modules of the model whose weights are not among the quantized ones."""
    sources: dict[str, dict[str, bool]] = {}
    for name in found:
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            for target in rename(name):
                sources.setdefault(target.removesuffix(".weight"), {})[module] = module not in quantized
    require_agreement(sources)
    return tuple(sorted(target for target, parts in sources.items() if all(parts.values())))
