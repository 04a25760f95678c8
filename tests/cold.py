"""A cold load for tests: checkpoint-form tensors straight into a model, one tensor at a time, no receiver."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quant.formats import FORMATS, amax, constants, encode, global_scale
from quant.layouts import apply_rows, invert_rows
from quant.models import derived_of, parameters_of, placements_of, storage_parameters
from quant.modules import QuantModule
from sharding.fsdp import local_bytes, unit_range


def encode_all(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint-form tensors of BF16 weights, fused groups on one global scale, activation scales 1.0."""
    rows = parameters_of(model)
    largest: dict[str, int] = {}
    for row in rows:
        key = row.group or row.name
        largest[key] = max(largest.get(key, 0), amax(weights[row.name]))
    tensors: dict[str, Tensor] = {}
    for row in rows:
        fmt, weight, stem = FORMATS[row.format], weights[row.name], row.name.removesuffix(".weight")
        if not fmt.is_quantized:
            tensors[row.name] = weight.to(fmt.rows_dtype)
            continue
        parts = {part.suffix: torch.ones(part.last) for part in fmt.components if part.kind == "input_scale"}
        scale = global_scale(fmt, largest[row.group or row.name]) if fmt.has_global_scale else None
        parts |= encode(fmt, weight.contiguous(), scale, given=parts) | constants(fmt, row.shape)
        parts |= {part.suffix: scale for part in fmt.components if scale is not None and part.kind == "global_scale"}
        tensors |= {f"{stem}.{suffix}": part for suffix, part in parts.items()}
    return tensors


def install(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write this rank's rows of every tensor, derive the scalars, mark the layouts as applied. Decodes nothing."""
    storages = storage_parameters(model)
    for placement in placements_of(model):
        spec, storage = placement.tensor, storages[placement.storage]
        source = tensors[spec.name].contiguous().view(-1).view(torch.uint8).view(spec.num_rows, spec.row_bytes)
        unit_start, unit_stop = unit_range(storage)
        row_start, row_stop = placement.rows_of_units(unit_start, unit_stop)
        if row_start < row_stop:
            base = unit_start * placement.unit_bytes
            apply_rows(placement, source[row_start:row_stop], row_start, local_bytes(storage), base)
    for derived in derived_of(model):
        inputs = [_local(storages[name]) for name in derived.inputs]
        if all(value.numel() for value in inputs):
            _local(storages[derived.name]).copy_(derived.function(*inputs))
    for module in model.modules():
        if isinstance(module, QuantModule):
            module.mark_applied()


def read_back(model: nn.Module) -> dict[str, bytes]:
    """Every tensor's bytes, read through the inverse index of an unsharded model."""
    storages = storage_parameters(model)
    return {
        placement.tensor.name: invert_rows(
            placement, 0, placement.tensor.num_rows, local_bytes(storages[placement.storage]), 0
        )
        .numpy()
        .tobytes()
        for placement in placements_of(model)
    }


def storage_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every storage as it lies in memory, this rank's shard of it."""
    return {name: local_bytes(storage).numpy().tobytes() for name, storage in storage_parameters(model).items()}


def random_weights(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """BF16 weights for every logical parameter, of a size that keeps activations in range."""
    generator = torch.Generator().manual_seed(seed)
    return {
        row.name: torch.randn(row.shape, generator=generator).mul_(0.05).to(torch.bfloat16)
        + (1.0 if "norm" in row.name else 0.0)
        for row in parameters_of(model)
    }


def _local(parameter: Tensor) -> Tensor:
    return getattr(parameter, "to_local", lambda: parameter)().detach()
