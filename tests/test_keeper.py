"""The version store beside a running service: what is durable, who waits, and what disks do."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service import keeper as keeping
from tests.local import LocalService, cold, local_service, wait_for
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.errors import StoreError
from weight_update.fetch import fetch
from weight_update.store import Store
from weight_update.transport import connect


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))


@pytest.fixture
def service(checkpoint: Path, tmp_path: Path) -> Iterator[LocalService]:
    with local_service(checkpoint, tmp_path / "state", ("trtllm", "cutlass"), store_dir=tmp_path / "store") as running:
        yield running


@pytest.fixture
def pusher(service: LocalService) -> Iterator[Pusher]:
    each = Pusher(service.address, pushed_by="a test")
    yield each
    each.close()


def ask(service: LocalService, method: str, request: Any) -> Any:
    with connect(service.address) as channel:
        return getattr(pb_grpc.ControlStub(channel), method)(request, timeout=30)


def durable(service: LocalService) -> list[int]:
    return [each.version for each in ask(service, "Versions", pb.VersionsRequest()).versions if each.durable]


def cold_tensors(model: nn.Module, directory: Path) -> list[bytes]:
    """The checkpoint form that a plain layout keeps as it is, padded at the end."""
    _, receiver = cold(save(model, directory), "plain")
    stored = receiver.storage_bytes()
    return [stored[spec.name][: spec.num_bytes] for spec in receiver.manifest.tensors]


def stored_tensors(directory: Path, version: int) -> list[bytes]:
    store = Store.existing(directory, version)
    store.check(version)
    return [store.read(version, index).numpy().tobytes() for index in range(len(store.record(version).digests))]


def nudged(model: nn.Module) -> nn.Module:
    """A few weights differ, as after a step of training."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "up_proj" in name:
                parameter[3, 5] += 0.25
    return model


def test_every_version_becomes_durable_by_itself_the_loaded_one_too(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    wait_for(lambda: durable(service) == [1])
    first, second = tiny_llama(seed=1), nudged(tiny_llama(seed=1))
    report = pusher.push(first, step=7)
    wait_for(lambda: durable(service) == [1, 2])
    pusher.push(second, step=8)
    wait_for(lambda: durable(service) == [1, 2, 3])
    held = [cold_tensors(model, tmp_path / name) for model, name in ((first, "first"), (second, "second"))]
    assert [stored_tensors(tmp_path / "store", version) for version in (2, 3)] == held
    record = Store.existing(tmp_path / "store").record(2)
    assert (record.digest, record.pushed_by, record.step) == (report.digest, "a test", 7)
    assert Store.existing(tmp_path / "store").record(3).base == 2  # stored as changes
    status = ask(service, "Status", pb.StatusRequest())
    assert (status.durable_version, status.store) == (3, "")


def test_a_durable_push_returns_when_the_version_is_stored(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=2)
    report = pusher.push(model, durable=True)
    assert report.version in durable(service)
    assert stored_tensors(tmp_path / "store", report.version) == cold_tensors(model, tmp_path / "cold")


def test_a_busy_trainer_cannot_take_the_place_of_a_version_that_is_waited_for(
    service: LocalService, pusher: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    pushed: list[int] = []

    def slow(donors: Any, version: int, *rest: Any) -> None:
        deadline_s = time.monotonic() + 2.0
        while service.shell.protocol.version == version and time.monotonic() < deadline_s:
            time.sleep(0.02)  # a later version takes its place, if it may
        fetch(donors, version, *rest)

    monkeypatch.setattr(keeping, "fetch", slow)

    def push_on() -> None:
        other = Pusher(service.address)
        while not stop.is_set():
            pushed.append(other.push(tiny_llama(seed=len(pushed)), on_busy="wait").version)
        other.close()

    busy = threading.Thread(target=push_on)
    busy.start()
    try:
        wait_for(lambda: len(pushed) > 2)
        waited = [pusher.push(tiny_llama(seed=9), durable=True, on_busy="wait").version for _ in range(2)]
        assert set(waited) <= set(durable(service))
    finally:
        stop.set()
        busy.join()
    assert len(set(pushed) - set(durable(service))) > 0  # those that nobody waited for were overtaken


def test_durable_is_refused_before_the_commit_where_there_is_no_store(checkpoint: Path, tmp_path: Path) -> None:
    with local_service(checkpoint, tmp_path / "state") as service:
        pusher = Pusher(service.address)
        with pytest.raises(StoreError, match="--store"):
            pusher.push(tiny_llama(seed=1), durable=True)
        assert ask(service, "Status", pb.StatusRequest()).version == 1
        pusher.close()


def test_what_retention_drops_is_said(checkpoint: Path, tmp_path: Path) -> None:
    with local_service(checkpoint, tmp_path / "state", store_dir=tmp_path / "store", keep=2) as service:
        events: list[pb.Event] = []
        watching = threading.Thread(target=lambda: events.extend(service.shell.watch(lambda: len(events) < 99)))
        watching.start()
        pusher = Pusher(service.address)
        for seed in range(3):  # so different that none is stored as changes
            pusher.push(tiny_llama(seed=seed), durable=True)
        pusher.close()
        wait_for(lambda: durable(service) == [3, 4])
        wait_for(lambda: [each.version for each in events if each.kind == "drop"] == [1, 2])
        events.extend([pb.Event()] * 99)
        watching.join()
    assert sorted(path.name for path in (tmp_path / "store").glob("v*")) == ["v00000003", "v00000004"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, whose size a test can change."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a disk of its own needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize(("worse", "better"), [("size=64k", "size=8m"), ("ro", "rw")], ids=["full", "read-only"])
def test_a_disk_that_fails_is_shown_and_tried_again_while_pushes_go_on(
    worse: str, better: str, checkpoint: Path, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "RETRY_S", 0.3)
    with local_service(checkpoint, tmp_path / "state", store_dir=disk) as service:
        wait_for(lambda: durable(service) == [1])
        if worse != "ro":
            (disk / "other").write_bytes(bytes((8 << 20) - (300 << 10)))  # of somebody else
        else:
            subprocess.run(["mount", "-o", f"remount,{worse}", disk], check=True)
        pusher = Pusher(service.address)
        with pytest.raises(StoreError, match="version 2 is committed and served, and not stored"):
            pusher.push(tiny_llama(seed=1), durable=True)
        status = ask(service, "Status", pb.StatusRequest())
        assert (status.version, status.durable_version) == (2, 1)
        assert {"ro": "Read-only", "size=64k": "No space"}[worse] in status.store
        assert pusher.push(tiny_llama(seed=2)).version == 3  # and nobody is held back
        if worse == "ro":
            subprocess.run(["mount", "-o", f"remount,{better}", disk], check=True)
        else:
            (disk / "other").unlink()
        wait_for(lambda: durable(service) == [1, 3])
        assert ask(service, "Status", pb.StatusRequest()).store == ""
        pusher.close()
