"""The commands' way to a running service: one call, its errors, and messages as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service.wire import connect, error_of
from weight_update.errors import TransferError, WeightUpdateError

from .access import security

# A call answered with one of these never reached a servicer: those end calls with other codes.
UNREACHED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


def ask(target: str, method: str, request: Any, *, timeout_s: float = 10.0) -> Any:
    """Call Control.`method` at `target`."""
    with connect(target, security()) as channel:
        try:
            return getattr(pb_grpc.ControlStub(channel), method)(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _error(error, target) from None


def generate(target: str, request: pb.GenerateRequest) -> Iterator[pb.Token]:
    """The tokens of all prompts, as they are drawn."""
    with connect(target, security()) as channel:
        try:
            yield from pb_grpc.GenerationStub(channel).Generate(request)
        except grpc.RpcError as error:
            raise _error(error, target) from None


def denoise(target: str, request: pb.DenoiseRequest) -> Iterator[pb.Denoised]:
    """The steps of all samples, as they are done."""
    with connect(target, security()) as channel:
        try:
            yield from pb_grpc.GenerationStub(channel).Denoise(request)
        except grpc.RpcError as error:
            raise _error(error, target) from None


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
