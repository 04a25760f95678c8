"""The version store: committed versions on disk, as checkpoints that other engines load.

    store = Store(directory, config_dir=model_dir, manifest=manifest)
    store.write(record, tensor_bytes)              # whole or not at all; a delta where that is much smaller
    store.versions(), store.read(7, index), store.check(7), store.export(7, Path("out"))

    v00000007/   model-00001-of-00002.safetensors ... model.safetensors.index.json     checkpoint form, ModelOpt's names
                 config.json hf_quant_config.json tokenizer files, as the model's folder has them
                 transfuse.json                                                        what this version is
    v00000008/   delta.safetensors transfuse.json                                      changed bytes against v00000007

A version is written into a hidden sibling, synced, and renamed: what has its name is complete. A tensor of a delta is
`name@positions` (int64 byte positions in the tensor, rising) with `name@values` (U8), or `name@whole` (U8).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant.exports import quantization_configs
from quant.specs import DTYPES, TensorSpec

from .digest import digest_rows, name_key
from .errors import DigestError, StoreError, VersionError, raise_all
from .manifest import Manifest

RECORD, DELTA = "transfuse.json", "delta.safetensors"
WEIGHTS = {False: "model", True: "diffusion_pytorch_model"}  # transformers' and diffusers' names of a weights file
SHARD_BYTES = 2 << 30
POSITION_BYTES = 8
# A delta pays when it is much smaller: reading it also reads its base.
DELTA_SHARE = 0.5

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


class Store:
    """Versions of one model in one folder; one writer.

    keep, keep_bytes: the newest versions that are kept, by count and by bytes on disk; a base stays as long as a delta
    needs it. full_every: after so many deltas in a row a version is written in full.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config_dir: Path,
        manifest: Manifest,
        keep: int = 4,
        keep_bytes: int | None = None,
        full_every: int = 8,
    ) -> None:
        self.directory = directory
        self._config_dir = config_dir
        self._manifest = manifest
        self._keep, self._keep_bytes, self._full_every = keep, keep_bytes, full_every
        with _reporting(f"{directory}: cannot be the version store"):
            directory.mkdir(parents=True, exist_ok=True)
            for partial in directory.glob(".v*"):  # of a writer that died
                shutil.rmtree(partial)

    # -- what is there

    def versions(self) -> list[StoredVersion]:
        """Complete versions, oldest first."""
        return [_read_record(path) for path in sorted(self.directory.glob("v*")) if (path / RECORD).is_file()]

    def newest(self) -> StoredVersion | None:
        """The version that a full restart serves; None in an empty store."""
        found = self.versions()
        return found[-1] if found else None

    def record(self, version: int) -> StoredVersion:
        """One version; raises VersionError naming what there is."""
        path = self._path(version)
        if not (path / RECORD).is_file():
            held = ", ".join(str(each.version) for each in self.versions()) or "nothing"
            raise VersionError(f"version {version}: not in the store {self.directory}, which holds {held}")
        return _read_record(path)

    def read(self, version: int, index: int) -> Tensor:
        """One tensor of a version in checkpoint form, uint8 [rows, row_bytes]."""
        record = self.record(version)
        if record.fingerprint != f"{self._manifest.fingerprint:016x}":
            raise VersionError(f"version {version} in {self.directory}: of another model, format or tensor list")
        spec = self._manifest.tensors[index]
        if not record.base:
            return _read_full(self._path(version), spec, self._components())
        return _read_delta(self._path(version) / DELTA, spec, lambda: self.read(record.base, index))

    def check(self, version: int) -> None:
        """Read all of a version; DigestError names every tensor whose bytes are not what was committed."""
        record = self.record(version)
        problems = [
            f"{spec.name}: {self._path(version)} holds {found}, committed was {wanted}"
            for index, (spec, wanted) in enumerate(zip(self._manifest.tensors, record.digests, strict=True))
            if (found := tensor_digest(spec, self.read(version, index))) != wanted
        ]
        raise_all(DigestError, f"version {version} is damaged; restore it from a copy, or push again", problems)

    # -- writing

    def write(self, record: StoredVersion, tensor_bytes: TensorBytes) -> StoredVersion:
        """Keep a version; returns its record as written. A failure leaves the store as it was."""
        base = self._base()
        delta = None if base is None else self._changes(base.version, tensor_bytes)
        hidden = self.directory / f".v{record.version:08d}"
        with _reporting(f"{self.directory}: version {record.version} was not stored"):
            shutil.rmtree(hidden, ignore_errors=True)
            try:
                hidden.mkdir()
                if delta is None or base is None:
                    self._write_full(hidden, tensor_bytes)
                else:
                    save_file(delta, hidden / DELTA)
                    record = replace(record, base=base.version)
                record = replace(record, num_bytes=_bytes_in(hidden))
                (hidden / RECORD).write_text(json.dumps(asdict(record)))
                _sync(hidden)
                hidden.rename(self._path(record.version))
                _sync_directory(self.directory)
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise
        return record

    def prune(self) -> list[StoredVersion]:
        """Drop what retention no longer covers; returns what fell out."""
        found = self.versions()
        kept: list[StoredVersion] = []
        for record in reversed(found):
            within = self._keep_bytes is None or sum(each.num_bytes for each in kept) + record.num_bytes <= (
                self._keep_bytes
            )
            if not kept or (len(kept) < self._keep and within):
                kept.append(record)
        needed = {each.version for each in kept} | {each.base for each in kept}
        dropped = [record for record in found if record.version not in needed]
        with _reporting(f"{self.directory}: old versions were not dropped"):
            for record in dropped:
                shutil.rmtree(self._path(record.version))
        return dropped

    def export(self, version: int, target: Path) -> None:
        """Write one version as a checkpoint folder, digests checked first. The folder must not exist."""
        if target.exists():
            raise StoreError(f"{target}: exists; name a new folder")
        self.check(version)
        hidden = target.parent / f".{target.name}.partial"
        with _reporting(f"{target}: version {version} was not exported"):
            shutil.rmtree(hidden, ignore_errors=True)
            try:
                hidden.mkdir(parents=True)
                self._write_full(hidden, lambda index: self.read(version, index))
                _sync(hidden)
                hidden.rename(target)
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise

    def _path(self, version: int) -> Path:
        return self.directory / f"v{version:08d}"

    def _base(self) -> StoredVersion | None:
        """The full version that the next one may be a delta against: the base of the last, or the last itself."""
        found = self.versions()
        if not found or found[-1].fingerprint != f"{self._manifest.fingerprint:016x}":
            return None
        base = found[-1].base or found[-1].version
        deltas = sum(each.base == base for each in found)
        return next(each for each in found if each.version == base) if deltas < self._full_every else None

    def _changes(self, base: int, tensor_bytes: TensorBytes) -> dict[str, Tensor] | None:
        """The tensors of a delta file; None where a full version is not much larger."""
        changes: dict[str, Tensor] = {}
        limit = DELTA_SHARE * sum(spec.num_bytes for spec in self._manifest.tensors)
        for index, spec in enumerate(self._manifest.tensors):
            changes |= changed_bytes(spec.name, self.read(base, index), tensor_bytes(index))
            if sum(tensor.nbytes for tensor in changes.values()) > limit:
                return None
        return changes

    def _write_full(self, folder: Path, tensor_bytes: TensorBytes) -> None:
        components = self._components()
        _copy_configs(self._config_dir, folder)
        for component, group in _by_component(self._manifest, components).items():
            specs = {index: replace(spec, name=name) for index, (name, spec) in group.items()}
            (folder / component).mkdir(exist_ok=True)
            _write_shards(folder / component, WEIGHTS[bool(components)], specs, tensor_bytes)
            rows = [
                replace(row, name=row.name.removeprefix(f"{component}."))
                for row in self._manifest.parameters
                if not component or row.name.startswith(f"{component}.")
            ]
            _write_quantization(folder / component, quantization_configs(rows))

    def _components(self) -> tuple[str, ...]:
        """Folders of a pipeline's transformers; none where the model is the folder itself."""
        index = self._config_dir / "model_index.json"
        names = {spec.name.partition(".")[0] for spec in self._manifest.tensors}
        return tuple(sorted(names & json.loads(index.read_text()).keys())) if index.is_file() else ()


