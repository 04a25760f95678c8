"""Ways of a payload: which one is taken, that all bring the same bytes, and what is left when an end dies."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.relays import Proxy
from quant.formats import TensorSpec
from tests.bench import links
from tests.local import LocalService, cold, local_service
from tests.tiny import save, tiny_llama
from weight_update.chunks import Chunk, Packet, check, decode_request
from weight_update.client import Pusher
from weight_update.device_rings import DeviceWriter
from weight_update.errors import TransferError, WeightUpdateError
from weight_update.links import CUDA_IPC, GRPC, NCCL, SHARED_MEMORY, Place, allowed_of, choose, here
from weight_update.rings import PAGE_BYTES, Ring, RingWriter
from weight_update.staging import StagingBuffer, plan_staging

ROOT = str(Path(__file__).parents[1])
LAYOUTS = ("trtllm", "plain")


# ---------------------------------------------------------------- the choice

OURS = Place(host="h", processes="pid:[1]", user=7)
EITHER = (SHARED_MEMORY, GRPC)
CHOICES = {
    "one host": (OURS, EITHER, SHARED_MEMORY, ""),
    "another host": (replace(OURS, host="other"), EITHER, GRPC, "another host"),
    "another container": (replace(OURS, processes="pid:[2]"), EITHER, GRPC, "another container"),
    "another user": (replace(OURS, user=8), EITHER, GRPC, "another user: 8 there, 7 here"),
    "no memory to share": (replace(OURS, host=""), EITHER, GRPC, "no memory to share"),
    "forbidden": (OURS, (GRPC,), GRPC, "shared-memory: not allowed"),
    "no GPU here": (replace(OURS, gpu="G"), (CUDA_IPC, *EITHER), SHARED_MEMORY, "cuda-ipc: what this end sends is"),
    "forced": (OURS, (SHARED_MEMORY,), SHARED_MEMORY, ""),
    "no GPU there": (OURS, (NCCL, GRPC), GRPC, "shared-memory: not allowed"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_best_transport_that_both_ends_have_is_taken_and_why_is_said(case: str) -> None:
    theirs, allowed, transport, reason = CHOICES[case]
    link = choose(OURS, theirs, allowed)
    assert link.transport == transport and reason in str(link)
    assert link.only == (GRPC not in allowed)


def test_where_nothing_is_left_the_error_says_why_of_each() -> None:
    with pytest.raises(TransferError, match=r"no transport to a:1: shared-memory: another host; grpc: not allowed"):
        choose(OURS, replace(OURS, host="other"), (SHARED_MEMORY,), "a:1")


def test_an_option_that_names_no_transport_is_refused() -> None:
    assert allowed_of("auto") == (CUDA_IPC, NCCL, *EITHER)
    assert allowed_of("auto", encrypted=True) == (CUDA_IPC, *EITHER)  # what NCCL sends is not
    assert allowed_of(NCCL, encrypted=True) == (NCCL,)
    assert allowed_of("grpc") == allowed_of(["grpc"]) == (GRPC,)
    with pytest.raises(TransferError, match="'smoke' is none of cuda-ipc, nccl, shared-memory, grpc"):
        allowed_of("smoke")
    with pytest.raises(TransferError, match="none is allowed"):
        allowed_of(())


def test_between_two_gpus_of_one_host_bytes_go_from_one_to_the_other() -> None:
    ours, theirs = replace(OURS, gpu="G0"), replace(OURS, gpu="G1")
    assert str(choose(ours, theirs, allowed_of("auto"))) == CUDA_IPC
    elsewhere = replace(theirs, host="other")
    said = str(choose(ours, elsewhere, allowed_of("auto")))
    assert said == "grpc (cuda-ipc: another host; nccl: there is no NCCL; shared-memory: another host)"
    both = replace(ours, nccl="2.28.9"), replace(elsewhere, nccl="2.28.9")
    assert str(choose(*both, allowed_of("auto"))) == "nccl (cuda-ipc: another host)"
    older = replace(both[1], nccl="2.27.5")
    assert "nccl: NCCL 2.27.5 there, 2.28.9 here" in str(choose(both[0], older, (NCCL, GRPC)))
    same = replace(both[0], processes="pid:[2]")
    assert "nccl: both ends are on one GPU" in str(choose(both[0], same, allowed_of("auto")))
    said = str(choose(ours, OURS, allowed_of("auto")))
    assert said == "shared-memory (cuda-ipc: what that end serves is in host memory)"


# ---------------------------------------------------------------- the ring


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.integers(1, 5000), st.none()), max_size=60))
def test_a_ring_gives_no_byte_out_twice_and_all_of_them_again(steps: list[int | None]) -> None:
    """A number takes so many bytes, None frees the oldest."""
    ring = RingWriter(np.zeros(8192, np.uint8), b"")
    held: list[set[int]] = []
    for step in steps:
        if step is None:
            if held:
                held.pop(0)
                ring.free()
            continue
        at = ring.take(step)
        if at is not None:
            taken = set(range(at, at + step))
            assert max(taken) < ring.num_bytes and not any(taken & each for each in held)
            held.append(taken)
    for _ in held:
        ring.free()
    assert ring.take(ring.num_bytes) == 0


def test_what_one_end_puts_into_a_ring_the_other_reads_in_place() -> None:
    ring = Ring.create(10_000)
    writer = RingWriter.open(ring.pid, ring.fd, ring.num_bytes, ring.token)
    assert writer.num_bytes == ring.num_bytes == 3 * PAGE_BYTES
    numbers = np.array([3, 4], np.uint32), np.array([0, 9], np.uint64), np.array([5, 3], np.uint32)
    packet = Packet(1, *numbers, [memoryview(b"hello"), memoryview(b"you")])
    at = writer.take(packet.payload_bytes)
    assert at is not None
    packet.put(writer.view(at, packet.payload_bytes))
    chunk = decode_request(packet.in_ring(at), ring.payload)
    check(chunk)  # type: ignore[arg-type]
    assert bytes(chunk.payload) == b"helloyou" and chunk.payload.obj is ring.payload.obj  # type: ignore[union-attr]
    message = bytearray(packet.in_ring(at))
    message[message.index(b"\x09")] ^= 1  # an offset
    with pytest.raises(TransferError, match="checksum"):
        check(decode_request(bytes(message), ring.payload))  # type: ignore[arg-type]
    for where, held in ((ring.num_bytes - 7, ring.payload), (1 << 40, ring.payload), (0, None)):
        with pytest.raises(TransferError, match="of a ring"):
            decode_request(packet.in_ring(where), held)
    ring.close()


def test_a_payload_in_a_ring_of_tensors_is_staged_where_it_belongs() -> None:
    """As a GPU's memory is used, in memory of the host."""
    writer = DeviceWriter(torch.zeros(4096, dtype=torch.uint8), b"")
    specs = [TensorSpec(name=name, dtype="U8", shape=(2, 100)) for name in "ab"]
    plan = plan_staging(specs, np.array([0, 1]), np.array([2, 2]))
    buffer = StagingBuffer(plan, torch.zeros(plan.num_bytes, dtype=torch.uint8))
    rows = torch.arange(300, dtype=torch.int64).to(torch.uint8)
    numbers = np.array([0, 1], np.uint32), np.array([0, 100], np.uint64), np.array([200, 100], np.uint32)
    packet = Packet(1, *numbers, [rows[:200], rows[200:]])
    at = writer.take(packet.payload_bytes)
    assert at is not None
    chunk = decode_request(writer.put(packet, at), writer._memory)
    assert isinstance(chunk, Chunk) and isinstance(chunk.payload, torch.Tensor)
    check(chunk)
    assert buffer.place(chunk) == 300 and not buffer.missing()
    assert torch.equal(torch.cat([buffer.rows(0).flatten(), buffer.rows(1).flatten()]), rows)
    inline = decode_request(packet.message)
    assert isinstance(inline, Chunk) and bytes(inline.payload) == bytes(rows.tolist())  # type: ignore[arg-type]
    check(inline)


