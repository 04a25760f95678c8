"""Commands that take something away say what will happen, and ask."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from weight_update.errors import UnconfirmedError

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do it without asking.")]


def confirm(what: str, *, yes: bool) -> None:
    """Return where `yes` was given, or whoever sits at the terminal says so; UnconfirmedError otherwise.

    what: what is about to happen, for people.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise UnconfirmedError(f"{what}\nnothing was done: there is no terminal to ask at; add --yes")
    sys.stderr.write(what + "\n")
    if not typer.confirm("Go on?", err=True):
        raise UnconfirmedError("nothing was done: the answer was no")
