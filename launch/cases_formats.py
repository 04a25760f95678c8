"""What the conformance command checks of formats: which tensors of a fixture a row of FORMATS must reproduce.

A case says: tensors of fixtures of this group whose names match this pattern are reproduced by this function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant import kernels
from quant import numerics_compressed as compressed
from quant import numerics_float as floats
from quant import numerics_int as ints
from quant.dialects import to_dialect
from quant.formats import FORMATS, Format, amax, decode, encode, first_nonfinite, global_scale, typed

from .fixtures import Fixture

Produce = Callable[[Fixture, "re.Match[str]"], Tensor]
Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One row of the table of cases. `row`: a format, layout or conversion; `group`: of the manifest."""

    row: str
    oracle: str
    group: str
    match: str
    produce: Produce


def case(row: str, oracle: str, group: str, match: str, produce: Produce) -> Case:
    """A case whose fields come in order, so that a table of them reads as one."""
    return Case(row=row, oracle=oracle, group=group, match=match, produce=produce)


class Apart(Exception):
    """The row does on purpose what the library does not; `status` is "refused" or "special"."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


MODELOPT, CT, MODELSLIM = "nvidia-modelopt", "compressed-tensors", "msmodelslim"


def weight_of(fixture: Fixture) -> Tensor:
    """in.weight, finite: a row refuses anything else."""
    weight = fixture.find("in.weight")
    if weight is None:
        raise Apart("special", "in.weight is not stored")
    index = first_nonfinite(weight)
    if index is not None:
        raise Apart("refused", f"in.weight{list(index)} is not finite")
    return weight


def encoded(
    fmt: Format, weight: Tensor, scale: Tensor | None = None, given: Mapping[str, Tensor] | None = None
) -> Tensors:
    """Tensors of a parameter in our names, the global scale included; of stacked experts one by one."""
    if weight.ndim == 3:
        each = [encoded(fmt, expert, None, given) for expert in weight]
        return {suffix: torch.stack([tensors[suffix] for tensors in each]) for suffix in each[0]}
    if fmt.has_global_scale and scale is None:
        scale = global_scale(fmt, amax(weight))
    tensors = typed(fmt, encode(fmt, weight.contiguous(), scale, given=given), tuple(weight.shape))
    part = fmt.component("global_scale")
    return tensors if part is None or scale is None else {**tensors, part.suffix: scale}


def _by_row(name: str, prefix: str = "") -> Produce:
    """A whole format; `given` scales are taken from the fixture where its prefix says that the scale was fixed."""
    fmt = FORMATS[name]

    def make(fixture: Fixture) -> Tensors:
        weight = weight_of(fixture)
        if fmt.has_global_scale and not weight.any():
            if decode(fmt, encoded(fmt, weight)).any():  # a NaN counts
                raise ValueError(f"{name}: a tensor of zeros does not decode to zeros")
            raise Apart("special", f"all zeros: {fmt.zero}")
        fixed = fixture.find(f"{prefix}.weight_scale_2") if prefix else None
        tensors = encoded(fmt, weight, fixed)
        values = decode(fmt, tensors) if weight.ndim == 2 else weight
        return {**_zeros_as_stored(fmt, weight, tensors), "dequant": values, "dequant_bf16": values}

    return lambda fixture, match: fixture.once((name, prefix), lambda: make(fixture))[match["part"]]


def _zeros_as_stored(fmt: Format, weight: Tensor, tensors: Tensors) -> Tensors:
    """modelopt's FP8 has scale 0 and NaN codes for a block of zeros; ours has 1.0 and 0. Say it in its words."""
    if not fmt.zero.startswith("scale 1.0") or fmt.has_global_scale:
        return tensors
    scale = tensors["weight_scale"]
    largest = weight.float().abs().amax(1) if scale.ndim == 1 else floats.tile_amax(weight.float())
    zero = largest == 0
    codes = zero.unsqueeze(1).expand(weight.shape) if scale.ndim == 1 else floats.over_tiles(zero, weight.shape)
    stored = torch.where(codes, 0xFF, tensors["weight"].view(torch.uint8)).to(torch.uint8)
    return {"weight": stored.view(torch.float8_e4m3fn), "weight_scale": torch.where(zero, 0.0, scale)}


def _by_function(key: str, function: Callable[[Tensor], Tensors]) -> Produce:
    return lambda fixture, match: fixture.once(
        (key, match["form"]), lambda: function(_in_form(fixture, match["form"]))
    )[match["part"]]


