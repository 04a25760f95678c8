"""Trainer placements: which rows a rank holds, by torch's own sharding, and that each row of a push is sent once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from quant.formats import FORMATS
from quant.names import expert_parts
from quant.parameters import ParameterRow
from sharding.routes import local_rows
from sharding.tiles import STEP_ROWS, Tiles, senders
from weight_update.encoder import encoded
from weight_update.manifest import Manifest
from weight_update.sharing import holding_of, plan_of, share_out
from weight_update.source import Offer, PushPlan, offer_of

Items = list[tuple[str, Tensor]]


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """This process as one of many: torch's process group without anyone at the other end."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def spread(whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """This rank's part, as torch splits it; the values are real, nobody is asked."""
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def rows_of(runs: Sequence[tuple[int, int]]) -> list[int]:
    return [row for start, stop in runs for row in range(start, stop)]


# ---------------------------------------------------------------- which rows a rank holds

MESHES: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "fsdp": ((4,), (Shard(0),)),
    "hsdp": ((2, 3), (Replicate(), Shard(0))),
    "sharded, then replicated": ((3, 2), (Shard(0), Replicate())),
    "two axes": ((2, 3), (Shard(0), Shard(0))),
    "three axes": ((2, 2, 2), (Shard(0), Replicate(), Shard(0))),
    "replicated": ((4,), (Replicate(),)),
    "strided": ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
    "strided and replicated": ((2, 2, 2), (Replicate(), _StridedShard(0, split_factor=2), Shard(0))),
}


@pytest.mark.parametrize("case", MESHES)
@pytest.mark.parametrize("num_rows", [0, 1, 3, 8, 12, 29])
def test_rows_are_those_that_torch_gives_to_the_rank(case: str, num_rows: int) -> None:
    sizes, placements = MESHES[case]
    if "strided" in case and num_rows % math.prod(sizes):
        pytest.skip("torch reads uneven strided shards in two ways")
    whole = torch.arange(num_rows * 2).view(num_rows, 2)
    for rank in range(math.prod(sizes)):
        with as_rank(rank, math.prod(sizes)):
            mesh = DeviceMesh("cpu", torch.arange(math.prod(sizes)).view(sizes))
            local = local_rows(spread(whole, mesh, placements))
            assert torch.equal(local.rows, whole[rows_of(local.runs)])
            assert local.shape == (num_rows, 2)


def inner_first(num_rows: int, outer: int, inner: int, place: tuple[int, int]) -> list[int]:
    """What FSDP2 leaves a rank of a tensor that was split over the inner axis before."""
    rows = torch.arange(num_rows).tensor_split([-(-num_rows // inner) * i for i in range(1, inner)])[place[1]]
    size = -(-len(rows) // outer)
    return rows[place[0] * size : (place[0] + 1) * size].tolist()


@pytest.mark.parametrize("num_rows", [9, 10, 13, 5, 3])
def test_an_uneven_strided_shard_is_read_as_fsdp_splits(num_rows: int) -> None:
    placements = (_StridedShard(0, split_factor=2), Shard(0))
    for rank in range(8):
        with as_rank(rank, 8):
            mesh = DeviceMesh("cpu", torch.arange(8).view(4, 2))
            expected = inner_first(num_rows, 4, 2, divmod(rank, 2))
            rows = torch.tensor(expected, dtype=torch.int64).view(-1, 1)
            held = DTensor.from_local(rows, mesh, placements, run_check=False, shape=(num_rows, 1), stride=(1, 1))
            try:
                assert rows_of(local_rows(held).runs) == expected
            except ValueError as error:
                assert "ambiguous" in str(error)  # refused, never guessed


@pytest.mark.parametrize("placements", [(Shard(1),), (Partial(),), (_StridedShard(1, split_factor=2),)])
def test_what_keeps_no_row_whole_is_refused_by_name(placements: tuple[Placement, ...]) -> None:
    with as_rank(0, 2):
        mesh = DeviceMesh("cpu", torch.arange(2))
        held = DTensor.from_local(torch.zeros(4, 2).bfloat16(), mesh, placements, run_check=False)
        offer = offer_of(manifest_of({"a.weight": tuple(held.shape)}), [("a.weight", held)], "all")
    assert "a.weight: placement" in offer.problems[0] and "expected Replicate() or dim 0" in offer.problems[0]


def test_a_shard_that_is_not_torch_s_is_refused() -> None:
    with as_rank(0, 2):
        mesh = DeviceMesh("cpu", torch.arange(2))
        held = DTensor.from_local(torch.zeros(3, 2), mesh, (Shard(0),), run_check=False, shape=(8, 2), stride=(2, 1))
        with pytest.raises(ValueError, match="its shard has 3 rows"):
            local_rows(held)


def test_a_rank_outside_the_mesh_holds_nothing() -> None:
    with as_rank(3, 4):
        mesh = DeviceMesh("cpu", torch.tensor([0, 1]), _init_backend=False)
        local = local_rows(spread(torch.zeros(8, 2), mesh, (Shard(0),)))
    assert local.runs == () and local.rows.shape == (0, 2) and local.shape == (8, 2)


# ---------------------------------------------------------------- each row is sent once


def manifest_of(shapes: dict[str, tuple[int, ...]], format: str = "bf16") -> Manifest:
    rows = tuple(ParameterRow(name=name, shape=shape, format=format) for name, shape in shapes.items())
    tensors = tuple(spec for row in rows for spec in FORMATS[format].tensors(row.name, row.shape))
    return Manifest(tensors=tensors, parameters=rows)


def planned(manifest: Manifest, world: int, items: Callable[[int], Items]) -> list[PushPlan]:
    """The plan of every rank, each made from all holdings and its own."""
    offers: list[Offer] = []
    for rank in range(world):
        with as_rank(rank, world):
            offers.append(offer_of(manifest, items(rank), "all"))
    holdings = [holding_of(manifest, offer, rank) for rank, offer in enumerate(offers)]
    plans = []
    for rank, offer in enumerate(offers):
        plan, problems = plan_of(manifest, offer, share_out(manifest, holdings, holdings[rank]), rank, "all")
        assert plan is not None, problems
        plans.append(plan)
    return plans


def together(
    manifest: Manifest, plans: Sequence[PushPlan], scale: Tensor | None = None
) -> tuple[dict[str, Tensor], list[int]]:
    """All tensors as they are put together from what every rank sends, each byte once; and the bytes by rank."""
    out = {spec.name: torch.full((spec.num_rows, spec.row_bytes), -1, dtype=torch.int16) for spec in manifest.tensors}
    sent = [0] * len(plans)
    for rank, plan in enumerate(plans):
        for source in plan.sources:
            for spec, first, data in encoded(source, scale):
                into = out[spec.name][first : first + len(data)]
                assert into.eq(-1).all(), f"{spec.name} from rank {rank}: sent twice"
                into.copy_(data)
                sent[rank] += data.numel()
    return out, sent


def random_weight(rows: int, columns: int = 32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()


def assert_sent(manifest: Manifest, plans: Sequence[PushPlan], weights: dict[str, Tensor]) -> list[int]:
    out, sent = together(manifest, plans)
    for name, weight in weights.items():
        assert torch.equal(out[name].to(torch.uint8).flatten(), weight.contiguous().view(torch.uint8).flatten()), name
    assert sum(sent) == sum(spec.num_bytes for spec in manifest.tensors)  # bytes sent over bytes needed: 1.00
    assert len({plan.specs for plan in plans}) == 1 and len({plan.order for plan in plans}) == 1
    return sent


@pytest.mark.parametrize("case", [case for case in MESHES if "strided" not in case])
def test_ranks_of_any_mesh_send_every_row_once(case: str) -> None:
    sizes, placements = MESHES[case]
    world = math.prod(sizes)
    weights = {f"{i}.weight": random_weight(rows) for i, rows in enumerate((1, 29, 12, 700, 768))}

    def items(rank: int) -> Items:
        mesh = DeviceMesh("cpu", torch.arange(world).view(sizes))
        return [(name, spread(weight, mesh, placements)) for name, weight in weights.items()]

    manifest = manifest_of({name: tuple(weight.shape) for name, weight in weights.items()})
    sent = assert_sent(manifest, planned(manifest, world, items), weights)
    assert max(sent) < 2.3 * sum(sent) / world  # replicas share the work


def test_a_plain_model_is_shared_by_the_ranks_that_all_hold_it() -> None:
    weights = {"a.weight": random_weight(4 * STEP_ROWS), "b.weight": random_weight(3)}
    manifest = manifest_of({name: tuple(weight.shape) for name, weight in weights.items()})
    sent = assert_sent(manifest, planned(manifest, 4, lambda rank: list(weights.items())), weights)
    assert min(sent) > 0


def test_experts_that_only_some_ranks_own_come_from_these() -> None:
    """Expert parallel over two ranks, twice; the rest replicated; no rank has all names."""
    weights = {f"mlp.experts.{e}.up_proj.weight": random_weight(256 + e) for e in range(4)} | {"norm": random_weight(9)}
    manifest = manifest_of({name: tuple(weight.shape) for name, weight in weights.items()})

    def items(rank: int) -> Items:
        own = range(2 * (rank % 2), 2 * (rank % 2) + 2)
        experts = [(name, weights[name]) for name in (f"mlp.experts.{e}.up_proj.weight" for e in own)]
        return [*experts, ("norm", weights["norm"])]

    sent = assert_sent(manifest, planned(manifest, 4, items), weights)
    assert max(sent) < 1.2 * min(sent)


@pytest.mark.parametrize(
    ("sizes", "placements"),
    [
        ((4,), (Shard(0),)),
        ((2, 2), (Shard(0), Shard(0))),  # FSDP over experts that are split over ranks already
        ((2, 2), (_StridedShard(0, split_factor=2), Shard(0))),
        ((2, 2), (Shard(1), Shard(0))),  # FSDP on the rows of each expert
        ((3, 2), (Shard(1), Replicate())),
    ],
)
def test_stacked_experts_may_be_split_over_experts_and_over_their_rows(
    sizes: tuple[int, ...], placements: tuple[Placement, ...]
) -> None:
    stacked = torch.randn(4, 2 * 9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "mlp.experts.gate_up_proj"
    parts = expert_parts(name, tuple(stacked.shape))
    weights = {part.name: stacked[part.expert, part.row0 : part.row1] for part in parts}
    manifest = manifest_of({part: tuple(weight.shape) for part, weight in weights.items()})
    world = math.prod(sizes)

    def items(rank: int) -> Items:
        return [(name, spread(stacked, DeviceMesh("cpu", torch.arange(world).view(sizes)), placements))]

    assert_sent(manifest, planned(manifest, world, items), weights)


def test_quantized_rows_of_strided_and_replicated_shards_are_those_of_the_whole() -> None:
    weight = random_weight(512, 256)
    manifest = manifest_of({"a.weight": (512, 256)}, "fp8_block")
    placements = (Replicate(), _StridedShard(0, split_factor=2), Shard(0))

    def items(rank: int) -> Items:
        return [("a.weight", spread(weight, DeviceMesh("cpu", torch.arange(8).view(2, 2, 2)), placements))]

    split, _ = together(manifest, planned(manifest, 8, items))
    alone, _ = together(manifest, planned(manifest, 1, lambda rank: [("a.weight", weight)]))
    assert all(torch.equal(split[name], alone[name]) and alone[name][0, 0] >= 0 for name in ("a.weight",))
    scales = "a.weight_scale"
    assert torch.equal(split[scales], alone[scales]) and alone[scales].ge(0).all()


def test_one_rank_of_many_sends_the_global_scale() -> None:
    weight, scale = random_weight(512, 64), torch.ones(())
    manifest = manifest_of({"a.weight": (512, 64)}, "nvfp4")
    split, sent = together(manifest, planned(manifest, 4, lambda rank: [("a.weight", weight)]), scale)
    alone, _ = together(manifest, planned(manifest, 1, lambda rank: [("a.weight", weight)]), scale)
    assert all(torch.equal(split[name], alone[name]) for name in split) and min(sent) > 0
    assert split["a.weight_scale_2"].ge(0).all()


def test_rows_that_no_rank_has_and_forms_that_differ_are_refused() -> None:
    manifest = manifest_of({"a.weight": (8, 32)}, "nvfp4")
    offer = offer_of(manifest, [("a.weight", random_weight(8))], "all")
    other = offer_of(manifest, [("a.weight", torch.zeros(8, 16, dtype=torch.uint8))], "all")
    holdings = [holding_of(manifest, each, rank) for rank, each in enumerate((offer, other))]
    _, problems = plan_of(manifest, offer, share_out(manifest, holdings), 0, "all")
    assert "a.weight: to encode on some trainer ranks, in checkpoint form on others" in problems[0]
    with as_rank(0, 2):
        mesh = DeviceMesh("cpu", torch.arange(2))
        first = offer_of(manifest, [("a.weight", spread(random_weight(8), mesh, (Shard(0),)))], "all")
    _, problems = plan_of(manifest, first, share_out(manifest, [holding_of(manifest, first, 0)]), 0, "all")
    assert "a.weight: only a part of its rows is there, no trainer rank has 4:8" in problems[0]


def test_a_rank_s_plan_does_not_grow_with_what_others_hold() -> None:
    shapes = {f"{i}.weight": (256, 32) for i in range(64)}
    manifest = manifest_of(shapes)

    def shared_of_first(others: int) -> int:
        names = list(shapes)
        first = holding_of(manifest, offer_of(manifest, [(names[0], random_weight(256))], "all"), 0)
        rest = [(name, random_weight(256)) for name in names[1 : 1 + others]]
        second = holding_of(manifest, offer_of(manifest, rest, "all"), 1)
        return sum(len(each) for each in share_out(manifest, [first, second], first).sent.tensors)

    assert shared_of_first(1) == shared_of_first(63) == 1


# ---------------------------------------------------------------- any placement, against a slow reference


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 700), min_size=1, max_size=5),
    data=st.data(),
)
def test_senders_cover_every_row_once_and_only_with_rows_they_hold(rows: list[int], data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 5))
    held: list[tuple[int, int, int, int]] = []
    for tensor, count in enumerate(rows):
        edges = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=4))})
        for start, stop in pairwise(edges):
            holders = data.draw(st.sets(st.integers(0, world - 1), max_size=world))
            held += [(rank, tensor, start, stop) for rank in holders]
    by_rank = [[each for each in held if each[0] == rank] for rank in range(world)]
    columns = [np.array(each, np.int64).reshape(-1, 4) for each in by_rank]
    tiles = Tiles.joined(Tiles.of(r, c[:, 1], c[:, 2], c[:, 3]) for r, c in enumerate(columns))
    sent, gaps = senders(tiles, np.array(rows))
    by_row = {(tensor, row): [] for tensor, count in enumerate(rows) for row in range(count)}  # type: ignore[var-annotated]
    for rank in range(world):
        for tensor, start, stop in sent.of_rank(rank):
            for row in range(start, stop):
                by_row[tensor, row].append(rank)
    missing = {(gap.tensor, row) for gap in gaps for row in range(gap.start, gap.stop)}
    for (tensor, row), ranks in by_row.items():
        holders = {r for r, t, start, stop in held if t == tensor and start <= row < stop}
        assert len(ranks) == min(1, len(holders)) and set(ranks) <= holders
        assert ((tensor, row) in missing) == (not holders)


def test_every_rank_finds_the_same_senders_for_what_it_holds() -> None:
    """What a rank works out for its own tensors alone is what anyone works out for all."""
    shapes = {f"{i}.weight": (100 * i + 1, 8) for i in range(8)}
    manifest = manifest_of(shapes)
    holdings = []
    for rank in range(3):
        own = [(name, random_weight(*shape)) for i, (name, shape) in enumerate(shapes.items()) if i % 3 != rank]
        holdings.append(holding_of(manifest, offer_of(manifest, own, "all"), rank))
    everything = share_out(manifest, holdings).sent
    for rank, own in enumerate(holdings):
        alone = share_out(manifest, holdings, own).sent
        assert sorted(alone.of_rank(rank)) == sorted(everything.of_rank(rank))
