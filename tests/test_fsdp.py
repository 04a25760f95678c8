"""FSDP2 over quantized modules: two gloo ranks, each with its shard of one small mixture of experts."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cold import encode_all, install, random_weights, storage_bytes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant.models import build_model, storage_parameters
from quant.modules import decode_all, quantized_modules
from sharding.fsdp import (
    ShardingError,
    layers_of,
    local_bytes,
    reshard_all,
    shard_model,
    shard_range,
    unit_range,
    unshard_all,
)

WORLD = 2
TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def build(directory: Path, device: str) -> nn.Module:
    """q_proj is one row tile, so that later ranks hold none of it; 33 tokens and 5 experts split unevenly."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=33,
        hidden_size=128,
        moe_intermediate_size=64,
        num_experts=5,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    if not (directory / "config.json").exists():
        config.save_pretrained(directory)
    return build_model(directory, "nvfp4", "trtllm", device=device)


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(torch.tensor(TOKENS)).logits.clone()


class Collectives(TorchDispatchMode):
    """Names of the collectives issued meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def num_collectives(call: Callable[[], Any]) -> int:
    with Collectives() as seen:
        call()
    return len(seen.names)


def pointers(model: nn.Module) -> dict[str, int]:
    return {name: local_bytes(parameter).data_ptr() for name, parameter in storage_parameters(model).items()}


# ---------------------------------------------------------------- what a rank does


def serve_and_update(directory: Path) -> Mapping[str, Any]:
    """Load version 0, forward, load version 1 in place, forward: everything that the tests look at."""
    whole = build(directory, "cpu")
    versions = [encode_all(whole, random_weights(whole, seed)) for seed in (0, 1)]
    expected = []
    for tensors in versions:
        install(whole, tensors)
        decode_all(whole)
        expected.append(logits(whole))

    model = build(directory, "meta")
    model.get_parameter("model.norm.weight").requires_grad_(True)
    shard_model(model, init_device_mesh("cpu", (WORLD,)), quantized=quantized_modules(model))
    seen: dict[str, Any] = {"expected_differ": not torch.equal(*expected)}
    seen["units"] = {name: unit_range(parameter) for name, parameter in storage_parameters(model).items()}
    seen["local_units"] = {name: len(p.to_local()) for name, p in storage_parameters(model).items()}
    seen["requires_grad"] = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    buffers = dict(whole.named_buffers())
    seen["buffers"] = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])]
    seen["not_zero"] = [name for name, data in storage_bytes(model).items() if any(data)]
    parameters, first = storage_parameters(model), pointers(model)

    install(model, versions[0])
    seen["collectives_of_unshard"] = num_collectives(lambda: unshard_all(model))
    decode_all(model)
    seen["collectives_of_forward"] = [num_collectives(lambda: logits(model)) for _ in range(3)]
    seen["version_0"] = torch.equal(logits(model), expected[0])
    decoded = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}

    reshard_all(model)
    seen["sharded_again"] = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    install(model, versions[1])
    unshard_all(model)
    seen["stale_before_decode"] = not torch.equal(logits(model), expected[1])
    decode_all(model)
    seen["version_1"] = torch.equal(logits(model), expected[1])
    seen["decoded_moved"] = {name: buffer.data_ptr() for name, buffer in model.named_buffers()} != decoded

    reshard_all(model)
    seen["same_parameters"] = all(storage_parameters(model)[name] is parameters[name] for name in parameters)
    seen["shards_moved"] = [name for name, pointer in pointers(model).items() if pointer and pointer != first[name]]
    seen["collectives_when_sharded"] = num_collectives(lambda: logits(model))
    seen["version_1_sharded"] = torch.equal(logits(model), expected[1])
    return {**seen, **placements()}


def placements() -> Mapping[str, Any]:
    """Unit ranges under HSDP and of a replicated tensor, and what is refused."""
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    layer = nn.Linear(4, 6, bias=False)
    fully_shard(layer, mesh=mesh)
    seen: dict[str, Any] = {"hsdp": unit_range(layer.weight)}
    flat = init_device_mesh("cpu", (WORLD,))
    seen["replicated"] = unit_range(distribute_tensor(torch.zeros(6, 4), flat, [Replicate()]))
    try:
        unit_range(distribute_tensor(torch.zeros(6, 4), flat, [Shard(1)]))
    except ShardingError as error:
        seen["refused"] = str(error)
    return seen


# ---------------------------------------------------------------- ranks


def entry(rank: int, directory: Path, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=WORLD)
    try:
        results.put((rank, serve_and_update(directory)))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Mapping[str, Any]]:
    """What each rank saw; rank 0 is in this process, where everything is imported already."""
    directory = tmp_path_factory.mktemp("ranks")
    build(directory, "meta")  # writes config.json
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    others = [context.Process(target=entry, args=(rank, directory, results)) for rank in range(1, WORLD)]
    for process in others:
        process.start()
    entry(0, directory, results)
    found = dict(results.get() for _ in range(WORLD))
    for process in others:
        process.join()
    failures = [str(found[rank]) for rank in range(WORLD) if isinstance(found[rank], str)]
    assert not failures, "\n".join(failures)
    return [found[rank] for rank in range(WORLD)]


def test_no_parameter_requires_grad_and_all_start_at_zero_with_real_buffers(ranks: list[Mapping[str, Any]]) -> None:
    for seen in ranks:
        assert seen["requires_grad"] == [] and seen["not_zero"] == [] and seen["buffers"] == []


def test_unit_ranges_tile_every_storage_and_are_those_of_the_shards(ranks: list[Mapping[str, Any]]) -> None:
    for name in ranks[0]["units"]:
        ranges = [seen["units"][name] for seen in ranks]
        assert ranges[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(ranges))
        assert [stop - start for start, stop in ranges] == [seen["local_units"][name] for seen in ranks]
    sizes = [[seen["local_units"][name] for seen in ranks] for name in ranks[0]["units"]]
    assert any(row[-1] == 0 for row in sizes) and any(0 < row[-1] < row[0] for row in sizes)  # empty, uneven


def test_sharded_logits_are_those_of_the_whole_model_bit_by_bit(ranks: list[Mapping[str, Any]]) -> None:
    for seen in ranks:
        assert seen["version_0"] and seen["version_1"] and seen["version_1_sharded"] and seen["expected_differ"]


def test_once_unsharded_forwards_issue_no_collective(ranks: list[Mapping[str, Any]]) -> None:
    for seen in ranks:
        assert seen["collectives_of_unshard"] == 3  # two layers and the root
        assert seen["collectives_of_forward"] == [0, 0, 0]
        assert seen["collectives_when_sharded"] == 3  # the counter does count


def test_writes_to_local_shards_are_seen_after_reshard_unshard_decode_and_not_before(
    ranks: list[Mapping[str, Any]],
) -> None:
    assert all(seen["stale_before_decode"] and seen["version_1"] for seen in ranks)


def test_local_shards_and_decoded_buffers_never_move(ranks: list[Mapping[str, Any]]) -> None:
    for seen in ranks:
        assert seen["shards_moved"] == [] and not seen["decoded_moved"]
        assert seen["sharded_again"] and seen["same_parameters"]


def test_unit_ranges_under_replication(ranks: list[Mapping[str, Any]]) -> None:
    for seen in ranks:
        assert seen["hsdp"] == (0, 6) and seen["replicated"] == (0, 6)
        assert "expected Replicate() and at most one Shard(0)" in seen["refused"]


# ---------------------------------------------------------------- without processes


@pytest.mark.parametrize("num_units", [0, 1, 2, 5, 7, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
def test_shard_ranges_are_those_of_torch_chunk(num_units: int, world: int) -> None:
    chunks = torch.arange(num_units).chunk(world) if num_units else ()
    for rank in range(world):
        start, stop = shard_range(num_units, rank, world)
        expected = chunks[rank].tolist() if rank < len(chunks) else []
        assert list(range(start, stop)) == expected


def test_what_cannot_be_sharded_is_refused_by_name_all_at_once(tmp_path: Path) -> None:
    model = build(tmp_path, "cpu")
    quantized = quantized_modules(model)
    linear, experts = model.model.layers[0].self_attn.q_proj, model.model.layers[1].mlp.experts
    linear.zero_point = nn.Parameter(torch.zeros(1), requires_grad=False)
    experts.w2_offset = nn.Parameter(torch.zeros(1), requires_grad=False)
    model.scalar = nn.Parameter(torch.zeros(()))
    model.codes = nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ShardingError) as error:
        shard_model(model, None, quantized=quantized)  # type: ignore[arg-type]
    lines = str(error.value).split("\n")
    assert len(lines) == 5 and "4 problem(s)" in lines[0]
    for name, said in {
        "model.layers.0.self_attn.q_proj.zero_point": "QuantLinear owns no parameter 'zero_point'",
        "model.layers.1.mlp.experts.w2_offset": "QuantExperts owns no parameter 'w2_offset'",
        "scalar": "shape [1]",
        "codes": "store uint8",
    }.items():
        assert any(f"- {name}: " in line and said in line for line in lines), name


def test_layers_are_the_items_of_the_outermost_lists(tmp_path: Path) -> None:
    model = build(tmp_path, "meta")
    assert layers_of(model) == list(model.model.layers)
    nested = nn.Sequential(nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)]))
    assert layers_of(nested) == list(nested[0])


def test_local_bytes_write_the_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    local_bytes(parameter).view(torch.float32).copy_(torch.arange(6.0))
    assert parameter.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ShardingError, match="expected contiguous"):
        local_bytes(parameter.T)