def _in_form(fixture: Fixture, form: str) -> Tensor:
    weight = weight_of(fixture)
    return weight.float() if form == "f32" else weight


def _nvfp4_ct(weight: Tensor) -> Tensors:
    parts = compressed.nvfp4(weight)
    values = compressed.nvfp4_values(parts["weight_packed"], parts["weight_scale"], parts["weight_global_scale"])
    return {**parts, "dequant": values}


def _int8_column(fixture: Fixture, match: re.Match[str]) -> Tensor:
    return to_dialect("int8", CT, encoded(FORMATS["int8"], weight_of(fixture)))[f"{match['part']}"]


def _int8_static(fixture: Fixture, match: re.Match[str]) -> Tensor:
    def make() -> Tensors:
        lowest, highest, bias = (fixture.find(f"in.{name}") for name in ("act_min", "act_max", "bias"))
        if lowest is None or highest is None or bias is None:
            raise Apart("special", "in.act_min, in.act_max or in.bias is not stored")
        given = ints.activation_scale(lowest, highest)
        tensors = encoded(FORMATS["int8_static"], weight_of(fixture), None, {**given, "bias": bias})
        return {**tensors, **given, "bias": bias}

    tensors = fixture.once("int8_static", make)
    if match["model"] == "fp16" and match["part"] != "bias":
        return to_dialect("int8_static", "modelslim fp16", {match["part"]: tensors[match["part"]]})[match["part"]]
    return tensors[match["part"]]


def _int8_dynamic(fixture: Fixture, match: re.Match[str]) -> Tensor:
    bias = fixture.find("in.bias") if match["part"] == "bias" else None
    return bias if bias is not None else _by_row("int8_dynamic")(fixture, match)


def _int4_awq(fixture: Fixture, match: re.Match[str]) -> Tensor:
    group = int(match["size"])
    return fixture.once(("awq", group), lambda: ints.encode_int4_pairs(weight_of(fixture), group))[match["part"]]


def _int4_flat(fixture: Fixture, match: re.Match[str]) -> Tensor:
    block = int(match["size"])
    return fixture.once(("flat", block), lambda: ints.encode_int4_flat(weight_of(fixture), block))[match["part"]]


def _int4_group(fixture: Fixture, match: re.Match[str]) -> Tensor:
    weight, group = weight_of(fixture), int(match["size"])
    if match["part"] == "weight_shape":
        return torch.tensor(weight.shape)
    return fixture.once(("words", group), lambda: ints.encode_int4_words(weight, group))[match["part"]]


def _fp8_short_scale(fixture: Fixture, match: re.Match[str]) -> Tensor:
    weight = weight_of(fixture)
    if not weight.any():
        raise Apart("special", f"all zeros: {FORMATS['fp8'].zero}")
    return floats.encode_fp8_short_scale(weight)[match["part"]]


def _ue8m0(fixture: Fixture, match: re.Match[str]) -> Tensor:
    tensors = encoded(FORMATS["fp8_block_ue8m0"], weight_of(fixture))
    return to_dialect("fp8_block_ue8m0", "transformers", tensors)[match["part"]]


def _e2m1_code(fixture: Fixture, match: re.Match[str]) -> Tensor:
    """The magnitude is that of the encoder; modelopt takes the sign of x < 0."""
    values = fixture.find("in.x")
    assert values is not None
    return kernels.e2m1_codes(values.abs()) | (values < 0).to(torch.uint8) * 8


def _e2m1_packed(fixture: Fixture, match: re.Match[str]) -> Tensor:
    values = fixture.find("in.x")
    assert values is not None
    return compressed.pack_e2m1(values)


def _e2m1_values(fixture: Fixture, match: re.Match[str]) -> Tensor:
    packed = fixture.find("all_bytes")
    assert packed is not None
    return floats.e2m1_values(floats.unpack_nibbles(packed))


_CT = r"ct_(?P<form>bf16|f32)\.(?P<part>{parts})"
_CT_FP8 = r"ct_{row}_(?P<form>bf16|f32)\.(?P<part>weight|weight_scale)"
_PART = r"\.(?P<part>weight|weight_scale)"
_INT = "int8_int4"

