"""Rows that ranks pass on to each other: every replica gets every byte, the trainer sends them once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from launch import authority
from launch.relays import Proxy
from launch.scenario import plan_scenario, read_scenario
from protos import transfuse_pb2 as pb
from service.rank import WINDOW_BYTES
from sharding.cost import HOST
from sharding.routes import Destination, chains
from tests.local import LocalService, local_service, wait_for
from tests.test_delta_push import nudge
from tests.test_push import cold_bytes, current_version
from tests.tiny import save, tiny_llama
from weight_update import packing
from weight_update.channels import Channels
from weight_update.chunks import Chunk
from weight_update.client import FANS_OUT, Pusher
from weight_update.errors import TransferError
from weight_update.foresight import Foresight
from weight_update.links import GRPC, Place
from weight_update.security import Security, token_line
from weight_update.stream import StageStream
from weight_update.transport import ControlClient, connect
from weight_update.values import from_manifest_proto

LAYOUTS = ("trtllm", "cutlass", "plain")
CHUNK_BYTES = 4096
HALF_BYTES = 100_000  # about, of a full push


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))


@pytest.fixture
def service(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    monkeypatch.setattr(packing, "CHUNK_BYTES", CHUNK_BYTES)
    with local_service(checkpoint, tmp_path / "state", LAYOUTS) as running:
        yield running


@pytest.fixture
def pusher(service: LocalService) -> Iterator[Pusher]:
    each = Pusher(service.address, transport=GRPC, fan_out="always", lease_s=10.0, retry_s=10.0)
    yield each
    each.close()


def when_half_is_staged(service: LocalService, replica: int, monkeypatch: pytest.MonkeyPatch, then: Any) -> list[int]:
    """Call `then` once, in another thread; returns the payload bytes that this rank was sent, as they come."""
    receiver, sizes, calls = service.ranks[replica].receiver, list[int](), [then]
    stage = receiver.stage

    def counted(chunk: Chunk, **options: Any) -> int:
        sizes.append(len(chunk.payload))
        if sum(sizes) > HALF_BYTES and calls:
            threading.Thread(target=calls.pop()).start()
        return stage(chunk, **options)

    monkeypatch.setattr(receiver, "stage", counted)
    return sizes


# ---------------------------------------------------------------- what lands


@pytest.mark.parametrize("shares_memory", [True, False])
def test_full_pushes_and_deltas_reach_every_replica_and_leave_the_trainer_once(
    service: LocalService, pusher: Pusher, tmp_path: Path, shares_memory: bool
) -> None:
    for rank in service.ranks:
        rank.place = rank.place if shares_memory else Place()
    model, addresses = tiny_llama(seed=1), service.addresses()
    with_three = Pusher(service.address, transport=GRPC, fan_out="never", mode="full")
    direct = with_three.push(tiny_llama(seed=2))
    with_three.close()
    for mode in ("full", "delta", "delta"):
        nudge(model, seed=3)
        report = pusher.push(model)
        assert (report.mode, report.digest_verified, report.attempts) == (mode, True, 1)
        assert report.transports == ["trainer 0 to 0.0 on to 1.0 on to 2.0: grpc (shared-memory: not allowed)"]
        assert report.passed_bytes == pytest.approx(2 * report.wire_bytes, rel=0.01)
        if mode == "full":
            assert report.wire_bytes == pytest.approx(direct.wire_bytes / 3, rel=0.01)
            assert report.planned_bytes >= direct.planned_bytes + 5 * WINDOW_BYTES  # the stream out
        assert service.bytes() == cold_bytes(model, tmp_path / mode, LAYOUTS)
    assert service.addresses() == addresses


def test_with_certificates_and_tokens_each_rank_shows_its_own_ticket_to_the_next(
    checkpoint: Path, tmp_path: Path
) -> None:
    authority.create(tmp_path)
    authority.issue(tmp_path, ["node"])
    lines = {name: token_line(role, name) for role, name in (("push", "ppo"), ("service", "fleet"), ("admin", "ops"))}
    for name, text in {"all": "".join(lines.values()), "ppo": lines["ppo"]}.items():
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_text(text)
    security = {name: Security(tls_dir=tmp_path / "node", token_file=tmp_path / name) for name in ("all", "ppo")}
    with local_service(checkpoint, tmp_path / "state", LAYOUTS, security=security["all"]) as running:
        pusher = Pusher(running.address, transport=GRPC, fan_out="always", security=security["ppo"])
        report = pusher.push(tiny_llama(seed=1))
        pusher.close()
        assert report.passed_bytes and report.attempts == 1
        assert running.bytes() == cold_bytes(tiny_llama(seed=1), tmp_path / "cold", LAYOUTS)


def test_what_a_rank_acknowledges_every_rank_behind_it_has(service: LocalService, pusher: Pusher) -> None:
    service.ranks[2].faults.arm("stage", "stall")
    handle = pusher.push_async(tiny_llama(seed=9))
    wait_for(lambda: service.ranks[0].receiver.staged_bytes > HALF_BYTES)
    wait_for(lambda: service.ranks[2].faults.stalled == "stage")
    for rank in service.ranks[:2]:
        [passing] = rank._data._passing.values()
        assert passing.acknowledged == 0
    assert [each.received_bytes for each in service.ranks[0].gauges.streams()] == [0]
    service.ranks[2].faults.release()
    assert handle.result().digest_verified


# ---------------------------------------------------------------- what breaks


class Detour(Channels):
    """Every connection leads to one address, or nowhere."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    def __call__(self, address: str) -> grpc.Channel:
        if not self._address:
            raise TransferError(f"no way to {address}")
        return super().__call__(self._address)


