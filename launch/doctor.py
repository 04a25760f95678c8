"""What a node must have before anything is started on it: a table of checks, each with what to do where it fails.

    findings = examine(deployment, "head")
    require(findings)      # PlanError that lists what is wrong

Nothing is changed: ports are bound and let go, folders are looked at.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from weight_update.errors import PlanError, raise_all
from weight_update.security import SERVICE, Tokens, is_loopback

from .authority import issued
from .deployment import Deployment, Role

Verdict = Literal["ok", "warning", "failed"]

MIN_PYTHON = (3, 11)
MIN_FREE_BYTES = 1 << 30  # of the folders that the coordinator and Ray write
MIN_FILES = 4096  # descriptors: every stream, log and shared segment takes one
MAX_SOCKET_FOLDER = 45  # Ray adds 60 characters to it for its sockets, whose paths end at 107
VOLATILE = frozenset({"tmpfs", "ramfs", "devtmpfs"})
HEAD_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found. found: what is there. wanted: what should be, and what to do."""

    check: str
    verdict: Verdict
    found: str
    wanted: str = ""


Outcome = tuple[Verdict, str, str]
OK: Verdict = "ok"


def examine(deployment: Deployment, role: Role) -> list[Finding]:
    """Every check of this role, in the order of CHECKS."""
    findings = []
    for check in CHECKS:
        if role in check.roles:
            findings += [
                Finding(check=check.name, verdict=verdict, found=found, wanted=wanted if verdict != OK else "")
                for verdict, found, wanted in check.look(deployment)
            ]
    return findings


def require(findings: list[Finding]) -> None:
    """PlanError that lists what failed."""
    failed = [f"{each.check}: {each.found}; {each.wanted}" for each in findings if each.verdict == "failed"]
    raise_all(PlanError, "this node cannot be started; nothing was", failed)


# ---------------------------------------------------------------- addresses


def addresses_of(interface: str) -> list[str]:
    """IPv4 addresses of a network interface of this machine; none where there is no such interface."""
    return [each.address for each in psutil.net_if_addrs().get(interface, ()) if each.family == socket.AF_INET]


def address_towards(head: str) -> str:
    """The address of this node on the way to the head; the head's own, on the head. OSError where there is no way."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))  # nothing is sent
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The network interface that has this address."""
    names: list[str] = [name for name in psutil.net_if_addrs() if address in addresses_of(name)]
    if not names:
        raise PlanError(f"{address}: no network interface of this node has this address")
    return names[0]


def node_address(deployment: Deployment) -> tuple[str, str]:
    """(address, interface) of this node in the cluster; PlanError where it has none."""
    cluster = deployment.cluster
    if cluster.interface != "auto":
        found = addresses_of(cluster.interface)
        if not found:
            known = ", ".join(sorted(psutil.net_if_addrs()))
            raise PlanError(f"cluster.interface {cluster.interface!r}: no IPv4 address; interfaces here: {known}")
        return found[0], cluster.interface
    try:
        address = address_towards(cluster.head)
    except OSError as error:
        raise PlanError(f"cluster.head {cluster.head!r}: {error}; name an address that every node reaches") from None
    return address, interface_of(address)


# ---------------------------------------------------------------- checks


def _versions(deployment: Deployment) -> Iterator[Outcome]:
    python = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        yield "failed", f"Python {python}", "install Python 3.11 or newer"
    for line in metadata.requires("transfuse") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield "failed", f"{requirement.name} is not installed", f"pip install '{requirement}'"
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        told = f"{requirement.name} {version}"
        yield (OK if fits else "failed"), told, f"expected {requirement.specifier}: pip install -c constraints.txt ."


def _network(deployment: Deployment) -> Iterator[Outcome]:
    try:
        address, interface = node_address(deployment)
    except PlanError as error:
        yield "failed", str(error), "see [cluster] head and interface"
    else:
        yield OK, f"{address} on {interface}", ""


