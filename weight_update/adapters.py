"""LoRA adapters of a PEFT model: merged into what is pushed, one tensor at a time; the trainer's weights stay apart.

    given = adapted("", model, model.named_parameters(remove_duplicate=False))
    given.items              the names that the service knows, each with its weight, adapters left out
    given.low_rank           name -> what its adapters add
    merged(rows, updates)    rows and what is added, in a tensor of its own

The arithmetic is that of PEFT's own merge, so what lands is what a checkpoint after merge_and_unload() holds. Layers
are known by their attributes; peft itself is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sharding.routes import LowRank

from .errors import ManifestError, raise_all

WRAPPER = "base_model.model."  # before every name of a PeftModel
BASE = ".base_layer."  # between a module and its own parameters
FACTORS = frozenset({"lora_A", "lora_B"})
HALVES = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """A model's tensors as the service names them. low_rank: name -> what each of its active adapters adds."""

    items: Sequence[tuple[str, Tensor]]
    trainable: frozenset[str]
    low_rank: Mapping[str, tuple[LowRank, ...]]
    has_adapters: bool


def adapted(prefix: str, model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> Adapted:
    """Take the adapters of a model apart from its weights; ManifestError where one cannot be merged.

    prefix: of every name. parameters: the model's own, by name. Collective where adapters are sharded.
    """
    has_adapters = bool(getattr(model, "peft_config", None))
    if not has_adapters:
        items = [(prefix + name, parameter) for name, parameter in parameters]
        trainable = frozenset(name for name, parameter in items if parameter.requires_grad)
        return Adapted(items=items, trainable=trainable, low_rank={}, has_adapters=False)
    layers = {name: each for name, each in model.named_modules() if hasattr(each, "base_layer")}
    problems = [f"{prefix}{name}: {problem}" for name, each in layers.items() if (problem := _unmergeable(each))]
    raise_all(ManifestError, "push refused: adapters cannot be merged", problems)
    low_rank = {f"{prefix}{plain_name(name)}.weight": _updates(each) for name, each in layers.items()}
    items = [
        (prefix + plain_name(name), parameter)
        for name, parameter in parameters
        if not FACTORS & set(name.split("."))
    ]
    return Adapted(
        items=items,
        trainable=frozenset(name for name, updates in low_rank.items() if updates)
        | frozenset(name for name, parameter in items if parameter.requires_grad),
        low_rank=low_rank,
        has_adapters=True,
    )


def plain_name(name: str) -> str:
    """The name of a parameter or module as it was before PEFT wrapped it."""
    return name.removeprefix(WRAPPER).replace(BASE, ".")


def _unmergeable(layer: Any) -> str:
    """Why the adapters of a layer cannot be merged here; "" where they can."""
    if not hasattr(layer, "lora_A") or len(layer.lora_embedding_A):
        return f"adapters of {type(layer).__name__} are no LoRA of a matrix; merge first (merge_and_unload)"
    if getattr(layer, "parameter_name", "weight") != "weight" or layer.base_layer.weight.ndim != 2:
        return "the adapted parameter is no matrix; merge first (merge_and_unload)"
    if layer.fan_in_fan_out:
        return f"{type(layer.base_layer).__name__} keeps its weight transposed; merge first (merge_and_unload)"
    variants = [name for name in layer.lora_A if name in layer.lora_variant or layer.lora_bias.get(name)]
    told = f"{', '.join(variants)}: DoRA, or another variant of LoRA; merge first (merge_and_unload)"
    return told if variants else ""


def _updates(layer: Any) -> tuple[LowRank, ...]:
    """What the active adapters of a layer add to its weight; none of those that lie in the weight already."""
    if layer.disable_adapters:
        return ()
    names = [name for name in layer.active_adapters if name in layer.lora_A and name not in layer.merged_adapters]
    return tuple(
        LowRank(down=_whole(layer.lora_A[name].weight), up=layer.lora_B[name].weight, scaling=layer.scaling[name])
        for name in names
    )


def _whole(tensor: Tensor) -> Tensor:
    """All of a factor: rank times columns, little beside the weight."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def merged(rows: Tensor, updates: Sequence[LowRank]) -> Tensor:
    """rows [n, columns] of a weight and what is added to them, in new memory of rows' dtype; rows itself where nothing
    is."""
    if not updates:
        return rows
    out = rows.clone()
    with torch.no_grad():
        for each in updates:
            out += _product(each).to(out.device)  # an FP32 update is rounded once, after the sum
    return out


def _product(update: LowRank) -> Tensor:
    """The update in its factors' dtype, as PEFT computes it: halves on a CPU go through FP32."""
    up, down, dtype = update.up, update.down, update.up.dtype
    if up.device.type == "cpu" and dtype in HALVES:
        return ((up.float() @ down.float()) * update.scaling).to(dtype)
    return (up @ down) * update.scaling
