"""The `transfuse` command: a table of commands.

A command is loaded when it is asked for, and imports what it needs when it runs: neither the help nor the commands of
administrators load torch or ray.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from weight_update.errors import WeightUpdateError

from . import access, exits, settings

# module -> its commands, in the order of the help; "name=app" is a group of commands
MODULES = {
    "running": "demo demo-diffusion serve push probe",
    "node": "node doctor",
    "admin": "status describe versions verify pause resume drain abort watch events",
    "top": "top",
    "explain": "explain",
    "replay": "replay",
    "store": "rollback reset export",
    "planning": "plan simulate",
    "denoise": "denoise",
    "compare": "compare",
    "tools": "calibrate build-mixed convert-fp8",
    "proofs": "formats conformance chaos",
    "replicas": "replica=app",
    "certs": "certs=app",
    "access": "tokens=app",
}
# command -> module, function
COMMANDS: Mapping[str, tuple[str, str]] = {
    name: (module, attribute or name.replace("-", "_"))
    for module, names in MODULES.items()
    for name, _, attribute in (each.partition("=") for each in names.split())
}


class Loaded(Mapping[str, Any]):
    """Commands by name, each loaded at its first use: to prepare all of them takes longer than most of them run."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            module, attribute = COMMANDS[name]
            found = getattr(import_module(f"{__package__}.{module}"), attribute)
            self._made[name] = made = get_command(found if isinstance(found, typer.Typer) else _app_of(found))
            made.name = name
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class Commands(TyperGroup):
    """The group of them all."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.commands: Any = Loaded()


def _app_of(function: Any) -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(function)
    return app


app = typer.Typer(
    name="transfuse",
    cls=Commands,
    help="Puts new weights into running, quantized, FSDP-sharded models.",
    epilog=f"\b\nExit codes:\n{exits.as_text()}\n\nOptions with an environment variable come from {settings.WHERE}.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.callback()(access.take)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; an error of weight_update.errors becomes one message on stderr and its exit code."""
    # Trainer and ranks often share cores here. A thread of OpenMP that waits for its turn spins by default: a step of
    # the demo's trainer beside other work took 7.2 s so, and 1.2 s with threads that sleep. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # It warns that a local cluster is protected. Its parent will not do: importing ray sets that level again.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    given = list(sys.argv[1:] if args is None else args)
    try:
        command, path = get_command(app), settings.config_file()
        command(args=given, prog_name="transfuse", default_map=settings.defaults(command, settings.read(path), path))
    except WeightUpdateError as error:
        code = exits.exit_code(error)
        told = {"error": error.code, "message": str(error), "exit_code": code}
        text = f"transfuse: [{error.code}] {error}\n  'transfuse explain {error.code}' says more"
        sys.stderr.write((json.dumps(told) if "--json" in given else text) + "\n")
        sys.exit(code)