def _is_head(deployment: Deployment) -> Iterator[Outcome]:
    head = deployment.cluster.head
    try:
        address = socket.gethostbyname(head)
    except OSError as error:
        yield "failed", f"{head}: {error}", "name the head by an address, or add it to the name service"
        return
    here = {each for name in psutil.net_if_addrs() for each in addresses_of(name)}
    advice = "run --head on that node, and --join here"
    yield (OK if address in here else "failed"), f"cluster.head {head} is {address}", advice


def _ports(deployment: Deployment) -> Iterator[Outcome]:
    for port, what in ((deployment.cluster.port, "Ray's head"), (deployment.service_port, "the coordinator")):
        with socket.socket() as probe:
            try:
                probe.bind((deployment.cluster.head, port))
            except OSError as error:
                yield "failed", f"port {port} of {what}: {error.strerror}", "end what listens there, or take another"
            else:
                yield OK, f"port {port} is free for {what}", ""


def _head_answers(deployment: Deployment) -> Iterator[Outcome]:
    cluster = deployment.cluster
    try:
        with socket.create_connection((cluster.head, cluster.port), timeout=HEAD_TIMEOUT_S):
            yield OK, f"{cluster.head}:{cluster.port} answers", ""
    except OSError as error:
        # A node may come up before its head; `transfuse node --join` waits.
        advice = "start it with 'transfuse node FILE --head'; check routes and firewalls"
        yield "warning", f"{cluster.head}:{cluster.port}: {error}", advice


def _tokens(deployment: Deployment) -> Iterator[Outcome]:
    path = deployment.cluster.token_file
    if path is None:
        yield _waived(deployment, "token_file", "'transfuse tokens init FILE' makes one, for all nodes alike")
        return
    try:
        Tokens(path).own(SERVICE)
    except PlanError as error:
        yield "failed", str(error), "it must be there on every node, the same one"
    else:
        yield OK, f"{path} holds the fleet's token", ""


def _certificates(deployment: Deployment) -> Iterator[Outcome]:
    if deployment.cluster.tls_dir is None:
        yield _waived(deployment, "tls_dir", "'transfuse certs init DIR HOST=ADDRESS' makes them, copy DIR/HOST")
        return
    advice = "'transfuse certs add DIR HOST=ADDRESS --renew' makes one, copy its folder here"
    try:
        address, _ = node_address(deployment)
        deployment.security.identity()
        _, own = issued(deployment.security.folder)
    except (PlanError, ValueError) as error:
        yield "failed", str(error), advice
        return
    lasts = own.days_left >= 0
    yield (OK if lasts else "failed"), f"{own.path} is valid until {own.not_after:%Y-%m-%d}", advice
    yield (OK if address in own.names else "failed"), f"{own.path} is for {', '.join(own.names)}", advice


def _waived(deployment: Deployment, option: str, advice: str) -> Outcome:
    """What is not given: no matter on loopback, or where it was said so."""
    cluster = deployment.cluster
    fine = cluster.insecure_plaintext or is_loopback(f"{cluster.head}:0")
    return "warning" if fine else "failed", f"cluster.{option} is not set: nobody is kept out", advice


def _state(deployment: Deployment) -> Iterator[Outcome]:
    for path, what in ((deployment.cluster.state, "decisions"), (deployment.store, "the version store")):
        if path is not None:
            kind = file_system_of(path)
            told = f"{what}: {path} is on {kind}"
            yield "failed" if kind in VOLATILE else OK, told, "it is lost at a reboot; name a folder on a disk"


def _folders(deployment: Deployment) -> Iterator[Outcome]:
    for path in (deployment.cluster.state, deployment.cluster.logs, deployment.store):
        if path is None:
            continue
        there = _nearest(path)
        if not os.access(there, os.W_OK):
            yield "failed", f"{path} cannot be written", f"let {_user()} write {there}, or name another folder"
            continue
        free = shutil.disk_usage(there).free
        verdict: Verdict = OK if free >= MIN_FREE_BYTES else "failed"
        yield verdict, f"{path}: {free >> 20} MiB free", f"expected {MIN_FREE_BYTES >> 20} MiB: make room"


def _socket_paths(deployment: Deployment) -> Iterator[Outcome]:
    length = len(str(deployment.cluster.logs))
    advice = f"at most {MAX_SOCKET_FOLDER}: Ray keeps its sockets under it; name a shorter folder"
    yield (OK if length <= MAX_SOCKET_FOLDER else "failed"), f"cluster.logs has {length} characters", advice


