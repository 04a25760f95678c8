"""Nibble order and scale layout against BF16 rows: what is stored comes from the oracles' own swaps and swizzles."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant.checkpoint import Checkpoint
from quant.configs import Quantization, ScaleLayout
from quant.name_maps import NAME_MAPS
from quant.probe import HYPOTHESES, Hypothesis, ProbeError, Sample, check, fits, padded_scales, rows_of, samples, verify
from tests.goldens import load

LAYER = "transformer_blocks.0.attn.to_q"
DIT = {name: load(f"dit_nvfp4_{name}") for name in ("n256k128", "n192k96", "n40k80", "n128k48")}


def stored(swap: bool, layout: ScaleLayout, name: str = "n256k128") -> dict[str, Tensor]:
    """A layer as sglang and modelopt have it: nibbles swapped or not, scales swizzled or not."""
    golden = DIT[name]
    return {
        "weight": golden["out.cutlass_swapped.weight" if swap else "ckpt.weight"],
        "weight_scale": golden["ckpt.weight_scale" if layout == "linear" else "out.swizzled_ckpt_scale"],
        "weight_scale_2": golden["ckpt.weight_scale_2"],
    }


def sample(tensors: dict[str, Tensor], base: Tensor, rows: int = 32) -> Sample:
    return Sample(
        name=f"{LAYER}.weight",
        codes=tensors["weight"][:rows],
        scales=tensors["weight_scale"][:128],
        global_scale=tensors["weight_scale_2"],
        base=base[:rows],
    )


def write(
    directory: Path,
    layers: dict[str, dict[str, Tensor]],
    extra: Mapping[str, Tensor] = {},
    swap_nibbles: bool | None = None,
) -> Checkpoint:
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{suffix}": tensor.clone() for name, parts in layers.items() for suffix, tensor in parts.items()}
    save_file(tensors | dict(extra), directory / "model.safetensors")
    return Checkpoint(directory, swap_nibbles=swap_nibbles)


def declared(swap: bool = False, layout: ScaleLayout = "linear", fmt: str = "nvfp4") -> Quantization:
    return Quantization(format=fmt, swap_nibbles=swap, scale_layout=layout)


ALL = [(each.swap_nibbles, each.scale_layout) for each in HYPOTHESES]


@pytest.mark.parametrize("truth", ALL)
def test_only_the_reading_that_is_true_is_verified(truth: tuple[bool, ScaleLayout]) -> None:
    taken = [sample(stored(*truth), DIT["n256k128"]["in.weight"])]
    for reading in HYPOTHESES:
        if (reading.swap_nibbles, reading.scale_layout) == truth:
            verdict = check(reading, taken)
            assert verdict.status == "verified" and verdict.errors[reading] < 0.15
            continue
        with pytest.raises(ProbeError) as caught:
            check(reading, taken)
        message = str(caught.value)
        assert f"declared is {reading}, but {Hypothesis(swap_nibbles=truth[0], scale_layout=truth[1])} fits" in message
        errors = re.findall(r"(\w+ nibble first, \w+ scales) ([0-9.]+[0-9])", message.split("Relative errors: ")[1])
        assert {text for text, _ in errors} == {str(each) for each in HYPOTHESES}
        values = [float(error) for _, error in errors]
        assert values == sorted(values) and values[0] < 0.15 < 0.2 < values[1]


def test_errors_are_those_of_the_decoded_rows() -> None:
    """Against arithmetic of its own: E2M1 values by table, scales by torch, in FP64."""
    golden, rows = DIT["n256k128"], 32
    codes, values = golden["ckpt.weight"][:rows], torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).long()
    signed = values[nibbles & 7] * torch.where(nibbles > 7, -1, 1)
    scales = (
        golden["ckpt.weight_scale"][:rows].double().repeat_interleave(16, dim=1)
        * golden["ckpt.weight_scale_2"].double()
    )
    base = golden["in.weight"][:rows].double()
    expected = float((signed * scales - base).norm() / base.norm())
    found = fits([sample(stored(False, "linear"), golden["in.weight"])])
    assert found[HYPOTHESES[0]] == pytest.approx(expected, rel=1e-2)  # decoded rows are rounded to BF16


def test_the_first_push_serves_as_the_base(tmp_path: Path) -> None:
    weight = DIT["n256k128"]["in.weight"]
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.float().std() * 0.02
    pushed = {f"{LAYER}.weight": (weight.float() + step).to(torch.bfloat16)}
    checkpoint = write(tmp_path, {LAYER: stored(True, "swizzled")})

    def base(name: str, start: int, stop: int) -> Tensor | None:
        return pushed[name][start:stop] if name in pushed else None

    assert verify(checkpoint, base, quantization=declared(True, "swizzled")).status == "verified"
    with pytest.raises(ProbeError, match="high nibble first, swizzled scales fits the BF16 rows better"):
        verify(checkpoint, base, quantization=declared())


def test_a_base_checkpoint_is_compared_under_the_names_that_it_has(tmp_path: Path) -> None:
    checkpoint = write(
        tmp_path / "fp4", {"double_blocks.0.img_attn.proj": stored(True, "linear")}, {"x": torch.ones(1)}
    )
    base = write(tmp_path / "bf16", {LAYER: {"weight": DIT["n256k128"]["in.weight"]}})
    renamed = rows_of(base, lambda name: f"{LAYER}.weight" if "proj" in name else name)
    assert verify(checkpoint, renamed, quantization=declared(True)).status == "verified"
    with pytest.raises(ProbeError):
        verify(checkpoint, renamed, quantization=declared(False))
    assert verify(checkpoint, rows_of(base), quantization=declared(False)).status == "unverified"


def test_a_packed_weight_is_compared_by_its_first_part(tmp_path: Path) -> None:
    """q, k and v stacked, each with its own global scale; the base has q alone."""
    parts = stored(False, "linear")
    packed = {
        "weight": torch.cat([parts["weight"]] * 3),
        "weight_scale": torch.cat([parts["weight_scale"]] * 3),
        "weight_scale_2": torch.stack([parts["weight_scale_2"] * factor for factor in (1.0, 5.0, 9.0)]),
    }
    checkpoint = write(tmp_path, {"blocks.0.qkv": packed})
    taken = samples(checkpoint, lambda name, start, stop: DIT["n256k128"]["in.weight"][start:stop])
    verdict = check(HYPOTHESES[0], taken)
    assert verdict.status == "verified" and verdict.errors[HYPOTHESES[0]] < 0.15


def test_samples_are_few_rows_of_weights_all_over_the_checkpoint(tmp_path: Path) -> None:
    layers = {f"blocks.{i:02}.to_q": stored(False, "linear") for i in range(12)}
    checkpoint = write(tmp_path, layers)
    taken = samples(checkpoint, lambda name, start, stop: DIT["n256k128"]["in.weight"][start:stop])
    assert [each.name for each in taken] == [f"blocks.{i:02}.to_q.weight" for i in (0, 3, 6, 9)]
    assert all(each.codes.shape == (32, 64) and each.scales.shape == (128, 8) for each in taken)


def test_weights_that_cannot_be_compared_are_not_sampled(tmp_path: Path) -> None:
    """All zero, which modelopt gives a global scale of 0; and of another width than the base."""
    good = stored(False, "linear")
    zero = {suffix: torch.zeros_like(tensor) for suffix, tensor in good.items()}
    wide = {**stored(False, "linear", "n192k96")}
    checkpoint = write(tmp_path, {"a": zero, "b": wide, "c": good})
    taken = samples(checkpoint, lambda name, start, stop: DIT["n256k128"]["in.weight"][start:stop])
    assert [each.name for each in taken] == ["c.weight"]


def test_a_reading_that_takes_nan_for_a_scale_is_the_worst() -> None:
    scales = stored(False, "linear")["weight_scale"][:128].view(torch.uint8).clone()
    scales[32:] = 0x7F  # beyond the rows that are compared, unless the tile is taken apart
    tensors = stored(False, "linear") | {"weight_scale": scales.view(torch.float8_e4m3fn)}
    verdict = check(HYPOTHESES[0], [sample(tensors, DIT["n256k128"]["in.weight"])])
    assert verdict.status == "verified" and verdict.errors[HYPOTHESES[1]] == float("inf")


def test_padded_rows_and_columns_are_left_out_of_the_comparison() -> None:
    golden = DIT["n40k80"]
    tensors = {
        "weight": golden["out.modelopt_pad_row_col.weight"],
        "weight_scale": golden["out.modelopt_pad_row_col_swizzled.weight_scale"],
        "weight_scale_2": golden["ckpt.weight_scale_2"],
    }
    taken = [sample(tensors, golden["in.weight"], rows=48)]
    assert taken[0].base.shape == (40, 80)
    assert check(Hypothesis(swap_nibbles=False, scale_layout="swizzled"), taken).status == "verified"
    with pytest.raises(ProbeError):
        check(Hypothesis(swap_nibbles=False, scale_layout="linear"), taken)


def test_scales_that_are_no_tiles_cannot_be_swizzled() -> None:
    taken = [sample(stored(False, "linear", "n40k80"), DIT["n40k80"]["in.weight"])]
    assert {each.scale_layout for each in fits(taken)} == {"linear"}
    assert check(HYPOTHESES[0], taken).status == "verified"
    with pytest.raises(ProbeError, match="scales of these shapes are not swizzled"):
        check(Hypothesis(swap_nibbles=False, scale_layout="swizzled"), taken)


def test_rows_that_read_the_same_either_way_verify_nothing() -> None:
    """All codes alike, and all scales: no reading differs. Pairs alike: only the order of nibbles is left open."""
    alike = {
        "weight": torch.full((128, 64), 0x77, dtype=torch.uint8),
        "weight_scale": torch.full((128, 8), 1.0).to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(0.5),
    }
    constant = torch.full((128, 128), 3.0, dtype=torch.bfloat16)
    verdict = check(HYPOTHESES[0], [sample(alike, constant)])
    assert verdict.status == "unverified" and verdict.verified == frozenset()
    assert set(verdict.errors.values()) == {0.0}

    doubling = 2.0 ** (torch.arange(128 * 8) % 11 - 5).reshape(128, 8)
    pairs = {**alike, "weight_scale": doubling.to(torch.float8_e4m3fn)}
    rows = (doubling * 3.0).repeat_interleave(16, dim=1).to(torch.bfloat16)
    verdict = check(HYPOTHESES[0], [sample(pairs, rows)])
    assert verdict.status == "unverified" and verdict.verified == {"scale_layout"}
    assert str(verdict).startswith("unverified (swap_nibbles): relative errors")


def test_rows_of_another_model_neither_verify_nor_stop() -> None:
    other = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16) * 0.02
    verdict = check(HYPOTHESES[0], [sample(stored(True, "swizzled"), other)])
    assert verdict.status == "unverified" and "the BF16 rows are of another model" in verdict.reason


def test_nothing_to_compare_with_is_unverified(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {LAYER: stored(False, "linear")})
    verdict = verify(checkpoint, quantization=declared())
    assert verdict.status == "unverified" and verdict.verified == frozenset()
    assert verdict.reason == "no BF16 rows to compare with"


def test_a_format_without_nibbles_needs_no_probe(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {LAYER: stored(False, "linear")})
    assert verify(checkpoint, quantization=declared(fmt="fp8")).status == "verified"


# ---------------------------------------------------------------- metadata and padding bytes


def test_a_header_that_states_both_stands_in_for_the_base(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, {LAYER: stored(True, "swizzled")})
    config = {"quant_algo": "NVFP4", "swap_weight_nibbles": True, "checkpoint_weight_scale_layout": "swizzled"}
    header = [{"quantization_config": json.dumps(config)}]
    assert verify(checkpoint, quantization=declared(True, "swizzled"), metadata=header).status == "verified"
    with pytest.raises(ProbeError, match=r"metadata: swap_nibbles True \(no BF16 rows to compare with\)"):
        verify(checkpoint, quantization=declared(False, "swizzled"), metadata=header)


def test_markers_of_comfyui_stand_in_for_the_base(tmp_path: Path) -> None:
    marker = {f"{LAYER}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    checkpoint = write(tmp_path, {LAYER: stored(True, "swizzled")}, marker)
    assert verify(checkpoint, quantization=declared(True, "swizzled")).status == "verified"
    with pytest.raises(ProbeError, match="metadata: scale_layout swizzled"):
        verify(checkpoint, quantization=declared(True, "linear"))


def test_bf16_rows_outweigh_metadata(tmp_path: Path) -> None:
    marker = {f"{LAYER}.comfy_quant": torch.zeros(2, dtype=torch.uint8)}
    checkpoint = write(tmp_path, {LAYER: stored(False, "linear")}, marker)
    base = rows_of(write(tmp_path / "base", {LAYER: {"weight": DIT["n256k128"]["in.weight"]}}))
    assert verify(checkpoint, base, quantization=declared(False, "linear")).status == "verified"


@pytest.mark.parametrize("name", ["n192k96", "n40k80", "n256k128"])
def test_padding_bytes_tell_the_layout_of_scales_but_not_the_order_of_nibbles(tmp_path: Path, name: str) -> None:
    """Padded by modelopt: rows and columns, rows, and columns alone."""
    golden, other = DIT[name], {"linear": "swizzled", "swizzled": "linear"}
    for layout, suffix in (("linear", ""), ("swizzled", "_swizzled")):
        tensors = {
            "weight": golden["out.modelopt_pad_row_col.weight"],
            "weight_scale": golden[f"out.modelopt_pad_row_col{suffix}.weight_scale"],
            "weight_scale_2": golden["ckpt.weight_scale_2"],
        }
        checkpoint = write(tmp_path / layout, {LAYER: tensors})
        verdict = verify(checkpoint, quantization=declared(layout=layout))  # type: ignore[arg-type]
        assert verdict.status == "unverified" and verdict.verified == {"scale_layout"}
        with pytest.raises(ProbeError, match=f"padding bytes: scale_layout {layout}"):
            verify(checkpoint, quantization=declared(layout=other[layout]))  # type: ignore[arg-type]


def test_padding_that_is_zero_under_both_layouts_tells_nothing(tmp_path: Path) -> None:
    """One tile of columns: swizzling it moves rows, not the padding column."""
    checkpoint = write(tmp_path, {LAYER: stored(False, "swizzled", "n128k48")})
    padding = list(padded_scales(checkpoint))
    assert [each.name for each in padding] == [LAYER]
    for reading in HYPOTHESES:
        assert check(reading, (), padding=padding).verified == frozenset()


# ---------------------------------------------------------------- what checkpoints declare


def test_a_header_is_read_with_the_checkpoint(tmp_path: Path) -> None:
    tensors = {f"{LAYER}.{suffix}": tensor for suffix, tensor in stored(True, "linear").items()}
    config = {"quant_algo": "NVFP4", "swap_weight_nibbles": True, "checkpoint_weight_scale_layout": "linear"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"quantization_config": json.dumps(config)})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.quantization is not None
    verdict = verify(checkpoint, quantization=checkpoint.quantization, metadata=checkpoint.metadata())
    assert verdict.status == "verified" and "metadata: swap_nibbles True" in verdict.reason


@pytest.mark.parametrize("truth", ALL)
def test_packed_qkv_is_compared_with_the_q_of_the_names_that_the_model_has(
    tmp_path: Path, truth: tuple[bool, ScaleLayout]
) -> None:
    """A qkv of 768 rows as Black Forest Labs store it, and the BF16 rows of to_q in a diffusers checkpoint."""
    parts = stored(*truth)
    packed = {suffix: torch.cat([parts[suffix]] * 3) for suffix in ("weight", "weight_scale")}
    layer = {"double_blocks.0.img_attn.qkv": packed | {"weight_scale_2": parts["weight_scale_2"]}}
    checkpoint = write(tmp_path / "fp4", layer, swap_nibbles=True)
    to_q = write(tmp_path / "base", {LAYER: {"weight": DIT["n256k128"]["in.weight"]}})
    base = rows_of(to_q, lambda name: NAME_MAPS["bfl_flux2"].forward(name)[0].target.name)
    assert checkpoint.quantization is not None and checkpoint.quantization.packed_qkv
    for swap, layout in ALL:
        reading = replace(checkpoint.quantization, swap_nibbles=swap, scale_layout=layout)
        if (swap, layout) == truth:
            assert verify(checkpoint, base, quantization=reading).status == "verified"
        else:
            with pytest.raises(ProbeError, match="fits the BF16 rows better"):
                verify(checkpoint, base, quantization=reading)
