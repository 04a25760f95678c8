"""Formats against the libraries' fixtures, a slow reference, and the two implementations against each other."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import kernels, loops
from quant.formats import (
    DTYPES,
    FORMATS,
    TensorSpec,
    amax,
    decode,
    decode_unscaled,
    dtype_name,
    encode,
    first_nonfinite,
    global_scale,
)
from tests import goldens, reference

BF16, NVFP4 = FORMATS["bf16"], FORMATS["nvfp4"]
FINITE = [name for name in goldens.names("nvfp4_special") if name.endswith(("edge", "huge", "tiny"))]
REFUSED = [name for name in goldens.names("nvfp4_special") if name.endswith(("nan", "inf"))]


def equal_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(goldens.bytes_of(a), goldens.bytes_of(b))


def as_stored(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale"].view(torch.float8_e4m3fn)}


@pytest.mark.parametrize("name", goldens.names("nvfp4_dense") + FINITE)
def test_encoding_and_decoding_give_the_bytes_of_modelopt(name: str) -> None:
    weight = goldens.load(name)["in.weight"]
    scale = global_scale(NVFP4, amax(weight))
    assert goldens.same(name, "modelopt.weight_scale_2", scale)
    parts = encode(NVFP4, weight, scale)
    for suffix, tensor in as_stored(parts).items():
        assert goldens.same(name, f"modelopt.{suffix}", tensor), suffix
    assert goldens.same(name, "modelopt.dequant_bf16", decode(NVFP4, {**parts, "weight_scale_2": scale}))


@pytest.mark.parametrize("name", goldens.names("nvfp4_dense") + FINITE)
def test_a_given_global_scale_saturates_as_modelopt_does(name: str) -> None:
    tensors = goldens.load(name)
    parts = encode(NVFP4, tensors["in.weight"], tensors["modelopt_fixed_global.weight_scale_2"])
    for suffix, tensor in as_stored(parts).items():
        assert goldens.same(name, f"modelopt_fixed_global.{suffix}", tensor), suffix


def test_experts_have_a_global_scale_each() -> None:
    name = "nvfp4_experts3d"
    experts = goldens.load(name)["in.weight"]
    scales = [global_scale(NVFP4, amax(expert)) for expert in experts]
    assert goldens.same(name, "modelopt.weight_scale_2", torch.stack(scales))
    parts = [as_stored(encode(NVFP4, expert, scale)) for expert, scale in zip(experts, scales, strict=True)]
    for suffix in ("weight", "weight_scale"):
        assert goldens.same(name, f"modelopt.{suffix}", torch.stack([part[suffix] for part in parts])), suffix


@pytest.mark.parametrize("name", ["moe_nvfp4_h256i128_tied", "moe_nvfp4_h256i128_untied"])
def test_gate_and_up_share_a_scale_where_they_are_tied(name: str) -> None:
    inputs = goldens.load("moe_nvfp4_h256i128_tied")
    weights = {"w1": inputs["in.w1_gate"], "w3": inputs["in.w3_up"], "w2": inputs["in.w2_down"]}
    for expert in range(4):
        bits = {key: amax(weight[expert]) for key, weight in weights.items()}
        if name.endswith("_tied"):
            bits["w1"] = bits["w3"] = max(bits["w1"], bits["w3"])
        for key, weight in weights.items():
            scale = global_scale(NVFP4, bits[key])
            parts = as_stored(encode(NVFP4, weight[expert], scale)) | {"weight_scale_2": scale}
            for suffix, tensor in parts.items():
                assert equal_bytes(tensor, goldens.load(name)[f"ckpt.{suffix}_{key}"][expert]), (expert, key, suffix)


STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FUSED = re.compile(r"\b(q|k|v|gate|up)_proj\.weight$")


def unstacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """transformers keeps experts stacked, gate above up; a checkpoint has one tensor an expert and projection."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in STACKED:
        return {name: tensor}
    parts = zip(STACKED[leaf], tensor.chunk(len(STACKED[leaf]), dim=1), strict=True)
    return {f"{stem}.{e}.{half}.weight": w.contiguous() for half, part in parts for e, w in enumerate(part)}


