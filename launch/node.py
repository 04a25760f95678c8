"""`transfuse node` and `transfuse doctor`: one command a node for bare hosts, from one file that is the same on all.

    transfuse node transfuse.toml --head     # on the head: Ray's head, the coordinator, the service; prints its address
    transfuse node transfuse.toml --join     # on every other node
    transfuse node transfuse.toml --attach   # the service alone, where somebody else runs Ray (KubeRay)

    check -> ray start -> wait for all nodes -> compare them -> serve -> SIGTERM: drain within --grace -> stop Ray
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weight_update.errors import MemberError, PlanError, raise_all

from . import access
from .options import Json, emit

if TYPE_CHECKING:  # deployment loads pydantic, which takes longer than most commands
    from .deployment import Deployment, Role

POLL_S = 0.5
STOP_S = 30.0  # for Ray's processes to end
MAX_CLOCK_S = 2.0  # between two nodes
COMPARED = ("torch", "ray", "grpcio", "protobuf", "transfuse")  # of the same version on every node
EXAMPLE = Path(__file__).with_name("transfuse.toml")

File = Annotated[Path | None, typer.Argument(metavar="FILE", help="The deployment, a TOML file; see --example.")]
Head = Annotated[bool, typer.Option("--head", help="Of the head node.")]
Join = Annotated[bool, typer.Option("--join", help="Of any other node.")]
Attach = Annotated[bool, typer.Option("--attach", help="Of the service alone, where Ray runs already.")]


def node(
    file: File = None,
    head: Head = False,
    join: Join = False,
    attach: Attach = False,
    grace: Annotated[
        float | None, typer.Option(min=0.0, metavar="S", help="In place of the file's cluster.grace_s.")
    ] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a commented deployment file.")] = False,
    as_json: Json = False,
) -> None:
    """Run this node of a service until Ctrl-C or SIGTERM.

    Checks what 'transfuse doctor' checks first, and starts nothing where that fails. The head prints the service's
    address once it serves. SIGTERM lets running requests and an open push end, for at most --grace seconds.
    """
    if example:
        sys.stdout.write(EXAMPLE.read_text())
        return
    deployment, role = _chosen(file, head=head, join=join, attach=attach)
    if grace is not None:
        deployment = replace(deployment, cluster=replace(deployment.cluster, grace_s=grace))
    access.use(deployment.security)
    ROLES[role](deployment, lambda at: emit({"address": at}, f"serving at {at}; Ctrl-C or SIGTERM stops it", as_json))


def doctor(
    file: File = None,
    head: Head = False,
    join: Join = False,
    attach: Attach = False,
    as_json: Json = False,
) -> None:
    """Check whether this node can run, and start nothing.

    Exit code 4 where something is missing. With --json one object a check: check, verdict (ok, warning, failed),
    found, wanted.
    """
    from dataclasses import asdict

    from .doctor import as_text, examine

    deployment, role = _chosen(file, head=head, join=join, attach=attach)
    findings = examine(deployment, role)
    emit([asdict(each) for each in findings], as_text(findings, all_of_them=True), as_json)
    if any(each.verdict == "failed" for each in findings):
        raise typer.Exit(4)


def _chosen(file: Path | None, **roles: bool) -> tuple[Deployment, Role]:
    """The deployment, and the one role that was named."""
    from .deployment import read

    named = [name for name, is_set in roles.items() if is_set]
    if file is None or len(named) != 1:
        raise typer.BadParameter("expected FILE and one of --head, --join and --attach")
    role: Any = named[0]
    return read(file), role


# ---------------------------------------------------------------- roles


def run_head(deployment: Deployment, ready: Callable[[str], None]) -> None:
    """Ray's head and the service."""
    with _ray_node(deployment, "head") as address:
        ray_address = f"{address}:{deployment.cluster.port}"
        await_nodes(deployment, ray_address)
        _serve(deployment, ray_address, ready)


def run_joined(deployment: Deployment, ready: Callable[[str], None]) -> None:
    """A node whose ranks Ray starts; `ready` is never called, the head says where the service is."""
    from .interrupts import raise_interrupts

    cluster = deployment.cluster
    _await_head(deployment)
    with _ray_node(deployment, "join") as address:
        raise_interrupts()
        sys.stderr.write(f"{address} joined {cluster.head}:{cluster.port}\n")
        try:
            while _is_running(cluster.head, cluster.port):
                time.sleep(POLL_S)
            raise MemberError(f"{cluster.head}:{cluster.port}: Ray's head is gone; start it, then join again")
        except KeyboardInterrupt:
            drain_node(deployment, address)


def run_attached(deployment: Deployment, ready: Callable[[str], None]) -> None:
    """The service on a Ray cluster that somebody else runs, listening at this node."""
    import ray

    from .doctor import examine, require

    require(examine(deployment, "attach"))
    await_nodes(deployment, "auto")
    address = str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
    here = replace(deployment, cluster=replace(deployment.cluster, head=address))
    _serve(here, "auto", ready)


ROLES: dict[Role, Callable[[Deployment, Callable[[str], None]], None]] = {
    "head": run_head,
    "join": run_joined,
    "attach": run_attached,
}


def _serve(deployment: Deployment, ray_address: str, ready: Callable[[str], None]) -> None:
    from .deployment import fleet_config
    from .serve import run

    run(fleet_config(deployment, ray_address), ready, grace_s=deployment.cluster.grace_s)


