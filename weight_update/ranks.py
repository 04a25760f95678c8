"""The trainer's own ranks: the few collectives that a push needs."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .errors import WeightUpdateError


class Ranks:
    """The trainer's own ranks: one process, or a torch.distributed group in which every rank calls the same things."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._distributed = dist.is_available() and dist.is_initialized()
        self._group = group
        self.rank = dist.get_rank(group) if self._distributed else 0
        self.world = dist.get_world_size(group) if self._distributed else 1
        backend = str(dist.get_backend(group)) if self._distributed else "gloo"
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")

    def apart(self) -> Ranks:
        """The same ranks over a group of their own, for collectives that must not meet the trainer's; all call it."""
        if self.world == 1:
            return self
        ranks = dist.get_process_group_ranks(self._group or dist.group.WORLD)
        return Ranks(dist.new_group(ranks, backend="gloo", use_local_synchronization=True))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, function: Callable[[], Any]) -> Any:
        """Call `function` on the first rank; all ranks return its result or raise its error."""
        result: Any = None
        if self.rank == 0:
            try:
                result = function()
            except WeightUpdateError as error:
                result = error
        result = self.gather(result)[0]
        if isinstance(result, WeightUpdateError):
            raise result
        return result

    def reduce(self, values: np.ndarray, op: dist.ReduceOp.RedOpType) -> np.ndarray:
        """Element-wise reduction of int64 values; uint64 sums wrap mod 2^64 through the same bits."""
        if self.world == 1:
            return values
        tensor = torch.from_numpy(values.view(np.int64).copy()).to(self._device)
        dist.all_reduce(tensor, op=op, group=self._group)
        return tensor.cpu().numpy().view(values.dtype)


def this_process() -> str:
    """Whose process this is, and which."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        user = f"uid {os.getuid()}"
    return f"{user}@{socket.gethostname()} pid {os.getpid()}"
