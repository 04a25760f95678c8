"""Which components of a pipeline have their weights gathered and decoded: all of them, or only the one in use.

    residence.refresh()                 new weights: everything gathered before is stale
    for names in residence.visits(3):   bit i of the mask: component i is needed in this step
        ...                             forward the components `names`

Every rank makes the same visits in the same order, so gathering may be collective.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from torch import nn

from quant.modules import QuantModule, decode_all
from sharding.fsdp import reshard_all, unshard_all
from weight_update.errors import PlanError

Offload = Literal["none", "component"]
Say = Callable[[str], None]

_REFUSED = {
    "layerwise": "it moves the layers' storages at every step, and a push writes to addresses that never move; use"
    " --offload component, or none",
}


class Residence:
    """The components of one rank's model, in the order of their indices."""

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        offload: Offload = "none",
        on_refresh: Callable[[], None] | None = None,
    ) -> None:
        self.names = tuple(components)
        self.offload = offload
        self._components = components
        self._on_refresh = on_refresh or self._gather_all
        self._here: str | None = None  # the one that is gathered, where they take turns

    def refresh(self) -> None:
        """Make new weights visible: gather and decode them again, or at the next visit."""
        if self._here is not None:
            _release(self._components[self._here])
            self._here = None
        self._on_refresh()

    def _gather_all(self) -> None:
        for component in self._components.values():
            reshard_all(component)
        if self.offload == "none":
            for component in self._components.values():
                _gather(component)

    def visits(self, mask: int) -> Iterator[tuple[str, ...]]:
        """The components that are there together, one group after the other, until all of the mask were."""
        if self.offload == "none":
            yield self.names
            return
        due = [name for index, name in enumerate(self.names) if mask >> index & 1]
        for name in sorted(due, key=lambda name: name != self._here):
            self._fetch(name)
            yield (name,)

    def _fetch(self, name: str) -> None:
        if name == self._here:
            return
        if self._here is not None:
            _release(self._components[self._here])
        _gather(self._components[name])
        self._here = name


def _gather(component: nn.Module) -> None:
    unshard_all(component)
    decode_all(component)


def _release(component: nn.Module) -> None:
    """Free what was gathered and decoded; the shards stay where they are."""
    reshard_all(component)
    for module in component.modules():
        if isinstance(module, QuantModule):
            for name in module.decoded_shapes:
                setattr(module, name, None)


def choose_offload(asked: str, num_components: int, say: Say) -> Offload:
    """The mode that is used; says why one is switched off, or what it costs. PlanError for one that cannot be."""
    known = ("none", "component")
    if asked not in known:
        reason = _REFUSED.get(asked, "no such mode")
        raise PlanError(f"offload {asked!r}: expected one of {', '.join(known)}; {reason}")
    if asked == "component" and num_components < 2:
        say("offload component: switched off, this model has one component, which is always in use")
        return "none"
    if asked == "component":
        say(
            "offload component: each transformer is gathered and decoded again when its turn comes, which slows"
            " denoising; --offload none disables it"
        )
        return "component"
    return "none"