def group_of(name: str) -> str:
    """q, k, v share a global scale, and so do gate and up."""
    return FUSED.sub(lambda match: "gate_up" if match[1] in ("gate", "up") else "qkv", name)


@pytest.mark.parametrize(("model", "count"), [("llama", 7), ("qwen3moe", 16)])
def test_a_whole_export_of_modelopt_is_reproduced(model: str, count: int) -> None:
    exported = {name.removeprefix("out."): t for name, t in goldens.load(f"export_{model}_nvfp4_default").items()}
    weights: dict[str, Tensor] = {}
    for name, tensor in goldens.load(f"export_{model}_inputs").items():
        weights |= unstacked(name.removeprefix("in."), tensor)
    quantized = [name for name in weights if name.replace(".weight", ".weight_scale") in exported]
    largest: dict[str, int] = {}
    for name in quantized:
        largest[group_of(name)] = max(largest.get(group_of(name), 0), amax(weights[name]))
    assert len(quantized) == count
    for name in quantized:
        scale = global_scale(NVFP4, largest[group_of(name)])
        parts = as_stored(encode(NVFP4, weights[name], scale)) | {"weight_scale_2": scale}
        for spec in NVFP4.tensors(name, tuple(weights[name].shape))[:3]:
            tensor = parts[spec.name.rpartition(".")[2]]
            assert equal_bytes(tensor, exported[spec.name]), spec.name
            assert (dtype_name(tensor.dtype), tuple(tensor.shape)) == (spec.dtype, spec.shape)


def torch_codes(quotients: Tensor) -> Tensor:
    return kernels.e2m1_codes(quotients)


def numba_codes(quotients: Tensor) -> Tensor:
    codes = [int(loops._e2m1(np.float32(value))) for value in quotients.flatten().tolist()]
    return torch.tensor(codes, dtype=torch.uint8).view(quotients.shape)


@pytest.mark.parametrize("codes", [torch_codes, numba_codes])
def test_fp4_rounding_is_that_of_modelopt(codes: Callable[[Tensor], Tensor]) -> None:
    tensors = goldens.load("e2m1_rounding")
    values = tensors["in.x"]
    sign = (values < 0).to(torch.uint8) * 8
    assert torch.equal(codes(values.abs()) | sign, tensors["modelopt.code"])
    assert codes(torch.tensor([torch.nan, torch.inf])).tolist() == [7, 7]


@pytest.mark.parametrize("byte", range(0, 256, 5))
def test_nibbles_hold_the_first_element_low(byte: int) -> None:
    packed = torch.full((1, 8), byte, dtype=torch.uint8)
    ones = torch.full((1, 1), 0x38, dtype=torch.uint8)
    expected = goldens.load("e2m1_rounding")["ct.unpacked_of_all_bytes"].view(-1, 2)[byte]
    assert decode_unscaled(NVFP4, {"weight": packed, "weight_scale": ones})[0, :2].tolist() == expected.tolist()


@pytest.mark.parametrize("name", REFUSED)
def test_non_finite_weights_are_refused_and_found(name: str) -> None:
    weight = goldens.load(name)["in.weight"]
    with pytest.raises(ValueError, match="NaN or infinity"):
        global_scale(NVFP4, amax(weight))
    index = first_nonfinite(weight)
    assert index is not None and index == tuple((~weight.isfinite()).nonzero()[0].tolist())


def test_an_all_zero_tensor_gets_scale_one_and_codes_zero() -> None:
    weight = goldens.load("nvfp4_special_allzero")["in.weight"]
    scale = global_scale(NVFP4, amax(weight))
    parts = encode(NVFP4, weight, scale)
    assert scale.item() == 1.0 and scale.shape == ()
    assert parts["weight"].eq(0).all() and parts["weight_scale"].eq(0x38).all()
    assert decode(NVFP4, {**parts, "weight_scale_2": scale}).eq(0).all()
    assert first_nonfinite(weight) is None


