"""Payloads that come in a group of the trainer and a rank. Here over gloo, in host memory, where no push would choose
it: all but NCCL itself is the same (see test_gpu_push)."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from launch.relays import Proxy
from tests.local import LocalService, local_service
from tests.test_push import cold_bytes, current_version
from tests.tiny import save, tiny_llama
from weight_update import attempt as attempts
from weight_update import groups, stream
from weight_update.client import Pusher
from weight_update.errors import TransferError, WeightUpdateError
from weight_update.groups import Group
from weight_update.links import NCCL, Link

LAYOUTS = ("trtllm", "plain")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    monkeypatch.setattr(attempts, "choose", lambda *_: Link(transport=NCCL))
    monkeypatch.setitem(stream.CHUNK_BYTES_OF, NCCL, 32 << 10)
    monkeypatch.setitem(attempts.RING_OF, NCCL, 128 << 10)
    with local_service(save(tiny_llama(seed=0), tmp_path / "model"), tmp_path, LAYOUTS) as running:
        yield running


def held(service: LocalService) -> list[Group]:
    """The groups that the ranks keep."""
    return [group for rank in service.ranks for _, group in rank._data._groups.values()]


def test_pushes_leave_the_bytes_of_a_cold_load_and_one_group_serves_them_all(
    service: LocalService, tmp_path: Path
) -> None:
    model = tiny_llama(seed=1)
    with closing(Pusher(service.address)) as pusher:
        report = pusher.push(model)
        assert report.digest_verified and {way.partition(": ")[2] for way in report.transports} == {NCCL}
        first, joined = held(service), dict(pusher._groups._joined)
        assert len(first) == len(joined) == len(LAYOUTS)
        for _ in range(3):
            model = copy.deepcopy(model)
            model.model.layers[0].mlp.down_proj.weight.data[3] *= -1  # type: ignore[index, union-attr]
            assert pusher.push(model).mode == "delta"
        assert pusher.push(tiny_llama(seed=2)).mode == "full"
        assert held(service) == first and pusher._groups._joined == joined
    assert service.bytes() == cold_bytes(tiny_llama(seed=2), tmp_path / "cold", LAYOUTS)


def test_a_trainer_that_comes_after_another_takes_its_place(service: LocalService, tmp_path: Path) -> None:
    found = []
    for seed in (3, 4):
        with closing(Pusher(service.address, mode="full")) as pusher:
            assert pusher.push(tiny_llama(seed=seed)).digest_verified
            found.append(held(service))
    assert len(found[0]) == len(found[1]) == len(LAYOUTS) and not set(found[0]) & set(found[1])
    assert all(group._failed for group in found[0])  # ended, not forgotten
    assert service.bytes() == cold_bytes(tiny_llama(seed=4), tmp_path / "cold", LAYOUTS)


def test_a_stream_that_breaks_goes_on_and_no_payload_is_taken_for_another(
    service: LocalService, tmp_path: Path
) -> None:
    proxies: dict[str, Proxy] = {}
    receiver, cut = service.ranks[0].receiver, list[int]()
    stage = receiver.stage

    def cutting(chunk: Any, transaction: int | None = None) -> int:
        if chunk.sequence == 3 and not cut:
            cut.append(chunk.sequence)
            for each in proxies.values():
                each.cut()
            time.sleep(0.3)
        return stage(chunk, transaction)

    with closing(Pusher(service.address, mode="full")) as pusher:
        direct = pusher._channel

        def along(address: str) -> Any:
            proxies[address] = Proxy(address)
            return direct(proxies[address].address)

        pusher._channel = along  # type: ignore[method-assign]
        receiver.stage = cutting  # type: ignore[method-assign]
        try:
            report = pusher.push(tiny_llama(seed=5))
        finally:
            receiver.stage = stage  # type: ignore[method-assign]
    assert cut and max(proxy.num_connections for proxy in proxies.values()) >= 2
    for proxy in proxies.values():
        proxy.close()
    assert report.digest_verified
    assert service.bytes() == cold_bytes(tiny_llama(seed=5), tmp_path / "cold", LAYOUTS)


def test_a_push_that_fails_ends_its_groups_and_the_next_one_makes_others(service: LocalService, tmp_path: Path) -> None:
    before, version = service.bytes(), current_version(service.address)
    with closing(Pusher(service.address, mode="full")) as pusher:
        assert pusher.push(tiny_llama(seed=6)).version == version + 1
        before, first = service.bytes(), held(service)
        service.ranks[1].faults.arm("stage", "raise", skip=2)
        with pytest.raises(WeightUpdateError):
            pusher.push(tiny_llama(seed=7))
        assert service.bytes() == before
        assert pusher.push(tiny_llama(seed=7)).version == version + 2
        assert not set(first) & set(held(service)) and all(group._failed for group in first)
    assert service.bytes() == cold_bytes(tiny_llama(seed=7), tmp_path / "cold", LAYOUTS)


def test_where_a_group_cannot_be_joined_payloads_go_over_grpc(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "JOIN_S", 1.0)
    host = Group.host

    def elsewhere(name: str, device: torch.device) -> Group:
        group = host(name, device)
        group.address = f"{name}:1"  # where nobody listens, as behind a firewall
        return group

    monkeypatch.setattr(Group, "host", elsewhere)
    with closing(Pusher(service.address, mode="full")) as pusher:
        report = pusher.push(tiny_llama(seed=8))
    assert report.digest_verified
    assert all("grpc (nccl: 127.0.0.1:1 of the rank cannot be reached" in way for way in report.transports)


def test_a_rank_listens_where_its_service_does_and_nowhere_else() -> None:
    group = Group.host("127.0.0.1", torch.device("cpu"))
    listening = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
    port = int(group.address.rpartition(":")[2])
    assert [each.ip for each in listening if each.port == port] == ["127.0.0.1"]
    group.abort()


def test_an_end_that_is_alone_says_so_and_can_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "JOIN_S", 1.0)
    group = Group.host("127.0.0.1", torch.device("cpu"))
    with pytest.raises(TransferError, match="nccl: "):
        group.wait()
    group.abort()
    assert not any(thread.name == "group" and not thread.daemon for thread in threading.enumerate())
