"""Who may do what, as values and files: where the certificates lie, and the tokens with their roles.

    TLS folder                                token file, 0600, of a service         of a trainer
      ca.pem     whom to trust                  read    dashboard tf_3kQ...           push ppo tf_9fB...
      node.pem   this node's certificate        push    ppo       tf_9fB...
      node.key   its key, 0600                  admin   oncall    tf_aa0...
                                                service fleet     tf_7Xw...

Both are read again when they change. Roles include those before them; `service` is the fleet's own: the coordinator and
the ranks show it to each other, nobody else has it. Nothing here speaks gRPC.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import DeniedError, PlanError

ROLES = ("read", "push", "admin", "service")
SERVICE = ROLES[-1]
TOKEN_BYTES = 32
MAX_FILE_BYTES = 1 << 20
MAX_NAME = 64
FILES = ("ca.pem", "node.pem", "node.key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Security:
    """How one process protects its connections; the default does nothing, and is enough on loopback only.

    tls_dir: folder with ca.pem, node.pem, node.key; "{host}" in it stands for this machine's name. token_file: of a
    service all tokens, of a client its own. insecure_plaintext: connect and listen beyond loopback without. role: shown
    where the file has several tokens; "" is the highest of people.
    """

    tls_dir: Path | None = None
    token_file: Path | None = None
    insecure_plaintext: bool = False
    role: str = ""

    def as_service(self) -> Security:
        """The same, for the coordinator and the ranks among themselves."""
        return replace(self, role=SERVICE)

    def require(self, address: str, doing: str) -> list[str]:
        """PlanError unless this suffices at this host:port; what is missing there, where it was waived."""
        if is_loopback(address):
            return []
        lacks = {"certificates (--tls-dir)": self.tls_dir, "tokens (--token-file)": self.token_file}
        missing = [name for name, path in lacks.items() if path is None]
        if missing and not self.insecure_plaintext:
            raise PlanError(
                f"{doing} {address}, which is not loopback, needs {' and '.join(missing)}; make them with 'transfuse"
                " certs init' and 'transfuse tokens init', or say --insecure-plaintext"
            )
        return missing

    @property
    def folder(self) -> Path:
        """Of this machine's certificates."""
        return Path(str(self.tls_dir).replace("{host}", socket.gethostname()))

    def identity(self) -> Identity | None:
        """The certificates as they are now; None without a folder. PlanError where they cannot be read."""
        if self.tls_dir is None:
            return None
        try:
            return Identity(*((self.folder / name).read_bytes() for name in FILES))
        except OSError as error:
            raise PlanError(f"{self.folder}: {error}; 'transfuse certs' makes {', '.join(FILES)}") from None

    def bearer(self) -> str:
        """The token that this process shows; "" without a file."""
        return "" if self.token_file is None else Tokens(self.token_file).own(self.role)


@dataclass(frozen=True, slots=True)
class Identity:
    """PEM bytes of the authority and of this node."""

    ca: bytes
    certificate: bytes
    key: bytes


def is_loopback(address: str) -> bool:
    """Whether host:port, or a Unix socket, is reached from this machine only."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Whom a token belongs to."""

    name: str
    role: str

    def may(self, role: str) -> bool:
        """Whether its role includes this one."""
        return ROLES.index(self.role) >= ROLES.index(role)


# Where no tokens are asked for, everybody is.
ANYBODY = Principal(name="", role=SERVICE)


