"""How commands reach a service and protect one: three options before every command, and `transfuse tokens`."""

from __future__ import annotations

import os
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer

from weight_update.errors import PlanError
from weight_update.security import ROLES, Security, Tokens, token_line

from .options import Json, emit

app = typer.Typer(help="Who may do what.", no_args_is_help=True, rich_markup_mode=None, add_completion=False)

FIRST = (("read", "reader"), ("push", "trainer"), ("admin", "operator"), ("service", "fleet"))

TlsDir = Annotated[
    Path | None,
    typer.Option(
        "--tls-dir",
        envvar="TRANSFUSE_TLS_DIR",
        metavar="DIR",
        help="Folder of this node's ca.pem, node.pem, node.key; {host} in it is this machine's name.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", envvar="TRANSFUSE_TOKEN_FILE", metavar="FILE", help="Whose token is shown."),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure-plaintext",
        envvar="TRANSFUSE_INSECURE_PLAINTEXT",
        help="Listen and connect beyond loopback without certificates or tokens.",
    ),
]


NOTHING = Security()
# Typer hides the context of the command that runs from what the command calls.
_GIVEN: ContextVar[Security] = ContextVar("security", default=NOTHING)


def take(tls_dir: TlsDir = None, token_file: TokenFile = None, insecure_plaintext: Insecure = False) -> None:
    """Puts new weights into running, quantized, FSDP-sharded models."""
    use(
        Security(
            tls_dir=None if tls_dir is None else tls_dir.absolute(),
            token_file=None if token_file is None else token_file.absolute(),
            insecure_plaintext=insecure_plaintext,
        )
    )


def from_environment() -> Security:
    """For a trainer's own program: TRANSFUSE_TLS_DIR, TRANSFUSE_TOKEN_FILE, TRANSFUSE_INSECURE_PLAINTEXT."""
    tls_dir, token_file = (os.environ.get(f"TRANSFUSE_{name}") for name in ("TLS_DIR", "TOKEN_FILE"))
    return Security(
        tls_dir=Path(tls_dir) if tls_dir else None,
        token_file=Path(token_file) if token_file else None,
        insecure_plaintext=os.environ.get("TRANSFUSE_INSECURE_PLAINTEXT", "").lower() in ("1", "true", "yes", "on"),
    )


def security() -> Security:
    """Of the command that runs."""
    return _GIVEN.get()


def use(given: Security) -> None:
    """Of the command that runs, from elsewhere than its options."""
    _GIVEN.set(given)


File = Annotated[Path, typer.Argument(help="A token file; only its owner may read it.")]
Name = Annotated[str, typer.Argument(help="Whose token it is; shown in logs.")]


@app.command("init")
def init(file: File, as_json: Json = False) -> None:
    """Make a service's token file.

    One token a role: read, push, admin, and service, which the coordinator and the ranks show to each other. Every
    node of the service gets this file; a trainer or an operator gets one line of it, see 'transfuse tokens show'.
    """
    from .authority import write_whole

    text = "".join(token_line(role, name) for role, name in FIRST)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text.encode(), 0o600, new=True)
    emit(_rows(file), f"made {file}: {', '.join(name for _, name in FIRST)}", as_json)


@app.command("add")
def add(
    file: File,
    role: Annotated[str, typer.Argument(metavar="|".join(ROLES), help="What it may do; each includes those before.")],
    name: Name,
    as_json: Json = False,
) -> None:
    """Add a token; running services take it up.

    To take one back, remove its line from the file of the service.
    """
    from .authority import write_whole

    if name in {each.name for each in Tokens(file).principals()}:
        raise PlanError(f"{file}: there is a token named {name!r} already; choose another name")
    line = token_line(role, name)
    write_whole(file, file.read_bytes().rstrip(b"\n") + b"\n" + line.encode(), 0o600)
    emit(_rows(file), f"added {name} to {file}; 'transfuse tokens show {file} {name}' prints its line", as_json)


@app.command("list")
def list_(file: File, as_json: Json = False) -> None:
    """Names and roles, never a token."""
    from .tables import aligned

    rows = _rows(file)
    emit(rows, aligned(rows), as_json)


@app.command("show")
def show(file: File, name: Name) -> None:
    """Print the line of one name, for the file of whoever uses it."""
    typer.echo(Tokens(file).line(name), nl=False)


def _rows(file: Path) -> list[dict[str, Any]]:
    return [{"name": each.name, "role": each.role} for each in Tokens(file).principals()]
