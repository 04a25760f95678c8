"""The routes of one push, from its plan and the rows that actor ranks own; for people and predictions.

The push itself needs no list: each trainer rank sends what sharing gives it to whoever owns it (weight_update.sending).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quant.formats import FORMATS
from sharding.plan import RoutePlan, plan_routes
from sharding.tiles import Ints, Tiles, as_tensors

from .manifest import Manifest
from .source import PushPlan


def push_routes(manifest: Manifest, plan: PushPlan, ranks: Sequence[Any], trainer_rank: int = 0) -> RoutePlan:
    """The routes of what this trainer rank sends. ranks: RankSpec messages of the service."""
    numbered = [(manifest.index[source.specs[0].name], source) for source in plan.sources]
    table = np.array([(number, *run) for number, source in numbered for run in source.sent], np.int64).reshape(-1, 3)
    sent = Tiles.of(trainer_rank, table[:, 0], table[:, 1], table[:, 2])
    parameter, rows = _tensors(manifest, plan)
    everything = np.arange(len(manifest.tensors))
    owned = Tiles.joined(
        Tiles.of(i, everything, np.array(rank.row_start, np.int64), np.array(rank.row_stop, np.int64))
        for i, rank in enumerate(ranks)
    )
    row_bytes = np.array([spec.row_bytes for spec in manifest.tensors], np.int64)
    num_rows = np.array([spec.num_rows for spec in manifest.tensors], np.int64)
    routes = as_tensors(sent, parameter, rows, num_rows)
    return plan_routes(routes, owned, row_bytes, num_senders=trainer_rank + 1, num_receivers=len(ranks))


def _tensors(manifest: Manifest, plan: PushPlan) -> tuple[Ints, Ints]:
    """By tensor of the manifest: the number under which it is sent, -1 for one that is not, and the rows of that for
    one of its own."""
    parameter = np.full(len(manifest.tensors), -1, np.int64)
    rows = np.ones(len(manifest.tensors), np.int64)
    for name, row in plan.order:
        if row is None:
            parameter[manifest.index[name]] = manifest.index[name]
            continue
        first = manifest.index[manifest.tensors_of(row)[0].name]
        parts = {part.suffix: part.rows for part in FORMATS[row.format].components}
        for required in manifest.required_of(row):
            number = manifest.index[required]
            parameter[number] = first
            rows[number] = parts[required.rpartition(".")[2]] if FORMATS[row.format].is_quantized else 1
    return parameter, rows
