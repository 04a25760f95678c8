"""Every row of FORMATS: its numbers against slow references, and what must hold for all rows alike."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quant import numerics_float as floats
from quant import numerics_int as ints
from quant.formats import DTYPES, FORMATS, Format, amax, constants, decode, encode, global_scale, typed
from tests import goldens, reference
from tests import reference_numbers as slow

QUANTIZED = [row for row in FORMATS.values() if row.is_quantized]
NAMES = [row.name for row in QUANTIZED]
CALIBRATION = {"input_scale": torch.tensor([0.03125]), "input_offset": torch.tensor([-7.0])}


def encoded(fmt: Format, weight: Tensor) -> dict[str, Tensor]:
    """All tensors of a checkpoint but activation scales, unless they are needed."""
    scale = global_scale(fmt, amax(weight)) if fmt.has_global_scale else None
    tensors = typed(fmt, encode(fmt, weight, scale, given=CALIBRATION), tuple(weight.shape))
    part = fmt.component("global_scale")
    tensors |= {name: CALIBRATION[name] for name in fmt.needs}
    return tensors if part is None or scale is None else {**tensors, part.suffix: scale}


@st.composite
def weights(draw: st.DrawFn, rows: int = 4, columns: int = 64) -> Tensor:
    """Finite BF16 of any magnitude, with zero rows, zeros, -0.0 and ties strewn in."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    middle, spread = draw(st.sampled_from([(127, 6), (120, 2), (4, 3), (245, 6), (127, 100)]))
    exponent = np.clip(rng.integers(middle - spread, middle + spread + 1, (rows, columns)), 0, 254)
    mantissa = rng.integers(0, 128, (rows, columns)) & draw(st.sampled_from([0x7F, 0x60, 0x00]))
    bits = rng.integers(0, 2, (rows, columns)) << 15 | exponent << 7 | mantissa
    bits = np.where(rng.random((rows, columns)) < draw(st.sampled_from([0, 0.3])), bits & 0x8000, bits)
    bits[rng.integers(0, rows)] *= draw(st.sampled_from([0, 1]))
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def bits_of(weight: Tensor) -> np.ndarray:
    return weight.view(torch.int16).numpy().view(np.uint16)


@settings(max_examples=8, deadline=None)
@given(weights())
def test_fp8_rounds_twice_as_modelopt_does(weight: Tensor) -> None:
    if weight.any():
        codes, scale = slow.fp8(bits_of(weight))
        tensors = encoded(FORMATS["fp8"], weight)
        assert np.float32(tensors["weight_scale"].item()) == scale
        assert np.array_equal(tensors["weight"].view(torch.uint8).numpy(), codes)


@settings(max_examples=8, deadline=None)
@given(weights())
def test_fp8_of_channels_and_blocks_divides_once_in_fp32(weight: Tensor) -> None:
    for name, tile in (("fp8_channel", (1, 1 << 30)), ("fp8_block", (128, 128))):
        codes, scales = slow.fp8_block(bits_of(weight), tile)
        tensors = encoded(FORMATS[name], weight)
        assert np.array_equal(tensors["weight_scale"].numpy().reshape(scales.shape), scales), name
        assert np.array_equal(tensors["weight"].view(torch.uint8).numpy(), codes), name


def test_blocks_of_fp8_end_where_the_weight_ends() -> None:
    weight = goldens.load("fp8_c200x192")["in.weight"][:131, :130].contiguous()
    codes, scales = slow.fp8_block(bits_of(weight), (128, 128))
    tensors = encoded(FORMATS["fp8_block"], weight)
    assert tensors["weight_scale"].shape == scales.shape == (2, 2)
    assert np.array_equal(tensors["weight_scale"].numpy(), scales)
    assert np.array_equal(tensors["weight"].view(torch.uint8).numpy(), codes)


@settings(max_examples=8, deadline=None)
@given(weights())
def test_mx_scales_are_the_next_power_of_two_and_codes_exact(weight: Tensor) -> None:
    for name, top in (("mxfp8", 448), ("mxfp4", 6)):
        quotients, scales = slow.mx(bits_of(weight), top)
        tensors = encoded(FORMATS[name], weight)
        assert np.array_equal(tensors["weight_scale"].numpy(), scales), name
        if name == "mxfp8":
            codes = [
                [slow.signed(slow.e4m3(q), v) for q, v in zip(row, values, strict=True)]
                for row, values in zip(quotients, reference.bf16_values(bits_of(weight)), strict=True)
            ]
            assert tensors["weight"].view(torch.uint8).tolist() == codes
        else:
            nibbles = [[slow.e2m1_toward_zero(q) for q in row] for row in quotients]
            packed = [[row[i] + 16 * row[i + 1] for i in range(0, len(row), 2)] for row in nibbles]
            assert tensors["weight"].tolist() == packed