@contextmanager
def _ray_node(deployment: Deployment, role: Role) -> Iterator[str]:
    """Ray's processes of this node while entered; this node's address. They stay out of the terminal's signals."""
    from .deployment import environment, ray_command
    from .doctor import examine, node_address, require

    findings = examine(deployment, role)
    require(findings)
    for each in findings:
        if each.verdict == "warning":
            sys.stderr.write(f"{each.check}: {each.found}; {each.wanted}\n")
    cluster = deployment.cluster
    address, interface = node_address(deployment)
    os.environ.update(environment(cluster, interface))
    cluster.logs.mkdir(parents=True, exist_ok=True)
    cluster.state.mkdir(parents=True, exist_ok=True)
    log = cluster.logs / f"ray-{address}.log"
    command = ray_command(cluster, role, address)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name(command[0])), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        target = (address, cluster.port) if role == "head" else (cluster.head, cluster.port)
        _await_ray(process, target, log, cluster.join_s)
        yield address
    finally:
        _end(process)


def _await_ray(process: subprocess.Popen[bytes], target: tuple[str, int], log: Path, timeout_s: float) -> None:
    """Return once Ray has started."""
    deadline_s = time.monotonic() + timeout_s
    while b"Ray runtime started" not in log.read_bytes() or not _is_running(*target):
        if process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
            raise MemberError(f"ray start ended with {process.returncode}; the end of {log}:\n{tail}")
        if time.monotonic() > deadline_s:
            raise MemberError(f"ray start is not done after {timeout_s:.0f} s; see {log}")
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End Ray's processes of this node: `ray start --block` ends them when it is told to."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ---------------------------------------------------------------- nodes


def _is_running(host: str, port: int) -> bool:
    import socket

    try:
        with socket.create_connection((host, port), timeout=5.0):
            return True
    except OSError:
        return False


def _await_head(deployment: Deployment) -> None:
    from .progress import Bars

    cluster = deployment.cluster
    deadline_s = time.monotonic() + cluster.join_s
    with Bars().show(f"wait for {cluster.head}:{cluster.port}"):
        while not _is_running(cluster.head, cluster.port):
            if time.monotonic() > deadline_s:
                raise MemberError(
                    f"{cluster.head}:{cluster.port}: no head after {cluster.join_s:.0f} s; start it with"
                    " 'transfuse node FILE --head', check routes and firewalls"
                )
            time.sleep(POLL_S)


def await_nodes(deployment: Deployment, ray_address: str) -> None:
    """Wait until all nodes have joined, and compare them. MemberError that says who is there; PlanError for nodes that
    differ."""
    import ray

    from .progress import Bars

    cluster, bars = deployment.cluster, Bars()
    ray.init(address=ray_address, log_to_driver=False, configure_logging=False)
    try:
        deadline_s = time.monotonic() + cluster.join_s
        with bars.show():
            while len(alive := _alive_nodes()) < cluster.nodes:
                bars.update("wait for nodes", len(alive), cluster.nodes)
                if time.monotonic() > deadline_s:
                    there = ", ".join(each["NodeManagerAddress"] for each in alive)
                    raise MemberError(
                        f"{len(alive)} of {cluster.nodes} nodes after {cluster.join_s:.0f} s: {there}; run 'transfuse"
                        " node FILE --join' on the others, or set cluster.nodes"
                    )
                time.sleep(POLL_S)
            bars.update("compare nodes", 0, 1)
            raise_all(PlanError, "nodes differ", _differences(alive))
    finally:
        ray.shutdown()


def _alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [each for each in ray.nodes() if each["Alive"]]  # type: ignore[no-untyped-call]


def facts() -> tuple[dict[str, str], float]:
    """Versions and the clock of the node that this runs on."""
    from importlib import metadata

    return {name: metadata.version(name) for name in COMPARED}, time.time()


def _differences(nodes: list[dict[str, Any]]) -> list[str]:
    """What is not alike on all nodes: installed versions, clocks."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own, _ = facts()
    problems = []
    for each in nodes:
        there = NodeAffinitySchedulingStrategy(each["NodeID"], soft=False)
        remote: Any = ray.remote(num_cpus=0)(facts)
        ask = remote.options(scheduling_strategy=there).remote
        ray.get(ask())  # its process is there now, so that the next answer is quick
        sent_s = time.time()
        versions, clock_s = ray.get(ask())
        back_s = time.time()
        name = each["NodeManagerAddress"]
        off_s = max(sent_s - clock_s, clock_s - back_s)
        if off_s > MAX_CLOCK_S:
            problems.append(f"{name}: its clock is {off_s:.1f} s off; at most {MAX_CLOCK_S:.0f}: run chronyd or ntpd")
        problems += [
            f"{name}: {package} {versions[package]}, the head has {version}; install from the same constraints.txt"
            for package, version in own.items()
            if versions[package] != version
        ]
    return problems


def drain_node(deployment: Deployment, address: str) -> None:
    """Let the requests of this node's replicas end before its ranks do; what cannot be asked is no reason to stay."""
    from protos import transfuse_pb2 as pb
    from weight_update.errors import WeightUpdateError

    from .rpc import ask
    from .serve import drain

    grace_s = deployment.cluster.grace_s
    try:
        ranks = ask(deployment.listen, "Status", pb.StatusRequest()).ranks
    except WeightUpdateError as error:  # the service may be gone already
        sys.stderr.write(f"not drained: {error}\n")
        return
    here = sorted({each.replica for each in ranks if each.address.rpartition(":")[0] == address})
    if here and grace_s:
        drain(deployment.listen, grace_s, here)
