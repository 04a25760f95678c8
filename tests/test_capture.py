"""Graphs are captured over modules that are whole on a rank, and over no others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from service.denoising import compile_blocks
from sharding.fsdp import ShardingError, check_capturable, reshard_all, shard_model, unshard_all

REFUSED = r"CUDA graph refused"


@pytest.fixture
def sharded() -> Iterator[nn.Module]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
        shard_model(model, init_device_mesh("cpu", (1,)), quantized={})
        yield model
    finally:
        dist.destroy_process_group()


def test_a_sharded_model_is_not_capturable_and_a_whole_one_is(sharded: nn.Module) -> None:
    check_capturable(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ShardingError, match=REFUSED + ".*Sequential"):
        check_capturable(sharded)


def test_forward_and_gather_refuse_while_a_graph_is_captured(
    sharded: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(1, 8)
    before = sharded(x)
    reshard_all(sharded)
    with monkeypatch.context() as capturing:  # as torch answers then; the last test captures a real one
        capturing.setattr(torch.cuda, "is_available", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for work in (lambda: sharded(x), lambda: unshard_all(sharded)):
            with pytest.raises(ShardingError, match=REFUSED):
                work()
        assert nn.Linear(8, 8)(x).shape == (1, 8)
    assert torch.equal(sharded(x), before)  # nothing was left half gathered


def test_a_backend_that_replays_graphs_is_refused_over_sharded_blocks(sharded: nn.Module) -> None:
    with pytest.raises(ShardingError, match=REFUSED):
        compile_blocks(sharded, "cudagraphs")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_capture_over_a_gather_is_refused() -> None:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        model, x = nn.Sequential(nn.Linear(8, 8, bias=False)).cuda(), torch.ones(1, 8, device="cuda")
        shard_model(model, init_device_mesh("cuda", (1,)), quantized={})
        before = model(x).clone()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(ShardingError, match=REFUSED), torch.cuda.graph(graph):
            model(x + 1)
        assert torch.equal(model(x), before)
    finally:
        dist.destroy_process_group()
