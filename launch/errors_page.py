"""docs/errors.md, from the tables of error and exit codes. `python -m launch.errors_page` rewrites it."""

from __future__ import annotations

from pathlib import Path

from weight_update.codes import CODES

from .exits import EXIT_OF, EXITS

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"


def page() -> str:
    """The whole page."""
    exits = "\n".join(f"| {row.code} | {row.means} | {', '.join(row.errors) or '-'} |" for row in EXITS)
    codes = "\n\n".join(
        f"## {row.code}\n\n{row.means[0].upper()}{row.means[1:]}. Exit code {EXIT_OF[row.code]}.\n\n"
        f"**Cause.** {row.cause}\n\n**Cure.** {row.cure}"
        for row in CODES.values()
    )
    return (
        "# Error codes\n\nWritten by `python -m launch.errors_page`; `transfuse explain CODE` says the same. Every"
        " error that a command prints has\nits code in brackets, with `--json` as `error`; on the wire it is the"
        " trailing metadata `transfuse-error-code`.\n\n"
        f"| exit code | means | error codes |\n| --- | --- | --- |\n{exits}\n\n{codes}\n"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