FORMAT_CASES: tuple[Case, ...] = (
    case("nvfp4", MODELOPT, "e2m1", r"modelopt\.code", _e2m1_code),
    case("nvfp4", CT, "e2m1", r"ct\.packed", _e2m1_packed),
    case("nvfp4", CT, "e2m1", r"ct\.unpacked_of_all_bytes", _e2m1_values),
    case(
        "nvfp4",
        MODELOPT,
        "nvfp4",
        r"modelopt\.(?P<part>weight|weight_scale|weight_scale_2|dequant_bf16)",
        _by_row("nvfp4"),
    ),
    case(
        "nvfp4, a given scale",
        MODELOPT,
        "nvfp4",
        r"modelopt_fixed_global\.(?P<part>weight|weight_scale|weight_scale_2)",
        _by_row("nvfp4", "modelopt_fixed_global"),
    ),
    case(
        "nvfp4, rounded as its own",
        CT,
        "nvfp4",
        _CT.format(parts="weight_packed|weight_scale|weight_global_scale|dequant"),
        _by_function("nvfp4", _nvfp4_ct),
    ),
    case("fp8", MODELOPT, "fp8", r"modelopt_tensor_f32scale\.(?P<part>weight|weight_scale|dequant)", _by_row("fp8")),
    case("fp8, a BF16 scale", MODELOPT, "fp8", r"modelopt_tensor_bf16scale" + _PART, _fp8_short_scale),
    case("fp8_channel", MODELOPT, "fp8", r"modelopt_channel" + _PART, _by_row("fp8_channel")),
    case("fp8_block", MODELOPT, "fp8", r"modelopt_block128" + _PART, _by_row("fp8_block")),
    case(
        "fp8_block_ue8m0",
        "transformers",
        "fp8",
        r"transformers_block128_ue8m0\.(?P<part>weight|weight_scale_inv)",
        _ue8m0,
    ),
    *(
        case(f"{row}, rounded as its own", CT, "fp8", _CT_FP8.format(row=theirs), _by_function(row, function))
        for row, theirs, function in (
            ("fp8", "tensor", compressed.fp8_tensor),
            ("fp8_channel", "channel", compressed.fp8_channel),
            ("fp8_block", "block128", compressed.fp8_block),
        )
    ),
    case("nvfp4", MODELOPT, "dit", r"ckpt\.(?P<part>weight|weight_scale|weight_scale_2)", _by_row("nvfp4")),
    *(
        case(row, MODELOPT, row, r"modelopt\.(?P<part>weight|weight_scale|dequant_bf16)", _by_row(row))
        for row in ("mxfp8", "mxfp4")
    ),
    case(
        "mxfp8, rounded as its own",
        CT,
        "mxfp8",
        _CT.format(parts="weight|weight_scale"),
        _by_function("mxfp8", compressed.mxfp8),
    ),
    case(
        "mxfp4, rounded as its own",
        CT,
        "mxfp4",
        _CT.format(parts="weight_packed|weight_scale"),
        _by_function("mxfp4", compressed.mxfp4),
    ),
    case("int8", MODELOPT, _INT, r"modelopt_sq" + _PART, _by_row("int8")),
    case("int8", MODELOPT, _INT, r"modelopt_qtensor" + _PART, _int8_column),
    case(
        "int8, rounded as its own",
        CT,
        _INT,
        _CT.format(parts="weight|weight_scale"),
        _by_function("int8", compressed.int8_channel),
    ),
    case(
        "int8_static",
        MODELSLIM,
        _INT,
        r"modelslim_static_(?P<model>bf16|fp16)model\.(?P<part>weight|quant_bias|input_scale|input_offset|deq_scale|bias)",
        _int8_static,
    ),
    case(
        "int8_dynamic",
        MODELSLIM,
        _INT,
        r"modelslim_dynamic\.(?P<part>weight|weight_scale|weight_offset|bias)",
        _int8_dynamic,
    ),
    case("int4_awq", MODELOPT, _INT, r"modelopt_int4_awq_g(?P<size>\d+)" + _PART, _int4_awq),
    case(
        "int4, flat blocks",
        MODELOPT,
        _INT,
        r"modelopt_int4_blockwise(?P<size>\d+)\.(?P<part>weight|scales)",
        _int4_flat,
    ),
    case(
        "int4_group",
        CT,
        _INT,
        r"ct_w4a16_g(?P<size>\d+)\.(?P<part>weight_packed|weight_scale|weight_shape)",
        _int4_group,
    ),
)
