"""500 connections that do nothing and 50 that misbehave hold up no push, and keep nothing."""

from __future__ import annotations

import contextlib
import itertools
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service.guard import Limits
from tests.bench.growth import Holds, grown
from tests.local import LocalService, cold, local_service
from tests.tiny import save, tiny_llama
from weight_update.channels import connect
from weight_update.client import Pusher
from weight_update.security import Security, token_line
from weight_update.transport import STAGE

pytestmark = pytest.mark.slow

IDLE, BAD = 500, 50
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # and empty settings
LIMITS = Limits(idle_s=4.0)


def trickle(address: str, over: threading.Event) -> None:
    """A connection whose next byte is always late."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port))) as end, contextlib.suppress(OSError):
        for byte in itertools.cycle(PREFACE):
            end.sendall(bytes([byte]))
            if over.wait(0.5):
                return


def garbage(address: str, over: threading.Event) -> None:
    """What is no HTTP/2, again and again."""
    host, _, port = address.rpartition(":")
    while not over.wait(0.2):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as end:
            end.sendall(b"GET / HTTP/1.1\r\n\r\n" + b"\xff" * 1000)


def calling(security: Security, call: Callable[[grpc.Channel, threading.Event], object]) -> Callable[..., None]:
    def run(address: str, over: threading.Event) -> None:
        with connect(address, security) as channel:
            while not over.wait(0.1):
                with contextlib.suppress(grpc.RpcError):
                    call(channel, over)

    return run


def silence(over: threading.Event) -> Iterator[bytes]:
    over.wait(60)
    yield from ()


def misbehaving(files: Path) -> list[Callable[[str, threading.Event], None]]:
    """Ways to hold a slot or to use one up."""
    nobody, eve, mallory = (Security(token_file=files / name) for name in ("none", "eve", "mallory"))
    status = "/transfuse.v1.Control/Status"
    return [
        trickle,
        garbage,
        # A request that never comes, a push that never says which, a stream that nobody reads, guesses at a token.
        calling(eve, lambda channel, over: channel.stream_unary(status)(silence(over), timeout=60)),
        calling(mallory, lambda channel, over: list(channel.stream_stream(STAGE)(silence(over), timeout=60))),
        calling(eve, lambda channel, over: (pb_grpc.ControlStub(channel).Watch(pb.WatchRequest()), over.wait(60))),
        calling(nobody, lambda channel, over: channel.unary_unary(status)(b"", timeout=5)),
    ]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    lines = {name: token_line(role, name) for name, role in (("eve", "read"), ("mallory", "push"), ("ppo", "push"))}
    lines["all"] = "".join(lines.values()) + token_line("service", "fleet")
    for name, text in {**lines, "none": token_line("admin", "none")}.items():
        path = tmp_path / name
        path.touch(0o600)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 4096:
        pytest.skip(f"needs 4096 open files, the limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def seconds_of_push(service: LocalService, files: Path, seed: int) -> float:
    pusher = Pusher(service.address, security=Security(token_file=files / "ppo"), mode="full")
    start_s = time.monotonic()
    assert pusher.push(tiny_llama(seed=seed)).digest_verified
    pusher.close()
    return time.monotonic() - start_s


@pytest.mark.timeout(120)
def test_a_push_completes_among_idle_and_misbehaving_connections(files: Path, many_files: None) -> None:
    model_dir = save(tiny_llama(seed=0), files / "model")
    security = Security(token_file=files / "all")
    over = threading.Event()
    with local_service(model_dir, files, security=security, limits=LIMITS) as service, ExitStack() as stack:
        quiet_s = seconds_of_push(service, files, seed=1)
        doors = (service.address, service.ranks[0].address)
        for number, address in zip(range(IDLE), itertools.cycle(doors), strict=False):
            host, _, port = address.rpartition(":")
            end = stack.enter_context(socket.create_connection((host, int(port))))
            if number % 4 > 1:
                end.sendall(PREFACE)
        ways = misbehaving(files)
        threads = [
            threading.Thread(target=ways[i % len(ways)], args=(doors[i // len(ways) % 2], over), daemon=True)
            for i in range(BAD)
        ]
        for thread in threads:
            thread.start()
        guards = (service.server.guard, service.ranks[0].guard)
        time.sleep(1.0)  # all of them are at it
        loaded_s = [seconds_of_push(service, files, seed) for seed in (2, 3)]
        deadline_s = time.monotonic() + 30
        while not all(each.num_dropped for each in guards) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert all(each.num_dropped for each in guards)
        assert service.server.guard.num_failed
        over.set()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
        while any(each._calls for each in guards) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert not any(each._calls for each in guards)
        save(tiny_llama(seed=3), files / "cold")
        assert service.bytes() == [cold(files / "cold", "trtllm")[1].storage_bytes()]
        print(f"a push took {quiet_s:.2f} s alone, {max(loaded_s):.2f} s among them")
        assert max(loaded_s) < 20.0


@pytest.mark.parametrize("kind", ["memory_bytes", "descriptors", "threads", "segments", "files"])
def test_what_grows_with_the_pushes_is_named(kind: str) -> None:
    """The verdict of the soak's pushes in a row, tests.bench.growth."""
    first = Holds(
        pushes=500, memory_bytes=400 << 20, descriptors=20, threads=26, segments=1, files=6, state_bytes=5 << 20
    )
    middle = replace(first, pushes=2500, state_bytes=9 << 20)  # decisions and events are meant to be kept
    last = replace(middle, pushes=5000, state_bytes=13 << 20)
    assert grown(first, middle, last) == []
    more = {kind: getattr(first, kind) + (50 << 20 if kind == "memory_bytes" else 1)}
    (found,) = grown(first, middle, replace(last, **more))
    assert found.startswith(kind.partition("_")[0])
    assert grown(first, replace(middle, **more), last) == []  # it went away again