def tensor_digest(spec: TensorSpec, data: Tensor) -> str:
    """32 hex digits of one tensor's bytes, uint8 [rows, row_bytes]."""
    return "".join(f"{lane:016x}" for lane in digest_rows(name_key(spec.name), data, 0))


def changed_bytes(name: str, old: Tensor, new: Tensor) -> dict[str, Tensor]:
    """What a delta file holds of one tensor: nothing, positions and values, or all of it."""
    positions = (old != new).reshape(-1).nonzero().reshape(-1)
    if not len(positions):
        return {}
    if len(positions) * (1 + POSITION_BYTES) >= new.numel():
        return {f"{name}@whole": new.contiguous()}
    return {f"{name}@positions": positions, f"{name}@values": new.reshape(-1)[positions]}


# ---------------------------------------------------------------- files


def _read_record(path: Path) -> StoredVersion:
    with _reporting(f"{path}: its record cannot be read"):
        fields: dict[str, Any] = json.loads((path / RECORD).read_text())
        return StoredVersion(**fields | {"digests": tuple(fields["digests"])})


def _read_full(path: Path, spec: TensorSpec, components: Sequence[str]) -> Tensor:
    component, name = _placed(spec.name, components)
    folder = path / component
    stem = WEIGHTS[bool(components)]
    files = json.loads((folder / f"{stem}.safetensors.index.json").read_text())["weight_map"]
    with _reporting(f"{folder}: {name} cannot be read"), safe_open(folder / files[name], framework="pt") as file:
        found: Tensor = file.get_tensor(name)
        return found.reshape(-1).view(torch.uint8).reshape(spec.num_rows, spec.row_bytes)


