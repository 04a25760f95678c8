"""What a rank gives away while it serves: the committed rows, whole, or an error."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from protos import transfuse_pb2 as pb
from tests.local import LocalService, cold, local_service
from tests.tiny import save, tiny_llama
from weight_update import packing
from weight_update.chunks import Chunk
from weight_update.client import Pusher
from weight_update.errors import ManifestError, MemberError, VersionError
from weight_update.fetch import fetch
from weight_update.manifest import Manifest
from weight_update.transport import ControlClient, fetch_stream
from weight_update.values import from_manifest_proto

# Rows of these are cut apart, padded, swizzled and swapped by the layout.
LAYOUT = "trtllm"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    model_dir = save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))
    with local_service(model_dir, tmp_path_factory.mktemp("state"), (LAYOUT,)) as running:
        yield running


@pytest.fixture(scope="module")
def described(service: LocalService) -> pb.DescribeReply:
    client = ControlClient(service.address)
    try:
        return client.describe()
    finally:
        client.close()


class Sink:
    """Tensors as they are put together from chunks; every byte may come once."""

    def __init__(self, manifest: Manifest) -> None:
        self.tensors = [np.zeros(spec.num_bytes, np.uint8) for spec in manifest.tensors]
        self.times = [np.zeros(spec.num_bytes, np.uint8) for spec in manifest.tensors]
        self.largest = 0

    def __call__(self, chunk: Chunk) -> None:
        at = 0
        self.largest = max(self.largest, len(chunk.payload))
        for tensor, offset, length in zip(chunk.tensor, chunk.offset, chunk.length, strict=True):
            place = slice(int(offset), int(offset) + int(length))
            self.tensors[tensor][place] = np.frombuffer(chunk.payload[at : at + int(length)], np.uint8)
            self.times[tensor][place] += 1
            at += int(length)


def whole(manifest: Manifest) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(len(manifest.tensors), np.int64), np.array([spec.num_rows for spec in manifest.tensors])


def cold_tensors(seed: int, directory: Path) -> list[bytes]:
    """The checkpoint form that a plain layout keeps as it is, padded at the end."""
    _, receiver = cold(save(tiny_llama(seed=seed), directory), "plain")
    stored = receiver.storage_bytes()
    return [stored[spec.name][: spec.num_bytes] for spec in receiver.manifest.tensors]


def current(service: LocalService) -> int:
    return service.ranks[0].receiver.version


def test_rows_come_back_in_checkpoint_form_each_byte_once(
    service: LocalService, described: pb.DescribeReply, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", 5000)
    pusher = Pusher(service.address)
    report = pusher.push(tiny_llama(seed=1))
    pusher.close()
    manifest = from_manifest_proto(described.manifest)
    sink = Sink(manifest)
    fetch(described.ranks, report.version, *whole(manifest), sink)
    assert [tensor.tobytes() for tensor in sink.tensors] == cold_tensors(1, tmp_path)
    assert all((times == 1).all() for times in sink.times)
    assert sink.largest == 5000


def test_any_rows_can_be_asked_for(service: LocalService, described: pb.DescribeReply) -> None:
    manifest = from_manifest_proto(described.manifest)
    complete, part = Sink(manifest), Sink(manifest)
    first, stop = whole(manifest)
    fetch(described.ranks, current(service), first, stop, complete)
    first, stop = stop // 3, np.maximum(stop // 3, stop - 1)  # of tensors of one row none
    fetch(described.ranks, current(service), first, stop, part)
    for spec, start, end, times, tensor, expected in zip(
        manifest.tensors, first, stop, part.times, part.tensors, complete.tensors, strict=True
    ):
        inside = np.zeros(spec.num_bytes, np.uint8)
        inside[start * spec.row_bytes : end * spec.row_bytes] = 1
        assert (times == inside).all()
        assert (tensor == expected * inside).all()


def test_two_ranks_are_asked_for_what_each_has_and_a_gap_is_named(
    service: LocalService, described: pb.DescribeReply
) -> None:
    manifest = from_manifest_proto(described.manifest)
    first, stop = whole(manifest)
    halves = [pb.RankSpec(address=service.ranks[0].address) for _ in range(2)]
    for half, start, end in zip(halves, (first, stop // 2), (stop // 2, stop), strict=True):
        half.row_start.extend(start.tolist())
        half.row_stop.extend(end.tolist())
    sink = Sink(manifest)
    fetch(halves, current(service), first, stop, sink)
    assert all((times == 1).all() for times in sink.times)
    with pytest.raises(MemberError, match="held by no rank"):
        fetch(halves[1:], current(service), first, stop, sink)
    with pytest.raises(MemberError, match="more than one rank"):
        fetch([*halves, halves[0]], current(service), first, stop, sink)


@pytest.mark.parametrize("wrong", [-1, 1])
def test_another_version_is_refused(service: LocalService, described: pb.DescribeReply, wrong: int) -> None:
    manifest = from_manifest_proto(described.manifest)
    sink = Sink(manifest)
    with pytest.raises(VersionError, match=f"holds {current(service)}"):
        fetch(described.ranks, current(service) + wrong, *whole(manifest), sink)
    assert not any(times.any() for times in sink.times)


def test_rows_that_the_rank_does_not_hold_are_refused(service: LocalService, described: pb.DescribeReply) -> None:
    first, stop = whole(from_manifest_proto(described.manifest))
    request = pb.FetchRequest(version=current(service), row_start=first.tolist(), row_stop=(stop + 1).tolist())
    with pytest.raises(VersionError, match="this rank holds"):
        list(fetch_stream(service.ranks[0].address, request))
    short = pb.FetchRequest(version=current(service), row_start=first.tolist()[1:], row_stop=stop.tolist()[1:])
    with pytest.raises(ManifestError, match="describe"):
        list(fetch_stream(service.ranks[0].address, short))


def test_a_commit_ends_the_stream_before_a_byte_of_the_new_version_comes(
    service: LocalService, described: pb.DescribeReply, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "CHUNK_BYTES", 4096)
    manifest, version = from_manifest_proto(described.manifest), current(service)
    before, torn = Sink(manifest), Sink(manifest)
    fetch(described.ranks, version, *whole(manifest), before)
    receiver, pushed = service.ranks[0].receiver, threading.Event()
    read, num_read = receiver.rows, itertools.count()

    def rows(*which: int) -> torch.Tensor:
        if next(num_read) == 3:  # on the rank, with some tensors sent and most not
            assert pushed.wait(60)
        return read(*which)

    monkeypatch.setattr(receiver, "rows", rows)
    pusher = Pusher(service.address)

    def sink(chunk: Chunk) -> None:
        torn(chunk)
        if not pushed.is_set():
            pusher.push(tiny_llama(seed=2))
            pushed.set()

    with pytest.raises(VersionError, match=f"holds {version + 1}"):
        fetch(described.ranks, version, *whole(manifest), sink)
    pusher.close()
    assert any(times.any() for times in torn.times) and not all(times.all() for times in torn.times)
    for times, tensor, expected in zip(torn.times, torn.tensors, before.tensors, strict=True):
        assert (tensor[times > 0] == expected[times > 0]).all()
