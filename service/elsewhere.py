"""A rank's answer to who takes it for the coordinator: where that one is. Any node is a way into the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import grpc

from protos import transfuse_pb2 as pb
from weight_update.transport import COORDINATOR_KEY

CONTROL = pb.DESCRIPTOR.services_by_name["Control"].full_name


class Elsewhere(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Control on a rank. who: this rank. where: host:port of the coordinator, "" where none was heard from."""

    def __init__(self, who: str, where: Callable[[], str]) -> None:
        self._who, self._where = who, where

    def service(self, details: Any) -> Any:
        """The handler of a call to Control, None for all others."""
        if not details.method.startswith(f"/{CONTROL}/"):
            return None
        return grpc.unary_unary_rpc_method_handler(self._send_on)

    def _send_on(self, request: bytes, context: grpc.ServicerContext) -> NoReturn:
        where = self._where()
        if not where:
            context.abort(
                grpc.StatusCode.UNAVAILABLE, f"this is {self._who}, which has heard from no coordinator; ask it there"
            )
        context.set_trailing_metadata(((COORDINATOR_KEY, where),))
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is {self._who}; the coordinator is at {where}")
        raise AssertionError("abort returned")