@settings(max_examples=8, deadline=None)
@given(weights())
def test_integers_round_half_to_even_row_by_row(weight: Tensor) -> None:
    values = reference.bf16_values(bits_of(weight))
    for name, top, least in (("int8", 127, 0.0), ("int8_dynamic", 127, 2.0**-23), ("int4_dynamic", 7, 2.0**-23)):
        tensors = encoded(FORMATS[name], weight)
        for row, code, scale in zip(values, tensors["weight"], tensors["weight_scale"].flatten(), strict=True):
            expected, expected_scale = slow.int8_row(row, top, least)
            assert np.float32(scale.item()) == expected_scale and code.tolist() == expected, name


def test_static_int8_recomputes_its_bias_from_the_new_weights() -> None:
    """A push of weights changes deq_scale and quant_bias, whatever the activations."""
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.linspace(-2, 2, 6)
    row = FORMATS["int8_static"]
    tensors = typed(row, encode(row, weight, given={**CALIBRATION, "bias": bias}), (6, 128))
    for i in range(6):
        codes, scale = slow.int8_row(weight[i].float().numpy(), 127, 2.0**-23)
        deq_scale = np.float32(0.03125) * scale
        assert np.float32(tensors["deq_scale"][i].item()) == deq_scale and tensors["weight"][i].tolist() == codes
        exact = np.float32(np.float32(bias[i].item()) / deq_scale) - np.float32(sum(codes)) * np.float32(-7.0)
        assert tensors["quant_bias"][i].item() == round(float(exact))
    assert torch.equal(
        decode(row, {**tensors, **CALIBRATION}),
        decode(FORMATS["int8_dynamic"], encoded(FORMATS["int8_dynamic"], weight)),
    )


def test_activations_are_asymmetric_and_deq_scale_widens_and_narrows() -> None:
    scales = ints.activation_scale(torch.tensor([-1.0]), torch.tensor([3.0]))
    assert scales["input_scale"].item() == np.float32(np.float32(3) / 255 - np.float32(-1) / 255)
    assert scales["input_offset"].item() == 64 - 128
    wide = ints.widened(torch.tensor([1.5, -0.0]))
    assert wide.dtype == torch.int64 and wide.tolist() == [0x3FC00000, -(2**31)]
    assert torch.equal(ints.narrowed(wide).view(torch.int32), torch.tensor([1.5, -0.0]).view(torch.int32))


