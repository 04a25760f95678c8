"""What a push is expected to take, beside which its report sets what it took: the cost model with this trainer's rates.

The first push is predicted with the rates of one host core, every later one with those that the last full push had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist

from sharding.cost import HOST, Prediction, Rates, Work, calibrated, delta_work, predict

from .ranks import Ranks
from .source import PushPlan, Source


class Foresight:
    """Predictions of one trainer's pushes."""

    def __init__(self, rates: Rates = HOST) -> None:
        self.rates = rates
        self._sums: tuple[PushPlan, int, int] | None = None  # of the last plan: bytes of BF16, and what becomes of them

    def work(self, plan: PushPlan, actors: Sequence[Any], ranks: Ranks, delta: int | None) -> Work:
        """What this push has to do: of every side the rank that has most of it. actors: RankSpec messages. delta: bytes
        that changed on this trainer rank, None for a full push. Collective over the trainer's ranks."""
        if self._sums is None or self._sums[0] is not plan:
            self._sums = plan, sum(map(_bf16_bytes, plan.sources)), sum(map(_encoded_bytes, plan.sources))
        own = np.array([*self._sums[1:], len(plan.sources), delta or 0], np.int64)
        source, kept, tensors, changed = ranks.reduce(own, dist.ReduceOp.MAX).tolist()
        copies = len({rank.replica for rank in actors})
        rows = ([np.array(getattr(each, name)) for each in actors] for name in ("row_start", "row_stop"))
        starts, stops = map(np.stack, rows)
        columns = plan.columns
        owned = int(((stops - starts)[:, columns.index] * columns.row_bytes).sum(axis=1).max(initial=0))
        full = Work(
            mode="full",
            source=np.array([source], np.float64),
            kept=np.array([kept], np.float64),
            sent=np.array([kept * copies], np.float64),
            received=np.array([owned], np.float64),
            resident=np.array([owned], np.float64),
            gathered=np.array([owned * (len(actors) // copies - 1)], np.float64),
            copies=copies,
            tensors=len(plan.specs),
            own_tensors=float(tensors),
        )
        return full if delta is None else delta_work(full, changed / max(kept, 1))

    def predict(self, work: Work) -> Prediction:
        """Of one push."""
        return predict(work, self.rates)

    def learn(self, work: Work, phases: Mapping[str, float]) -> None:
        """Take over the rates of a push that is over; a delta says little of them."""
        if work.mode == "full":
            self.rates = calibrated(self.rates, work, phases)


def _rows(source: Source) -> int:
    return sum(stop - start for start, stop in source.sent)


def _bf16_bytes(source: Source) -> int:
    return 2 * _rows(source) * (math.prod(source.rows.shape[1:]) if source.rows.ndim else 1)


def _encoded_bytes(source: Source) -> int:
    """About what a source sends; a single value counts for nothing."""
    return sum(spec.num_bytes for spec in source.specs) * _rows(source) // max(1, source.specs[0].num_rows)
