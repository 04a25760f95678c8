"""gRPC servers of this service: options, the table of errors, standard health and reflection, clients' connections."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NoReturn

import grpc
from google.protobuf import descriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from weight_update.errors import (
    BusyError,
    DigestError,
    LayoutError,
    ManifestError,
    MemberError,
    PlanError,
    StoreError,
    TransferError,
    UnconfirmedError,
    VersionError,
    WeightUpdateError,
)
from weight_update.transport import CHANNEL_OPTIONS, ERROR_CODE_KEY, connect, error_of

log = logging.getLogger(__name__)

STATUS_CODES: Mapping[type[WeightUpdateError], grpc.StatusCode] = {
    ManifestError: grpc.StatusCode.INVALID_ARGUMENT,
    PlanError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    LayoutError: grpc.StatusCode.FAILED_PRECONDITION,
    DigestError: grpc.StatusCode.DATA_LOSS,
    TransferError: grpc.StatusCode.DATA_LOSS,
    VersionError: grpc.StatusCode.FAILED_PRECONDITION,
    BusyError: grpc.StatusCode.ABORTED,
    MemberError: grpc.StatusCode.INTERNAL,
    StoreError: grpc.StatusCode.INTERNAL,
    UnconfirmedError: grpc.StatusCode.FAILED_PRECONDITION,
    WeightUpdateError: grpc.StatusCode.INTERNAL,
}
MAX_WORKERS = 64
REFUSALS: Counter[str] = Counter()  # calls that this process ended with an error, by its code

# Without this two servers share one port silently, and each gets half of the calls.
SERVER_OPTIONS = (*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0))


def refuse(context: grpc.ServicerContext, error: WeightUpdateError) -> NoReturn:
    """End the call with this error; the other end raises it again."""
    REFUSALS[error.code] += 1
    context.set_trailing_metadata(((ERROR_CODE_KEY, error.code),))
    context.abort(STATUS_CODES[type(error)], str(error))
    raise AssertionError("abort returned")


def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    """A unary servicer method whose errors become the call's status."""

    @functools.wraps(method)
    def wrapped(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return method(self, request, context)
        except WeightUpdateError as error:
            refuse(context, error)
        except ValueError as error:
            refuse(context, ManifestError(str(error)))

    return wrapped


def refusing_stream(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same for a method that streams its answer."""

    @functools.wraps(method)
    def wrapped(self: Any, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from method(self, request, context)
        except WeightUpdateError as error:
            refuse(context, error)
        except ValueError as error:
            refuse(context, ManifestError(str(error)))

    return wrapped


def make_server(
    services: Sequence[descriptor.ServiceDescriptor], *, max_message_bytes: int
) -> tuple[grpc.Server, health.HealthServicer]:
    """A server with health and reflection for these services; add the servicers, then `bind` it."""
    options = [*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)]
    server = grpc.server(futures.ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="rpc"), options=options)
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [service.full_name for service in services]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    for name in ("", *names):
        checks.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    return server, checks


def bind(server: grpc.Server, listen: str) -> str:
    """Bind `host:port` (port 0: any free one) and start; returns the address to dial."""
    host = listen.rpartition(":")[0]
    try:
        port = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise MemberError(f"cannot listen on {listen}: {error}; is the port in use?") from None
    server.start()
    return f"{host}:{port}"


def set_serving(checks: health.HealthServicer, names: Sequence[str], serving: bool) -> None:
    """What gRPC health answers for these services and for the server as a whole."""
    states = health_pb2.HealthCheckResponse
    for name in ("", *names):
        checks.set(name, states.SERVING if serving else states.NOT_SERVING)


__all__ = ["bind", "connect", "error_of", "make_server", "refuse", "refusing", "refusing_stream", "set_serving"]