# ---------------------------------------------------------------- what holds for every row


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_the_dtypes_and_shapes_that_the_row_states(name: str) -> None:
    row, shape = FORMATS[name], (200, 384)
    tensors = encoded(row, torch.randn(shape).bfloat16()) | constants(row, shape)
    specs = {spec.name.removeprefix("a."): spec for spec in row.tensors("a.weight", shape)}
    calibrated = {part.suffix for part in row.components if part.kind == "input_scale"}
    assert tensors.keys() | calibrated == specs.keys()
    for suffix, tensor in tensors.items():
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[specs[suffix].dtype], specs[suffix].shape), suffix
    for part in row.row_components:
        spec = specs[part.suffix]
        assert spec.num_rows == -(-200 // part.rows) and spec.num_bytes == tensors[part.suffix].nbytes


@pytest.mark.parametrize("name", NAMES)
def test_rows_encoded_apart_are_rows_of_the_whole(name: str) -> None:
    row = FORMATS[name]
    weight = torch.randn(260, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    scale = global_scale(row, amax(weight)) if row.has_global_scale else None
    whole = encode(row, weight, scale, given=CALIBRATION)
    step = row.row_step
    for start, stop in ((0, step), (step, 260), (2 * step, 2 * step), (128, 256)):
        part = encode(row, weight[start:stop], scale, given=CALIBRATION)
        for component in row.row_components:
            rows = slice(start // component.rows, -(-stop // component.rows))
            assert torch.equal(part[component.suffix], whole[component.suffix][rows]), (component.suffix, start)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_decode_to_zeros_and_never_to_nan(name: str) -> None:
    row = FORMATS[name]
    some = torch.randn(132, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    some[3], some[:, 128:], some[7, :64] = 0, 0, -0.0
    for weight in (torch.zeros(4, 256).bfloat16(), some):
        values = decode(row, encoded(row, weight))
        assert values.isfinite().all() and values[weight == 0].eq(0).all(), row.zero


# Half a code at the top of the range (which a power-of-two scale fills half at least) and BF16's rounding.
HALF_STEPS = {"I8": 0.5 / 127 + 2.0**-8, "F8_E4M3": 16 / 224 + 2.0**-8}


@pytest.mark.parametrize("name", NAMES)
def test_decoding_is_within_half_a_step(name: str) -> None:
    row = FORMATS[name]
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(4)).bfloat16()
    worst = (decode(row, encoded(row, weight)).float() - weight.float()).abs().max() / weight.float().abs().max()
    four_bits = 1 / 6 + 2.0**-8  # E2M1: half of the step from 4 to 6
    assert worst <= (four_bits if "4" in name else HALF_STEPS[row.components[0].dtype])


@pytest.mark.parametrize("name", NAMES)
def test_encoding_writes_into_what_it_is_given_and_never_into_its_input(name: str) -> None:
    row = FORMATS[name]
    weight = torch.randn(6, 256).bfloat16()
    before = weight.clone()
    scale = global_scale(row, amax(weight)) if row.has_global_scale else None
    fresh = encode(row, weight, scale, given=CALIBRATION)
    out = {suffix: torch.full_like(part, 0xAA) for suffix, part in fresh.items()}
    got = encode(row, weight, scale, out, CALIBRATION)
    assert all(got[suffix].data_ptr() == out[suffix].data_ptr() for suffix in out)
    assert all(torch.equal(out[suffix], part) for suffix, part in fresh.items()) and torch.equal(weight, before)
    into = torch.empty_like(weight)
    assert decode(row, encoded(row, weight), into) is into


def test_int4_packings_hold_what_the_library_unpacks() -> None:
    """A known row: codes -8..7 in order, scale 1."""
    ramp = torch.arange(-8, 8).repeat(2, 8).bfloat16()
    ramp[0, 0] = ramp[1, 0] = 7.0  # amax 7, or 7.5 steps of 14 / 15
    pairs = ints.encode_int4_pairs(torch.where(ramp < -7, 7.0, ramp).bfloat16(), 128)
    assert pairs["weight_scale"].tolist() == [[1.0], [1.0]]
    nibble = [int(value) & 15 for value in torch.where(ramp < -7, 7.0, ramp)[0].tolist()]
    assert pairs["weight"].tolist() == [[low | low << 4 for low in nibble]]
    words = ints.encode_int4_words(torch.full((1, 128), 7.5).bfloat16(), 128)
    assert words["weight_scale"].tolist() == [[1.0]] and words["weight_packed"][0, 0].item() == -1  # 7 + 8 everywhere


def test_a_tile_that_others_share_takes_the_amax_it_is_given() -> None:
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(5)).bfloat16()
    largest = floats.tile_amax(weight.float())
    halves = [floats.encode_fp8_block(weight[at : at + 64], largest)["weight"] for at in (0, 64)]
    whole = floats.encode_fp8_block(weight)["weight"]
    assert torch.equal(torch.cat(halves).view(torch.uint8), whole.view(torch.uint8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FORMATS["mxfp8"].tensors("a.weight", (4, 48)), "a multiple of 32; keep it in bf16"),
        (lambda: FORMATS["int4_awq"].tensors("a.weight", (5, 128)), "a multiple of 128 and rows a multiple of 2"),
        (lambda: FORMATS["fp8"].tensors("a.weight", (128,)), "two dims"),
        (lambda: FORMATS["int8"].tensors("a.bias", (4, 4)), "named '<module>.weight'"),
        (lambda: encode(FORMATS["int8_static"], torch.zeros(2, 4).bfloat16()), "needs input_scale, input_offset"),
        (lambda: encode(FORMATS["fp8"], torch.zeros(2, 4).bfloat16()), "global scale is required"),
        (lambda: encode(FORMATS["fp8_block"], torch.zeros(2, 4).bfloat16(), torch.tensor(1.0)), "not part of it"),
        (lambda: encode(FORMATS["int4_awq"], torch.zeros(3, 128).bfloat16()), "rows a multiple of 2"),
        (lambda: global_scale(FORMATS["fp8"], 0x7F80), "NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_every_row_says_whom_it_follows_and_what_zeros_become() -> None:
    for row in FORMATS.values():
        assert row.oracle and row.zero and len(row.encode_block) == 2
        assert all(part.rows in (0, 1, 2, 128) for part in row.components)
