"""One deployment file for all nodes: what is read, what a node lacks, and the scripts that use it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import psutil
import pytest
import yaml

from launch import doctor
from launch.authority import create, issue
from launch.deployment import Cluster, Deployment, environment, fleet_config, ray_command, read
from launch.doctor import CHECKS, examine, require
from launch.node import EXAMPLE
from weight_update.errors import PlanError
from weight_update.security import token_line

LAUNCH = EXAMPLE.parent

GOOD = """
[cluster]
head = "127.0.0.1"
tls_dir = "{folder}/certs/node"
token_file = "{folder}/tokens"
state = "{folder}/state"
logs = "{folder}/ray"

[service]
model = "{folder}"
replicas = 2
[service.store]
directory = "{folder}/versions"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "transfuse.toml"
    path.write_text(text.format(folder=folder))
    return path


@pytest.fixture
def good(tmp_path: Path) -> Deployment:
    """A deployment that lacks nothing on this machine. Its folders have short names, as Ray's sockets need."""
    (tmp_path / "tokens").write_text(token_line("service", "fleet"))
    (tmp_path / "tokens").chmod(0o600)
    create(tmp_path / "certs")
    issue(tmp_path / "certs", ["node", "other=10.9.8.7"])
    deployment = read(written(tmp_path, GOOD))
    with socket.socket() as one, socket.socket() as other:
        ports = []
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
            ports.append(each.getsockname()[1])
    cluster = replace(deployment.cluster, port=ports[0], logs=Path("/tmp/tf-logs"))
    return replace(deployment, cluster=cluster, service={**deployment.service, "port": ports[1]})


def own_address() -> str:
    """An address of this machine that is not loopback."""
    found = [each for name in psutil.net_if_addrs() for each in doctor.addresses_of(name)]
    return next((each for each in found if not each.startswith("127.")), "10.255.255.1")


def failures(deployment: Deployment, role: Any = "head") -> dict[str, str]:
    return {each.check: each.found for each in examine(deployment, role) if each.verdict == "failed"}


# ---------------------------------------------------------------- the file


def test_the_example_is_a_deployment_and_names_every_option_of_a_cluster() -> None:
    deployment = read(EXAMPLE)
    assert deployment.cluster.nodes == 2
    config = fleet_config(deployment, "10.0.0.1:6379")
    assert (config.listen, config.ray_address) == ("10.0.0.1:7464", "10.0.0.1:6379")
    assert config.store is not None and config.store.keep == 4
    assert all(f"\n{name} = " in EXAMPLE.read_text() for name in Cluster.__dataclass_fields__)


def test_everything_that_is_wrong_with_a_file_is_said_at_once(tmp_path: Path) -> None:
    text = '[cluster]\nhed = "a"\nnodes = "x"\n[service]\nmodl = "b"\nlisten = "c"\n[extra]\n'
    with pytest.raises(PlanError) as caught:
        read(written(tmp_path, text))
    told = str(caught.value)
    assert all(name in told for name in ("cluster.head: missing", "cluster.hed", "cluster.nodes", "[extra]"))
    assert "service.model: missing" in told and "service.listen: follows from [cluster]" in told