@pytest.mark.parametrize("hop", [0, 1, 2])
def test_a_connection_of_a_chain_that_breaks_goes_on_where_the_ranks_are(
    service: LocalService, pusher: Pusher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hop: int
) -> None:
    way = Proxy(service.ranks[hop].address)
    for rank in service.ranks:
        rank.place = Place()  # over gRPC from rank to rank
    if hop:
        monkeypatch.setattr(service.ranks[hop - 1]._data, "_channels", Detour(way.address))
    else:
        monkeypatch.setattr(pusher, "_channel", Detour(way.address))
    sizes = when_half_is_staged(service, hop, monkeypatch, lambda: way.cut(0.5))
    report = pusher.push(tiny_llama(seed=4))
    way.close()
    assert report.attempts == 1 and way.num_connections > 1
    total = sum(sizes)
    assert total < 1.5 * report.wire_bytes  # what was on its way came twice, not all of it
    assert service.bytes() == cold_bytes(tiny_llama(seed=4), tmp_path / "cold", LAYOUTS)


@pytest.mark.parametrize("replica", [1, 2])
def test_a_rank_that_cannot_pass_on_makes_the_trainer_send_to_every_rank(
    service: LocalService, pusher: Pusher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replica: int
) -> None:
    monkeypatch.setattr(service.ranks[replica - 1]._data, "_channels", Detour(""))
    report = pusher.push(tiny_llama(seed=5))
    assert (report.attempts, report.passed_bytes, len(report.transports)) == (2, 0, 3)
    assert service.bytes() == cold_bytes(tiny_llama(seed=5), tmp_path / "cold", LAYOUTS)
    assert pusher.push(tiny_llama(seed=6)).attempts == 1  # it does not try again


@pytest.mark.parametrize("replica", [0, 1, 2])
def test_a_rank_that_fails_fails_the_push_and_nothing_has_changed(
    service: LocalService, pusher: Pusher, replica: int
) -> None:
    held, version = service.bytes(), current_version(service.address)
    service.ranks[replica].faults.arm("stage", "raise")
    with pytest.raises(Exception, match="stage"):
        pusher.push(tiny_llama(seed=7))
    assert service.bytes() == held and current_version(service.address) == version
    assert all(rank.receiver.staged_bytes == 0 for rank in service.ranks)
    assert pusher.push(tiny_llama(seed=7)).digest_verified


def test_a_trainer_that_gives_up_in_the_middle_leaves_no_stream(
    service: LocalService, pusher: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle: list[Any] = []
    when_half_is_staged(service, 2, monkeypatch, lambda: handle[0].cancel())
    handle.append(pusher.push_async(tiny_llama(seed=8)))
    with pytest.raises(TransferError, match="cancelled"):
        handle[0].result()
    assert not any(rank._data._passing for rank in service.ranks)
    assert pusher.push(tiny_llama(seed=8)).digest_verified


def test_nobody_makes_a_rank_dial_a_stranger(service: LocalService) -> None:
    control = ControlClient(service.address)
    described = control.describe(0)
    [first, *_] = from_manifest_proto(described.manifest).tensors
    begun = control.begin(
        push_id="p", fingerprint=described.fingerprint, tensors=[first], pushed_by="t", lease_s=5.0, num_streams=2
    )
    for onward, said in (
        ([pb.RankSpec(replica=9, address="127.0.0.1:1")], "127.0.0.1:1 cannot be passed on to, the ranks with the"),
        ([pb.RankSpec(replica=0, address=service.ranks[0].address)], "cannot be passed on to"),
    ):
        stream = StageStream(
            connect(service.ranks[0].address),
            target="rank",
            transaction=begun.transaction,
            epoch=described.epoch,
            trainer_rank=0,
            retry_s=1.0,
            onward=onward,
        )
        stream.send(next(iter(packing.Packer().add(0, 0, memoryview(bytes(CHUNK_BYTES))))))
        with pytest.raises(TransferError, match=said):
            stream.finish()
    control.abort(begun.transaction, "test")
    control.close()


# ---------------------------------------------------------------- who is in a chain, and whether there is one


def test_ranks_of_one_host_follow_each_other_and_a_rank_without_a_network_is_sent_to() -> None:
    everywhere = Destination(ranks=(0, 3, 4, 6, 9), row_start=np.zeros(1), row_stop=np.ones(1))
    assert chains(everywhere, {}) == [(0,), (3,), (4,), (6,), (9,)]
    assert chains(everywhere, {0: "b", 4: "a", 6: "b", 9: "a"}) == [(3,), (4, 9, 0, 6)]


GAINS: dict[str, Callable[[], float]] = {
    "100 replicas behind 10 GbE": lambda: plan_scenario(read_scenario("replicas_100")).full.fan_out_gain,
    "a replica": lambda: Foresight(HOST).predict(plan_scenario(read_scenario("kimi_k2")).work).fan_out_gain,
}


@pytest.mark.parametrize("case", GAINS)
def test_rows_are_passed_on_where_the_model_says_that_a_third_is_saved(case: str) -> None:
    gain = GAINS[case]()
    assert FANS_OUT["auto"](gain) == (case == "100 replicas behind 10 GbE")
    assert FANS_OUT["always"](gain) and not FANS_OUT["never"](gain)
