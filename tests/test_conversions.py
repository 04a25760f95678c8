"""Conversions of checkpoints that round or put in order, against fixtures and slow references."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from quant import conversions
from tests import goldens, reference

DIT = goldens.names("dit_nvfp4")
E4M3 = torch.float8_e4m3fn


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(goldens.bytes_of(a), goldens.bytes_of(b))


def nearest_e4m3(value: float) -> int:
    return reference.nearest(reference.E4M3, min(Fraction(value), Fraction(448)))


@pytest.mark.parametrize("name", DIT)
def test_packed_projections_move_onto_the_largest_global_scale(name: str) -> None:
    stored = goldens.load(name)
    scales, scale = stored["ckpt.weight_scale"], float(stored["ckpt.weight_scale_2"])
    half = len(scales) // 2
    moved, shared = conversions.rebase_block_scales(scales, (scale, scale / 2), (half, len(scales) - half))
    assert same_bytes(moved, stored["out.rebased_partition_scale"]) and shared.item() == scale


def test_rebasing_rounds_once_and_keeps_the_part_with_the_largest_scale() -> None:
    codes = torch.arange(1, 0x7F, dtype=torch.uint8).repeat(3, 1)
    moved, shared = conversions.rebase_block_scales(codes.view(E4M3), (0.3, 0.7, 0.1), (1, 1, 1))
    assert shared == torch.tensor(0.7) and torch.equal(moved[1].view(torch.uint8), codes[1])
    for row, scale in ((0, 0.3), (2, 0.1)):
        ratio = np.float32(scale) / np.float32(0.7)
        expected = [nearest_e4m3(float(np.float32(float(reference.E4M3[code])) * ratio)) for code in range(1, 0x7F)]
        assert moved[row].view(torch.uint8).tolist() == expected


def test_requantizing_to_a_group_s_maximum_rounds_once_in_fp32() -> None:
    codes = torch.arange(0, 0x7F, dtype=torch.uint8).view(1, -1)
    parts = [{"weight": codes.view(E4M3), "weight_scale": torch.tensor(scale)} for scale in (0.5, 0.125 / 3, 0.5, 0.02)]
    moved = conversions.requantize_to_largest(parts)
    assert {part["weight_scale"].item() for part in moved} == {0.5}
    assert all(same_bytes(moved[i]["weight"], parts[i]["weight"]) for i in (0, 2))
    for i in (1, 3):
        scale = np.float32(parts[i]["weight_scale"].item())
        values = [np.float32(float(value)) * scale / np.float32(0.5) for value in reference.E4M3]
        assert moved[i]["weight"].view(torch.uint8).flatten().tolist() == [
            nearest_e4m3(float(value)) for value in values
        ]


def test_a_fused_group_of_an_fp8_export_gets_one_scale() -> None:
    exported = goldens.load("export_llama_fp8_default")
    stems = [f"out.model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    parts = [
        {"weight": exported[f"{stem}.weight"], "weight_scale": exported[f"{stem}.weight_scale"]}
        for stem in stems
        if f"{stem}.weight" in exported
    ]
    moved = conversions.requantize_to_largest(parts)
    largest = max(part["weight_scale"] for part in parts)
    for before, after in zip(parts, moved, strict=True):
        assert after["weight_scale"] == largest
        error = (after["weight"].float() * largest - before["weight"].float() * before["weight_scale"]).abs().max()
        assert error <= largest * 16  # half a step at the top of E4M3


@pytest.mark.parametrize("name", DIT)
def test_a_swizzled_checkpoint_is_read_in_rows(name: str) -> None:
    stored = goldens.load(name)
    scales = stored["ckpt.weight_scale"]
    assert same_bytes(conversions.linear_scales(stored["out.swizzled_ckpt_scale"], *scales.shape), scales)


@pytest.mark.parametrize("shape", [(1, 1), (129, 3), (96, 4), (300, 17)])
def test_reading_swizzled_scales_undoes_the_slow_reference(shape: tuple[int, int]) -> None:
    scales = np.random.default_rng(3).integers(0, 256, shape).astype(np.uint8)
    swizzled = torch.from_numpy(reference.swizzle_128x4(scales).copy())
    assert np.array_equal(conversions.linear_scales(swizzled, *shape).numpy(), scales)


def test_nibbles_are_swapped_as_comfy_kitchen_packs_them() -> None:
    stored = goldens.load("nvfp4_dense_a128x128")
    low, high = stored["comfy_lo_first.weight"], stored["comfy_hi_first.weight"]
    assert torch.equal(conversions.swap_nibbles(high), low) and torch.equal(conversions.swap_nibbles(low), high)


@pytest.mark.parametrize("name", DIT)
@pytest.mark.parametrize("columns", [False, True])
def test_padding_is_that_of_modelopt_s_comfyui_export(name: str, columns: bool) -> None:
    stored = goldens.load(name)
    prefix = "out.modelopt_pad_row_col" if columns else "out.modelopt_pad_row"
    padded = conversions.pad_rows_and_blocks(stored["ckpt.weight"], stored["ckpt.weight_scale"], columns=columns)
    assert same_bytes(padded[0], stored[f"{prefix}.weight"]) and same_bytes(padded[1], stored[f"{prefix}.weight_scale"])


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ValueError, match="2 scales for parts of"):
        conversions.rebase_block_scales(torch.zeros(4, 1).to(E4M3), (1.0, 2.0), (4,))
    with pytest.raises(ValueError, match="expected 512 bytes for"):
        conversions.linear_scales(torch.zeros(128, dtype=torch.uint8), 3, 3)
