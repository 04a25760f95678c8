"""Golden fixtures: directories of tensors that third-party libraries produced, described by a manifest.json."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from weight_update.errors import PlanError

T = TypeVar("T")
GIVEN = ("in.", "all_bytes")  # what a conforming implementation reads


@dataclass(frozen=True, kw_only=True)
class Fixture:
    """One file of a directory: its entry in the manifest, and the tensors that it stores."""

    directory: Path
    entry: dict[str, Any]
    memo: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.entry["file"]).removesuffix(".safetensors")

    @property
    def group(self) -> str:
        return str(self.entry["group"])

    @property
    def args(self) -> dict[str, Any]:
        return dict(self.entry.get("args", {}))

    @property
    def outputs(self) -> list[str]:
        """Names of the tensors to reproduce."""
        return [name for name in self.entry["tensors"] if not name.startswith(GIVEN)]

    @cached_property
    def stored(self) -> dict[str, Tensor]:
        path = self.directory / self.entry["file"]
        if not path.is_file():
            raise PlanError(f"{path}: listed in manifest.json and not there; copy the whole directory again")
        return load_file(path)

    def find(self, name: str) -> Tensor | None:
        """A stored tensor, or the one that it equals; None where only its hash is stored."""
        meta = self.entry["tensors"].get(name, {})
        return self.stored.get(meta.get("same_as", name))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Computed for the first tensor that asks."""
        if key not in self.memo:
            self.memo[key] = make()
        found: T = self.memo[key]
        return found

    def companion(self, argument: str = "bf16_inputs") -> Fixture:
        """The fixture that holds the inputs of this one."""
        file = self.args.get(argument, self.entry["file"])
        found = self.once(("companion", file), lambda: read_directory(self.directory, only=file))
        if not found:
            raise PlanError(f"{self.directory}: {self.name} takes its inputs from {file}, which manifest.json lacks")
        return found[0]

    def is_primary(self, name: str) -> bool:
        """Whether an oracle marked primary wrote a tensor; where none is marked, every oracle counts."""
        oracles = self.entry["oracles"]
        primary = [oracle for oracle in oracles if oracle.get("primary")]
        return not primary or any(_wrote(oracle, name) for oracle in primary)

    def difference(self, name: str, got: Tensor) -> str | None:
        """None where `got` has shape, dtype and bytes of a tensor; else the first difference, with its coordinates."""
        meta = self.entry["tensors"][name]
        kind = str(got.dtype).removeprefix("torch.")
        if (list(got.shape), kind) != (meta["shape"], meta["dtype"]):
            return f"{name}: got {kind} {list(got.shape)}, expected {meta['dtype']} {meta['shape']}"
        if hashlib.sha256(_bytes(got).numpy().tobytes()).hexdigest() == meta["sha256"]:
            return None
        expected = self.find(name)
        if expected is None:
            return f"{name}: sha256 differs; the fixture stores no bytes to say where"
        return first_difference(name, expected, got)


def first_difference(name: str, expected: Tensor, got: Tensor) -> str | None:
    """The first differing byte by the coordinates of its element; the sign bit of a NaN is platform noise."""
    want, have = _bytes(_without_nan_signs(expected)), _bytes(_without_nan_signs(got))
    differing = (want != have).nonzero().flatten()
    if not len(differing):
        return None
    at = int(differing[0])
    element, byte = divmod(at, expected.element_size())
    index = [int(i) for i in torch.unravel_index(torch.tensor(element), expected.shape)] if expected.ndim else []
    return (
        f"{name}{index} byte {byte}: expected {int(want[at]):#04x}, got {int(have[at]):#04x}; "
        f"{len(differing)} of {len(want)} bytes differ"
    )


def _without_nan_signs(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    wide = tensor.float()
    return torch.where(wide.isnan(), math.nan, wide).to(tensor.dtype) if bool(wide.isnan().any()) else tensor


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _wrote(oracle: dict[str, Any], name: str) -> bool:
    """Prefixes stand as "modelopt", "modelopt_*", "ct_bf16/ct_f32"; without one an oracle wrote every tensor."""
    starts = [start.rstrip("*") for start in str(oracle.get("prefix", "")).split("/")]
    return any(name.startswith(start) for start in starts)


def read_directory(directory: Path, only: str | None = None) -> list[Fixture]:
    """The fixtures of a directory, in the order of its manifest."""
    manifest = directory / "manifest.json"
    if not manifest.is_file():
        raise PlanError(f"{directory}: no manifest.json; expected a directory of golden fixtures")
    entries = json.loads(manifest.read_text())["fixtures"]
    return [Fixture(directory=directory, entry=entry) for entry in entries if only in (None, entry["file"])]
