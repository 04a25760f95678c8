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

from weight_update.channels import CHANNEL_OPTIONS, PLAINTEXT, connect, server_credentials
from weight_update.errors import (
    BusyError,
    DeniedError,
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
from weight_update.security import Security
from weight_update.transport import ERROR_CODE_KEY, error_of

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
    DeniedError: grpc.StatusCode.PERMISSION_DENIED,
    UnconfirmedError: grpc.StatusCode.FAILED_PRECONDITION,
    WeightUpdateError: grpc.StatusCode.INTERNAL,
}
MAX_WORKERS = 160  # calls that run at once; service.guard leaves 64 of them to those who push and to the fleet itself
MAX_CALLS = 1024  # those that wait for a thread included
REFUSALS: Counter[str] = Counter()  # calls that this process ended with an error, by its code

SERVER_OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.so_reuseport", 0),  # without this two servers share one port silently, and each gets half of the calls
    ("grpc.server_handshake_timeout_ms", 20_000),  # a connection that says nothing
    ("grpc.max_connection_idle_ms", 300_000),  # one without a call
    ("grpc.max_concurrent_streams", MAX_CALLS),
)


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
    services: Sequence[descriptor.ServiceDescriptor], *, max_message_bytes: int, guard: grpc.ServerInterceptor
) -> tuple[grpc.Server, health.HealthServicer]:
    """A server with health and reflection for these services; add the servicers, then `bind` it. guard: see
    service.guard."""
    server = grpc.server(
        futures.ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="rpc"),
        interceptors=[guard],
        options=[*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes)],
        maximum_concurrent_rpcs=MAX_CALLS,
    )
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    names = [service.full_name for service in services]
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    checks.set("", health_pb2.HealthCheckResponse.SERVING)  # it answers at all: what a liveness probe asks
    set_serving(checks, names, False)
    return server, checks


def bind(server: grpc.Server, listen: str, security: Security = PLAINTEXT) -> str:
    """Bind `host:port` (port 0: any free one) and start; returns the address to dial. PlanError: not there without
    certificates and tokens."""
    host = listen.rpartition(":")[0]
    for missing in security.require(listen, "listening on"):
        log.warning("--insecure-plaintext: %s is open to whoever reaches it, without %s", listen, missing)
    credentials = server_credentials(security)
    try:
        port = server.add_insecure_port(listen) if credentials is None else server.add_secure_port(listen, credentials)
    except RuntimeError as error:
        raise MemberError(f"cannot listen on {listen}: {error}; is the port in use?") from None
    server.start()
    return f"{host}:{port}"


def set_serving(checks: health.HealthServicer, names: Sequence[str], serving: bool) -> None:
    """What gRPC health answers for these services: what a readiness probe asks."""
    states = health_pb2.HealthCheckResponse
    for name in names:
        checks.set(name, states.SERVING if serving else states.NOT_SERVING)


__all__ = ["bind", "connect", "error_of", "make_server", "refuse", "refusing", "refusing_stream", "set_serving"]
