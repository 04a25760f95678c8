"""`transfuse explain`: an error code's cause and cure."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json, emit


def explain(
    code: Annotated[str, typer.Argument(metavar="[CODE]", help="As an error prints it; without, all of them.")] = "",
    as_json: Json = False,
) -> None:
    """Say what an error code means and what to do.

    The same text is in docs/errors.md.
    """
    from weight_update.codes import CODES
    from weight_update.errors import PlanError

    from .exits import EXIT_OF
    from .tables import aligned

    if not code:
        rows = [{"code": row.code, "exit": EXIT_OF[row.code], "means": row.means} for row in CODES.values()]
        emit(rows, aligned(rows), as_json)
        return
    if code not in CODES:
        raise PlanError(f"code {code!r}: expected one of {', '.join(CODES)}")
    row = CODES[code]
    value = {"code": row.code, "exit_code": EXIT_OF[code], "means": row.means, "cause": row.cause, "cure": row.cure}
    head = f"{row.code}: {row.means} (exit code {EXIT_OF[code]})"
    emit(value, f"{head}\n\ncause: {row.cause}\n\ncure: {row.cure}", as_json)
