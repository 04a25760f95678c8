"""Pushes of what changed between sharded trainers and sharded actors, all of them processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import processes
from tests.test_fleet import _free_port, cold_shards
from tests.tiny import save, tiny_llama

TRAINER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
from torch.distributed.fsdp import fully_shard
from tests.test_delta_fleet import nudge
from tests.tiny import tiny_llama
from weight_update.client import Pusher

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = tiny_llama(seed=9)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
pusher = Pusher(sys.argv[1])
modes = [pusher.push(model).mode]
nudge(model, 1)
modes.append(pusher.push(model, step=1).mode)
nudge(model, 2)
handle = pusher.push_async(model, step=2)
nudge(model, 3)                            # not part of what is pushed
dist.all_reduce(torch.ones(1))             # the trainer's own collectives go on meanwhile
report = handle.result(60)
modes.append(report.mode)
print(*modes, report.version, report.digest, report.changed_tensors, flush=True)
pusher.close()
dist.barrier()
dist.destroy_process_group()
"""


def nudge(model: nn.Module, seed: int) -> None:
    """Change about one weight in a hundred; which ones depends on their values alone, not on who holds them."""
    with torch.no_grad():
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            bits = local.view(torch.int16).to(torch.int32)
            local.copy_(torch.where((bits * 2654435 + seed) % 97 == 0, local * 1.0625, local))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[processes.Fleet]:
    """One replica of two ranks."""
    with processes.fleet(save(tiny_llama(seed=0), tmp_path_factory.mktemp("model")), replicas=1, ranks=2) as running:
        yield running


@pytest.mark.slow
def test_deltas_of_two_trainer_ranks_land_on_two_actor_ranks(fleet: processes.Fleet, tmp_path: Path) -> None:
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    trainers = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINER, fleet.address, root],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [trainer.communicate(timeout=120)[0].splitlines()[-1:] for trainer in trainers]
    assert [trainer.returncode for trainer in trainers] == [0, 0]
    assert outputs[0] == outputs[1]  # all ranks return the same report
    assert outputs[0][0].split()[:3] == ["full", "delta", "delta"]
    model = tiny_llama(seed=9)
    nudge(model, 1)
    nudge(model, 2)
    assert [rank("stored_bytes") for rank in fleet.ranks] == cold_shards(model, tmp_path)[:2]
