"""What the conformance command checks of whole checkpoints that a library exported: every tensor, from the BF16 model.

The checkpoint says its quant_algo, which names the row; stacked experts are taken apart and fused groups share a scale.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from quant import numerics_float as floats
from quant.configs import QUANT_ALGOS
from quant.dialects import to_dialect
from quant.formats import FORMATS, Format, amax, global_scale
from quant.models import fused_group
from quant.names import expert_parts

from .cases_formats import Apart, Case, Tensors, encoded
from .fixtures import Fixture

FUSING = ("nvfp4", "w4a8_nvfp4")
DIALECT_OF = {"fp8_block": "modelopt export"}
CALIBRATED = ("input_scale", "pre_quant_scale")
SMOOTHED = "weights are folded with an FP32 scale that the file holds only rounded to BF16, or folded into a norm"


def _algo(fixture: Fixture) -> str:
    files = fixture.args["json_files"]
    return str(files["config.json"]["quantization_config"]["quant_algo"]).upper()


def _weights(fixture: Fixture) -> Tensors:
    """BF16 weights of the model by checkpoint name."""
    source = fixture.companion()
    weights: Tensors = {}
    for full in source.stored:
        name, tensor = full.removeprefix("in."), source.stored[full]
        parts = expert_parts(name, tuple(tensor.shape))
        weights |= {part.name: tensor[part.expert, part.row0 : part.row1].contiguous() for part in parts}
        weights |= {} if parts else {name: tensor}
    for full, meta in source.entry["tensors"].items():
        if "same_as" in meta:
            weights[full.removeprefix("in.")] = weights[str(meta["same_as"]).removeprefix("in.")]
    return weights


def _group(fmt: Format, name: str, weight: Tensor) -> str:
    """Whose amax a weight shares. modelopt fuses NVFP4's global scales and single tiles of FP8, not FP8 per tensor."""
    one_tile = fmt.name == "fp8_block" and max(weight.shape) <= floats.TILE
    fuses = one_tile or fmt.name in FUSING
    return (fused_group(name) if fuses else "") or name


def _largest(fixture: Fixture, fmt: Format, weights: Tensors) -> dict[str, int]:
    """BF16 bits of the largest magnitude of every fused group that is exported."""
    largest: dict[str, int] = {}
    for name, weight in weights.items():
        if f"out.{name.removesuffix('.weight')}.weight_scale" in fixture.entry["tensors"]:
            key = _group(fmt, name, weight)
            largest[key] = max(largest.get(key, 0), amax(weight))
    return largest


def _exported(fixture: Fixture, match: re.Match[str]) -> Tensor:
    fmt = FORMATS[QUANT_ALGOS[_algo(fixture)]]
    stem, suffix = match["stem"], match["suffix"]
    if suffix in CALIBRATED:
        raise Apart("special", "calibration of activations: taken as given")
    weights = fixture.once("weights", lambda: _weights(fixture))
    weight = weights[f"{stem}.weight"]
    smoothed = f"out.{stem}.pre_quant_scale" in fixture.entry["tensors"] or fmt.name == "int4_awq"
    if smoothed:
        _require_form(fixture, fmt, match, weight)
        raise Apart("special", f"names, dtypes and shapes are equal; {SMOOTHED}")

    def make() -> Tensors:
        largest = fixture.once("largest", lambda: _largest(fixture, fmt, weights))
        bits = largest[_group(fmt, f"{stem}.weight", weight)]
        if fmt.name == "fp8_block" and max(weight.shape) <= floats.TILE:
            top = torch.tensor([[bits << 16]], dtype=torch.int32).view(torch.float32)
            tensors = floats.encode_fp8_block(weight, top)
        else:
            tensors = encoded(fmt, weight, global_scale(fmt, bits) if fmt.has_global_scale else None)
        return to_dialect(fmt.name, DIALECT_OF[fmt.name], tensors) if fmt.name in DIALECT_OF else tensors

    return fixture.once(stem, make)[suffix]


def _require_form(fixture: Fixture, fmt: Format, match: re.Match[str], weight: Tensor) -> None:
    specs = {spec.name: spec for spec in fmt.tensors(f"{match['stem']}.weight", tuple(weight.shape))}
    meta, spec = fixture.entry["tensors"][match[0]], specs[f"{match['stem']}.{match['suffix']}"]
    if list(spec.shape) != meta["shape"]:
        raise ValueError(f"{spec.name}: a row of {fmt.name} has {list(spec.shape)}, the fixture {meta['shape']}")


EXPORT_CASES: tuple[Case, ...] = (
    Case(
        row="whole export",
        oracle="nvidia-modelopt",
        group="export",
        match=r"out\.(?P<stem>.+)\.(?P<suffix>\w+)",
        produce=_exported,
    ),
)