class Tokens:
    """A token file, read again whenever it changes; one that cannot be read lets nobody in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()  # guards the two below
        self._stamp: tuple[int, ...] | None = None
        self._rows: list[tuple[Principal, str, bytes]] = []
        self._current()

    def find(self, token: str) -> Principal | None:
        """Whose this is. Every entry is compared, each in constant time, on hashes."""
        asked, found = _hash(token), None
        for principal, _, expected in self._current():
            if hmac.compare_digest(asked, expected):
                found = principal
        return found

    def own(self, role: str = "") -> str:
        """The token of this role; "" is the highest of people."""
        rows = {principal.role: token for principal, token, _ in reversed(self._current())}
        wanted = [role] if role else [each for each in reversed(ROLES) if each != SERVICE]
        found = next((rows[each] for each in wanted if each in rows), None)
        if found is None:
            raise PlanError(f"{self.path}: no token of role {role or 'read, push or admin'}; see 'transfuse tokens'")
        return found

    def principals(self) -> list[Principal]:
        """Everybody in the file."""
        return [principal for principal, _, _ in self._current()]

    def line(self, name: str) -> str:
        """The line of one of them: all that a client's file holds."""
        for principal, token, _ in self._current():
            if principal.name == name:
                return _line(principal, token)
        raise PlanError(f"{self.path}: no token named {name!r}; see 'transfuse tokens list {self.path}'")

    def ticket(self, transaction: int, name: str) -> bytes:
        """What lets the one named `name` write into this transaction and into no other."""
        return hmac.digest(self.own(SERVICE).encode(), f"stage {transaction} {name}".encode(), "sha256")

    def own_ticket(self, transaction: int) -> bytes:
        """The same for whoever holds the service's own token."""
        return self.ticket(transaction, next(each.name for each in self.principals() if each.role == SERVICE))

    def require_ticket(self, ticket: bytes, transaction: int, name: str) -> None:
        """DeniedError unless this is the ticket."""
        if not hmac.compare_digest(ticket, self.ticket(transaction, name)):
            raise DeniedError(f"stage: no ticket of {name!r} for transaction {transaction}; begin a push of your own")

    def _current(self) -> list[tuple[Principal, str, bytes]]:
        with self._guard:
            try:
                info = self.path.stat()
                stamp = (info.st_mtime_ns, info.st_size, info.st_ino, info.st_mode)
                if stamp != self._stamp:
                    self._rows, self._stamp = _read(self.path, info.st_mode), stamp
            except OSError as error:
                self._rows, self._stamp = [], None
                raise PlanError(f"token file: {error}; 'transfuse tokens init' makes one") from None
            return self._rows


def token_line(role: str, name: str) -> str:
    """A new token, as a line of a file. PlanError: no such role, or no name."""
    if role not in ROLES:
        raise PlanError(f"role {role!r}: expected one of {', '.join(ROLES)}")
    if not _is_name(name):
        raise PlanError(f"token name {name!r}: expected up to {MAX_NAME} letters, digits, '-', '_', '.' or '@'")
    return _line(Principal(name=name, role=role), f"tf_{secrets.token_urlsafe(TOKEN_BYTES)}")


def _line(principal: Principal, token: str) -> str:
    return f"{principal.role} {principal.name} {token}\n"


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and all(each.isalnum() or each in "-_.@" for each in name) and name.isascii()


def _read(path: Path, mode: int) -> list[tuple[Principal, str, bytes]]:
    if mode & 0o077:
        raise PlanError(f"{path}: mode {mode & 0o777:o} lets others read it; 'chmod 600 {path}'")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise PlanError(f"{path}: more than {MAX_FILE_BYTES} bytes; expected a line a token")
    lines = [line.split() for line in data.decode("ascii", "replace").splitlines()]
    rows = [line for line in lines if line and not line[0].startswith("#")]
    _check(path, rows)
    return [(Principal(role=role, name=name), token, _hash(token)) for role, name, token in rows]


def _check(path: Path, rows: Sequence[Sequence[str]]) -> None:
    names = [row[1] for row in rows if len(row) == 3]
    for number, row in enumerate(rows, 1):
        # Never the line itself: it holds a token.
        if len(row) != 3 or row[0] not in ROLES or not _is_name(row[1]) or len(row[2]) < TOKEN_BYTES:
            raise PlanError(f"{path}: entry {number} is no 'ROLE NAME TOKEN' with a role of {', '.join(ROLES)}")
        if names.count(row[1]) > 1:
            raise PlanError(f"{path}: entry {number}: the name {row[1]} is there twice")


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
