"""Who asked this service for what: a record of every call that changes something, made before it is carried out.

The record is the coordinator's append-only table of events, which `transfuse events` shows. What the protocol does by
itself lies in the same table without a caller.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from weight_update.errors import MemberError, WeightUpdateError
from weight_update.messages import Notify
from weight_update.transport import USER_KEY

from .guard import caller

MAX_TEXT = 200  # characters of what a caller may put into a record


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """who: whose token was shown, and who the client says it is. peer: where the call came from, as gRPC says."""

    who: str = ""
    peer: str = ""

    @classmethod
    def of(cls, context: Any) -> Caller:
        """The caller of an RPC."""
        given = dict(context.invocation_metadata() or ())
        named, said = caller().name, clean(given.get(USER_KEY, ""))
        who = f"{named} ({said})" if named and said else named or said or "unnamed"
        return cls(who=who, peer=clean(context.peer() or ""))


Tell = Callable[[Notify, Caller], None]


@contextmanager
def recorded(tell: Tell, context: Any, kind: str, version: int, text: str = "") -> Iterator[None]:
    """Around a call that changes something: it is recorded first, and once more where it is refused."""
    by = Caller.of(context)

    def record(said: str) -> None:
        try:
            tell(Notify(kind=kind, version=version, transaction=0, text=said), by)
        except sqlite3.Error as error:
            why = f"it cannot be recorded: {error}; free the disk of the state file"
            raise MemberError(f"{kind}: not done, since {why}") from None

    record(clean(text))
    try:
        yield
    except WeightUpdateError as error:
        record(f"refused [{error.code}] {clean(str(error))}")
        raise


def clean(text: str | bytes) -> str:
    """One line of printable characters, of bounded length."""
    said = text.decode("ascii", "replace") if isinstance(text, bytes) else text
    line = "".join(letter if letter.isprintable() else " " for letter in said[: 2 * MAX_TEXT])
    return line if len(line) <= MAX_TEXT else line[: MAX_TEXT - 3] + "..."
