"""What a caller of `Pusher.push` wants, and where its experts are to lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from protos import transfuse_pb2 as pb
from quant.expert_maps import ExpertMapError, ExpertMaps, chosen_maps

from .manifest import Manifest
from .source import Items, Scope
from .values import from_maps_proto

OnBusy = Literal["wait", "replace", "error"]
GivenMaps = Mapping[str, Sequence[int] | Tensor] | Tensor


DIFFERENT_MAPS = "expert map: the trainer's ranks gave different ones; give all of them the same"


@dataclass(frozen=True, slots=True)
class Wish:
    """The arguments of one push, see `Pusher.push`."""

    model: Items
    scope: Scope
    base_version: int | None
    push_id: str | None
    step: int
    durable: bool
    on_busy: OnBusy
    expert_map: GivenMaps | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The maps that are to hold after a push. moved: parameters of the manifest that it must bring for them. problems:
    why a map does not fit."""

    maps: ExpertMaps
    moved: frozenset[str]
    problems: Sequence[str]

    def base_version(self, wish: Wish, described: int) -> int:
        """0 for whatever is current: a push that carries experts over holds for the map that it was planned with."""
        return wish.base_version or (described if self.maps.of and wish.scope != "all" else 0)


def places_of(manifest: Manifest, described: pb.DescribeReply, wish: Wish) -> Places:
    """Where the experts are to lie."""
    committed = from_maps_proto(described.expert_maps)
    try:
        maps = chosen_maps({} if wish.expert_map is None else wish.expert_map, manifest.num_slots, committed)
    except ExpertMapError as error:
        return Places(maps=committed, moved=frozenset(), problems=[str(error)])
    moved = maps.moved((row.name for row in manifest.parameters), committed)
    return Places(maps=maps, moved=moved, problems=[])
