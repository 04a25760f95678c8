"""Ways to a rank that can be broken: a TCP port in front of its door, and a gRPC relay that spoils single messages.

proxy = Proxy("127.0.0.1:50051")
channel = connect(proxy.address)
proxy.cut(refuse_s=3.0)             # every connection breaks, new ones are refused for a while
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from itertools import chain
from typing import Any

import grpc

from weight_update.transport import STAGE, connect

PIECE_BYTES = 64 << 10
SPOILED_CHUNK = 2  # message 0 opens the stream, 1 is the first chunk


class Proxy:
    """A TCP port in front of `target`. bytes_per_s: of everything that goes to the target, 0 for no bound."""

    def __init__(self, target: str, *, bytes_per_s: float = 0.0) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._listener = socket.create_server((host, 0))
        self.address = f"{host}:{self._listener.getsockname()[1]}"
        self.bytes_per_s = bytes_per_s
        self.num_bytes = 0  # that went to the target
        self.num_connections = 0
        self._guard = threading.Lock()  # guards the two below
        self._sockets: set[socket.socket] = set()
        self._refuse_until_s = 0.0
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def cut(self, refuse_s: float = 0.0) -> None:
        """Break every connection, as a restarted switch does; refuse new ones for some seconds."""
        with self._guard:
            self._refuse_until_s = time.monotonic() + refuse_s
            broken, self._sockets = self._sockets, set()
        for each in broken:
            _close(each)

    def close(self) -> None:
        """Stop listening, break what is connected."""
        _close(self._listener)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if time.monotonic() < self._refuse_until_s:
                _close(near)
                continue
            try:
                far = socket.create_connection(self._target)
            except OSError:
                _close(near)
                continue
            self.num_connections += 1
            with self._guard:
                self._sockets |= {near, far}
            for source, sink, counts in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(source, sink, counts), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                if counts:
                    self.num_bytes += len(data)
                    if self.bytes_per_s:
                        time.sleep(len(data) / self.bytes_per_s)
                sink.sendall(data)
        _close(source)
        _close(sink)


def _close(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()


# ---------------------------------------------------------------- single messages

Messages = Iterator[bytes]


def _changed(messages: Messages, change: Callable[[bytes], list[bytes]]) -> Messages:
    for number, message in enumerate(messages):
        yield from change(message) if number == SPOILED_CHUNK else [message]


def _reordered(messages: Messages) -> Messages:
    """The spoiled chunk changes places with the one after it."""
    for number, message in enumerate(messages):
        following = next(messages, None) if number == SPOILED_CHUNK else None
        yield from (message,) if following is None else (following, message)


def _flipped(message: bytes) -> bytes:
    """One bit of the payload, which ends the message."""
    return message[:-100] + bytes([message[-100] ^ 4]) + message[-99:]


SPOILS: Mapping[str, Callable[[Messages], Messages]] = {
    "dropped": lambda messages: _changed(messages, lambda message: []),
    "duplicated": lambda messages: _changed(messages, lambda message: [message, message]),
    "reordered": _reordered,
    "truncated": lambda messages: _changed(messages, lambda message: [message[: len(message) // 2]]),
    "bit-flipped": lambda messages: _changed(messages, lambda message: [_flipped(message)]),
}


class Relay:
    """A gRPC server that hands the Stage streams of `target` on, and spoils the first one."""

    def __init__(self, target: str, spoil: Callable[[Messages], Messages]) -> None:
        self._channel = connect(target)
        self._stage = self._channel.stream_stream(STAGE, request_serializer=None, response_deserializer=None)
        self._spoils = chain([spoil])
        self._server = grpc.server(
            futures.ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 1 << 30)]
        )
        handler = grpc.stream_stream_rpc_method_handler(
            self._hand_on, request_deserializer=None, response_serializer=None
        )
        service, _, method = STAGE.strip("/").partition("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def close(self) -> None:
        """End all calls."""
        self._server.stop(grace=None).wait()
        self._channel.close()

    def _hand_on(self, messages: Messages, context: grpc.ServicerContext) -> Iterator[Any]:
        replies = self._stage(next(self._spoils, iter)(messages))
        context.add_callback(replies.cancel)
        try:
            yield from replies
        except grpc.RpcError as error:
            call: Any = error
            context.set_trailing_metadata(call.trailing_metadata() or ())
            context.abort(call.code(), call.details())