def _shared_memory(deployment: Deployment) -> Iterator[Outcome]:
    wanted = deployment.cluster.shared_memory_bytes
    free = shutil.disk_usage("/dev/shm").free
    advice = f"expected {wanted >> 20} MiB: raise it (docker run --shm-size), or lower cluster.shared_memory_bytes"
    yield (OK if free >= wanted else "failed"), f"/dev/shm: {free >> 20} MiB free", advice


def _files(deployment: Deployment) -> Iterator[Outcome]:
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield (OK if limit >= MIN_FILES else "failed"), f"{limit} open files", f"expected {MIN_FILES}: ulimit -n 65536"


def _clock(deployment: Deployment) -> Iterator[Outcome]:
    """Leases count seconds, not dates; certificates and the times of versions want dates."""
    if not (synchronised := clock_is_synchronised()):
        told = "the kernel does not say that its clock is synchronised" if synchronised is False else "unknown"
        yield "warning", told, "run chronyd or ntpd"
    else:
        yield OK, "the kernel's clock is synchronised", ""


def _model(deployment: Deployment) -> Iterator[Outcome]:
    """Every node reads the model from its own disk."""
    for name, value in {"model": deployment.service["model"], **deployment.service.get("components", {})}.items():
        packaged = name == "model" and value == "smollm2"
        there = packaged or Path(value).exists()
        yield (OK if there else "failed"), f"service.{name} {value}", "not there; put it at the same path on every node"


def file_system_of(path: Path) -> str:
    """The type of the file system that holds a path, or will."""
    there = str(_nearest(path))
    mounts = [each for each in psutil.disk_partitions(all=True) if _is_under(there, each.mountpoint)]
    return max(mounts, key=lambda each: len(each.mountpoint)).fstype if mounts else "unknown"


def _is_under(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    absolute = path.resolve()
    return next(each for each in (absolute, *absolute.parents) if each.exists())


def _user() -> str:
    return psutil.Process().username()


def clock_is_synchronised() -> bool | None:
    """What adjtimex(2) says; None where it cannot be asked."""
    import ctypes

    unsynchronised = 5  # TIME_ERROR
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # modes 0: nothing is set
    except (OSError, AttributeError):
        return None
    return None if state < 0 else bool(state != unsynchronised)


@dataclass(frozen=True, slots=True)
class Check:
    """name; who runs it; what it yields."""

    name: str
    roles: frozenset[str]
    look: Callable[[Deployment], Iterator[Outcome]]


ALL, HEAD, JOIN = frozenset({"head", "join", "attach"}), frozenset({"head"}), frozenset({"join"})
NODES = HEAD | JOIN

CHECKS: tuple[Check, ...] = (
    Check("versions", ALL, _versions),
    Check("network", NODES, _network),
    Check("head", HEAD, _is_head),
    Check("head", JOIN, _head_answers),
    Check("ports", HEAD, _ports),
    Check("tokens", ALL, _tokens),
    Check("certificates", NODES, _certificates),
    Check("state", frozenset({"head", "attach"}), _state),
    Check("folders", frozenset({"head", "attach"}), _folders),
    Check("sockets", NODES, _socket_paths),
    Check("shared memory", NODES, _shared_memory),
    Check("files", NODES, _files),
    Check("clock", NODES, _clock),
    Check("model", ALL, _model),
)

MARKS: Mapping[Verdict, str] = {"ok": "ok", "warning": "WARNING", "failed": "FAILED"}


def as_text(findings: list[Finding], *, all_of_them: bool) -> str:
    """A line each; what is in order only where asked for, or counted."""
    shown = [each for each in findings if all_of_them or each.verdict != OK]
    lines = [
        f"{MARKS[each.verdict]:8} {each.check}: {each.found}" + (f"; {each.wanted}" if each.wanted else "")
        for each in shown
    ]
    counts = {verdict: sum(each.verdict == verdict for each in findings) for verdict in MARKS}
    return "\n".join([*lines, ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])
