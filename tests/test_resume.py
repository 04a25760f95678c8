"""Streams that break, and trainers that hear nothing for a while: a slower push, no error, and nothing comes twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from launch.relays import Proxy
from protos import transfuse_pb2 as pb
from service.control_server import ControlServer
from service.coordinator import CoordinatorShell
from service.rank import WINDOW_BYTES
from tests.local import LocalService, local_service, start_rank, wait_for
from tests.test_delta_push import Gate, nudge
from tests.test_push import cold_bytes, current_version
from tests.tiny import save, tiny_llama
from weight_update import attempt as attempts
from weight_update import packing
from weight_update.chunks import Chunk
from weight_update.client import Pusher
from weight_update.errors import ManifestError, TransferError
from weight_update.links import GRPC
from weight_update.stream import StageStream
from weight_update.transport import ControlClient

LAYOUTS = ("trtllm",)
CHUNK_BYTES = 4096
HALF_BYTES = 100_000  # about, of a full push
PARTITION_S = 30.0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[LocalService]:
    with local_service(save(tiny_llama(seed=0), tmp_path / "model"), tmp_path, LAYOUTS) as running:
        yield running


class Through(Pusher):
    """A trainer whose ways lead through ports that can be broken."""

    def __init__(self, service: LocalService, **options: Any) -> None:
        self.ways = {address: Proxy(address) for address in (service.address, *(r.address for r in service.ranks))}
        super().__init__(self.ways[service.address].address, transport=GRPC, **options)

    def cut(self, refuse_s: float) -> None:
        for each in self.ways.values():
            each.cut(refuse_s)

    def close(self) -> None:
        super().close()
        for each in self.ways.values():
            each.close()

    def _channel(self, address: str) -> Any:
        return super()._channel(self.ways[address].address)


class Staged:
    """Payload bytes that the only rank was sent, those that came twice as often as they came."""

    def __init__(self, service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_bytes = 0
        self.then: Callable[[], None] | None = None  # once, behind HALF_BYTES
        receiver = service.ranks[0].receiver
        self._stage = receiver.stage
        monkeypatch.setattr(receiver, "stage", self._counted)

    def _counted(self, chunk: Chunk, **options: Any) -> int:
        staged = self._stage(chunk, **options)
        self.num_bytes += len(chunk.payload)
        if self.num_bytes > HALF_BYTES and self.then is not None:
            then, self.then = self.then, None
            threading.Thread(target=then).start()
        return staged


@pytest.fixture
def staged(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> Staged:
    monkeypatch.setattr(packing, "CHUNK_BYTES", CHUNK_BYTES)
    return Staged(service, monkeypatch)


def full_bytes(service: LocalService) -> int:
    return sum(spec.num_bytes for spec in service.shell.manifest.tensors if not spec.name.endswith(".input_scale"))


def test_a_stream_that_breaks_goes_on_behind_what_the_rank_holds(
    service: LocalService, staged: Staged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where not one answer came back: on the new connection the rank says how far it came."""
    acknowledge, greetings = StageStream._acknowledge, list[int]()

    def unheard(self: StageStream, reply: pb.StageReply) -> None:
        is_greeting = reply.credit_bytes == WINDOW_BYTES
        greetings.extend([reply.sequence] if is_greeting else [])
        if is_greeting or len(greetings) > 1:
            acknowledge(self, reply)

    monkeypatch.setattr(StageStream, "_acknowledge", unheard)
    pusher = Through(service, mode="full")
    staged.then = lambda: pusher.cut(refuse_s=0.5)
    model = tiny_llama(seed=1)
    version = current_version(service.address)
    assert pusher.push(model).version == version + 1
    assert greetings[0] == 0 and greetings[1] * CHUNK_BYTES >= HALF_BYTES - CHUNK_BYTES and len(greetings) == 2
    # What the rank was about to stage as it answered may come twice.
    assert full_bytes(service) <= staged.num_bytes < full_bytes(service) + 4 * CHUNK_BYTES
    assert service.bytes() == cold_bytes(model, tmp_path / "cold", LAYOUTS)
    pusher.close()


@pytest.mark.slow
def test_a_partition_of_half_a_minute_is_a_slower_push(service: LocalService, staged: Staged, tmp_path: Path) -> None:
    """The trainer reaches neither coordinator nor rank meanwhile; lease and retries are those of every push."""
    pusher = Through(service)
    version = current_version(service.address)
    staged.then = lambda: pusher.cut(refuse_s=PARTITION_S)
    model = tiny_llama(seed=2)
    start_s = time.monotonic()
    assert pusher.push(model).version == version + 1
    assert time.monotonic() - start_s > PARTITION_S
    assert staged.num_bytes < full_bytes(service) + 4 * CHUNK_BYTES
    assert service.bytes() == cold_bytes(model, tmp_path / "cold", LAYOUTS)
    pusher.close()


