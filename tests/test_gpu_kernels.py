"""The CUDA kernels give the bytes of the host: every format, every tile that a batch may pick, every kind of row."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from quant import cuda, cuda_rows, kernels
from quant.formats import FORMATS, amax, encode, global_scale
from quant.layouts import LAYOUTS, LayoutPlan, plan_experts, plan_linear
from weight_update import cuda as rows_of
from weight_update.delta import Patch
from weight_update.digest import digest_rows
from weight_update.live import Live, plan_live
from weight_update.patching import Sparse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KERNELS = sorted(cuda_rows.ENCODERS)


def magnitudes(seed: int) -> Tensor:
    """Every finite BF16 magnitude once, signs at random, in rows of 64."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randperm(0x7F80, generator=generator)[: 0x7F80 // 64 * 64]
    bits |= torch.randint(0, 2, bits.shape, generator=generator) << 15
    return bits.to(torch.int16).view(torch.bfloat16).view(-1, 64)


def cases(name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = FORMATS[name].multiples[1]
    shapes = [(257, 768), (130, 96 * width), (3, 2048), (128, 7168), (1, 16 * width)]
    found = [(torch.randn(shape, generator=generator) * 0.02).bfloat16() for shape in shapes]
    found[0][3], found[0][5, :16] = 0, -0.0
    return [*found, torch.zeros(130, 256).bfloat16(), magnitudes(2)]


@pytest.mark.parametrize("name", KERNELS)
def test_encodes_as_the_host_does(name: str) -> None:
    fmt = FORMATS[name]
    for rows in cases(name):
        scale = global_scale(fmt, amax(rows)) if fmt.has_global_scale else None
        assert amax(rows.cuda()) == amax(rows)
        expected, found = encode(fmt, rows, scale), encode(fmt, rows.cuda(), scale)
        for suffix, part in expected.items():
            assert torch.equal(found[suffix].cpu(), part), (rows.shape, suffix)


@pytest.mark.parametrize("scale", [2.0**-40, 3.3e-5, 0.37, 100.0])
def test_every_magnitude_under_scales_of_other_tensors(scale: float) -> None:
    for seed in range(4):
        rows = magnitudes(seed)
        expected, found = (encode(FORMATS["nvfp4"], each, torch.tensor(scale)) for each in (rows, rows.cuda()))
        for suffix, part in expected.items():
            assert torch.equal(found[suffix].cpu(), part), (seed, suffix)


def experts(layout: str, sizes: tuple[int, int, int]) -> tuple[LayoutPlan, dict[str, Tensor], Live]:
    plan = plan_experts(LAYOUTS[layout], FORMATS["nvfp4"], "m", *sizes)
    return plan, *live_of(plan)


def live_of(plan: LayoutPlan, device: str = "cuda") -> tuple[dict[str, Tensor], Live]:
    storages = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype, device=device) for spec in plan.storages}
    storages |= {each.name: torch.zeros(each.shape, device=device) for each in plan.derived}
    return storages, plan_live(storages, plan.placements, plan.derived, {}, storages)


# A width for every tile of cuda.TILES, and one that none divides.
@pytest.mark.parametrize("sizes", [(2, 1024, 512), (2, 256, 768), (3, 128, 64), (2, 1088, 64)])
@pytest.mark.parametrize("layout", ["trtllm_moe", "cutlass_moe"])
def test_encodes_straight_into_live_storages(layout: str, sizes: tuple[int, int, int]) -> None:
    num, hidden, inter = sizes
    plan, storages, _ = experts(layout, sizes)
    expected, host = live_of(plan, "cpu")
    place = {write.placement.tensor.name: write for write in host.writes}
    matrices: dict[int, list[cuda.Matrix]] = {}
    scales = torch.rand(num, generator=torch.Generator().manual_seed(0)) * 1e-4
    for name, shape in (("gate", (inter, hidden)), ("up", (inter, hidden)), ("down", (hidden, inter))):
        for e in range(num):
            rows = (torch.randn(shape) * 0.02).bfloat16()
            parts = encode(FORMATS["nvfp4"], rows, scales[e])
            at = {}
            for suffix, part in parts.items():
                write = place[f"m.{e}.{name}_proj.{suffix}"]
                write.apply(part)
                placement = write.placement
                where = cuda.At(located=placement.located, row0=0, shift=placement.origin)
                at[suffix] = (storages[placement.storage], where)
            (weight, weight_at), (block_scale, scale_at) = at["weight"], at["weight_scale"]
            matrices.setdefault(shape[1], []).append(
                cuda.Matrix(
                    rows=rows.cuda(),
                    weight=weight,
                    block_scale=block_scale,
                    group=e,
                    weight_at=weight_at,
                    scale_at=scale_at,
                )
            )
    for batch in matrices.values():
        cuda.encode_nvfp4(cuda.plan_batch(batch), cuda.scale_table(scales.cuda()))
    for name, storage in expected.items():
        assert torch.equal(storages[name].cpu(), storage), name


