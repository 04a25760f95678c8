"""Two hosts in network namespaces, each started by `transfuse node`: a push, a node lost, a node back, a clean end."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launch.authority import create, issue
from tests.namespaces import cabled, needs_namespaces
from tests.tiny import save, tiny_llama
from weight_update.security import token_line

HOSTS = {"tf-head": "10.231.8.1", "tf-node": "10.231.8.2"}
CABLE = "tf-wire"
START_S = 150.0
ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    needs_namespaces("ip"),
]

DEPLOYMENT = """
[cluster]
head = "10.231.8.1"
nodes = 2
state = "{folder}/state"
logs = "{logs}"
tls_dir = "{folder}/certs/hosts"
token_file = "{folder}/tokens"
shared_memory_bytes = 80000000
grace_s = 20.0

[service]
model = "{folder}/model"
replicas = 2
min_replicas = 1
rebuild_after_s = 600.0
"""

# A trainer on the head's host.
TRAINER = """
import sys
from launch.access import from_environment
from tests.namespaces import cabled, needs_namespaces
from tests.tiny import tiny_llama
from weight_update.client import Pusher

pusher = Pusher("10.231.8.1:7464", security=from_environment())
print(pusher.push(tiny_llama(seed=int(sys.argv[1]))).version)
pusher.close()
"""


@pytest.fixture
def hosts() -> Iterator[None]:
    with cabled(HOSTS, CABLE):
        yield


class Host:
    """One host: what runs there is found again by its namespace."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._folder = name, folder
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TRANSFUSE_TLS_DIR": str(folder / "certs" / "hosts"),
            "TRANSFUSE_TOKEN_FILE": str(folder / "tokens"),
        }
        self.process: subprocess.Popen[str] | None = None

    def command(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def start(self, role: str) -> None:
        log = (self._folder / f"{self.name}.log").open("a")
        transfuse = str(Path(sys.executable).with_name("transfuse"))
        self.process = subprocess.Popen(
            self.command(transfuse, "node", str(self._folder / "transfuse.toml"), role, "--json"),
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        log.close()

    def pids(self) -> list[int]:
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        return [int(each) for each in done.stdout.split()]

    def lose(self) -> None:
        """As a power cut: every process of the host at once."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process is not None
        self.process.wait()
        self._close()

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(120)
        self._close()
        return code

    def _close(self) -> None:
        assert self.process is not None and self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def pair(hosts: None, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Head and node, nothing running yet; nothing is left running."""
    save(tiny_llama(seed=0), tmp_path / "model")
    logs = Path("/tmp") / f"tf-node-{os.getpid()}"  # Ray's sockets have short paths
    create(tmp_path / "certs")
    issue(tmp_path / "certs", [f"hosts={','.join(HOSTS.values())}"])
    (tmp_path / "tokens").write_text(token_line("service", "fleet") + token_line("push", "trainer"))
    (tmp_path / "tokens").chmod(0o600)
    (tmp_path / "transfuse.toml").write_text(DEPLOYMENT.format(folder=tmp_path, logs=logs))
    head, node = (Host(name, tmp_path) for name in HOSTS)
    try:
        yield head, node
    finally:
        for each in (node, head):
            if each.pids():
                each.lose()
        shutil.rmtree(logs, ignore_errors=True)


def status(host: Host) -> dict[str, object]:
    """What `transfuse status` says, asked on a host."""
    transfuse = str(Path(sys.executable).with_name("transfuse"))
    command = host.command(transfuse, "status", "--json", "--to", "10.231.8.1:7464")
    done = subprocess.run(command, capture_output=True, text=True, env=host.environment, cwd=ROOT)
    value: dict[str, object] = json.loads(done.stdout) if done.returncode == 0 else {}
    return value


def await_states(host: Host, wanted: list[tuple[str, int]], timeout_s: float = START_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while True:
        replicas = status(host).get("replicas", [])
        assert isinstance(replicas, list)
        found = sorted((each["state"], each["version"]) for each in replicas)
        if found == sorted(wanted):
            return
        assert time.monotonic() < deadline_s, found
        time.sleep(1.0)


def push(host: Host, seed: int) -> int:
    """A trainer on this host pushes."""
    command = host.command(sys.executable, "-c", TRAINER, str(seed))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=host.environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.timeout(600)
def test_a_node_is_lost_and_comes_back_and_everything_ends_clean(pair: tuple[Host, Host], tmp_path: Path) -> None:
    head, node = pair
    node.start("--join")  # before its head: it waits
    head.start("--head")
    assert head.process is not None and head.process.stdout is not None
    line = head.process.stdout.readline()
    assert line, (tmp_path / "tf-head.log").read_text()
    assert json.loads(line) == {"address": "10.231.8.1:7464"}
    first = push(head, 1)
    await_states(node, [("serving", first)] * 2)

    node.lose()
    await_states(head, [("serving", first), ("fenced", first)])
    second = push(head, 2)
    assert second == first + 1
    node.start("--join")
    await_states(head, [("serving", second)] * 2)
    assert push(head, 3) == second + 1
    await_states(head, [("serving", second + 1)] * 2)

    assert head.stop() == 0
    assert node.process is not None
    assert node.process.wait(60) != 0 or node.pids() == []  # it says that its head is gone
    node._close()
    left = [psutil.Process(pid).name() for host in pair for pid in host.pids()]
    assert left == []
