"""The one matcher of excluded modules: patterns of names, in a dialect that is always said.

Excludes(patterns=("*.norm.linear", "proj_out"), dialect="glob_full").matches("proj_out")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Dialect = Literal["glob_full", "per_part", "regex"]
Patterns = tuple[re.Pattern[str], ...]


class ConfigError(ValueError):
    """A quantization config cannot be used; the message lists every reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Excludes:
    """Patterns of module names, in one of three dialects.

    glob_full: '*' stands for anything, all else for itself; the whole name must match (diffusion exports).
    per_part: the same, and one part between dots may match alone, with or without a leading 'language_model.'
    regex: re.search, as tools take it on their command line.
    """

    patterns: tuple[str, ...] = ()
    dialect: Dialect = "glob_full"

    def __post_init__(self) -> None:
        if self.dialect not in MATCHERS:
            raise ConfigError(f"exclude dialect {self.dialect!r}: unknown; known: {', '.join(sorted(MATCHERS))}")
        _compiled(self.patterns, self.dialect == "regex")

    def matches(self, name: str) -> bool:
        """Whether a module is left in high precision; without patterns none is."""
        return MATCHERS[self.dialect](_compiled(self.patterns, self.dialect == "regex"), name)

    def packed(self, parts_of: Mapping[str, Sequence[str]]) -> frozenset[str]:
        """The packed projections that are excluded; parts_of: names of the parts (q, k, v) by that of the projection.

        A projection is one weight in one format: raises ConfigError that lists all whose parts disagree.
        """
        found = {name: {part: self.matches(part) for part in parts} for name, parts in parts_of.items()}
        require_agreement(found)
        return frozenset(name for name, parts in found.items() if any(parts.values()))


def require_agreement(excluded: Mapping[str, Mapping[str, bool]]) -> None:
    """Raise ConfigError listing the projections of which some parts are excluded and some are not."""
    split = [
        f"{name}: " + ", ".join(f"{part} {'excluded' if hit else 'quantized'}" for part, hit in sorted(parts.items()))
        for name, parts in excluded.items()
        if len(set(parts.values())) > 1
    ]
    if split:
        raise ConfigError(in_list("packed projections whose parts disagree; exclude all parts or none", split))


def in_list(head: str, problems: Sequence[str]) -> str:
    """One problem on the line, several below it."""
    return f"{head}: {problems[0]}" if len(problems) == 1 else "\n  - ".join([f"{head}:", *problems])


@cache
def _compiled(patterns: tuple[str, ...], raw: bool) -> Patterns:
    try:
        return tuple(re.compile(text if raw else re.escape(text).replace(r"\*", ".*")) for text in patterns)
    except re.error as error:
        raise ConfigError(f"exclude pattern {error.pattern!r}: no regular expression: {error}") from error


def _full(patterns: Patterns, name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns)


def _per_part(patterns: Patterns, name: str) -> bool:
    return any(_full(patterns, each) for each in (name, name.removeprefix("language_model."), *name.split(".")))


MATCHERS: dict[Dialect, Callable[[Patterns, str], bool]] = {
    "glob_full": _full,
    "per_part": _per_part,
    "regex": lambda patterns, name: any(pattern.search(name) for pattern in patterns),
}
