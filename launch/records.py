"""What one side of a comparison put out: a record, which a file can hold.

save(record, Path("a.safetensors")); record = load(Path("a.safetensors"))
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weight_update.errors import PlanError

from .sides import ASKED, Asked

METADATA = "transfuse_compare"  # key in the safetensors metadata of a saved record
CONDITIONING = "conditioning."  # prefix of what a diffusion model was conditioned on


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """kind "text": targets int64 [N] and logits FP32 [N, V] of a checkpoint; top_ids int64 and top_logprobs FP32 [P],
    the likeliest token after each probe, of any side. kind "latents": latents FP32 [steps, samples, ...], and what
    they were conditioned on, as CONDITIONING and its name.

    asked: the settings that the other side needs too. versions: of a live service, empty otherwise.
    """

    kind: str
    label: str
    asked: Mapping[str, Any]
    versions: tuple[int, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


def asked_of(kind: str, asked: Asked) -> dict[str, Any]:
    """What records of a kind depend on."""
    return {name: getattr(asked, name) for name in ASKED[kind]}


def save(record: Record, path: Path) -> None:
    """One safetensors file; the values beside the tensors are JSON in its metadata."""
    values = {"kind": record.kind, "label": record.label, "asked": record.asked, "versions": record.versions}
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in record.tensors.items()}
    save_file(tensors, path, metadata={METADATA: json.dumps(values)})


def load(path: Path) -> Record:
    """A saved record. Raises PlanError where the file is something else."""
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return Record(**values | {"versions": tuple(values["versions"]), "tensors": tensors})
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise PlanError(f"{path}: not written by this release's 'transfuse compare --save': {error}") from error
