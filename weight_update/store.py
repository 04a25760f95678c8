"""The version store: committed versions on disk, as checkpoints that other engines load.

    store = Store(directory, config_dir=model_dir, manifest=manifest)
    store.write(record, tensor_bytes)              # whole or not at all; a delta where that is much smaller
    store.versions(), store.read(7, index), store.check(7), store.export(7, Path("out"))
    Store.existing(directory)                      # to read what somebody wrote, without a model at hand

    v00000007/   model-00001-of-00002.safetensors ... model.safetensors.index.json     checkpoint form, ModelOpt's names
                 config.json hf_quant_config.json tokenizer files, as the model's folder has them
                 transfuse.json                                                        what this version is
    v00000008/   delta.safetensors transfuse.json                                      changed bytes against v00000007
    manifest-4e16809aabf7f1d0.json                                                     tensors and parameters

Where experts may be moved, a full version holds each of them once, under its own name, and the maps of its slots beside
them; a delta holds slots. A version is written into a hidden sibling, synced, and renamed: what has its name is
complete. A tensor of a delta is `name@positions` (int64 byte positions in the tensor, rising) with `name@values` (U8),
or `name@whole` (U8).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from quant.expert_maps import ExpertMaps, maps_in, module_of
from quant.exports import quantization_configs
from quant.specs import TensorSpec

from .digest import digest_rows, name_key
from .errors import DigestError, StoreError, VersionError, raise_all
from .manifest import Manifest
from .store_files import (
    RECORD,
    WEIGHTS,
    StoredVersion,
    TensorBytes,
    by_component,
    bytes_in,
    copy_configs,
    read_delta,
    read_full,
    read_manifest,
    read_record,
    reporting,
    sync,
    sync_directory,
    write_manifest,
    write_quantization,
    write_shards,
)

__all__ = ["Store", "StoredVersion", "changed_bytes", "tensor_digest"]

DELTA = "delta.safetensors"
POSITION_BYTES = 8
# A delta pays when it is much smaller: reading it also reads its base.
DELTA_SHARE = 0.5


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
        read_only: bool = False,
    ) -> None:
        self.directory = directory
        self._config_dir = config_dir
        self._manifest = manifest
        self._keep, self._keep_bytes, self._full_every = keep, keep_bytes, full_every
        self._records: dict[Path, StoredVersion] = {}  # what is complete does not change
        self._known_maps: dict[int, ExpertMaps] = {}  # of the full version that was read last
        if not read_only:
            self._take_over()

    @classmethod
    def existing(cls, directory: Path, version: int | None = None) -> Store:
        """To read a version, the newest by default, and those of the same model; StoreError where there is none."""
        found = {each.version: each for each in stored_versions(directory)}
        wanted = max(found, default=0) if version is None else version
        if wanted not in found:
            held = ", ".join(map(str, sorted(found))) or "nothing"
            raise VersionError(f"version {wanted}: not in the store {directory}, which holds {held}")
        record = found[wanted]
        manifest = read_manifest(_manifest_path(directory, record.fingerprint))
        return cls(directory, config_dir=_path(directory, record.base or wanted), manifest=manifest, read_only=True)

    def _take_over(self) -> None:
        """There is one writer, and this is it from now on."""
        with reporting(f"{self.directory}: cannot be the version store"):
            self.directory.mkdir(parents=True, exist_ok=True)
            for partial in self.directory.glob(".v*"):  # of a writer that died
                shutil.rmtree(partial)
            write_manifest(_manifest_path(self.directory, self.fingerprint), self._manifest)

    # -- what is there

    def versions(self) -> list[StoredVersion]:
        """Complete versions, oldest first."""
        paths = sorted(path for path in self.directory.glob("v*") if (path / RECORD).is_file())
        self._records = {path: self._records.get(path) or read_record(path) for path in paths}
        return list(self._records.values())

    @property
    def fingerprint(self) -> str:
        """Of the versions that can be read and written, 16 hex digits; others are listed only."""
        return f"{self._manifest.fingerprint:016x}"

    def newest(self) -> StoredVersion | None:
        """The version that a full restart serves; None in an empty store."""
        found = self.versions()
        return found[-1] if found else None

    def record(self, version: int) -> StoredVersion:
        """One version; raises VersionError naming what there is."""
        path = self.path(version)
        if not (path / RECORD).is_file():
            held = ", ".join(str(each.version) for each in self.versions()) or "nothing"
            raise VersionError(f"version {version}: not in the store {self.directory}, which holds {held}")
        if path not in self._records:
            self._records[path] = read_record(path)
        return self._records[path]

    def read(self, version: int, index: int) -> Tensor:
        """One tensor of a version in checkpoint form, uint8 [rows, row_bytes]."""
        record = self.record(version)
        if record.fingerprint != self.fingerprint:
            raise VersionError(f"version {version} in {self.directory}: of another model, format or tensor list")
        spec = self._manifest.tensors[index]
        if not record.base:
            spec = replace(spec, name=self._maps(version).logical(spec.name))
            return read_full(self.path(version), spec, self._components())
        return read_delta(self.path(version) / DELTA, spec, lambda: self.read(record.base, index))

    def check(self, version: int) -> None:
        """Read all of a version; DigestError names every tensor whose bytes are not what was committed."""
        record = self.record(version)
        problems = [
            f"{spec.name}: {self.path(version)} holds {found}, committed was {wanted}"
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
        with reporting(f"{self.directory}: version {record.version} was not stored"):
            shutil.rmtree(hidden, ignore_errors=True)
            try:
                hidden.mkdir()
                if delta is None or base is None:
                    self._write_full(hidden, tensor_bytes)
                else:
                    save_file(delta, hidden / DELTA)
                    record = replace(record, base=base.version)
                record = replace(record, num_bytes=bytes_in(hidden))
                (hidden / RECORD).write_text(json.dumps(asdict(record)))
                sync(hidden)
                hidden.rename(self.path(record.version))
                sync_directory(self.directory)
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
        with reporting(f"{self.directory}: old versions were not dropped"):
            for record in dropped:  # renamed first: nobody lists what is half gone
                hidden = self.directory / f".v{record.version:08d}"
                self.path(record.version).rename(hidden)
                shutil.rmtree(hidden)
        return dropped

    def export(self, version: int, target: Path) -> None:
        """Write one version as a checkpoint folder, digests checked first. The folder must not exist."""
        if target.exists():
            raise StoreError(f"{target}: exists; name a new folder")
        self.check(version)
        hidden = target.parent / f".{target.name}.partial"
        with reporting(f"{target}: version {version} was not exported"):
            shutil.rmtree(hidden, ignore_errors=True)
            try:
                hidden.mkdir(parents=True)
                self._write_full(hidden, lambda index: self.read(version, index))
                sync(hidden)
                hidden.rename(target)
            except BaseException:
                shutil.rmtree(hidden, ignore_errors=True)
                raise

    def path(self, version: int) -> Path:
        """The folder of a version."""
        return _path(self.directory, version)

    def _base(self) -> StoredVersion | None:
        """The full version that the next one may be a delta against: the base of the last, or the last itself."""
        found = self.versions()
        if not found or found[-1].fingerprint != self.fingerprint:
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

    def _maps(self, version: int) -> ExpertMaps:
        """Those of a full version."""
        if version not in self._known_maps:
            tensors = {spec.name: spec for spec in self._manifest.tensors if module_of(spec.name) is not None}
            path, components = self.path(version), self._components()
            self._known_maps = {version: maps_in(tensors, lambda name: read_full(path, tensors[name], components))}
        return self._known_maps[version]

    def _write_full(self, folder: Path, tensor_bytes: TensorBytes) -> None:
        components = self._components()
        copy_configs(self._config_dir, folder)
        numbers = self._manifest.index
        maps = maps_in(numbers, lambda name: tensor_bytes(numbers[name]))
        for component, group in by_component(self._manifest, components).items():
            specs = {
                index: replace(spec, name=maps.logical(name))
                for index, (name, spec) in group.items()
                if maps.is_first(name)
            }
            (folder / component).mkdir(exist_ok=True)
            write_shards(folder / component, WEIGHTS[bool(components)], specs, tensor_bytes)
            rows = [
                replace(row, name=maps.logical(row.name).removeprefix(f"{component}."))
                for row in self._manifest.parameters
                if (not component or row.name.startswith(f"{component}.")) and maps.is_first(row.name)
            ]
            write_quantization(folder / component, quantization_configs(rows))

    def _components(self) -> tuple[str, ...]:
        """Folders of a pipeline's transformers; none where the model is the folder itself."""
        index = self._config_dir / "model_index.json"
        names = {spec.name.partition(".")[0] for spec in self._manifest.tensors}
        return tuple(sorted(names & json.loads(index.read_text()).keys())) if index.is_file() else ()


def stored_versions(directory: Path) -> list[StoredVersion]:
    """Complete versions in a folder, of whatever model, oldest first."""
    return [read_record(path) for path in sorted(directory.glob("v*")) if (path / RECORD).is_file()]


def _path(directory: Path, version: int) -> Path:
    return directory / f"v{version:08d}"


def _manifest_path(directory: Path, fingerprint: str) -> Path:
    return directory / f"manifest-{fingerprint}.json"


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