@pytest.mark.slow
def test_a_lease_that_could_not_be_renewed_is_renewed_as_soon_as_the_service_hears_again(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two renewals of three are lost; the third would come when the lease has lapsed."""
    lease_s, begin, start_s = 6.0, ControlClient.begin, time.monotonic()

    def unheard(self: ControlClient, **fields: Any) -> pb.BeginReply:
        if not fields["tensors"] and time.monotonic() < start_s + 0.75 * lease_s:
            raise TransferError("no connection")
        return begin(self, **fields)

    monkeypatch.setattr(ControlClient, "begin", unheard)
    monkeypatch.setattr(attempts, "RENEW_RETRY_S", 0.1)
    gate = Gate(monkeypatch)
    pusher = Pusher(service.address, lease_s=lease_s)
    version = current_version(service.address)
    start_s = time.monotonic()
    handle = pusher.push_async(tiny_llama(seed=3))
    assert gate.reached.wait(30)
    time.sleep(max(0.0, start_s + 1.3 * lease_s - time.monotonic()))
    gate.opened.set()
    assert handle.result(60).version == version + 1
    pusher.close()


@contextmanager
def another_coordinator(service: LocalService, state_dir: Path, away_s: float) -> Iterator[CoordinatorShell]:
    """The coordinator dies, and one that knows what it had written down comes to its address."""
    service.server.stop()
    service.shell.stop()
    time.sleep(away_s)
    addresses = [rank.address for rank in service.ranks]
    shell = CoordinatorShell(addresses=addresses, state_file=state_dir / "state.sqlite", source="nowhere")
    server = ControlServer(shell, listen=service.address, tokenizer_dir=state_dir / "model")
    try:
        yield shell
    finally:
        server.stop()
        shell.stop()


@pytest.mark.parametrize("mode", ["full", "delta"])
def test_a_coordinator_that_is_replaced_during_a_transfer_is_a_slower_push(
    service: LocalService, mode: Literal["full", "delta"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that comes after it undoes what nobody decided; the trainer begins anew, under the same id."""
    pusher = Pusher(service.address, mode="auto")
    model = tiny_llama(seed=4)
    version = pusher.push(model).version
    pusher.mode = mode
    nudge(model, 1)
    expected = cold_bytes(model, tmp_path / "cold", LAYOUTS)
    gate = Gate(monkeypatch)
    handle = pusher.push_async(model, push_id="only once")
    assert gate.reached.wait(30)
    with another_coordinator(service, tmp_path, away_s=1.0) as shell:
        gate.opened.set()
        report = handle.result(60)
        assert (report.version, report.mode, report.attempts) == (version + 1, mode, 2)
        assert service.bytes() == expected
        decided = [each.push_id for each in shell.index.decisions()]
        assert decided.count("only once") == 1
        nudge(model, 2)
        assert pusher.push(model).attempts == 1
    pusher.close()


def test_a_coordinator_that_is_away_between_two_pushes_is_waited_for(service: LocalService, tmp_path: Path) -> None:
    pusher = Pusher(service.address)
    model = tiny_llama(seed=5)
    version = pusher.push(model).version
    nudge(model, 1)
    with ThreadPoolExecutor(1) as pool:
        service.server.stop()
        pushing = pool.submit(pusher.push, model)
        with another_coordinator(service, tmp_path, away_s=1.0):
            assert pushing.result(60).version == version + 1
    pusher.close()


def test_an_answer_to_prepare_that_got_lost_is_given_again(
    service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared, or about to be: the trainer asks again, and nothing is done twice."""
    prepare, asked = ControlClient.prepare, list[int]()

    def twice(self: ControlClient, transaction: int, *args: Any, **options: Any) -> None:
        with ThreadPoolExecutor(2) as pool:
            for each in [pool.submit(prepare, self, transaction, *args, **options) for _ in range(2)]:
                each.result(30)
        prepare(self, transaction, *args, **options)
        asked.append(transaction)
        digests, *rest = args
        with pytest.raises(ManifestError, match="with other digests"):
            prepare(self, transaction, digests + np.uint64(1), *rest, **options)

    monkeypatch.setattr(ControlClient, "prepare", twice)
    pusher = Pusher(service.address)
    model = tiny_llama(seed=6)
    pusher.push(model)
    assert len(asked) == 1
    assert service.bytes() == cold_bytes(model, tmp_path / "cold", LAYOUTS)
    pusher.close()


def test_a_replica_that_came_after_it_was_described_gets_its_rows(
    service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The push was planned for one replica, two take part when it begins."""
    model_dir = tmp_path / "model"
    rank, _ = start_rank(model_dir, 1, LAYOUTS[0], "nvfp4")
    begin = ControlClient.begin

    def late(self: ControlClient, **fields: Any) -> pb.BeginReply:
        if fields["tensors"] and len(service.shell.members) == 1:
            service.shell.add([rank.address], dead=False)
            wait_for(lambda: len(service.shell.protocol.membership.serving()) == 2)
        return begin(self, **fields)

    monkeypatch.setattr(ControlClient, "begin", late)
    pusher = Pusher(service.address)
    model = tiny_llama(seed=7)
    report = pusher.push(model)
    assert (report.attempts, len(report.replicas)) == (2, 2)
    [expected] = cold_bytes(model, tmp_path / "cold", LAYOUTS)
    assert service.bytes() == [expected] and rank.receiver.storage_bytes() == expected
    pusher.close()
    rank.stop()
