"""Trainer and checkpoint names to the names of a model, by tables of rules that read both ways.

    names = NAME_MAPS["bfl_flux2"].into("transformer")              # the tables: quant.name_maps
    names.forward("double_blocks.0.img_attn.qkv.weight")            # three links: its thirds are to_q, to_k, to_v
    names.reverse("transformer.transformer_blocks.0.attn.to_k.weight")
    names.prove_bijective(checkpoint_names, model_names)            # or NameMapError with every mismatch

Wrapper prefixes and stacked experts are taken apart here too, for any model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from .formats import FORMATS

# Modules that wrap others leave their attribute in the name, anywhere in it:
# torch.compile, FSDP1, activation checkpointing, DDP.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")

# Transformers keeps experts stacked; checkpoints name them one by one. Stacked gate_up_proj is [E, 2I, H], gate first.
STACKED: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"^(?P<prefix>.*\.experts)\.gate_up_proj$"), ("gate_proj", "up_proj")),
    (re.compile(r"^(?P<prefix>.*\.experts)\.down_proj$"), ("down_proj",)),
)

PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]+))?\}")
PLACEHOLDERS = {"n": r"\d+"}  # any other one, unless it brings a pattern, is one part of a dotted name

# What comes with the weight of a quantized module, and need not be among a model's names.
COMPANIONS = frozenset(part.suffix for fmt in FORMATS.values() for part in fmt.components) - {"weight", "bias"}

MAX_HINTS, MAX_NAMES = 10, 20  # of one kind of mismatch: names searched for near ones, and names shown


class NameMapError(ValueError):
    """Names do not map onto a model one to one; the message lists every one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Rows [row0, row1) of expert `expert` of a stacked parameter, under their checkpoint name."""

    name: str
    expert: int
    row0: int
    row1: int


@lru_cache(maxsize=1 << 16)
def canonical_name(name: str) -> str:
    """A parameter's name without the prefixes of wrapper modules."""
    return WRAPPERS.sub("", name)


