"""Which expert lies in which slot: physical to logical, for modules whose experts may be moved and doubled.

    maps = ExpertMaps({"model.layers.0.mlp.experts": (0, 1, 2, 3, 0)})      # slot -> expert; expert 0 lies in two
    maps.slots("model.layers.0.mlp.experts.0.up_proj.weight")               # ....experts.0...., ....experts.4....
    maps.logical("model.layers.0.mlp.experts.4.up_proj.weight")             # ....experts.0....

A trainer and a checkpoint name experts, a service names slots: `<module>.<slot>.<projection>.<tensor>`, all of them
tensors of its manifest. The map of a module is one of its tensors, too, `<module>.physical_to_logical`, I32 [slots]: it
is staged, compared, installed, undone and kept with the weights that it belongs to, as every other tensor is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LEAF = "physical_to_logical"
EXPERT = re.compile(r"^(?P<module>.*\.experts)\.(?P<number>\d+)\.(?P<rest>.+)$")

Map = tuple[int, ...]  # by slot, the number of the expert in it


class ExpertMapError(ValueError):
    """A map does not fit its module; the message lists every reason."""


@dataclass(frozen=True, slots=True)
class ExpertMaps:
    """Module name -> its map. Modules that are not named keep expert i in slot i."""

    of: Mapping[str, Map] = field(default_factory=dict)

    def slots(self, name: str) -> tuple[str, ...]:
        """The names of the service under which a tensor or parameter of an expert lies; of others the name itself."""
        match = EXPERT.match(name)
        if match is None or match["module"] not in self.of:
            return (name,)
        expert = int(match["number"])
        held = enumerate(self.of[match["module"]])
        return tuple(f"{match['module']}.{slot}.{match['rest']}" for slot, each in held if each == expert)

    def logical(self, name: str) -> str:
        """The name, for a trainer or in a checkpoint, of what the service calls so."""
        match = EXPERT.match(name)
        if match is None or match["module"] not in self.of:
            return name
        return f"{match['module']}.{self.of[match['module']][int(match['number'])]}.{match['rest']}"

    def is_first(self, name: str) -> bool:
        """Whether no earlier slot holds the same expert: each is written once into a checkpoint."""
        return self.slots(self.logical(name))[0] == name

    def moved(self, names: Iterable[str], since: ExpertMaps) -> frozenset[str]:
        """Those of the service's names that are of slots which held another expert before, or are maps that differ."""
        if self == since:
            return frozenset()
        return frozenset(name for name in names if self._differs(name, since))

    def _differs(self, name: str, since: ExpertMaps) -> bool:
        match = EXPERT.match(name)
        module = module_of(name) if match is None else match["module"]
        if module is None or module not in self.of:
            return False
        now, before = self.of[module], since.of.get(module, ())
        at = slice(None) if match is None else slice(int(match["number"]), int(match["number"]) + 1)
        return now[at] != before[at]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The maps as tensors of a service."""
        return ((f"{module}.{LEAF}", torch.tensor(each, dtype=torch.int32)) for module, each in self.of.items())


def slots_of_tokens(experts: Tensor, held: Tensor, num_experts: int) -> tuple[Tensor, bool]:
    """Where the experts of tokens [n, k] lie by a map, tokens taking the copies of an expert in turn; past the last
    slot for one past the last expert. And whether the map has every expert and no other."""
    copies = held.long().bincount(minlength=num_experts)
    fits = len(copies) == num_experts and bool(copies.all())
    copies = copies.clamp(min=1)
    by_expert = held.argsort(stable=True)  # slots, those of one expert side by side
    here = experts.clamp(max=num_experts - 1)
    turn = torch.arange(len(experts), device=experts.device)[:, None] % copies[here]
    found = by_expert[((copies.cumsum(0) - copies)[here] + turn) % len(held)]
    return torch.where(experts < num_experts, found, len(held)), fits


def module_of(name: str) -> str | None:
    """The module whose map a tensor is, None where it is none."""
    module, _, leaf = name.rpartition(".")
    return module if leaf == LEAF else None


def maps_in(names: Iterable[str], values: Callable[[str], Tensor]) -> ExpertMaps:
    """The maps among tensors of these names. values: the bytes or numbers of one, in any shape."""
    return ExpertMaps(
        {
            module: tuple(values(name).contiguous().view(-1).view(torch.int32).tolist())
            for name in names
            if (module := module_of(name)) is not None
        }
    )


def dealt_out(num_slots: int, num_experts: int) -> Map:
    """The map of a module that nobody gave one: in turn."""
    return tuple(slot % num_experts for slot in range(num_slots))


def chosen_maps(
    given: Mapping[str, Sequence[int] | Tensor] | Tensor, num_slots: Mapping[str, int], committed: ExpertMaps
) -> ExpertMaps:
    """The maps that are to hold, checked: those that are given, else the committed ones.

    given: by module, or one row a module in the order of the model's layers, as balancers return them (phy2log).
    num_slots: of every module that has a map. A map must name each expert from 0 to its largest at least once.
    """
    if isinstance(given, Tensor):
        if given.ndim != 2 or len(given) != len(num_slots):
            raise ExpertMapError(
                f"expert map: got shape {list(given.shape)}, expected [{len(num_slots)}, slots], one row a module:"
                f" {', '.join(num_slots) or 'the service has none; start it with --redundant-experts'}"
            )
        given = dict(zip(num_slots, given, strict=True))
    wanted = {module: tuple(map(int, torch.as_tensor(each).tolist())) for module, each in given.items()}
    problems = [each for module, wish in wanted.items() for each in _problems(module, wish, num_slots)]
    absent = [module for module in num_slots if module not in wanted and module not in committed.of]
    problems += [f"{module}: no replica can say which map it has; give one" for module in absent]
    if problems:
        raise ExpertMapError("\n  - ".join([f"expert map refused: {len(problems)} problem(s)", *problems]))
    return ExpertMaps({module: wanted.get(module) or committed.of[module] for module in num_slots})


def _problems(module: str, wish: Map, num_slots: Mapping[str, int]) -> Iterator[str]:
    if module not in num_slots:
        known = ", ".join(num_slots) or "none; start the service with --redundant-experts"
        yield f"{module}: the experts of this module do not move; those that do: {known}"
        return
    if len(wish) != num_slots[module]:
        yield f"{module}: {len(wish)} slots, expected {num_slots[module]}"
    absent = sorted(set(range(max(wish, default=0) + 1)) - set(wish))
    if absent or min(wish, default=0) < 0:
        lowest = f", and {min(wish)} is no expert" if min(wish, default=0) < 0 else ""
        yield f"{module}: experts {absent} are in no slot{lowest}; each needs one"