def from_bits(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


@st.composite
def finite_bits(draw: st.DrawFn) -> np.ndarray:
    """BF16 bits [n, 16 m] of finite numbers: any at all, or close together, with zeros and ties strewn in."""
    shape = draw(st.integers(1, 4)), 16 * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    middle, spread = draw(st.sampled_from([(0, 254), (127, 6), (120, 2), (3, 3), (250, 4)]))
    exponent = np.clip(rng.integers(middle - spread, middle + spread + 1, shape), 0, 254)
    mantissa = rng.integers(0, 128, shape) & draw(st.sampled_from([0x7F, 0x60, 0x00]))
    bits = rng.integers(0, 2, shape) << 15 | exponent << 7 | mantissa
    return np.where(rng.random(shape) < draw(st.sampled_from([0, 0.3])), bits & 0x8000, bits).astype(np.uint16)


Encode = Callable[[Tensor, float, Tensor, Tensor], None]
ENCODERS: list[Encode] = [kernels.encode_nvfp4_rows, kernels.encode_nvfp4_rows_torch]


def run_encoder(encoder: Encode, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    num_rows, num_elements = weight.shape
    parts = (
        torch.full((num_rows, num_elements // 2), 0xAA, dtype=torch.uint8),
        torch.full((num_rows, num_elements // 16), 0xAA, dtype=torch.uint8),
    )
    encoder(weight, scale, *parts)
    return parts


@settings(max_examples=40, deadline=None)
@given(bits=finite_bits(), shared=st.sampled_from([1.0, 0.01, 7.0]))
def test_both_encoders_equal_the_slow_reference(bits: np.ndarray, shared: float) -> None:
    weight = from_bits(bits)
    own = reference.nvfp4_scale_2(bits)
    assert global_scale(NVFP4, amax(weight)).numpy() == own
    scale = np.float32(own * np.float32(shared)) if np.isfinite(own * np.float32(shared)) else own
    scale = scale if scale > 0 else own
    packed, scales = reference.nvfp4_encode(bits, scale)
    for encoder in ENCODERS:
        got = run_encoder(encoder, weight, float(scale))
        assert np.array_equal(got[0].numpy(), packed) and np.array_equal(got[1].numpy(), scales)


@pytest.mark.parametrize("shape", [(1, 16), (257, 16), (3, 4112), (300, 1008), (0, 32)])
@pytest.mark.parametrize("seed", [0, 1])
def test_numba_and_torch_give_the_same_bytes(shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 0x10000, shape)
    finite = np.where(bits & 0x7F80 == 0x7F80, bits & 0x80FF, bits)
    weight = from_bits(finite) if seed else torch.randn(shape).bfloat16()
    assert kernels.amax_bits(weight) == kernels.amax_bits_torch(weight)
    scale = global_scale(NVFP4, amax(weight)).item()
    for factor in (1.0, 0.001):
        ours, twins = (run_encoder(encoder, weight, scale * factor) for encoder in ENCODERS)
        assert torch.equal(ours[0], twins[0]) and torch.equal(ours[1], twins[1])


@pytest.mark.parametrize("scale", [1.0, 1.125, 1.25, 0.37, 1e-38, 1.2e35])
def test_numba_and_torch_decode_every_byte_pair_alike(scale: float) -> None:
    """All 256 scale bytes, NaN among them, times all 256 code bytes; 1.125 and 1.25 give ties of BF16."""
    weight = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).repeat(1, 32)
    ours, twins = torch.empty(256, 512, dtype=torch.bfloat16), torch.empty(256, 512, dtype=torch.bfloat16)
    kernels.decode_nvfp4_rows(weight, scales, scale, ours)
    kernels.decode_nvfp4_rows_torch(weight, scales, scale, twins)
    assert ours[0x7F].isnan().all() and torch.equal(ours.isnan(), twins.isnan())
    assert equal_bytes(ours.masked_fill(ours.isnan(), 0), twins.masked_fill(twins.isnan(), 0))


def test_decoding_without_the_global_scale_is_exact() -> None:
    weight = goldens.load("nvfp4_dense_e192x256")["in.weight"]
    parts = encode(NVFP4, weight, global_scale(NVFP4, amax(weight)))
    scales = parts["weight_scale"].view(torch.float8_e4m3fn).double().repeat_interleave(16, dim=1)
    codes = torch.stack((parts["weight"] & 15, parts["weight"] >> 4), dim=2).flatten(1).long()
    table = torch.tensor([float(value) for value in reference.E2M1] + [-float(value) for value in reference.E2M1])
    assert torch.equal(decode_unscaled(NVFP4, parts).double(), table.double()[codes] * scales)


def test_rows_encoded_apart_are_rows_of_the_whole() -> None:
    weight = goldens.load("nvfp4_dense_c200x80")["in.weight"]
    scale = global_scale(NVFP4, amax(weight))
    whole = encode(NVFP4, weight, scale)
    for start, stop in ((0, 1), (7, 133), (199, 200), (50, 50)):
        part = encode(NVFP4, weight[start:stop], scale)
        assert all(torch.equal(part[suffix], whole[suffix][start:stop]) for suffix in whole)


def test_encoding_writes_into_what_it_is_given_and_never_into_its_input() -> None:
    weight = goldens.load("nvfp4_dense_a128x128")["in.weight"].clone()
    before, scale = weight.clone(), global_scale(NVFP4, amax(weight))
    out = {suffix: torch.empty_like(part) for suffix, part in encode(NVFP4, weight, scale).items()}
    addresses = {suffix: part.data_ptr() for suffix, part in out.items()}
    got = encode(NVFP4, weight, scale, out)
    assert {suffix: part.data_ptr() for suffix, part in got.items()} == addresses
    assert all(torch.equal(part, out[suffix]) for suffix, part in encode(NVFP4, weight, scale).items())
    assert equal_bytes(weight, before)


def test_unaligned_memory_is_encoded_and_decoded_alike() -> None:
    weight = goldens.load("nvfp4_dense_b96x64")["in.weight"]
    scale = global_scale(NVFP4, amax(weight))
    shifted = torch.empty(weight.numel() + 1, dtype=torch.bfloat16)[1:].view(weight.shape).copy_(weight)
    assert shifted.data_ptr() % 4 == 2 and amax(shifted) == amax(weight)
    parts = encode(NVFP4, shifted, scale)
    assert all(torch.equal(parts[suffix], part) for suffix, part in encode(NVFP4, weight, scale).items())
    out = torch.empty_like(shifted[:0].new_empty(weight.numel() + 1))[1:].view(weight.shape)
    whole = {**parts, "weight_scale_2": scale}
    assert equal_bytes(decode(NVFP4, whole, out), decode(NVFP4, whole))


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_bf16_is_the_bytes_themselves(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape).bfloat16()
    parts = encode(BF16, weight)
    assert parts["weight"].shape == (shape[0], weight[0].numel() * 2)
    assert torch.equal(parts["weight"].flatten(), goldens.bytes_of(weight))
    assert equal_bytes(decode(BF16, parts).view(shape), weight)
    (spec,) = BF16.tensors("model.norm.bias", shape)
    assert spec == TensorSpec(name="model.norm.bias", dtype="BF16", shape=shape)
    assert (spec.num_rows, spec.row_bytes, spec.num_bytes) == (shape[0], weight[0].numel() * 2, weight.numel() * 2)


def test_amax_takes_every_bit_pattern_for_its_magnitude() -> None:
    every = from_bits(np.arange(0x10000).reshape(-1, 1))
    assert all(amax(every[start : start + 4096]) == 0x7FFF & (start + 4095) for start in range(0, 0x10000, 4096))
    assert amax(every[:0]) == 0 and kernels.amax_bits_torch(every[:0]) == 0
    assert [amax(every[bits]) for bits in (0x8000, 0xFF7F, 0x7F80, 0xFFFF)] == [0, 0x7F7F, 0x7F80, 0x7FFF]


def test_the_tensors_of_a_parameter_follow_from_its_shape() -> None:
    specs = NVFP4.tensors("a.weight", (200, 80))
    assert [(spec.name, spec.dtype, spec.shape) for spec in specs] == [
        ("a.weight", "U8", (200, 40)),
        ("a.weight_scale", "F8_E4M3", (200, 5)),
        ("a.weight_scale_2", "F32", ()),
        ("a.input_scale", "F32", ()),
    ]
    assert [spec.num_rows for spec in specs] == [200, 200, 1, 1]
    assert [spec.num_bytes for spec in specs] == [8000, 1000, 4, 4]


ZEROS, ONE = torch.zeros(2, 32).bfloat16(), torch.tensor(1.0)


def parts_of(num_rows: int, code_bytes: int, scale_bytes: int) -> dict[str, Tensor]:
    widths = {"weight": code_bytes, "weight_scale": scale_bytes}
    return {suffix: torch.zeros(num_rows, width, dtype=torch.uint8) for suffix, width in widths.items()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NVFP4.tensors("a.weight", (4, 24)), "multiple of 16"),
        (lambda: NVFP4.tensors("a.weight", (16,)), "two dims"),
        (lambda: NVFP4.tensors("a.bias", (4, 16)), "named '<module>.weight'"),
        (lambda: amax(torch.zeros(2)), "expected torch.bfloat16"),
        (lambda: encode(NVFP4, torch.zeros(2, 16).bfloat16()), "global scale is required"),
        (lambda: encode(NVFP4, torch.zeros(2, 16).bfloat16(), torch.tensor(0.0)), "positive finite"),
        (lambda: encode(NVFP4, torch.zeros(2, 16).bfloat16(), torch.tensor(torch.inf)), "positive finite"),
        (lambda: encode(BF16, torch.zeros(2, 16).bfloat16(), torch.tensor(1.0)), "not part of it"),
        (lambda: encode(NVFP4, torch.zeros(16, 16).bfloat16()[:, ::2], torch.tensor(1.0)), "contiguous"),
        (lambda: encode(NVFP4, torch.zeros(2, 24).bfloat16(), torch.tensor(1.0)), "multiple of 16"),
        (lambda: encode(NVFP4, ZEROS, ONE, parts_of(1, 16, 1)), "expected (2, 16) and (2, 2)"),
        (lambda: encode(NVFP4, ZEROS, ONE, parts_of(2, 16, 1)), "expected (2, 16) and (2, 2)"),
        (lambda: encode(NVFP4, ZEROS, ONE, {k: v[:, ::2] for k, v in parts_of(2, 32, 4).items()}), "contiguous memory"),
        (lambda: decode_unscaled(NVFP4, parts_of(2, 16, 1)), "expected (2, 16) and (2, 2)"),
        (lambda: decode_unscaled(NVFP4, parts_of(2, 16, 2), ZEROS[:1]), "expected (1, 16) and (1, 2)"),
        (lambda: global_scale(BF16, 1), "no global scale"),
        (lambda: dtype_name(torch.complex64), "no name in a checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_every_dtype_has_one_name() -> None:
    assert {dtype_name(dtype): dtype for dtype in DTYPES.values()} == DTYPES


def test_a_loop_compiles_where_no_cache_can_be_written() -> None:
    namespace: dict[str, Callable[[int], int]] = {}
    exec("def double(x):\n    return 2 * x", namespace)  # a function without a file has no place to cache
    assert loops.loop(namespace["double"])(21) == 42


def test_formats_work_without_numba() -> None:
    code = """
import sys; sys.modules["numba"] = None
import torch; torch.set_num_threads(1)
from quant import kernels
from quant.formats import FORMATS, encode
from tests import goldens
tensors = goldens.load("nvfp4_dense_a128x128")
parts = encode(FORMATS["nvfp4"], tensors["in.weight"], tensors["modelopt.weight_scale_2"])
assert kernels.numba_loops() is None and torch.equal(parts["weight"], tensors["modelopt.weight"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=goldens.DIRECTORY.parents[1])
