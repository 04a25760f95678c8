"""A few read-only pages over HTTP: metrics for Prometheus, and what a browser is shown.

    pages = Pages("127.0.0.1:9464", {"/metrics": metrics.text})

Without certificates and tokens it listens on loopback only. Anything but GET of a known path is refused.
"""

from __future__ import annotations

import ipaddress
import logging
import ssl
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from weight_update.errors import MemberError, PlanError

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0  # for a client to send its request, and to take the answer
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
Page = Callable[[], tuple[str, bytes]]  # content type and body
Allowed = Callable[[str], bool]  # of an Authorization header


class Pages:
    """Serves `pages`, by path, on `listen` (host:port, port 0 for any) in threads of its own.

    tls, allowed: certificates, and who may read; both are needed off loopback.
    """

    def __init__(
        self,
        listen: str,
        pages: Mapping[str, Page],
        *,
        tls: ssl.SSLContext | None = None,
        allowed: Allowed | None = None,
    ) -> None:
        host, _, port = listen.rpartition(":")
        if not (is_loopback(host) or (tls and allowed)):
            raise PlanError(f"pages on {listen}: off loopback they need certificates and tokens; listen on 127.0.0.1")
        try:
            self._server = ThreadingHTTPServer((host, int(port)), _handler(pages, allowed))
        except OSError as error:
            raise MemberError(f"cannot listen on {listen}: {error}; is the port in use?") from None
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="pages", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _handler(pages: Mapping[str, Page], allowed: Allowed | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT_S
        server_version, sys_version = "transfuse", ""

        def do_GET(self) -> None:
            if allowed is not None and not allowed(self.headers.get("Authorization", "")):
                self.send_error(HTTPStatus.UNAUTHORIZED)
                return
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, body = page()
            self.send_response(HTTPStatus.OK)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            log.debug("%s", self.address_string())  # neither paths nor headers

    return Handler
