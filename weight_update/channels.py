"""Connections of both ends: options, certificates that are read again when they change, tokens on every call.

    channel = connect("host:port", security)
    credentials = server_credentials(security)      # None: no TLS
"""

from __future__ import annotations

import logging
import ssl
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc

from .errors import PlanError
from .security import FILES, Identity, Security

log = logging.getLogger(__name__)

CONTROL_MESSAGE_BYTES = 256 << 20  # a manifest of a million tensors is about 100 MiB
AUTHORIZATION = "authorization"
PLAINTEXT = Security()

# An error that lists fifty tensors is longer than gRPC's default of 8 KiB of metadata.
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", CONTROL_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 256 << 10),
    ("grpc.absolute_max_metadata_size", 512 << 10),
    ("grpc.http2.max_frame_size", (1 << 24) - 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


def connect(target: str, security: Security = PLAINTEXT) -> grpc.Channel:
    """A channel to `host:port`; it connects at the first call. PlanError: not without TLS and a token there."""
    security.require(target, "connecting to")
    options = [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", CONTROL_MESSAGE_BYTES)]
    identity = security.identity()
    if identity is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.certificate)
        channel = grpc.secure_channel(target, credentials, options=options)
    token = security.bearer()
    return grpc.intercept_channel(channel, _WithToken(token)) if token else channel


class _WithToken(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Shows a token with every call."""

    def __init__(self, token: str) -> None:
        self._pair = (AUTHORIZATION, f"Bearer {token}")

    def _call(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(details._replace(metadata=[*(details.metadata or ()), self._pair]), request)

    intercept_unary_unary = intercept_unary_stream = intercept_stream_unary = intercept_stream_stream = _call


class Channels:
    """One channel an address, a new one once certificates or tokens have changed. Calls under way keep the old."""

    def __init__(self, security: Security = PLAINTEXT) -> None:
        self._security = security
        self._guard = threading.Lock()  # guards the rest; nothing blocks under it
        self._made: dict[str, tuple[tuple[int, ...], grpc.Channel]] = {}
        self._stubs: dict[tuple[str, Callable[..., Any]], tuple[grpc.Channel, Any]] = {}
        self._former: list[grpc.Channel] = []

    def __call__(self, address: str) -> grpc.Channel:
        """The channel to host:port."""
        stamp = _stamp(self._security)
        with self._guard:
            made, channel = self._made.get(address, ((), None))
            if channel is None or made != stamp:
                if channel is not None:
                    self._former.append(channel)
                channel = connect(address, self._security)
                self._made[address] = (stamp, channel)
            return channel

    def stub(self, address: str, make: Callable[[grpc.Channel], Any]) -> Any:
        """What `make` made of the channel to host:port: to make a stub costs more than a call."""
        channel = self(address)
        with self._guard:
            known, stub = self._stubs.get((address, make), (None, None))
            if known is not channel:
                stub = make(channel)
                self._stubs[address, make] = (channel, stub)
            return stub

    def close(self) -> None:
        """Close them all."""
        with self._guard:
            for channel in (*self._former, *(channel for _, channel in self._made.values())):
                channel.close()
            self._made, self._stubs, self._former = {}, {}, []


def _stamp(security: Security) -> tuple[int, ...]:
    """Changes whenever a file does."""
    paths = [] if security.token_file is None else [security.token_file]
    paths += [security.folder / name for name in FILES] if security.tls_dir is not None else []
    return tuple(number for path in paths if path.exists() for number in (path.stat().st_mtime_ns, path.stat().st_ino))


# ---------------------------------------------------------------- servers


T = TypeVar("T")


class Renewed(Generic[T]):
    """What `make` makes of the certificates, made anew once they have changed; what does not fit is not taken up."""

    def __init__(self, security: Security, make: Callable[[Identity], T]) -> None:
        self._security, self._make = security, make
        self._guard = threading.Lock()  # guards the rest
        self._stamp = _stamp(security)
        self._made = self._fresh()

    def __call__(self) -> tuple[T, bool]:
        """As it is now, and whether it is another one than at the call before."""
        with self._guard:
            stamp = _stamp(self._security)
            if stamp == self._stamp:
                return self._made, False
            try:
                self._made, self._stamp = self._fresh(), stamp
            except PlanError as error:  # a copy under way: the key is of one, the certificate of the other
                self._stamp = ()
                log.warning("certificates kept as they were: %s", error)
                return self._made, False
            log.info("certificates taken up from %s", self._security.folder)
            return self._made, True

    def _fresh(self) -> T:
        identity = self._security.identity()
        assert identity is not None, "there are certificates"
        tls_context(identity)
        return self._make(identity)


def server_credentials(security: Security) -> grpc.ServerCredentials | None:
    """TLS that asks the other end for its certificate, and takes up new files at the next handshake; None without."""
    if security.tls_dir is None:
        return None
    latest = Renewed(security, _configuration)

    def changed() -> Any:
        configuration, is_new = latest()
        return configuration if is_new else None

    return grpc.dynamic_ssl_server_credentials(latest()[0], changed, require_client_authentication=True)


def _configuration(identity: Identity) -> Any:
    return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificate)], identity.ca)


def tls_context(identity: Identity) -> ssl.SSLContext:
    """For a server that asks for no certificate. PlanError unless the key is the certificate's; gRPC itself would only
    refuse every handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory(prefix="transfuse-") as scratch:  # ssl reads files only; 0700
        path = Path(scratch) / "pair.pem"
        path.touch(0o600)
        path.write_bytes(identity.certificate + b"\n" + identity.key)
        try:
            context.load_cert_chain(path)
            context.load_verify_locations(cadata=identity.ca.decode("ascii", "replace"))
        except (ssl.SSLError, ValueError) as error:
            raise PlanError(f"certificates: {error}; node.key must be the key of node.pem") from None
    return context
