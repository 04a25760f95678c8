"""A rank server in the worker process of an engine that already runs: it joins a coordinator as one replica."""

from __future__ import annotations

import json
import logging
import urllib.request
from dataclasses import dataclass
from typing import Any

from service.faults import Faults
from service.rank import RankIdentity, RankServer
from service.witness import Witness
from weight_update.errors import PlanError
from weight_update.holdings import Holdings
from weight_update.receiver import Receiver

from .boundary import Controls, Foreign

log = logging.getLogger(__name__)

TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """How a worker joins.

    control_url: of the engine's own HTTP server, http://host:port. listen: host:port of the rank server, which the
    coordinator is told. replica: this engine's number. memory_budget_bytes: above idle, for a push.
    """

    control_url: str
    listen: str = "127.0.0.1:0"
    replica: int = 0
    memory_budget_bytes: int | None = None


def require_one_rank(engine: str, world: int) -> None:
    """Raise PlanError for a model that is split over workers."""
    if world != 1:
        raise PlanError(
            f"{engine} runs this model on {world} workers, expected 1: row-parallel layers split columns, routes are"
            " of whole rows; run one worker an engine (data parallel), or a service of our own actors"
        )


def serve(holdings: Holdings, controls: Controls, membership: Membership, *, format: str, layout: str) -> RankServer:
    """The rank server of an engine's worker, serving; stop() it when the engine ends."""
    receiver = Receiver.of(holdings, memory_budget_bytes=membership.memory_budget_bytes)
    server = RankServer(
        identity=RankIdentity(replica=membership.replica, rank=0, format=format, layout=layout),
        receiver=receiver,
        engine=Foreign(controls),
        reshard=lambda: None,
        faults=Faults(),
        listen=membership.listen,
        witness=Witness(receiver, None),
    )
    log.info("%s: replica %d of a service at %s", controls.name, membership.replica, server.address)
    return server


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """Calls to an engine's HTTP server. Errors: OSError, with what the server said."""

    url: str
    api_key: str = ""

    def post(self, path: str, body: dict[str, Any] | None = None) -> None:
        """POST JSON; anything but success raises."""
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        data = json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url.rstrip("/") + path, data=data, headers=headers, method="POST")
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            said = reply.read()
        if said and (answer := _parsed(said)).get("success") is False:
            raise OSError(f"{path}: {answer.get('message', said)}")


def _parsed(said: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(said)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