@pytest.mark.parametrize("text", ["[cluster", None])
def test_a_file_that_cannot_be_read_says_where_an_example_is(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "none.toml" if text is None else written(tmp_path, text)
    with pytest.raises(PlanError, match="--example"):
        read(path)


def test_an_unknown_or_ill_typed_option_of_the_service_is_named(good: Deployment) -> None:
    with pytest.raises(PlanError, match=r"service.replica: unknown; known: .*replicas"):
        fleet_config(replace(good, service={**good.service, "replica": 2}), "auto")
    with pytest.raises(PlanError, match=r"service.ranks: .*'two'"):
        fleet_config(replace(good, service={**good.service, "ranks": "two"}), "auto")


def test_every_process_of_a_node_gets_the_token_and_the_interface(good: Deployment) -> None:
    env = environment(good.cluster, "eth7")
    secret = (good.path.parent / "tokens").read_text().split()[-1]
    assert env["RAY_AUTH_MODE"] == "token" and len(env["RAY_AUTH_TOKEN"]) == 64
    assert secret not in env["RAY_AUTH_TOKEN"]
    assert env == environment(good.cluster, "eth7")  # the same on every node
    open_to_all = replace(good.cluster, token_file=None, insecure_plaintext=True)
    assert environment(open_to_all, "eth7")["RAY_AUTH_MODE"] == "disabled"
    assert env["GLOO_SOCKET_IFNAME"] == env["NCCL_SOCKET_IFNAME"] == "eth7"
    head, join = (ray_command(good.cluster, role, "10.0.0.9") for role in ("head", "join"))
    assert "--head" in head and f"--address=127.0.0.1:{good.cluster.port}" in join
    assert all("--node-ip-address=10.0.0.9" in each for each in (head, join))


# ---------------------------------------------------------------- what a node lacks


def test_a_node_that_lacks_nothing_passes(good: Deployment) -> None:
    assert failures(good) == {}
    require(examine(good, "head"))


def test_every_check_fails_where_what_it_wants_is_missing(
    good: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each planted lack is found by its own check and by no other."""
    cluster = good.cluster
    open_tokens = tmp_path / "open"
    open_tokens.write_text(token_line("service", "fleet"))
    open_tokens.chmod(0o644)
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        lacking = {
            "network": replace(cluster, interface="tf-none"),
            "head": replace(cluster, head="192.0.2.1", interface="lo"),
            "ports": replace(cluster, port=busy.getsockname()[1]),
            "tokens": replace(cluster, token_file=open_tokens),
            "certificates": replace(cluster, tls_dir=tmp_path / "certs"),
            "state": replace(cluster, state=Path("/dev/shm/tf-state")),
            "folders": replace(cluster, state=Path("/proc/tf-state")),
            "sockets": replace(cluster, logs=Path("/tmp") / ("x" * 60)),
            "shared memory": replace(cluster, shared_memory_bytes=1 << 60),
        }
        for name, each in lacking.items():
            assert name in failures(replace(good, cluster=each)), name
    assert "model" in failures(replace(good, service={**good.service, "model": "/no/such"}))
    assert "tokens" in failures(replace(good, cluster=replace(cluster, token_file=tmp_path / "none")))
    addressed = replace(good, cluster=replace(cluster, head=own_address(), port=1024))
    assert "10.9.8.7" not in failures(addressed)["certificates"]  # the node's own certificate, for loopback only
    open_to_all = replace(addressed, cluster=replace(addressed.cluster, tls_dir=None, token_file=None))
    assert {"tokens", "certificates"} <= failures(open_to_all).keys()
    waived = replace(open_to_all, cluster=replace(open_to_all.cluster, insecure_plaintext=True))
    assert not {"tokens", "certificates"} & failures(waived).keys()
    monkeypatch.setattr(doctor, "MIN_FILES", 1 << 40)
    monkeypatch.setattr(doctor, "MIN_PYTHON", (4, 0))
    assert {"files", "versions"} <= failures(good).keys()
    assert {each.name for each in CHECKS} - lacking.keys() == {"model", "files", "versions", "clock"}


def test_a_head_that_is_not_up_yet_is_no_failure_of_a_node_that_joins(good: Deployment) -> None:
    assert failures(good, "join") == {}
    told = {each.check: each for each in examine(good, "join")}
    assert told["head"].verdict == "warning" and "--head" in told["head"].wanted


def test_nothing_is_started_on_a_node_that_lacks_something(good: Deployment) -> None:
    with pytest.raises(PlanError, match=r"(?s)nothing was.*tokens: .*/no/tokens"):
        require(examine(replace(good, cluster=replace(good.cluster, token_file=Path("/no/tokens"))), "head"))


def test_doctor_says_what_is_missing_with_an_exit_code(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    command = [str(Path(sys.executable).with_name("transfuse")), "doctor", str(path), "--join", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    verdicts = {each["check"]: each["verdict"] for each in yaml.safe_load(done.stdout)}
    assert verdicts["tokens"] == "failed" and verdicts["versions"] == "ok"


# ---------------------------------------------------------------- scripts

# Stands for Slurm: steps are local processes that pass signals on, as srun does.
SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do shift; done
echo "step $*" >>"$CALLS"
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ $1 == show ]] && printf 'node1\\nnode2\\n' || echo "scontrol $*" >>"$CALLS"
"""
NODE = """#!/usr/bin/env bash
trap 'echo "drained ${@: -1}" >>"$CALLS"; [[ ${@: -1} == --head ]] || sleep 0.5; exit 0' TERM # the head is first
cp "$2" "$CALLS.toml"
sleep 60 & wait
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "transfuse": NODE}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
    }


def test_a_job_runs_one_node_command_a_node_and_drains_and_requeues_when_it_is_evicted(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    path = written(tmp_path, EXAMPLE.read_text().replace("{", "{{").replace("}", "}}"))
    calls = tmp_path / "calls"
    job = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), str(path)], env=slurm)
    deadline_s = time.monotonic() + 20
    while not calls.exists() or calls.read_text().count("step") < 2 or not (tmp_path / "calls.toml").exists():
        assert time.monotonic() < deadline_s and job.poll() is None
        time.sleep(0.05)
    given = read(tmp_path / "calls.toml")
    assert (given.cluster.head, given.cluster.nodes) == ("node1", 2)
    time.sleep(0.3)  # both have set their traps
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    lines = calls.read_text().splitlines()
    assert sorted(line.split()[-1] for line in lines if line.startswith("step")) == ["--head", "--join"]
    assert sorted(line for line in lines if line.startswith("drained")) == ["drained --head", "drained --join"]
    assert lines[-1] == "scontrol requeue 7"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs the shellcheck command")
@pytest.mark.parametrize("path", [LAUNCH / "slurm.sbatch", LAUNCH.parent / ".ci" / "run"], ids=str)
def test_shell_scripts_pass_shellcheck(path: Path) -> None:
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Fields of RayJob and its parts that the manifest uses, from the reference of KubeRay 1.6 (ray.io/v1).
RAY_JOB = {"entrypoint", "submissionMode", "shutdownAfterJobFinishes", "backoffLimit", "rayClusterSpec"}
RAY_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
KUBERNETES = "1.37"


def test_the_manifest_fits_the_schemas_and_holds_a_deployment(tmp_path: Path) -> None:
    documents = {each["kind"]: each for each in yaml.safe_load_all((LAUNCH / "kuberay.yaml").read_text())}
    job = documents.pop("RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert job["apiVersion"] == "ray.io/v1" and job["spec"].keys() <= RAY_JOB and cluster.keys() <= RAY_CLUSTER
    assert all(group.keys() <= GROUP and set(map(type, group["rayStartParams"].values())) == {str} for group in groups)
    pods = [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        for group in groups
    ]
    for each in (*documents.values(), *pods):
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
    text = documents["ConfigMap"]["data"]["transfuse.toml"]
    deployment = read(written(tmp_path, text.replace("{", "{{").replace("}", "}}")))
    assert fleet_config(deployment, "auto").replicas == 2
    assert deployment.cluster.nodes == 1 + sum(group["replicas"] for group in cluster["workerGroupSpecs"])
    assert deployment.service_port == documents["Service"]["spec"]["ports"][0]["targetPort"]
