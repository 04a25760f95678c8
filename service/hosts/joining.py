"""From an engine's loaded model to a member of a service."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import nn

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from quant.checkpoint import open_checkpoint
from quant.models import build_model, parameters_of
from service.rank import RankServer
from weight_update.transport import call, connect

from .boundary import Controls
from .member import Membership, serve
from .plan import plan_holdings

log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Joining:
    """checkpoint: what the engine loaded, for the names, shapes and formats of the manifest. format: as of `transfuse
    serve`. scheme: row of plan.SCHEMES. coordinator: host:port of a running service to join, "" to be met by one that
    starts later."""

    checkpoint: str
    format: str
    scheme: str
    coordinator: str = ""
    membership: Membership = field(default_factory=lambda: Membership(control_url=""))


def joined(model: nn.Module, controls: Controls, joining: Joining) -> RankServer:
    """Plan the engine's model and serve it. A service that it joins fills it with its own version first."""
    with open_checkpoint(joining.checkpoint) as checkpoint:
        ours = build_model(checkpoint.config_dir, joining.format, "plain", device="meta")
    holdings = plan_holdings(model, parameters_of(ours), joining.scheme)
    server = serve(holdings, controls, joining.membership, format=joining.format, layout=joining.scheme)
    if joining.coordinator:
        with connect(joining.coordinator) as channel:
            stub = pb_grpc.ControlStub(channel)
            request = pb.ReplicaAddRequest(addresses=[server.address])
            call(stub.ReplicaAdd, request, timeout_s=JOIN_TIMEOUT_S, where=joining.coordinator)
    return server