def checkpoint_form(sizes: list[tuple[int, int]]) -> list[cuda.Matrix]:
    return [
        cuda.Matrix(
            rows=(torch.randn(n, k, device="cuda") * 0.02).bfloat16(),
            weight=torch.zeros(n, k // 2, dtype=torch.uint8, device="cuda"),
            block_scale=torch.zeros(n, k // 16, dtype=torch.uint8, device="cuda"),
            group=i // 2,
        )
        for i, (n, k) in enumerate(sizes)
    ]


@pytest.mark.parametrize("shape", [(768, 2048), (257, 768), (33, 48), (64, 7168)])
def test_amax_of_groups_and_their_scales(shape: tuple[int, int]) -> None:
    matrices = checkpoint_form([shape] * 8)
    bits = cuda.amax(cuda.plan_batch(matrices)).cpu()
    scales = cuda.scales_of(bits.cuda()).cpu()
    for group in range(4):
        largest = max(amax(each.rows.cpu()) for each in matrices if each.group == group)
        assert int(bits[group]) == largest
        assert scales[group] == global_scale(FORMATS["nvfp4"], largest)


@pytest.mark.parametrize("shape", [(768, 2048), (256, 768), (64, 7168)])
def test_diff_finds_what_changed_and_nothing_else(shape: tuple[int, int]) -> None:
    matrices = checkpoint_form([shape] * 4)
    batch, table = cuda.plan_batch(matrices), cuda.scale_table(torch.tensor([3e-5, 2e-5], device="cuda"))
    cuda.encode_nvfp4(batch, table)
    found = cuda.diff_nvfp4(batch, table)
    assert found is not None and not len(found.position)
    new = [(each.weight.clone(), each.block_scale.clone()) for each in matrices]
    for each in matrices:
        for part, count in ((each.weight, 20), (each.block_scale, 3)):
            at = torch.randperm(part.numel(), device="cuda")[:count]
            part.view(-1)[at] += torch.randint(1, 256, (count,), device="cuda").to(torch.uint8)
    found = cuda.diff_nvfp4(batch, table)
    assert found is not None and found.part.tolist() == sorted(found.part.tolist())
    for i, index in product(range(4), range(2)):
        old = matrices[i].weight if index == 0 else matrices[i].block_scale
        now, was, here = new[i][index].view(-1), old.view(-1), found.part == 2 * i + index
        expected = (now != was).nonzero().flatten()
        assert torch.equal(found.position[here], expected)
        assert torch.equal(found.difference[here], now[expected] - was[expected])


def test_a_diff_of_more_than_is_noted_is_left_to_a_comparison() -> None:
    matrices = checkpoint_form([(768, 2048)] * 2)
    batch, table = cuda.plan_batch(matrices), cuda.scale_table(torch.tensor([3e-5], device="cuda"))
    cuda.encode_nvfp4(batch, table)
    words = matrices[1].weight.view(-1)[: 4 * (cuda.ROOM + 1)].view(-1, 4)
    words[: cuda.ROOM] ^= 255  # every byte of as many words as there is room for
    found = cuda.diff_nvfp4(batch, table)
    assert found is not None and found.position.tolist() == list(range(4 * cuda.ROOM))
    assert set(found.part.tolist()) == {2}
    words[cuda.ROOM, 3] ^= 1
    assert cuda.diff_nvfp4(batch, table) is None


ROWS = [
    (plan_experts, "trtllm_moe", "nvfp4", (3, 128, 64)),
    (plan_experts, "cutlass_moe", "nvfp4", (2, 128, 80)),
    (plan_linear, "cutlass_dit_swapped", "nvfp4", (192, 96)),
    (plan_linear, "trtllm_linear", "nvfp4", (200, 80)),
    (plan_linear, "trtllm_linear_fp8", "fp8", (128, 256)),
    (plan_linear, "plain", "fp8_block", (150, 200)),
    (plan_linear, "npu_linear", "int8_dynamic", (40, 33)),
    (plan_linear, "plain", "bf16", (33, 7)),
]


@pytest.mark.parametrize(("plan_of", "layout", "fmt", "sizes"), ROWS, ids=[f"{row[1]}-{row[2]}" for row in ROWS])
def test_rows_and_bytes_through_layouts(plan_of: object, layout: str, fmt: str, sizes: tuple[int, ...]) -> None:
    plan = plan_of(LAYOUTS[layout], FORMATS[fmt], "m", *sizes)  # type: ignore[operator]
    storages, live = live_of(plan)
    expected, host = live_of(plan, "cpu")
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(0, 256, (w.num_rows, w.placement.tensor.row_bytes), dtype=torch.uint8, generator=generator)
        for w in host.writes
    ]
    arrived = [each.cuda() for each in rows]
    staged = torch.tensor([each.data_ptr() for each in arrived], device="cuda")
    chosen = rows_of.Table(live.writes).select(range(len(rows)))
    chosen.scatter(staged)
    for write, each in zip(host.writes, rows, strict=True):
        write.apply(each)
    assert all(torch.equal(bits(storages[name].cpu()), bits(each)) for name, each in expected.items())
    digests = np.array([digest_rows(w.key, r, w.row0) for w, r in zip(host.writes, rows, strict=True)], np.uint64)
    assert (rows_of.as_digests(chosen.digest(staged)) == digests).all()
    assert (rows_of.as_digests(chosen.digest()) == digests).all()
    check_bytes(chosen, host, rows, storages, expected)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def check_bytes(
    chosen: rows_of.Chosen, host: Live, rows: list[Tensor], storages: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    random, before = np.random.default_rng(0), {name: bits(each).clone() for name, each in storages.items()}
    found, moved = [], np.zeros((len(rows), 2), np.uint64)
    for i, (write, each) in enumerate(zip(host.writes, rows, strict=True)):
        count = max(1, each.numel() // 7)
        at = np.sort(random.choice(each.numel(), count, replace=False)).astype(np.int64)
        values = random.integers(1, 256, count).astype(np.uint8)
        part = Sparse(i, write, Patch(tensor=i, first=0, stop=each.numel(), positions=at, values=values))
        moved[i] = [(new - old) % 2**64 for new, old in zip(part.into, part.out, strict=True)]
        part.apply()
        found.append((np.full(count, i, np.int32), at, values))
    changes = chosen.changes(*(torch.from_numpy(np.concatenate(each)).cuda() for each in zip(*found, strict=True)))
    assert (rows_of.as_digests(changes.moved) == moved).all()
    changes.apply()
    assert (rows_of.as_digests(changes.read_back() - changes.taken) == moved).all()
    assert all(torch.equal(bits(storages[name].cpu()), bits(each)) for name, each in expected.items())
    changes.undo()
    assert all(torch.equal(bits(each), before[name]) for name, each in storages.items())


def test_a_scale_beyond_the_kernel_is_left_to_the_twin() -> None:
    rows = magnitudes(3)
    expected, found = (encode(FORMATS["nvfp4"], each, torch.tensor(2.0**40)) for each in (rows, rows.cuda()))
    assert all(torch.equal(found[suffix].cpu(), part) for suffix, part in expected.items())
    assert kernels.amax_bits(rows) == amax(rows.cuda())


def test_a_diff_of_other_widths_is_left_to_a_comparison() -> None:
    batch = cuda.plan_batch(checkpoint_form([(33, 48)]))
    assert cuda.diff_nvfp4(batch, cuda.scale_table(torch.ones(1, device="cuda"))) is None
