"""Who may call what, and how much: one interceptor before every method of every server of this service.

    guard = Guard(security)                     # of a coordinator, or of a rank
    server = grpc.server(pool, interceptors=[guard])
    caller().name                               # inside a method: whose token was shown

A call costs a thread while it runs, so what may hold one is bounded: calls of one peer, calls of those who only read,
and the time for which a client is waited for, be it for its next message or until it has read ours.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from weight_update.channels import AUTHORIZATION, PLAINTEXT
from weight_update.errors import BusyError, DeniedError, WeightUpdateError
from weight_update.security import ANYBODY, Principal, Security, Tokens

from .wire import refuse

log = logging.getLogger(__name__)

OPEN = ""  # asked for without a token
_METHODS: Mapping[str, Mapping[str, str]] = {
    "transfuse.v1.Control": {
        "read": "Describe Status Versions Watch Events",
        "push": "Begin Prepare Install Decide Abort WaitDurable",
        "admin": "Verify Reread Rollback Reset ReplicaAdd ReplicaRemove Pause Resume Drain",
    },
    "transfuse.v1.Data": {"push": "Stage", "service": "Fetch"},
    "transfuse.v1.Member": {
        "service": (
            "Hello Open Prepare Install Confirm Publish Adopt Reach Undo Abort Digest Pause Resume Drain Reread"
        )
    },
    "transfuse.v1.Generation": {"read": "Generate Denoise"},
    "grpc.health.v1.Health": {OPEN: "Check List Watch"},
    "grpc.reflection.v1alpha.ServerReflection": {"read": "ServerReflectionInfo"},
    "grpc.reflection.v1.ServerReflection": {"read": "ServerReflectionInfo"},
}
# method -> the least role that may call it; a method that is not here is refused
ROLE_OF: Mapping[str, str] = {
    f"/{service}/{method}": role
    for service, roles in _METHODS.items()
    for role, methods in roles.items()
    for method in methods.split()
}
# Methods whose requests may be as large as their server's limit; those of all others are small.
LARGE = frozenset(
    f"/transfuse.v1.{service}/{method}"
    for service, methods in {
        "Control": "Begin Prepare",
        "Member": "Open",
        "Data": "Stage Fetch",
        "Generation": "Generate Denoise",
    }.items()
    for method in methods.split()
)
SMALL_BYTES = 64 << 10
MAX_PEERS = 4096  # of whom is remembered how much they asked
SCHEME = "Bearer "


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one server. idle_s: for which a client is waited for. calls: at once, of one peer (address and token).
    reading_calls: of all who may not push. open_calls: of one address, without a token. calls_s, messages_s: of one
    peer, of one stream; as many more may come at once. slow_s: what a failed attempt waits for its answer."""

    idle_s: float = 60.0
    calls: int = 64
    reading_calls: int = 96
    open_calls: int = 8
    calls_s: float = 1000.0
    messages_s: float = 4000.0
    slow_s: float = 0.5
    slowed: int = 8  # at once; others are refused without a wait, so that waiting holds few threads


_CALLER: ContextVar[Principal] = ContextVar("caller", default=ANYBODY)


def caller() -> Principal:
    """Whose call this thread serves."""
    return _CALLER.get()


class Bucket:
    """So many things a second, and one second's worth at once. Not for several threads at a time."""

    def __init__(self, per_s: float) -> None:
        self._per_s = self._left = per_s
        self._then_s = time.monotonic()

    def take(self) -> float:
        """Take one; returns for how many seconds it is too early."""
        now_s = time.monotonic()
        self._left = min(self._per_s, self._left + (now_s - self._then_s) * self._per_s) - 1.0
        self._then_s = now_s
        return max(0.0, -self._left / self._per_s)


