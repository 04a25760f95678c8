"""The one config file of administrators' commands: defaults for the options that have an environment variable.

    ~/.config/transfuse/config.toml, or the file that TRANSFUSE_CONFIG names

    [client]
    service = "coordinator.example:7464"     # what TRANSFUSE_SERVICE would say

A flag goes before the environment, the environment before the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from typer.core import TyperGroup, TyperOption

from weight_update.errors import PlanError, raise_all

PREFIX = "TRANSFUSE_"
ENV = PREFIX + "CONFIG"
TABLE = "client"
WHERE = f"[{TABLE}] of ~/.config/transfuse/config.toml, or of the file that {ENV} names"


def config_file() -> Path:
    """Where the file is looked for."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return Path(os.environ.get(ENV) or home / "transfuse" / "config.toml")


def read(path: Path) -> dict[str, Any]:
    """Values of the file; none where there is no file. PlanError where it cannot be read."""
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"config file {path}: {error}; mend it, or name another by {ENV}") from None
    unknown = [f"[{name}]: expected only [{TABLE}]" for name in found if name != TABLE]
    raise_all(PlanError, f"config file {path}", unknown)
    values = found.get(TABLE, {})
    if not isinstance(values, dict):
        raise PlanError(f"config file {path}: {TABLE} is no table; write [{TABLE}]")
    return values


def defaults(command: Any, values: dict[str, Any], path: Path) -> dict[str, Any]:
    """click's default_map of a command and of those below it. PlanError where a key is no option of any of them."""
    if not values:  # nor is any command loaded then
        return {}
    known = {name for each in _below(command) for name in _options(each)}
    unknown = [f"{key}: expected one of {', '.join(sorted(known))}" for key in values if key not in known]
    raise_all(PlanError, f"config file {path}", unknown)
    return _map(command, values)


def _map(command: Any, values: dict[str, Any]) -> dict[str, Any]:
    if isinstance(command, TyperGroup):
        return {name: _map(each, values) for name, each in command.commands.items()}
    return {parameter: values[key] for key, parameter in _options(command).items() if key in values}


def _below(command: Any) -> Iterable[Any]:
    if not isinstance(command, TyperGroup):
        return [command]
    return [leaf for each in command.commands.values() for leaf in _below(each)]


def _options(command: Any) -> dict[str, str]:
    """Key of the file -> the parameter's name in the code."""
    found = {}
    for each in command.params:
        if isinstance(each, TyperOption) and each.envvar and each.name:
            found[str(each.envvar).removeprefix(PREFIX).lower()] = each.name
    return found
