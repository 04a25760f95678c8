"""What a rank holds, as a receiver needs to know it: named storages, and where every checkpoint tensor lies in them.

    our own model                  holdings_of(model)
    vLLM's, SGLang's               service.hosts.plan

One of the two halves of what an engine must offer; the other is the step boundary, service.hosts.boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from quant.layouts import Derived, Placement, place_row_major
from quant.parameters import ParameterRow
from quant.variants import Held, bare, format_of, together


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdings:
    """storages: looks the live tensors up anew, by name. placements: one a checkpoint tensor. derived: values that are
    recomputed from storages after every install. parameters: as a trainer names them. shards: units [start, stop) of a
    storage that this rank holds, by default all."""

    storages: Callable[[], Mapping[str, Tensor]]
    placements: Sequence[Placement]
    derived: Sequence[Derived] = ()
    parameters: Sequence[ParameterRow] = ()
    shards: Mapping[str, tuple[int, int]] = field(default_factory=dict)


ABSENT = "absent"  # the storage of what replicas of other formats hold: of no bytes


def among(holdings: Holdings, format: str, formats: Mapping[str, Held]) -> Holdings:
    """The same of a rank in `format`, in a service whose replicas are in all of these formats: named as there, and none
    of the rows of what only others hold."""
    rows, tensors = together(formats)
    own = {each.tensor.name: each for each in holdings.placements}
    device = next((each.device for each in holdings.storages().values()), torch.device("cpu"))
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    placements = [
        replace(own[bare(spec.name)], tensor=spec)
        if format_of(spec.name) in ("", format)
        else place_row_major(spec, ABSENT)
        for spec in tensors
    ]
    return replace(
        holdings,
        storages=lambda: {**holdings.storages(), ABSENT: nothing},
        placements=placements,
        parameters=rows,
        shards={**holdings.shards, ABSENT: (0, 0)},
    )


def holdings_of(model: nn.Module) -> Holdings:
    """Of a model of quant.models, sharded by FSDP2 or not; call it while the model is sharded."""
    from quant.models import derived_of, parameters_of, placements_of, storage_parameters  # only here: a library
    from sharding.fsdp import unit_range  # of named storages needs neither

    return Holdings(
        storages=lambda: storage_parameters(model),
        placements=placements_of(model),
        derived=derived_of(model),
        parameters=parameters_of(model),
        shards={name: unit_range(parameter) for name, parameter in storage_parameters(model).items()},
    )