@dataclass(eq=False)
class _Call:
    """A call that runs. since_s: when the wait for its client began, inf while there is none."""

    context: grpc.ServicerContext
    since_s: float = float("inf")

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.since_s = time.monotonic()
        try:
            yield
        finally:
            self.since_s = float("inf")

    def read(self, requests: Iterator[Any], messages_s: float) -> Iterator[Any]:
        bucket = Bucket(messages_s)
        while True:
            with self.waiting():
                message = next(requests, None)
            if message is None:
                return
            if (early_s := bucket.take()) > 0:
                time.sleep(early_s)
            yield message


class Guard(grpc.ServerInterceptor):  # type: ignore[misc]
    """The interceptor of one server; stop it with the server."""

    def __init__(self, security: Security = PLAINTEXT, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.security = security
        self._tokens = None if security.token_file is None else Tokens(security.token_file)
        self._lock = threading.Lock()  # guards all below; nothing blocks under it
        self._calls: set[_Call] = set()
        self._of_peer: Counter[tuple[str, str]] = Counter()
        self._num_reading = 0
        self._buckets: OrderedDict[tuple[str, str], Bucket] = OrderedDict()
        self._failed: OrderedDict[str, int] = OrderedDict()
        self.num_failed = 0  # attempts without the right to
        self.num_dropped = 0  # calls whose client was waited for too long
        self._slowed = threading.Semaphore(self.limits.slowed)
        self._stopped = threading.Event()
        self._watch = threading.Thread(target=self._drop_idle, name="guard", daemon=True)
        self._watch.start()

    def stop(self) -> None:
        """Watch no calls any more."""
        self._stopped.set()
        self._watch.join()

    # -- tickets

    def ticket(self, transaction: int) -> bytes:
        """What lets this caller write into a transaction; b"" where no tokens are asked for."""
        return b"" if self._tokens is None else self._tokens.ticket(transaction, caller().name)

    def own_ticket(self, transaction: int) -> bytes:
        """What lets this service's own processes write into it."""
        return b"" if self._tokens is None else self._tokens.own_ticket(transaction)

    def require_ticket(self, ticket: bytes, transaction: int) -> None:
        """DeniedError unless this caller began the transaction."""
        if self._tokens is not None:
            self._tokens.require_ticket(ticket, transaction, caller().name)

    # -- the interceptor

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        """The method, behind all checks."""
        handler = continuation(details)
        if handler is None:
            return None
        try:
            who = self._who(details)
        except WeightUpdateError as error:
            denial = str(error)
            return grpc.stream_stream_rpc_method_handler(
                lambda _, context: self._deny(context, details.method, denial)
            )
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self._serve(handler, requests, context, who),
            _bounded(handler.request_deserializer, details.method),
            handler.response_serializer,
        )

    def _who(self, details: Any) -> Principal | None:
        """Whose call this is, None for one that needs no token; DeniedError."""
        role = ROLE_OF.get(details.method)
        if role is None:
            raise DeniedError("no role may call this method; it lacks its row in service/guard.py")
        if self._tokens is None:
            return ANYBODY
        if role == OPEN:
            return None
        shown = dict(details.invocation_metadata).get(AUTHORIZATION, "")
        return self.find(shown if isinstance(shown, str) else "", role)

    def find(self, shown: str, role: str) -> Principal:
        """Whose authorization this is; DeniedError unless it includes the role."""
        if self._tokens is None:
            return ANYBODY
        if not shown.startswith(SCHEME):
            raise DeniedError(f"a token of role {role} is needed; name its file with --token-file")
        who = self._tokens.find(shown[len(SCHEME) :])
        if who is None:
            raise DeniedError(f"this token is not known; ask for one of role {role}")
        if not who.may(role):
            raise DeniedError(f"{who.name} has role {who.role}; this takes {role}")
        return who

    def _deny(self, context: grpc.ServicerContext, method: str, why: str) -> NoReturn:
        self.failed(_host(context), method, why)
        refuse(context, DeniedError(f"{method.rpartition('/')[2]}: {why}"))

    def failed(self, host: str, what: str, why: str) -> None:
        """Somebody at `host` asked without the right to: count it, log it, and let it wait."""
        with self._lock:
            self.num_failed += 1
            count = self._failed[host] = self._failed.pop(host, 0) + 1
            while len(self._failed) > MAX_PEERS:
                self._failed.popitem(last=False)
        if not count & (count - 1):  # the 1st, 2nd, 4th, 8th: a flood of attempts is no flood of lines
            log.warning("denied %s to %s: %s (attempt %d from there)", what, host, why, count)
        if self._slowed.acquire(blocking=False):
            try:
                self._stopped.wait(self.limits.slow_s)
            finally:
                self._slowed.release()

    def _serve(
        self, handler: Any, requests: Iterator[Any], context: grpc.ServicerContext, who: Principal | None
    ) -> Iterator[Any]:
        call, peer = _Call(context), (_host(context), "" if who is None else who.name)
        try:
            self._enter(call, peer, who)
        except BusyError as error:
            refuse(context, error)
        token = _CALLER.set(who or Principal(name="", role="read"))
        try:
            feed = call.read(requests, self.limits.messages_s)
            answers = _answers(handler, feed, context)
            for answer in answers:
                with call.waiting():
                    yield answer
        finally:
            _CALLER.reset(token)
            self._leave(call, peer, who)

    def _enter(self, call: _Call, peer: tuple[str, str], who: Principal | None) -> None:
        limits = self.limits
        reads = who is None or not who.may("push")
        most = limits.open_calls if who is None else limits.calls
        with self._lock:
            if who is None or who.role != "service":
                bucket = self._buckets.setdefault(peer, Bucket(limits.calls_s))
                self._buckets.move_to_end(peer)
                while len(self._buckets) > MAX_PEERS:
                    self._buckets.popitem(last=False)
                if bucket.take() > 0:
                    raise BusyError(f"{peer[0]}: more than {limits.calls_s:.0f} calls a second; ask less often")
                if self._of_peer[peer] >= most:
                    raise BusyError(f"{peer[0]}: {most} calls run already; end one first")
                if reads and self._num_reading >= limits.reading_calls:
                    raise BusyError(f"{limits.reading_calls} calls of readers run already; try again later")
            self._of_peer[peer] += 1
            self._num_reading += reads
            self._calls.add(call)

    def _leave(self, call: _Call, peer: tuple[str, str], who: Principal | None) -> None:
        with self._lock:
            self._calls.discard(call)
            self._num_reading -= who is None or not who.may("push")
            self._of_peer[peer] -= 1
            if not self._of_peer[peer]:
                del self._of_peer[peer]

    def _drop_idle(self) -> None:
        while not self._stopped.wait(self.limits.idle_s / 8):
            before_s = time.monotonic() - self.limits.idle_s
            with self._lock:
                idle = [call for call in self._calls if call.since_s < before_s]
                self.num_dropped += len(idle)
            for call in idle:
                context: Any = call.context
                log.warning("dropped a call of %s: nothing heard for %.0f s", _host(context), self.limits.idle_s)
                context.cancel()


def _answers(handler: Any, feed: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
    """What a method answers, whatever its kind."""
    kind = f"{'stream' if handler.request_streaming else 'unary'}_{'stream' if handler.response_streaming else 'unary'}"
    request = feed if handler.request_streaming else next(feed, None)
    if request is None:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call ended before its request came")
    answer = getattr(handler, kind)(request, context)
    if handler.response_streaming:
        yield from answer
    else:
        yield answer


def _bounded(deserializer: Callable[[bytes], Any] | None, method: str) -> Callable[[bytes], Any] | None:
    """Refuses a large request before it is parsed, where small ones are expected."""
    if deserializer is None or method in LARGE:
        return deserializer

    def parse(data: bytes) -> Any:
        if len(data) > SMALL_BYTES:
            raise ValueError(f"{method}: a request of {len(data)} bytes, at most {SMALL_BYTES} are taken")
        return deserializer(data)

    return parse


def _host(context: grpc.ServicerContext) -> str:
    """The peer without its port."""
    return str(context.peer()).rpartition(":")[0]
