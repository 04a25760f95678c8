"""The fixtures in tests/golden: what third-party libraries really produce (format: its README.md)."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DIRECTORY = Path(__file__).parent / "golden"


@cache
def fixtures() -> dict[str, dict[str, Any]]:
    """Manifest entry by file name without suffix."""
    manifest = json.loads((DIRECTORY / "manifest.json").read_text())
    return {entry["file"].removesuffix(".safetensors"): entry for entry in manifest["fixtures"]}


def names(prefix: str) -> list[str]:
    return sorted(name for name in fixtures() if name.startswith(prefix))


@cache
def load(name: str) -> dict[str, Tensor]:
    """The stored tensors of a fixture; one that equals another is there under both names."""
    stored = load_file(DIRECTORY / f"{name}.safetensors")
    aliases = {tensor: entry["same_as"] for tensor, entry in fixtures()[name]["tensors"].items() if "same_as" in entry}
    return stored | {alias: stored[target] for alias, target in aliases.items() if target in stored}


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(name: str, tensor_name: str, got: Tensor) -> bool:
    """Whether the bytes and the shape are those of a fixture, stored or only hashed."""
    entry = fixtures()[name]["tensors"][tensor_name]
    digest = hashlib.sha256(bytes_of(got).numpy().tobytes()).hexdigest()
    return bool(digest == entry["sha256"] and list(got.shape) == entry["shape"])
