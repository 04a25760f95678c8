"""Exit codes: what scripts can rely on. One table; the command's help and the README print it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weight_update.errors import ERRORS, WeightUpdateError


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """One code. errors: the codes of weight_update.errors that end with it."""

    code: int
    means: str
    errors: tuple[str, ...] = ()


EXITS: tuple[Exit, ...] = (
    Exit(code=0, means="done"),
    Exit(
        code=1,
        means="failed: a rank, the version store, or a digest that does not match",
        errors=("internal", "digest", "member", "store"),
    ),
    Exit(code=2, means="usage: see --help"),
    Exit(code=3, means="no connection, or it broke", errors=("transfer",)),
    Exit(code=4, means="refused: the input does not fit; nothing was changed", errors=("manifest", "plan", "layout")),
    Exit(code=5, means="busy: another push is open", errors=("busy",)),
    Exit(code=6, means="not the current version, or no such version", errors=("version",)),
    Exit(code=7, means="denied: the token or its role; see 'transfuse tokens --help'", errors=("denied",)),
    Exit(code=8, means="not confirmed, nothing was done: answer yes, or add --yes", errors=("unconfirmed",)),
    Exit(code=130, means="interrupted; whatever the command started has stopped"),
)

EXIT_OF: Mapping[str, int] = {error: row.code for row in EXITS for error in row.errors}
assert EXIT_OF.keys() == ERRORS.keys()


def exit_code(error: WeightUpdateError) -> int:
    """The exit code of a command that ended with this error."""
    return EXIT_OF[error.code]


def as_text() -> str:
    """The table, for --help."""
    return "\n".join(f"  {row.code:>3}  {row.means}" for row in EXITS)
