"""The commands' way to a running service: one call, its errors, and messages as plain values."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.errors import TransferError, WeightUpdateError
from weight_update.transport import COORDINATOR_KEY, USER_KEY, connect, error_of

from .access import security

# A call answered with one of these never reached a servicer: those end calls with other codes.
UNREACHED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


def ask(target: str, method: str, request: Any, *, timeout_s: float = 10.0) -> Any:
    """Call Control.`method` at `target`, which may be any node: a rank says where the coordinator is."""

    def once(channel: grpc.Channel) -> Iterator[Any]:
        yield getattr(pb_grpc.ControlStub(channel), method)(request, timeout=timeout_s, metadata=_caller())

    (reply,) = _answers(target, once)
    return reply


def listen(target: str, method: str, request: Any, *, timeout_s: float | None = None) -> Iterator[Any]:
    """The answers of a Control method that streams them."""

    def stream(channel: grpc.Channel) -> Any:
        return getattr(pb_grpc.ControlStub(channel), method)(request, timeout=timeout_s, metadata=_caller())

    return _answers(target, stream)


def generate(target: str, request: pb.GenerateRequest) -> Iterator[pb.Token]:
    """The tokens of all prompts, as they are drawn."""
    return _answers(target, lambda channel: pb_grpc.GenerationStub(channel).Generate(request))


def denoise(target: str, request: pb.DenoiseRequest) -> Iterator[pb.Denoised]:
    """The steps of all samples, as they are done."""
    return _answers(target, lambda channel: pb_grpc.GenerationStub(channel).Denoise(request))


def _answers(target: str, start: Callable[[grpc.Channel], Iterator[Any]], *, moved: bool = False) -> Iterator[Any]:
    """What a call answers. A node that names the coordinator is left for that one, once."""
    try:
        with connect(target, security()) as channel:
            yield from start(channel)
            return
    except grpc.RpcError as error:
        call: Any = error
        elsewhere = dict(call.trailing_metadata() or ()).get(COORDINATOR_KEY)
        if moved or not elsewhere:
            raise _error(error, target) from None
    yield from _answers(str(elsewhere), start, moved=True)


def _caller() -> tuple[tuple[str, str], ...]:
    """Who asks, for the service's record; metadata is ASCII."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    who = f"{user}@{socket.gethostname()}"
    return ((USER_KEY, who.encode("ascii", "replace").decode()),)


def _error(error: grpc.RpcError, target: str) -> WeightUpdateError:
    call: Any = error
    if call.code() not in UNREACHED:
        return error_of(error, target)
    return TransferError(
        f"{target}: no answer ({call.details()}); start a service there with"
        f" 'transfuse serve --listen {target}', or name another with --to HOST:PORT"
    )


def values(message: Any) -> dict[str, Any]:
    """A message as JSON-ready values under its field names; 64-bit integers stay integers."""
    return {field.name: _value(field, getattr(message, field.name)) for field in message.DESCRIPTOR.fields}


def _value(field: Any, value: Any) -> Any:
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    return [values(each) for each in value] if field.is_repeated else values(value)
