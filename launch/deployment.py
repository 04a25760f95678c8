"""A deployment: what every node of a service needs to know, from one TOML file that is the same on all of them.

    deployment = read(Path("transfuse.toml"))
    environment(deployment.cluster, "eth0")    # of every process of a node

    [cluster]  head, nodes, port, interface, state, logs, tls_dir, token_file, shared_memory_bytes, join_s, grace_s
    [service]  the fields of service.fleet.FleetConfig, and `port`; [service.store] directory, keep, keep_bytes
"""

from __future__ import annotations

import hmac
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from weight_update.errors import PlanError, raise_all
from weight_update.security import SERVICE, Security, Tokens

Role = Literal["head", "join", "attach"]

STRICT = ConfigDict(extra="forbid")
SERVICE_PORT = 7464
DERIVED = frozenset({"listen", "ray_address", "state_dir", "security"})  # of FleetConfig, from [cluster]


@checked(config=STRICT, frozen=True, kw_only=True, slots=True)
class Cluster:
    """The nodes.

    head: host name or address of the head, as every node reaches it. nodes: how many make the cluster, head included.
    port: of Ray's head. interface: network interface of this cluster's traffic, "auto" for the one that leads to the
    head. state: folder of the coordinator's decisions, on the head; it must outlive a reboot. logs: folder of Ray's
    sessions and logs. tls_dir: folder of this node's certificates, "{host}" in it is its name. token_file: the
    service's tokens, mode 0600, the same on every node. insecure_plaintext: go without both. shared_memory_bytes: of
    Ray's object store; nothing of the weights goes through it. join_s: how long nodes wait for each other. grace_s: how
    long a stop waits for running requests and an open push.
    """

    head: str
    nodes: int = 1
    port: int = 6379
    interface: str = "auto"
    state: Path = Path("/var/lib/transfuse")
    logs: Path = Path("/var/log/transfuse")
    tls_dir: Path | None = None
    token_file: Path | None = None
    insecure_plaintext: bool = False
    shared_memory_bytes: int = 256 << 20
    join_s: float = 300.0
    grace_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A file, read. service: values of [service], checked by `fleet_config`."""

    path: Path
    cluster: Cluster
    service: Mapping[str, Any] = field(default_factory=dict)

    @property
    def service_port(self) -> int:
        return int(self.service.get("port", SERVICE_PORT))

    @property
    def listen(self) -> str:
        """host:port of the coordinator."""
        return f"{self.cluster.head}:{self.service_port}"

    @property
    def security(self) -> Security:
        """Of every process of the service."""
        cluster = self.cluster
        return Security(
            tls_dir=cluster.tls_dir, token_file=cluster.token_file, insecure_plaintext=cluster.insecure_plaintext
        )

    @property
    def store(self) -> Path | None:
        """Folder of the version store."""
        directory = self.service.get("store", {}).get("directory")
        return None if directory is None else Path(directory)


def read(path: Path) -> Deployment:
    """PlanError with everything that is wrong with the file."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"{path}: {error}; a commented example is printed by 'transfuse node --example'") from None
    unknown = sorted(values.keys() - {"cluster", "service"})
    problems = [f"[{name}]: unknown; expected [cluster] and [service]" for name in unknown]
    cluster, service = values.get("cluster", {}), values.get("service", {})
    problems += _problems(Cluster, cluster, "cluster")
    problems += _service_problems(service)
    raise_all(PlanError, f"{path} is no deployment", problems)
    return Deployment(path=path, cluster=TypeAdapter(Cluster).validate_python(cluster), service=service)


def _service_problems(service: Any) -> list[str]:
    if not isinstance(service, Mapping):
        return ["service: expected a table"]
    problems = [f"service.{name}: follows from [cluster]; leave it out" for name in sorted(DERIVED & service.keys())]
    return problems if "model" in service else [*problems, "service.model: missing; name a folder, or 'smollm2'"]


def _problems(kind: Any, values: Any, where: str) -> list[str]:
    try:
        TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        return [
            f"{'.'.join((where, *map(str, each['loc'])))}: {each['msg']}, got {each['input']!r}"
            if each["type"] != "missing"
            else f"{'.'.join((where, *map(str, each['loc'])))}: missing"
            for each in error.errors()
        ]
    return []


def fleet_config(deployment: Deployment, ray_address: str) -> Any:
    """The FleetConfig of [service]. Imports torch and ray. ray_address: host:port, or "auto"."""
    from service.fleet import FleetConfig

    values = {name: value for name, value in deployment.service.items() if name != "port"}
    values |= {"listen": deployment.listen, "ray_address": ray_address, "state_dir": deployment.cluster.state}
    values |= {"security": deployment.security}
    known = {each.name for each in fields(FleetConfig)}
    unknown = [
        f"service.{name}: unknown; known: {', '.join(sorted(known - DERIVED))}"
        for name in sorted(values.keys() - known)
    ]
    raise_all(PlanError, f"{deployment.path} is no deployment", unknown + _problems(FleetConfig, values, "service"))
    return TypeAdapter(FleetConfig).validate_python(values)


def environment(cluster: Cluster, interface: str) -> dict[str, str]:
    """What every process of a node gets: Ray's token, and the interface of process groups."""
    ray = {"RAY_AUTH_MODE": "disabled"}
    if cluster.token_file is not None:
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ray_token(Tokens(cluster.token_file))}
    return {**ray, "GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}


def ray_token(tokens: Tokens) -> str:
    """The secret of Ray's processes. It follows from the fleet's own token, which cannot be told from it: Ray sends it
    over connections that are not encrypted."""
    return hmac.digest(tokens.own(SERVICE).encode(), b"ray", "sha256").hex()


def ray_command(cluster: Cluster, role: Role, address: str) -> list[str]:
    """`ray start` of a node. address: of this node, as the others reach it."""
    common = [f"--node-ip-address={address}", "--block", "--disable-usage-stats"]
    ends = {
        "head": ["--head", f"--port={cluster.port}", "--include-dashboard=false", f"--temp-dir={cluster.logs}"],
        "join": [f"--address={cluster.head}:{cluster.port}"],
    }
    return ["ray", "start", *ends[role], *common, f"--object-store-memory={cluster.shared_memory_bytes}"]
