"""What makes newly written bytes visible to forward: gather where sharded, decode what changed.

The same for a language model and for the transformers of a pipeline, resident all of them or in turns.
"""

from __future__ import annotations

import torch
from torch import nn

from quant.cells import Changed, Refresh
from quant.modules import decode_all, plan_refresh
from quant.variants import bare
from sharding.fsdp import reshard_all, unshard_all
from weight_update.receiver import Receiver

from .residence import Offload


class Refresher:
    """Called by the engine at a step boundary, on every rank of a replica.

    A replica of one rank decodes only what changed, and `foresee` finds out before the pause where that is. Over
    several ranks each one knows its own changes only, so all is gathered and decoded. Components that take turns
    (service.residence) are, each time that their turn comes, and not here.
    """

    def __init__(self, model: nn.Module, receiver: Receiver, *, sharded: bool, offload: Offload = "none") -> None:
        self._model, self._receiver, self._sharded = model, receiver, sharded
        self._in_turns = offload == "component"
        self._planned: Refresh | None = None

    def foresee(self) -> None:
        """Plan for the prepared transaction, while the model runs."""
        if not self._sharded and not self._in_turns:
            self._planned = plan_refresh(self._model, _bare(self._receiver.changes()))

    def __call__(self) -> None:
        changed = _bare(self._receiver.take_stale())
        planned, self._planned = self._planned, None
        if self._in_turns:
            reshard_all(self._model)
        elif self._sharded:
            reshard_all(self._model)
            unshard_all(self._model)
            decode_all(self._model)
        elif planned is not None and planned.covers(changed):
            with torch.no_grad():
                planned.run()
        else:
            decode_all(self._model, changed)


def _bare(changed: Changed) -> Changed:
    """By the names of the model, which knows one format."""
    return {bare(name): positions for name, positions in changed.items()}
