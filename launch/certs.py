"""`transfuse certs`: a private authority and the certificates of the nodes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json, emit

if TYPE_CHECKING:
    from .authority import Issued

app = typer.Typer(
    help="Certificates for TLS between nodes.", no_args_is_help=True, rich_markup_mode=None, add_completion=False
)

NODES = "HOST, or HOST=NAME,... with further names and addresses that it is dialed by; repeatable."
Folder = Annotated[Path, typer.Argument(help="Folder of the authority.")]
Days = Annotated[int, typer.Option(min=1, help="How long node certificates hold.")]


@app.command()
def init(
    directory: Folder,
    nodes: Annotated[list[str] | None, typer.Argument(metavar="[HOST]...", help=NODES)] = None,
    days: Days = 365,
    as_json: Json = False,
) -> None:
    """Make an authority, and certificates of nodes.

    An authority that is there stays as it is. Copy the folder DIR/HOST to its node, and nothing else: DIR/ca.key makes
    certificates, whoever has it is trusted.
    """
    from .authority import create, issue

    made = create(directory)
    rows = issue(directory, nodes or [], days=days)
    head = f"authority {'made' if made else 'there already, left as it is'}: {directory}"
    emit({"created": made, "certificates": [_row(each) for each in rows]}, "\n".join([head, _text(rows)]), as_json)


@app.command()
def add(
    directory: Folder,
    nodes: Annotated[list[str], typer.Argument(metavar="HOST...", help=NODES)],
    renew: Annotated[bool, typer.Option("--renew", help="Make new ones in place of those that still hold.")] = False,
    days: Days = 365,
    as_json: Json = False,
) -> None:
    """Make certificates of nodes.

    Running processes take up a renewed one without a restart, once it is copied to its node.
    """
    from .authority import issue

    rows = issue(directory, nodes, days=days, renew=renew)
    emit([_row(each) for each in rows], _text(rows), as_json)


@app.command()
def show(directory: Folder, as_json: Json = False) -> None:
    """Certificates of a folder and when they expire."""
    from .authority import issued

    rows = issued(directory)
    emit([_row(each) for each in rows], _text(rows), as_json)


def _row(each: Issued) -> dict[str, Any]:
    return {
        "node": each.node,
        "names": list(each.names),
        "not_after": each.not_after.isoformat(),
        "days_left": each.days_left,
        "path": str(each.path),
    }


def _text(rows: list[Issued]) -> str:
    from .tables import aligned

    table = [
        {
            "node": each.node or "(authority)",
            "until": f"{each.not_after:%Y-%m-%d}",
            "days left": "EXPIRED" if each.days_left < 0 else str(each.days_left),
            "names": ", ".join(each.names),
        }
        for each in rows
    ]
    return aligned(table) if table else "no node certificates yet; 'transfuse certs add DIR HOST' makes one"
