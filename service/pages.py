"""A few read-only pages over HTTP: metrics for Prometheus, and what a browser is shown.

    pages = Pages("10.0.0.2:9464", {"/metrics": metrics.text}, guard)

They are protected as the calls beside them are: where those have certificates the pages are HTTPS, where those ask for
tokens so do the pages, for one of role read, and beyond loopback there are none without both. The token comes as
`Authorization: Bearer TOKEN`, or, from a browser, which asks its user, as the password of any name. A browser need show
no certificate. Anything but GET of a known path is refused.
"""

from __future__ import annotations

import base64
import binascii
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from weight_update.channels import Renewed, tls_context
from weight_update.errors import MemberError, WeightUpdateError

from .guard import SCHEME, Guard

log = logging.getLogger(__name__)

TIMEOUT_S = 10.0  # for a client to send its next byte, and to take ours
REQUEST_S = 30.0  # for all of a request and its answer
MAX_REQUESTS = 32  # at once; more are not answered
ROLE = "read"
BASIC = "Basic "
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
Page = Callable[[], tuple[str, bytes]]  # content type and body


class Pages:
    """Serves `pages`, by path, on `listen` (host:port, port 0 for any) in threads of its own. guard: of the calls
    beside them. PlanError: beyond loopback without certificates and tokens."""

    def __init__(self, listen: str, pages: Mapping[str, Page], guard: Guard) -> None:
        host, _, port = listen.rpartition(":")
        for missing in guard.security.require(listen, "pages on"):
            log.warning("--insecure-plaintext: pages on %s are open to whoever reaches it, without %s", listen, missing)
        try:
            self._server = _Server((host.strip("[]"), int(port)), _handler(pages, guard), guard)
        except OSError as error:
            raise MemberError(f"cannot listen on {listen}: {error}; is the port in use?") from None
        self.address = f"{host}:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="pages", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    """A thread a request, of bounded number and time; TLS with the certificates of the moment."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], guard: Guard) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._context = None if guard.security.tls_dir is None else Renewed(guard.security, tls_context)
        self._free = threading.Semaphore(MAX_REQUESTS)
        super().__init__(address, handler)

    def get_request(self) -> tuple[Any, Any]:
        connection, peer = super().get_request()
        if self._context is None:
            return connection, peer
        context, _ = self._context()
        # The handshake is the request's thread's: a client that says nothing keeps nobody else waiting.
        return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), peer

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        # A client that sends a byte every few seconds is cut off, too.
        limit = threading.Timer(REQUEST_S, self._cut, (request,))
        limit.daemon = True
        limit.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            limit.cancel()
            self._free.release()

    def _cut(self, request: socket.socket) -> None:
        try:
            socket.socket.shutdown(request, socket.SHUT_RDWR)  # TLS of it is another thread's
        except OSError:
            log.debug("a request had ended already")

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request of %s broke off", client_address[0])


def _shown(header: str) -> str:
    """An Authorization header as calls have it: a browser sends the token as the password of a name."""
    if not header.startswith(BASIC):
        return header
    try:
        told = base64.b64decode(header[len(BASIC) :], validate=True).decode("ascii")
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return SCHEME + told.partition(":")[2]


def _handler(pages: Mapping[str, Page], guard: Guard) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT_S
        server_version, sys_version = "transfuse", ""

        def do_GET(self) -> None:
            shown = _shown(self.headers.get("Authorization", ""))
            try:
                guard.find(shown, ROLE)
            except WeightUpdateError as error:
                if shown:  # a browser asks without first
                    guard.failed(self.client_address[0], "a page", str(error))
                self._answer(HTTPStatus.UNAUTHORIZED, "text/plain", f"{error}\n".encode())
                return
            page = pages.get(self.path.partition("?")[0])
            if page is None:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            self._answer(HTTPStatus.OK, *page())

        def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            asking = {"WWW-Authenticate": 'Basic realm="Transfuse: a token as the password"'}
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}
            for name, value in (headers | asking if status == HTTPStatus.UNAUTHORIZED else headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            log.debug("%s", self.address_string())  # neither paths nor headers

    return Handler