def expert_parts(name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
    """The checkpoint parameters in a stacked experts parameter [E, rows, columns]; none when it is not one."""
    for pattern, projections in STACKED:
        match = pattern.match(name)
        if match and len(shape) == 3:
            rows = shape[1] // len(projections)
            return tuple(
                Part(
                    name=f"{match['prefix']}.{expert}.{projection}.weight",
                    expert=expert,
                    row0=i * rows,
                    row1=(i + 1) * rows,
                )
                for expert in range(shape[0])
                for i, projection in enumerate(projections)
            )
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Rows [start, stop) of a tensor along dim 0, counted in 1/of of all its rows: the whole by default."""

    name: str
    start: int = 0
    stop: int = 1
    of: int = 1

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (0, self.of)

    def rows(self, num_rows: int) -> tuple[int, int]:
        """The rows [first, last) of a tensor of num_rows."""
        if num_rows % self.of:
            raise NameMapError(
                f"{self.name}: {num_rows} rows do not divide into {self.of} equal parts; wrong name map?"
            )
        return num_rows // self.of * self.start, num_rows // self.of * self.stop

    def rows_of_whole(self, num_rows: int) -> int:
        """The rows of the tensor, of which num_rows are this share."""
        return num_rows * self.of // (self.stop - self.start)

    def overlaps(self, other: Share) -> bool:
        return self.start * other.of < other.stop * self.of and other.start * self.of < self.stop * other.of


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The rows of one share, in a checkpoint or at a trainer, are the rows of the other in the model."""

    source: Share
    target: Share


@dataclass(frozen=True, slots=True)
class NameRule:
    """A checkpoint name and the name of the model that its tensor becomes, or the names of those that it packs.

    Names are regexes with placeholders: {n} is a number, {x:q|k|v} what its own pattern says, any other one part of a
    dotted name. Every placeholder of `source` stands in every target, so that the rule reads both ways.
    sizes: relative rows of the parts that the source packs, equal ones by default.
    fills: where each of them lies in its target, as (start, stop, of): ((0, 1, 3),) is the first third of a target that
    packs what the checkpoint keeps apart; the whole of it by default.
    """

    source: str
    targets: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    fills: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        wanted = _placeholders(self.source).keys()
        for target in self.targets:
            if _placeholders(target).keys() != wanted:
                raise NameMapError(
                    f"rule {self.source} -> {target}: the placeholders differ; use {sorted(wanted)} in both"
                )
        for field in (self.sizes, self.fills):
            if field and len(field) != len(self.targets):
                raise NameMapError(f"rule {self.source}: {len(field)} shares for {len(self.targets)} targets")

    def forward(self, name: str) -> Iterator[Link]:
        """The links of a checkpoint name; none where the rule is for another."""
        match = _pattern(self.source, self.source).fullmatch(name)
        for i, target in enumerate(self.targets if match else ()):
            assert match is not None
            yield self._link(i, name, _filled(target, match))

    def reverse(self, name: str) -> Iterator[Link]:
        """The links of a name of the model."""
        for i, target in enumerate(self.targets):
            match = _pattern(target, self.source).fullmatch(name)
            if match:
                yield self._link(i, _filled(self.source, match), name)

    def _link(self, i: int, source: str, target: str) -> Link:
        sizes = self.sizes or (1,) * len(self.targets)
        first = sum(sizes[:i])
        start, stop, of = self.fills[i] if self.fills else (0, 1, 1)
        return Link(
            source=Share(name=source, start=first, stop=first + sizes[i], of=sum(sizes)),
            target=Share(name=target, start=start, stop=stop, of=of),
        )


@dataclass(frozen=True, slots=True)
class NameMap:
    """Rules, the first that matches wins; a name that none matches stays what it is.

    strip: prefixes that some files put before every name. components: the children of the served model that hold what
    is named; of a single one the prefix may be missing in checkpoint and trainer.
    """

    rules: tuple[NameRule, ...] = ()
    strip: tuple[str, ...] = ()
    components: tuple[str, ...] = ()

    def into(self, *components: str) -> NameMap:
        """The same map for these components of a served model: "<component>.<name>"."""
        return replace(self, components=components)

    def forward(self, name: str) -> tuple[Link, ...]:
        """Which rows of which parameters a checkpoint's tensor holds."""
        component, inner = self._component(name)
        for prefix in self.strip:
            inner = inner.removeprefix(prefix)
        links = next(filter(None, (tuple(rule.forward(inner)) for rule in self.rules)), (_identity(inner),))
        return tuple(_renamed(link, name, component + link.target.name) for link in links)

    def reverse(self, name: str) -> tuple[Link, ...]:
        """Which rows of which checkpoint tensors make up a parameter, in its order; their names have no component."""
        component, inner = self._component(name)
        links: list[Link] = []
        for link in (link for rule in self.rules for link in rule.reverse(inner)):
            if not any(link.target.overlaps(known.target) for known in links):
                links.append(link)
        links.sort(key=lambda link: link.target.start / link.target.of)
        return tuple(_renamed(link, link.source.name, component + inner) for link in links or [_identity(inner)])

    def _component(self, name: str) -> tuple[str, str]:
        """ "transformer." and the name inside it."""
        for component in self.components:
            if name.startswith(f"{component}."):
                return f"{component}.", name.removeprefix(f"{component}.")
        return (f"{self.components[0]}." if len(self.components) == 1 else ""), name

    def links(self, names: Iterable[str]) -> dict[str, tuple[Link, ...]]:
        """Target name -> its links in the order of its rows; NameMapError lists targets filled twice or in part."""
        found, problems = self._gathered(names)
        raise_all(problems, "names do not map one to one")
        return found

    def prove_bijective(self, names: Iterable[str], model_names: Collection[str]) -> dict[str, tuple[Link, ...]]:
        """As `links`, when every name maps into the model and every name of the model is reached once, by all its rows.

        model_names: of parameters, or of checkpoint tensors; COMPANIONS of a `<module>.weight` need not be among them.
        Raises NameMapError with every name that is left over on either side, and what is near it.
        """
        found, problems = self._gathered(names)
        model = frozenset(model_names)
        unmapped = [name for name in found if name not in model and not _is_companion(name, model)]
        missing = [name for name in model if name not in found]
        problems += _listed(
            [(f"{_sources(found[name])} -> {name}", name) for name in unmapped], model, "is no name of the model"
        )
        problems += _listed([(name, name) for name in missing], unmapped, "nothing in the checkpoint maps to it")
        raise_all(problems, "names do not map onto the model one to one")
        return found

    def _gathered(self, names: Iterable[str]) -> tuple[dict[str, tuple[Link, ...]], list[str]]:
        found: dict[str, list[Link]] = {}
        for name in sorted(names):
            for link in self.forward(name):
                found.setdefault(link.target.name, []).append(link)
        ordered = {
            name: tuple(sorted(links, key=lambda link: link.target.start / link.target.of))
            for name, links in found.items()
        }
        problems = [
            f"{name}: {problem}, from {' and '.join(link.source.name for link in links)}"
            for name, links in ordered.items()
            if (problem := uncovered(link.target for link in links))
        ]
        return ordered, problems


IDENTITY = NameMap()


def raise_all(problems: Sequence[str], what: str) -> None:
    """One NameMapError for all problems, none where there is none."""
    if problems:
        raise NameMapError("\n  - ".join([f"{what}: {len(problems)} problem(s)", *problems]))


def nearest(name: str, known: Collection[str]) -> str:
    """The names most like this one, for a message."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f"nearest: {', '.join(near)}" if near else "nothing like it"


def uncovered(shares: Iterable[Share]) -> str | None:
    """What is wrong with shares that should make up one tensor: they overlap, or leave rows out."""
    ordered = sorted(shares, key=lambda share: share.start / share.of)
    if any(one.overlaps(other) for one, other in pairwise(ordered)):
        return "filled twice"
    if sum(Fraction(share.stop - share.start, share.of) for share in ordered) < 1:
        return "only a part of its rows is there"
    return None


def _listed(pairs: Sequence[tuple[str, str]], known: Collection[str], what: str) -> list[str]:
    lines = [
        f"{shown}: {what}" + (f" ({nearest(name, known)})" if i < MAX_HINTS else "")
        for i, (shown, name) in enumerate(sorted(pairs)[:MAX_NAMES])
    ]
    return lines + ([f"and {len(pairs) - MAX_NAMES} more: {what}"] if len(pairs) > MAX_NAMES else [])


def _is_companion(name: str, model: Collection[str]) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf in COMPANIONS and f"{module}.weight" in model


def _sources(links: Iterable[Link]) -> str:
    return ", ".join(dict.fromkeys(link.source.name for link in links))


def _identity(name: str) -> Link:
    return Link(source=Share(name=name), target=Share(name=name))


def _renamed(link: Link, source: str, target: str) -> Link:
    if (link.source.name, link.target.name) == (source, target):
        return link
    return Link(source=replace(link.source, name=source), target=replace(link.target, name=target))


@lru_cache(maxsize=4096)
def _placeholders(template: str) -> Mapping[str, str]:
    """Placeholder -> the pattern of what it stands for."""
    return {name: pattern or PLACEHOLDERS.get(name, r"[^.]+") for name, pattern in PLACEHOLDER.findall(template)}


@lru_cache(maxsize=4096)
def _pattern(template: str, defined_in: str) -> re.Pattern[str]:
    """The regex of a template, its placeholders as `defined_in` has them."""
    patterns = _placeholders(defined_in)
    literals = PLACEHOLDER.split(template)[::3]
    groups = [f"(?P<{name}>{patterns[name]})" for name, _ in PLACEHOLDER.findall(template)]
    return re.compile("".join(re.escape(text) + group for text, group in zip(literals, [*groups, ""], strict=True)))


def _filled(template: str, match: re.Match[str]) -> str:
    return PLACEHOLDER.sub(lambda placeholder: match[placeholder[1]], template)
