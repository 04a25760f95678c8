"""The files of a version store: checkpoint folders, deltas, records and manifests, and what disks do to them."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant.parameters import ParameterRow
from quant.specs import DTYPES, TensorSpec

from .errors import StoreError
from .manifest import Manifest

RECORD = "transfuse.json"
WEIGHTS = {False: "model", True: "diffusion_pytorch_model"}  # transformers' and diffusers' names of a weights file
SHARD_BYTES = 2 << 30

TensorBytes = Callable[[int], Tensor]  # index in the manifest -> uint8 [rows, row_bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredVersion:
    """What one folder of the store says of itself.

    base: version that a delta needs, 0 for a full one. digests: 32 hex digits a tensor, in manifest order.
    num_bytes: on disk.
    """

    version: int
    digest: str
    digests: tuple[str, ...]
    fingerprint: str
    created_s: float
    pushed_by: str = ""
    step: int = 0
    base: int = 0
    num_bytes: int = 0


def write_manifest(path: Path, manifest: Manifest) -> None:
    """What its versions are made of, for readers that have no model at hand."""
    content = {
        "tensors": [asdict(spec) for spec in manifest.tensors],
        "parameters": [asdict(row) for row in manifest.parameters],
    }
    hidden = path.with_name(f".{path.name}")
    hidden.write_text(json.dumps(content))
    with hidden.open("rb") as file:
        os.fsync(file.fileno())
    hidden.rename(path)
    sync_directory(path.parent)


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file that `write_manifest` wrote."""
    with reporting(f"{path}: cannot be read"):
        content: dict[str, Any] = json.loads(path.read_text())
        return Manifest(
            tensors=tuple(TensorSpec(**each | {"shape": tuple(each["shape"])}) for each in content["tensors"]),
            parameters=tuple(
                ParameterRow(**each | {"shape": tuple(each["shape"]), "aliases": tuple(each["aliases"])})
                for each in content["parameters"]
            ),
        )


def read_record(path: Path) -> StoredVersion:
    with reporting(f"{path}: its record cannot be read"):
        fields: dict[str, Any] = json.loads((path / RECORD).read_text())
        return StoredVersion(**fields | {"digests": tuple(fields["digests"])})


def read_full(path: Path, spec: TensorSpec, components: Sequence[str]) -> Tensor:
    component, name = placed(spec.name, components)
    folder = path / component
    stem = WEIGHTS[bool(components)]
    with reporting(f"{folder}: {name} cannot be read"):
        index = folder / f"{stem}.safetensors.index.json"
        file_name = _weight_map(index, index.stat().st_mtime_ns)[name]
    with reporting(f"{folder}: {name} cannot be read"), safe_open(folder / file_name, framework="pt") as file:
        found: Tensor = file.get_tensor(name)
        return found.reshape(-1).view(torch.uint8).reshape(spec.num_rows, spec.row_bytes)


@functools.lru_cache(maxsize=8)
def _weight_map(index: Path, mtime_ns: int) -> dict[str, str]:
    found: dict[str, str] = json.loads(index.read_text())["weight_map"]
    return found


def read_delta(path: Path, spec: TensorSpec, base: Callable[[], Tensor]) -> Tensor:
    with reporting(f"{path}: {spec.name} cannot be read"), safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if f"{spec.name}@whole" in names:
            return torch.as_tensor(file.get_tensor(f"{spec.name}@whole"))
        data = base()
        if f"{spec.name}@positions" in names:
            data = data.clone()
            data.view(-1)[file.get_tensor(f"{spec.name}@positions")] = file.get_tensor(f"{spec.name}@values")
        return data


def placed(name: str, components: Sequence[str]) -> tuple[str, str]:
    """(component folder, name in it)."""
    component, _, rest = name.partition(".")
    return (component, rest) if component in components else ("", name)


def by_component(manifest: Manifest, components: Sequence[str]) -> Mapping[str, dict[int, tuple[str, TensorSpec]]]:
    groups: dict[str, dict[int, tuple[str, TensorSpec]]] = {}
    for index, spec in enumerate(manifest.tensors):
        component, name = placed(spec.name, components)
        groups.setdefault(component, {})[index] = (name, spec)
    return groups


def write_shards(folder: Path, stem: str, specs: Mapping[int, TensorSpec], tensor_bytes: TensorBytes) -> None:
    """safetensors files of at most SHARD_BYTES (or one tensor) with their index; one shard in memory at a time."""
    shards = list(_shards(specs))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            spec.name: tensor_bytes(index).contiguous().view(-1).view(DTYPES[spec.dtype]).reshape(spec.shape)
            for index, spec in shard.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    total = {"total_size": sum(spec.num_bytes for spec in specs.values())}
    index_file = folder / f"{stem}.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": total, "weight_map": weight_map}, indent=1))


def _shards(specs: Mapping[int, TensorSpec]) -> Iterator[dict[int, TensorSpec]]:
    shard: dict[int, TensorSpec] = {}
    for index, spec in specs.items():
        if shard and sum(each.num_bytes for each in shard.values()) + spec.num_bytes > SHARD_BYTES:
            yield shard
            shard = {}
        shard[index] = spec
    yield shard


def copy_configs(source: Path, target: Path) -> None:
    """Everything but weights and indices, tokenizer and scheduler folders included."""
    unwanted = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf", "*.pt", RECORD, ".*")
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*unwanted))


def write_quantization(folder: Path, configs: tuple[dict[str, Any], dict[str, Any]] | None) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    config.pop("quantization_config", None)
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    if configs is not None:
        config["quantization_config"] = configs[0]
        (folder / "hf_quant_config.json").write_text(json.dumps(configs[1], indent=2))
    path.write_text(json.dumps(config, indent=2))


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync(folder: Path) -> None:
    """Everything below is on the disk when this returns."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_directory(path)
    sync_directory(folder)


def sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class reporting:
    """Turns what disks and files raise into StoreError: a full disk, a read-only one, a damaged file."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | SafetensorError | KeyError | json.JSONDecodeError) and not isinstance(
            error, StoreError
        ):
            raise StoreError(f"{self._what}: {type(error).__name__}: {error}; nothing was changed") from error