def _read_delta(path: Path, spec: TensorSpec, base: Callable[[], Tensor]) -> Tensor:
    with _reporting(f"{path}: {spec.name} cannot be read"), safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if f"{spec.name}@whole" in names:
            return torch.as_tensor(file.get_tensor(f"{spec.name}@whole"))
        data = base()
        if f"{spec.name}@positions" in names:
            data = data.clone()
            data.view(-1)[file.get_tensor(f"{spec.name}@positions")] = file.get_tensor(f"{spec.name}@values")
        return data


def _placed(name: str, components: Sequence[str]) -> tuple[str, str]:
    """(component folder, name in it)."""
    component, _, rest = name.partition(".")
    return (component, rest) if component in components else ("", name)


def _by_component(manifest: Manifest, components: Sequence[str]) -> Mapping[str, dict[int, tuple[str, TensorSpec]]]:
    groups: dict[str, dict[int, tuple[str, TensorSpec]]] = {}
    for index, spec in enumerate(manifest.tensors):
        component, name = _placed(spec.name, components)
        groups.setdefault(component, {})[index] = (name, spec)
    return groups


def _write_shards(folder: Path, stem: str, specs: Mapping[int, TensorSpec], tensor_bytes: TensorBytes) -> None:
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


def _copy_configs(source: Path, target: Path) -> None:
    """Everything but weights and indices, tokenizer and scheduler folders included."""
    unwanted = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf", "*.pt", RECORD, ".*")
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*unwanted))


def _write_quantization(folder: Path, configs: tuple[dict[str, Any], dict[str, Any]] | None) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    config.pop("quantization_config", None)
    (folder / "hf_quant_config.json").unlink(missing_ok=True)
    if configs is not None:
        config["quantization_config"] = configs[0]
        (folder / "hf_quant_config.json").write_text(json.dumps(configs[1], indent=2))
    path.write_text(json.dumps(config, indent=2))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _sync(folder: Path) -> None:
    """Everything below is on the disk when this returns."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_directory(path)
    _sync_directory(folder)


def _sync_directory(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _reporting:
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
