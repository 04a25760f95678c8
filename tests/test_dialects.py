"""Dialects: other libraries' names and dtypes for the same bytes, there and back, against what they write."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant.dialects import DIALECTS, from_dialect, to_dialect
from quant.formats import FORMATS, amax, decode, encode, global_scale, typed
from tests import goldens

CT = "compressed-tensors"
NVFP4_FILES = [*goldens.names("nvfp4_dense"), "nvfp4_special_edge"]


def tensors_of(name: str, prefix: str) -> dict[str, Tensor]:
    stored = goldens.load(name)
    return {key.removeprefix(f"{prefix}."): value for key, value in stored.items() if key.startswith(f"{prefix}.")}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(goldens.bytes_of(a), goldens.bytes_of(b))


def sample(fmt: str, shape: tuple[int, int]) -> dict[str, Tensor]:
    """A weight in our form, calibration included."""
    row = FORMATS[fmt]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    given = {name: torch.tensor([0.25]) for name in row.needs}
    scale = global_scale(row, amax(weight)) if row.has_global_scale else None
    tensors = typed(row, encode(row, weight, scale, given=given), shape) | given
    part = row.component("global_scale")
    if part is not None and scale is not None:
        tensors |= {part.suffix: scale, "input_scale": torch.tensor(0.37)}
    return tensors


@pytest.mark.parametrize(("fmt", "dialect"), DIALECTS)
def test_there_and_back_keeps_every_byte_but_a_reciprocal_s_last_bit(fmt: str, dialect: str) -> None:
    for shape in ((256, 384), (128, 128)):
        ours = sample(fmt, shape)
        back = from_dialect(fmt, dialect, to_dialect(fmt, dialect, ours))
        assert back.keys() == ours.keys()
        for suffix, tensor in ours.items():
            if (fmt, suffix) in {("nvfp4", "weight_scale_2"), ("nvfp4", "input_scale")}:
                ulps = abs(int(back[suffix].view(torch.int32)) - int(tensor.view(torch.int32)))
                assert back[suffix].shape == tensor.shape and ulps <= 1
            else:
                assert same_bytes(back[suffix], tensor), suffix


@pytest.mark.parametrize("name", NVFP4_FILES)
def test_a_compressed_tensors_checkpoint_is_read_without_touching_its_codes(name: str) -> None:
    theirs = tensors_of(name, "ct_f32")
    wanted = {"weight_packed", "weight_scale", "weight_global_scale"} & theirs.keys()
    ours = from_dialect("nvfp4", CT, {key: theirs[key] for key in wanted})
    assert same_bytes(ours["weight_scale"], theirs["weight_scale"])
    assert ours["weight_scale_2"].shape == () and ours["weight_scale_2"] == 1 / theirs["weight_global_scale"][0]
    if "weight_packed" in theirs:
        assert same_bytes(ours["weight"], theirs["weight_packed"])
        weight = goldens.load(name)["in.weight"].float()
        error = (decode(FORMATS["nvfp4"], ours).float() - weight).abs().max() / weight.abs().max()
        assert error < 0.17  # half a step of E2M1 at its top


DECODED = [("fp8", "ct_tensor_f32", "fp8_special_tiny"), ("fp8_channel", "ct_channel_f32", "fp8_special_tiny")]
DECODED += [("fp8_block", "ct_block128_f32", "fp8_c200x192"), ("mxfp4", "ct_f32", "mxfp4_d33x160")]
DECODED += [("mxfp8", "ct_f32", "mxfp8_d33x160"), ("int8", "ct_f32", "int_special_edge")]


@pytest.mark.parametrize(("fmt", "prefix", "name"), DECODED)
def test_checkpoints_of_compressed_tensors_decode_by_our_rows(fmt: str, prefix: str, name: str) -> None:
    theirs = tensors_of(name, prefix)
    ours = from_dialect(fmt, CT, theirs)
    weight = goldens.load(name)["in.weight"].float()
    specs = {spec.name: spec for spec in FORMATS[fmt].tensors("a.weight", tuple(weight.shape))}
    assert all(list(tensor.shape) == list(specs[f"a.{suffix}"].shape) for suffix, tensor in ours.items())
    got = decode(FORMATS[fmt], ours).float()
    assert got.isfinite().all() and (got - weight).abs().max() <= 0.17 * weight.abs().max()


@pytest.mark.parametrize("name", [name for name in goldens.names("int_") if "c66" not in name])
def test_int4_codes_keep_their_values_in_the_other_packing(name: str) -> None:
    """modelopt and compressed-tensors scale differently; the same codes and scales are said in both."""
    stored = tensors_of(name, "modelopt_int4_awq_g128")
    theirs = to_dialect("int4_awq", CT, stored)
    nibbles = stored["weight"]
    signed = torch.stack((nibbles & 15, nibbles >> 4), 1).flatten(0, 1).to(torch.int8)
    signed = torch.where(signed > 7, signed - 16, signed)
    words = theirs["weight_packed"].long()
    unpacked = torch.stack([(words >> (4 * i) & 15) - 8 for i in range(8)], 2).flatten(1)
    assert torch.equal(unpacked, signed.long()) and words.shape[1] * 8 == nibbles.shape[1]


def test_an_fp16_model_of_modelslim_holds_the_same_bits_widened() -> None:
    for name in goldens.names("int_"):
        ours = from_dialect(
            "int8_static", "modelslim fp16", {"deq_scale": tensors_of(name, "modelslim_static_fp16model")["deq_scale"]}
        )
        assert same_bytes(ours["deq_scale"], tensors_of(name, "modelslim_static_bf16model")["deq_scale"])


def test_single_blocks_are_squeezed_as_modelopt_exports_them() -> None:
    exported = goldens.load("export_llama_fp8_2d_blockwise_weight_only")
    down, k = (exported[f"out.model.layers.0.{path}.weight_scale"] for path in ("mlp.down_proj", "self_attn.k_proj"))
    assert [list(scale.shape) for scale in (down, k)] == [[1, 1, 2, 1], []]
    for scale, shape in ((down, [1, 2]), (k, [1, 1])):
        ours = from_dialect("fp8_block", "modelopt export", {"weight_scale": scale})
        assert list(ours["weight_scale"].shape) == shape
        assert same_bytes(to_dialect("fp8_block", "modelopt export", ours)["weight_scale"], scale)


def test_unknown_dialects_and_tensors_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"bf16 in compressed-tensors: no such dialect; known: nvfp4 in compressed"):
        to_dialect("bf16", CT, {})
    with pytest.raises(ValueError, match=r"unknown tensors weight_offset; known: weight, weight_scale"):
        to_dialect("fp8", CT, {"weight_offset": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"unknown tensors weight; known: weight_packed"):
        from_dialect("nvfp4", CT, {"weight": torch.zeros(1)})
