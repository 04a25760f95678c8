"""Two nodes in network namespaces of their own, a real Ray cluster over both, and the cable between them pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.namespaces import cabled, needs_namespaces, run
from tests.tiny import save, tiny_llama

NODES = {"tf-here": "10.231.7.1", "tf-there": "10.231.7.2"}
CABLE = "tf-cable"
PARTITION_S = 30.0
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled"}  # nobody else is on these networks

pytestmark = [
    pytest.mark.slow,
    needs_namespaces("ip"),
]

# Runs on the first node. Ray itself must not give the other node up before the partition is over.
DRIVER = """
import sys, time, ray
from protos import transfuse_pb2 as pb, transfuse_pb2_grpc as pb_grpc
from service.fleet import Fleet, FleetConfig
from tests.tiny import tiny_llama
from weight_update.client import Pusher
from weight_update.security import Security
from weight_update.transport import connect

OPEN = Security(insecure_plaintext=True)  # nobody else is on these networks
model, address = sys.argv[1:]
host = address.rpartition(":")[0]

def states():
    return [(each.state, each.version) for each in control.Status(pb.StatusRequest(), timeout=10).replicas]

def wait_for(condition, timeout_s=120):
    deadline_s = time.monotonic() + timeout_s
    while not condition(states()):
        assert time.monotonic() < deadline_s, states()
        time.sleep(0.5)

def say(text):
    print(text, flush=True)
    assert sys.stdin.readline() == "done\\n"

config = FleetConfig(
    model=model,
    replicas=2,
    ranks=1,
    ray_address=address,
    listen=f"{host}:0",
    min_replicas=1,
    rebuild_after_s=600,
    security=OPEN,
)
with Fleet(config) as fleet, connect(fleet.address, OPEN) as channel:
    control = pb_grpc.ControlStub(channel)
    hosts = {rank.address.rpartition(":")[0] for rank in control.Describe(pb.DescribeRequest()).ranks}
    assert len(hosts) == 2, hosts
    pusher = Pusher(fleet.address, security=OPEN)
    version = pusher.push(tiny_llama(seed=1)).version
    say("pull the cable")
    wait_for(lambda states: "fenced" in [state for state, _ in states])
    assert pusher.push(tiny_llama(seed=2)).version == version + 1
    say("plug it in")
    wait_for(lambda states: states == [("serving", version + 1)] * 2)
    assert control.Verify(pb.VerifyRequest(), timeout=60).ok
    first, second = ray.get([rank.stored_bytes.remote() for rank in fleet.ranks])
    assert first == second
    say("all is well")
"""


@pytest.fixture
def nodes() -> Iterator[None]:
    with cabled(NODES, CABLE):
        yield


@pytest.fixture
def cluster(nodes: None, tmp_path: Path) -> Iterator[str]:
    """host:port of a Ray cluster over both nodes, one CPU each."""
    here, there = NODES
    address = f"{NODES[here]}:6379"
    environment = ENVIRONMENT | {"RAY_health_check_failure_threshold": "100"}
    start = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    head = [*start, "--head", "--port=6379", f"--node-ip-address={NODES[here]}", "--include-dashboard=false"]
    worker = [*start, f"--address={address}", f"--node-ip-address={NODES[there]}"]
    # Sockets have short paths.
    directory = Path("/tmp") / f"tf-{os.getpid()}"
    head.append(f"--temp-dir={directory}")
    processes = []
    try:
        for name, command in ((here, head), (there, worker)):
            log = (tmp_path / f"{name}.log").open("w")
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *command], env=environment, stdout=log, stderr=log, text=True
                )
            )
            log.close()
            time.sleep(15)
            assert processes[-1].poll() is None, (tmp_path / f"{name}.log").read_text()
        yield address
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=60)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.timeout(600)
def test_a_node_that_is_cut_off_is_fenced_and_comes_back_with_what_it_missed(cluster: str, tmp_path: Path) -> None:
    here, _ = NODES
    model = save(tiny_llama(seed=0), tmp_path / "model")
    root = str(Path(__file__).parent.parent)
    driver = subprocess.Popen(
        ["ip", "netns", "exec", here, sys.executable, "-c", DRIVER, str(model), cluster],
        env=ENVIRONMENT | {"PYTHONPATH": root},
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        for state in ("pull", "plug", "all"):
            assert (line := driver.stdout.readline()).startswith(state), line
            if state == "pull":
                run("ip", "-n", here, "link", "set", CABLE, "down")
                pulled_s = time.monotonic()
            if state == "plug":
                time.sleep(max(0.0, pulled_s + PARTITION_S - time.monotonic()))
                run("ip", "-n", here, "link", "set", CABLE, "up")
            driver.stdin.write("done\n")
            driver.stdin.flush()
        assert driver.wait(timeout=120) == 0
    finally:
        driver.kill()
        driver.wait()
        driver.stdin.close()
        driver.stdout.close()
