"""Scales that a calibration found, read from whatever holds them: an export, a saved training state.

    scales = read_scales(Path("backbone.pt"))          # or a .safetensors file; nothing in it is executed
    scales_of("blocks.0.to_q", scales)                 # Scales(weight=..., input=...), []

ModelOpt keeps the largest magnitude (amax) while it quantizes, and writes scales, amax over the largest value of the
format, when it exports.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .encodings import E4M3_MAX
from .output import ToolError

# What a tensor's scale is called -> what it is divided by. The first that is there counts.
WEIGHT_SCALES = (("weight_quantizer._amax", E4M3_MAX), ("weight_scale", 1.0))
INPUT_SCALES = (("input_quantizer._amax", E4M3_MAX), ("input_scale", 1.0))
INPUT_AMAX, INPUT_SCALE = (f".{name}" for name, _ in INPUT_SCALES)
SCALE_NAMES = tuple(f".{name}" for name, _ in (*WEIGHT_SCALES, *INPUT_SCALES))
# Where a saved training state keeps the tensors of its model.
STATE_KEYS = ("model_state_dict", "state_dict", "model", "module")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """FP32 scales of one module, positive and finite."""

    weight: float
    input: float


def read_scales(path: Path) -> dict[str, Tensor]:
    """The amax and scale tensors in a state file, by their full names; nothing in the file is ever executed.

    A .safetensors file, or what torch.save wrote of plain containers and tensors (the weights may be among them: they
    are mapped, not read). Raises ToolError for anything else.
    """
    if not path.is_file():
        raise ToolError(f"{path}: no such file; expected a .safetensors file or a torch.save of a state dict")
    found = _safetensors_scales(path) if path.suffix == ".safetensors" else _state_scales(path)
    if not found:
        raise ToolError(f"{path}: no tensor ends with {' or '.join(SCALE_NAMES)}; save the state after calibration")
    return found


def _safetensors_scales(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.endswith(SCALE_NAMES)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ToolError(f"{path}: cannot be read as safetensors: {error}; copy it again") from error


def _state_scales(path: Path) -> dict[str, Tensor]:
    refused = (
        f"{path}: refused, since reading it would run code that is in it; save tensors only, for instance "
        "safetensors.torch.save_file({k: v for k, v in model.state_dict().items() if k.endswith('_amax')}, FILE)"
    )
    if not zipfile.is_zipfile(path):
        raise ToolError(f"{refused} (it is a bare pickle, not an archive of torch.save)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ToolError(f"{refused} ({str(error).splitlines()[0]})") from error
    return dict(_scales_in(state))


def _scales_in(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Of a state dict, or of the one that lies in it under a usual key."""
    if not isinstance(state, Mapping):
        return
    for key in STATE_KEYS:
        if isinstance(state.get(key), Mapping):
            yield from _scales_in(state[key])
    for name, value in state.items():
        if isinstance(value, Tensor) and str(name).endswith(SCALE_NAMES):
            yield str(name), value.clone()


def scales_of(module: str, tensors: Mapping[str, Tensor]) -> tuple[Scales | None, list[str]]:
    """The scales of a module, None where it has none; and what is wrong with them."""
    named = {"weight": WEIGHT_SCALES, "input": INPUT_SCALES}
    found: dict[str, float] = {}
    problems: list[str] = []
    for what, names in named.items():
        name, divisor = next(((n, d) for n, d in names if f"{module}.{n}" in tensors), ("", 1.0))
        if not name:
            continue
        value = tensors[f"{module}.{name}"]
        if value.numel() != 1:
            problems.append(f"{module}.{name}: {list(value.shape)}; expected one number, FP8 per tensor")
            continue
        found[what] = (value.reshape(()).to(torch.float32) / divisor).item()
        if what == "weight" and found[what] == 0:
            found[what] = 1.0  # of a weight that is zero, as quant.formats has it
        if not 0 < found[what] < math.inf:
            problems.append(f"{module}.{name}: {value.item()}; expected a positive finite number; calibrate again")
    if len(found) == 1 and not problems:
        missing = "input" if "weight" in found else "weight"
        wanted = " or ".join(name for name, _ in named[missing])
        problems.append(f"{module}: has no {wanted}; both scales are needed, or neither")
    return (Scales(**found) if len(found) == 2 and not problems else None), problems
