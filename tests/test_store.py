"""The version store: what is written is what is read, whole or not at all, whatever the disk does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from quant.formats import FORMATS
from quant.parameters import ParameterRow
from weight_update.errors import DigestError, StoreError, VersionError
from weight_update.manifest import Manifest
from weight_update.store import Store, StoredVersion, tensor_digest

ROWS = (
    ParameterRow(name="model.layers.0.mlp.up_proj.weight", shape=(64, 128), format="nvfp4"),
    ParameterRow(name="model.layers.0.mlp.down_proj.weight", shape=(128, 64), format="nvfp4"),
    ParameterRow(name="model.embed_tokens.weight", shape=(96, 64), format="bf16", aliases=("lm_head.weight",)),
    ParameterRow(name="model.norm.weight", shape=(64,), format="bf16"),
)
MANIFEST = Manifest(
    tensors=tuple(spec for row in ROWS for spec in FORMATS[row.format].tensors(row.name, row.shape)), parameters=ROWS
)


def random_tensors(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 255, (spec.num_rows, spec.row_bytes), dtype=torch.uint8, generator=generator)
        for spec in MANIFEST.tensors
    ]


def nearly(tensors: list[Tensor], seed: int) -> list[Tensor]:
    """A few bytes differ, in one tensor; another tensor is new altogether."""
    changed = [tensor.clone() for tensor in tensors]
    generator = torch.Generator().manual_seed(seed)
    changed[0].view(-1)[torch.randperm(changed[0].numel(), generator=generator)[:5]] ^= 0x11
    changed[-1] = ~changed[-1]
    return changed


def record(version: int, tensors: list[Tensor]) -> StoredVersion:
    digests = tuple(tensor_digest(spec, data) for spec, data in zip(MANIFEST.tensors, tensors, strict=True))
    return StoredVersion(
        version=version,
        digest="0" * 32,
        digests=digests,
        fingerprint=f"{MANIFEST.fingerprint:016x}",
        created_s=float(version),
        pushed_by="a test",
    )


def put(store: Store, version: int, tensors: list[Tensor]) -> StoredVersion:
    return store.write(record(version, tensors), lambda index: tensors[index])


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"not copied")
    return folder


@pytest.fixture
def make(tmp_path: Path, config_dir: Path) -> Callable[..., Store]:
    def made(directory: Path | None = None, **options: Any) -> Store:
        return Store(directory or tmp_path / "store", config_dir=config_dir, manifest=MANIFEST, **options)

    return made


def assert_holds(store: Store, version: int, tensors: list[Tensor]) -> None:
    for index, data in enumerate(tensors):
        assert store.read(version, index).numpy().tobytes() == data.numpy().tobytes()
    store.check(version)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_full_version_is_a_checkpoint_in_modelopt_s_names(make: Callable[..., Store], tmp_path: Path) -> None:
    store, tensors = make(), random_tensors(1)
    put(store, 1, tensors)
    assert_holds(store, 1, tensors)
    folder = tmp_path / "store" / "v00000001"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {spec.name for spec in MANIFEST.tensors}
    # numpy's loader knows no E4M3, so the header and the bytes are read as they lie.
    (file,) = set(index.values())
    data = (folder / file).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for spec, tensor in zip(MANIFEST.tensors, tensors, strict=True):
        first, stop = header[spec.name]["data_offsets"]
        assert header[spec.name]["dtype"] == spec.dtype
        assert data[8 + size + first : 8 + size + stop] == tensor.numpy().tobytes()
    told = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert told["quant_algo"] == "NVFP4" and told["group_size"] == 16
    assert told["exclude_modules"] == ["lm_head", "model.embed_tokens"]
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"] == told["exclude_modules"]
    assert (folder / "tokenizer.json").is_file() and not (folder / "model.safetensors").exists()


def test_small_changes_are_a_small_delta_and_export_is_whole(make: Callable[..., Store], tmp_path: Path) -> None:
    store, first = make(), random_tensors(1)
    second = nearly(first, 2)
    full, delta = put(store, 1, first), put(store, 2, second)
    assert (full.base, delta.base) == (0, 1)
    assert delta.num_bytes < full.num_bytes / 4
    assert_holds(store, 1, first)
    assert_holds(store, 2, second)
    held = load_file(tmp_path / "store" / "v00000002" / "delta.safetensors")
    assert sorted(held) == sorted(
        [f"{MANIFEST.tensors[0].name}@positions", f"{MANIFEST.tensors[0].name}@values", "model.norm.weight@whole"]
    )
    assert held[f"{MANIFEST.tensors[0].name}@positions"].size == 5
    store.export(2, tmp_path / "out")
    exported = files_below(tmp_path / "out")
    put(make(tmp_path / "fresh"), 2, second)
    assert {
        name: data for name, data in files_below(tmp_path / "fresh" / "v00000002").items() if "transfuse" not in name
    } == (exported)


def test_a_version_that_changed_much_is_written_in_full(make: Callable[..., Store]) -> None:
    store = make()
    put(store, 1, random_tensors(1))
    assert put(store, 2, random_tensors(2)).base == 0


def test_after_some_deltas_a_full_version_follows(make: Callable[..., Store]) -> None:
    store, tensors = make(full_every=2, keep=99), random_tensors(1)
    bases = []
    for version in range(1, 6):
        bases.append(put(store, version, tensors).base)
        tensors = nearly(tensors, version)
    assert bases == [0, 1, 1, 0, 4]


def test_retention_keeps_the_base_that_a_delta_needs(make: Callable[..., Store]) -> None:
    store, tensors = make(keep=2), random_tensors(1)
    for version in range(1, 5):
        put(store, version, tensors)
        tensors = nearly(tensors, version)
    assert [each.version for each in store.prune()] == [2]
    assert [each.version for each in store.versions()] == [1, 3, 4]
    store.check(4)


def test_retention_by_bytes_always_keeps_the_newest(make: Callable[..., Store]) -> None:
    store = make(keep=9, keep_bytes=1)
    put(store, 1, random_tensors(1))
    put(store, 2, random_tensors(2))
    assert [each.version for each in store.prune()] == [1]


@pytest.mark.parametrize("version", [1, 2])
def test_one_flipped_bit_on_the_disk_is_found_and_named(
    version: int, make: Callable[..., Store], tmp_path: Path
) -> None:
    store, first = make(), random_tensors(1)
    put(store, 1, first)
    put(store, 2, nearly(first, 2))
    name = {1: "model-00001-of-00001.safetensors", 2: "delta.safetensors"}[version]
    path = tmp_path / "store" / f"v{version:08d}" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DigestError, match=r"\.weight"):
        store.check(version)
    with pytest.raises(DigestError):
        store.export(version, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_version_is_refused_with_what_there_is(make: Callable[..., Store]) -> None:
    store = make()
    put(store, 3, random_tensors(1))
    with pytest.raises(VersionError, match="holds 3"):
        store.read(7, 0)


def test_versions_of_another_model_are_not_read(make: Callable[..., Store], config_dir: Path, tmp_path: Path) -> None:
    put(make(), 1, random_tensors(1))
    other = Manifest(tensors=MANIFEST.tensors[:-1], parameters=ROWS[:-1])
    with pytest.raises(VersionError, match="another model"):
        Store(tmp_path / "store", config_dir=config_dir, manifest=other).read(1, 0)


def test_a_store_is_read_without_the_model_that_wrote_it(make: Callable[..., Store], tmp_path: Path) -> None:
    store, first = make(), random_tensors(1)
    put(store, 1, first)
    put(store, 2, nearly(first, 2))
    (tmp_path / "store" / ".v00000003").mkdir()  # somebody is writing
    shutil.rmtree(tmp_path / "model")
    found = Store.existing(tmp_path / "store")
    assert_holds(found, 2, nearly(first, 2))
    found.export(2, tmp_path / "out")
    exported = files_below(tmp_path / "out")
    assert json.loads(exported["hf_quant_config.json"]) and "tokenizer.json" in exported
    assert (tmp_path / "store" / ".v00000003").is_dir()
    with pytest.raises(VersionError, match=r"version 5: .* holds 1, 2"):
        Store.existing(tmp_path / "store", 5)
    with pytest.raises(VersionError, match="holds nothing"):
        Store.existing(tmp_path / "nowhere")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one version and a half."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_the_store_as_it_was(make: Callable[..., Store], small_disk: Path) -> None:
    store = make(small_disk)
    put(store, 1, random_tensors(1))
    before = files_below(small_disk)
    with pytest.raises(StoreError, match=r"version 2 was not stored.*No space left"):
        put(store, 2, random_tensors(2))
    assert files_below(small_disk) == before
    store.check(1)


def test_a_read_only_disk_is_said_and_what_is_there_is_read(make: Callable[..., Store], small_disk: Path) -> None:
    store, tensors = make(small_disk), random_tensors(1)
    put(store, 1, tensors)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StoreError, match="Read-only"):
        put(store, 2, random_tensors(2))
    assert_holds(store, 1, tensors)


def test_a_writer_that_is_killed_leaves_no_version_and_no_rest(make: Callable[..., Store], tmp_path: Path) -> None:
    store, tensors = make(), random_tensors(1)
    put(store, 1, tensors)
    pid = os.fork()
    if pid == 0:
        store.write(record(2, tensors), lambda index: os.kill(os.getpid(), signal.SIGKILL) or tensors[index])  # type: ignore[func-returns-value]
    os.waitpid(pid, 0)
    store = make()
    assert [each.version for each in store.versions()] == [1]
    assert [path.name for path in (tmp_path / "store").iterdir() if path.is_dir()] == ["v00000001"]