def test_only_the_memory_that_was_meant_is_opened() -> None:
    ring = Ring.create(PAGE_BYTES)
    with pytest.raises(TransferError, match="not the rank's ring"):
        RingWriter.open(ring.pid, ring.fd, ring.num_bytes, bytes(16))
    with pytest.raises(TransferError, match="not the rank's ring"):
        RingWriter.open(ring.pid, ring.fd, ring.num_bytes * 2, ring.token)
    with pytest.raises(OSError):
        os.ftruncate(ring.fd, 0)
    assert os.fstat(ring.fd).st_mode & 0o777 == 0o600
    ring.close()
    with pytest.raises(TransferError, match="No such file"):
        RingWriter.open(ring.pid, ring.fd, ring.num_bytes, ring.token)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_the_same_host_cannot_open_a_ring() -> None:
    ring = Ring.create(PAGE_BYTES)
    code = f"import os; os.setuid(65534); os.open('/proc/{ring.pid}/fd/{ring.fd}', os.O_RDWR)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "PermissionError" in done.stderr
    ring.close()


# ---------------------------------------------------------------- pushes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    with local_service(checkpoint, tmp_path_factory.mktemp("state"), LAYOUTS) as running:
        yield running


def cold_bytes(model: Any, directory: Path) -> list[dict[str, bytes]]:
    save(model, directory)
    return [cold(directory, layout)[1].storage_bytes() for layout in LAYOUTS]


