"""Graphs are captured over modules that are whole on a rank, and over no others."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from sharding.fsdp import ShardingError, check_capturable, shard_model


def test_a_capture_over_an_all_gather_is_refused() -> None:
    model = nn.Sequential(nn.ModuleList([nn.Linear(8, 8, bias=False)]))
    check_capturable(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard_model(model, init_device_mesh("cpu", (1,)), quantized={})
        with pytest.raises(ShardingError, match=r"CUDA graph refused.*0\.0"):
            check_capturable(model)
    finally:
        dist.destroy_process_group()
