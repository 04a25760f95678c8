"""Every row behind a receiver: random sequences of pushes leave what a cold load of the last tensors would."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from rig import Content, chunks_for, shard_of

from quant.formats import TensorSpec
from quant.layouts import LayoutPlan
from tests.plans import PLANS, Storages, apply_all
from weight_update.receiver import Receiver

PAIRS = sorted({case.rpartition("-")[0]: case for case in PLANS}.values())
PAIRS += [case for case in PLANS if "swapped" in case and case not in PAIRS and case.endswith("384x128")]


def random_content(specs: Sequence[TensorSpec], seed: int) -> Content:
    """Random bytes, and numbers where scalars may be derived from them."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.uniform(0.1, 9, (spec.num_rows, spec.row_bytes // 4)).astype(np.float32).view(np.uint8)
        if spec.dtype == "F32"
        else rng.integers(0, 256, (spec.num_rows, spec.row_bytes), np.uint8)
        for spec in specs
    }


def cold(plan: LayoutPlan, content: Content) -> Storages:
    """Whole storages, derived scalars included."""
    storages = apply_all(plan, {name: torch.from_numpy(data) for name, data in content.items()})
    shapes = {spec.name: spec.shape for spec in plan.storages}
    for each in plan.derived:
        inputs = [storages[name].view(torch.float32).view(shapes[name]) for name in each.inputs]
        storages[each.name] = each.function(*inputs).contiguous().view(-1).view(torch.uint8)
    return storages


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("case", PAIRS)
def test_hot_equals_cold_for_random_sequences_of_pushes(case: str, world: int) -> None:
    plan, rng = PLANS[case](), np.random.default_rng(world)
    shapes = {spec.name: (spec.shape, spec.dtype) for spec in plan.storages}
    shapes |= {each.name: (each.shape, torch.float32) for each in plan.derived}
    receivers, storages = [], []
    for rank in range(world):
        shards = {name: shard_of(shape[0], rank, world) for name, (shape, _) in shapes.items()}
        held = {
            name: torch.zeros((shards[name][1] - shards[name][0], *shape[1:]), dtype=dtype)
            for name, (shape, dtype) in shapes.items()
        }
        storages.append(held)
        receivers.append(Receiver(held, plan.placements, plan.derived, shards=shards))
    where = [{name: (each.data_ptr(), each.shape, each.stride()) for name, each in held.items()} for held in storages]
    specs = receivers[0].manifest.tensors
    content: Content = {}
    for push in range(1, 4):
        chosen = sorted(rng.choice(len(specs), rng.integers(1, len(specs) + 1), replace=False).tolist())
        chosen = list(range(len(specs))) if push == 1 else chosen
        new = random_content(specs, seed=push)
        for receiver in receivers:
            receiver.begin(push, push, push - 1, np.array(chosen))
            for chunk in chunks_for(receiver, chosen, new, push):
                receiver.stage(chunk, transaction=push)
            receiver.prepare()
            receiver.install()
            receiver.publish()
        content |= {specs[i].name: new[specs[i].name] for i in chosen}
    expected = cold(plan, content)
    for name in shapes:
        got = torch.cat([held[name].reshape(-1).view(torch.uint8) for held in storages])
        assert torch.equal(got, expected[name]), name
    assert where == [{name: (t.data_ptr(), t.shape, t.stride()) for name, t in held.items()} for held in storages]