def rings_of(pid: int) -> int:
    """Mapped or open memory of rings in a process. Views that the frames of a caught error hold go first."""
    gc.collect()
    maps = Path(f"/proc/{pid}/maps").read_text().count("memfd:transfuse-ring")
    opened = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            opened += "memfd:transfuse-ring" in os.readlink(each)
        except OSError:
            continue
    return maps + opened


def eventually(holds: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not holds() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return holds()


@pytest.mark.parametrize("transport", EITHER)
def test_full_and_delta_pushes_leave_the_bytes_of_a_cold_load_and_say_how_they_went(
    transport: str, service: LocalService, tmp_path: Path
) -> None:
    with closing(Pusher(service.address, transport=transport)) as pusher:
        model = tiny_llama(seed=1 + EITHER.index(transport))
        report = pusher.push(model)
        assert report.digest_verified and report.mode == "full"
        assert [way.partition(" (")[0] for way in report.transports] == [
            f"trainer 0 to 0.0: {transport}",
            f"trainer 0 to 1.0: {transport}",
        ]
        changed = copy.deepcopy(model)
        changed.model.layers[0].mlp.down_proj.weight.data[3] *= -1  # type: ignore[index, union-attr]
        assert pusher.push(changed).mode == "delta"
        nothing = pusher.push(changed)
        assert (nothing.mode, nothing.wire_bytes, nothing.transports) == ("delta", 0, [])  # no stream to any rank
        assert service.bytes() == cold_bytes(changed, tmp_path)
    assert rings_of(os.getpid()) == 0


def test_the_bytes_sent_are_the_same_over_both(service: LocalService) -> None:
    sent = []
    for transport in EITHER:
        with closing(Pusher(service.address, mode="full", transport=transport)) as pusher:
            sent.append(pusher.push(tiny_llama(seed=3)).wire_bytes)
    assert sent[0] == pytest.approx(sent[1], rel=0.001)


def test_a_rank_elsewhere_is_reached_over_grpc_and_a_forced_transport_fails(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.ranks[1], "place", replace(here(), host="another machine"))
    service.shell.members[1].spec.place.host = "another machine"
    with closing(Pusher(service.address)) as pusher:
        assert pusher.push(tiny_llama(seed=4)).transports == [
            "trainer 0 to 0.0: shared-memory",
            "trainer 0 to 1.0: grpc (shared-memory: another host)",
        ]
    before = service.bytes()
    forced = Pusher(service.address, transport=SHARED_MEMORY)
    with closing(forced) as pusher, pytest.raises(TransferError, match="another host"):
        pusher.push(tiny_llama(seed=5))
    assert service.bytes() == before
    service.shell.members[1].spec.place.host = here().host


def test_a_rank_that_offers_no_ring_after_all_is_reached_over_grpc(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.ranks[1], "place", Place())
    with closing(Pusher(service.address)) as pusher:
        said = pusher.push(tiny_llama(seed=6)).transports
    assert said == ["trainer 0 to 0.0: shared-memory", "trainer 0 to 1.0: grpc (shared-memory: the rank offers none)"]
    forced = Pusher(service.address, transport=SHARED_MEMORY)
    with closing(forced) as pusher, pytest.raises(TransferError, match="offers none"):
        pusher.push(tiny_llama(seed=7))


@pytest.mark.parametrize(("transport", "told"), [(SHARED_MEMORY, "are not what the trainer meant"), (GRPC, "checksum")])
def test_a_byte_that_changes_on_the_way_stops_the_push_with_nothing_changed(
    transport: str, told: str, service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, message = Packet.put, Packet.message.func  # type: ignore[attr-defined]

    def spoiled_put(self: Packet, target: npt.NDArray[np.uint8]) -> None:
        put(self, target)
        target[len(target) // 2] ^= 1

    def spoiled_message(self: Packet) -> bytes:
        whole = bytearray(message(self))
        whole[-100] ^= 1
        return bytes(whole)

    before = service.bytes()
    monkeypatch.setattr(Packet, "put", spoiled_put)
    monkeypatch.setattr(Packet, "message", property(spoiled_message))
    forced = Pusher(service.address, transport=transport)
    with closing(forced) as pusher, pytest.raises(TransferError, match=told):
        pusher.push(tiny_llama(seed=8))
    assert service.bytes() == before
    assert eventually(lambda: rings_of(os.getpid()) == 0)


@pytest.mark.parametrize("transport", EITHER)
def test_a_stream_that_breaks_goes_on_where_it_was(transport: str, service: LocalService, tmp_path: Path) -> None:
    """The rank is slow, so that much is on its way when the connection is cut."""
    proxies: dict[str, Proxy] = {}
    receivers = [rank.receiver for rank in service.ranks]
    model = tiny_llama(seed=9)
    with closing(Pusher(service.address, transport=transport)) as pusher:
        direct = pusher._channel

        def along(address: str) -> Any:
            proxies[address] = Proxy(address)
            return direct(proxies[address].address)

        pusher._channel = along  # type: ignore[method-assign]
        stages = [receiver.stage for receiver in receivers]
        cut = []

        def cutting(chunk: Any, transaction: int | None = None) -> int:
            if not cut:
                cut.append(True)
                for each in proxies.values():
                    each.cut()
                time.sleep(0.3)
            return stages[0](chunk, transaction)

        receivers[0].stage = cutting  # type: ignore[method-assign]
        try:
            report = pusher.push(model)
        finally:
            receivers[0].stage = stages[0]  # type: ignore[method-assign]
    assert cut and max(proxy.num_connections for proxy in proxies.values()) >= 2
    for proxy in proxies.values():
        proxy.close()
    assert report.digest_verified and service.bytes() == cold_bytes(model, tmp_path)
    assert rings_of(os.getpid()) == 0


TRAINER = f"""
import os, sys
sys.path.insert(0, {ROOT!r})
from tests.tiny import tiny_llama
from weight_update.chunks import Packet
from weight_update.client import Pusher
put = Packet.put
def last(self, target):
    put(self, target)
    os.kill(os.getpid(), 9)
Packet.put = last
Pusher(sys.argv[1], lease_s=1.0, transport="shared-memory").push(tiny_llama(seed=10))
"""


@pytest.mark.slow
def test_a_trainer_killed_while_it_writes_leaves_no_memory_behind_and_the_next_push_works(
    service: LocalService,
) -> None:
    before = service.bytes()
    shown = set(os.listdir("/dev/shm"))
    done = subprocess.run([sys.executable, "-c", TRAINER, service.address], check=False, timeout=240)
    assert done.returncode == -9
    assert eventually(lambda: all(rank.member.state == "idle" for rank in service.ranks))
    assert eventually(lambda: rings_of(os.getpid()) == 0)
    assert set(os.listdir("/dev/shm")) <= shown and service.bytes() == before
    with closing(Pusher(service.address)) as pusher:
        assert pusher.push(tiny_llama(seed=11)).digest_verified


ACTOR = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {ROOT!r})
from tests.local import local_service
with local_service(Path(sys.argv[1]), Path(sys.argv[2]), ("plain",)) as service:
    stage = service.ranks[0].receiver.stage
    def dying(chunk, transaction=None):
        os.kill(os.getpid(), 9)
    service.ranks[0].receiver.stage = dying
    print(service.address, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.slow
def test_a_rank_killed_while_it_reads_fails_the_push_as_over_grpc_and_leaves_no_memory_behind(
    checkpoint: Path, tmp_path: Path
) -> None:
    shown = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", ACTOR, str(checkpoint), str(tmp_path)]
    actor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert actor.stdout is not None
    forced = Pusher(actor.stdout.readline().strip(), transport=SHARED_MEMORY, retry_s=0.5)
    with closing(forced) as pusher, pytest.raises(WeightUpdateError, match="no connection"):
        pusher.push(tiny_llama(seed=12))
    actor.communicate()
    assert actor.returncode == -9
    assert eventually(lambda: rings_of(os.getpid()) == 0)
    assert set(os.listdir("/dev/shm")) <= shown


@pytest.mark.gpu
def test_bytes_go_from_one_process_to_another_in_a_gpus_memory_and_are_installed() -> None:
    """measure() compares every digest, as staged and as installed."""
    last = f"cuda:{torch.cuda.device_count() - 1}"
    row = links.measure(CUDA_IPC, layers=1, experts=4, source="cuda:0", target=last, rounds=1)
    assert row.transport == CUDA_IPC


@pytest.mark.parametrize("transport", EITHER)
def test_the_bench_of_the_transports_compares_every_digest(transport: str) -> None:
    assert links.measure(transport, layers=1, experts=2, source="cpu", target="cpu", rounds=1).tensors == 24
