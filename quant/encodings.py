"""The table of formats: the components of a row, and its numbers as functions of bytes.

quant.formats is the door to it; how to add a row is said there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from . import kernels
from . import numerics_float as floats
from . import numerics_int as ints
from .specs import DTYPES, Component, DecodeRows, EncodeRows, Format, Parts

E2M1_MAX, E4M3_MAX = 6.0, 448.0
PIECE_ELEMENTS = 1 << 18  # weights encoded or decoded at a time: 1 MiB in FP32
GROUP = 128  # elements that share a scale in the rows of grouped INT4


def as_rows(tensor: Tensor) -> Tensor:
    """uint8 [n, row bytes]; no copy."""
    if tensor.dtype == torch.uint8 and tensor.ndim == 2:
        return tensor
    return tensor.contiguous().view(len(tensor), -1).view(torch.uint8)


def _encode_plain(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    out["weight"].copy_(rows.reshape(len(rows), -1).view(torch.uint8))


def _decode_bf16(parts: Parts, scale: float, out: Tensor) -> None:
    out.copy_(parts["weight"].view(torch.bfloat16).reshape(out.shape))


def _decode_fp32(parts: Parts, scale: float, out: Tensor) -> None:
    out.copy_(parts["weight"].contiguous().view(torch.float32).reshape(out.shape))


def _decode_int32(parts: Parts, scale: float, out: Tensor) -> None:
    out.copy_(parts["weight"].contiguous().view(torch.int32).reshape(out.shape))


def _encode_nvfp4(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    kernels.encode_nvfp4_rows(rows, scale, out["weight"], out["weight_scale"])


def _decode_nvfp4(parts: Parts, scale: float, out: Tensor) -> None:
    kernels.decode_nvfp4_rows(parts["weight"], parts["weight_scale"], scale, out)


def _encode_w4a8(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    kernels.encode_nvfp4_rows_torch(rows, scale, out["weight"], out["weight_scale"])


def _decode_w4a8(parts: Parts, scale: float, out: Tensor) -> None:
    kernels.decode_nvfp4_rows_torch(parts["weight"], parts["weight_scale"], scale, out)


def _encodes(
    components: tuple[Component, ...], numbers: Callable[[Tensor, float, Parts], dict[str, Tensor]]
) -> EncodeRows:
    """Numbers in their own dtypes, as the bytes of rows; piece by piece, so that FP32 scratch stays small."""
    covered = {part.suffix: part.rows for part in components if part.rows}

    def encode_rows(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
        for start, stop in _pieces(rows, covered):
            # Of what is given only a bias goes by rows.
            here = {name: value[start:stop] if name == "bias" else value for name, value in given.items()}
            for suffix, tensor in numbers(rows[start:stop], scale, here).items():
                first = start // covered[suffix]
                out[suffix][first : first + len(tensor)].copy_(as_rows(tensor))

    return encode_rows


def _decodes(components: tuple[Component, ...], numbers: Callable[[Parts, float], Tensor]) -> DecodeRows:
    """The bytes of rows as tensors [n, items] in their own dtypes."""
    dtypes = {part.suffix: DTYPES[part.dtype] for part in components if part.rows}
    covered = {part.suffix: part.rows for part in components if part.rows}

    def decode_rows(parts: Parts, scale: float, out: Tensor) -> None:
        views = {
            suffix: part.contiguous().view(dtypes[suffix]) if suffix in dtypes else part
            for suffix, part in parts.items()
        }
        for start, stop in _pieces(out, covered):
            here = {
                suffix: part[start // covered[suffix] : -(-stop // covered[suffix])] if suffix in covered else part
                for suffix, part in views.items()
            }
            out[start:stop].copy_(numbers(here, scale))

    return decode_rows


def _pieces(rows: Tensor, covered: Mapping[str, int]) -> Iterator[tuple[int, int]]:
    """Runs of rows, none of which cuts rows that share a scale or a byte."""
    unit = max(covered.values())
    step = max(1, PIECE_ELEMENTS // max(1, rows[:1].numel()) // unit) * unit
    return ((start, min(start + step, len(rows))) for start in range(0, len(rows), step))


# ---------------------------------------------------------------- the table


def _weight(dtype: str, elements: int = 1, rows: int = 1, suffix: str = "weight") -> Component:
    return Component(suffix=suffix, dtype=dtype, kind="weight", elements=elements, rows=rows)


def _scale(
    dtype: str, elements: int, rows: int = 1, suffix: str = "weight_scale", last: tuple[int, ...] = ()
) -> Component:
    return Component(suffix=suffix, dtype=dtype, kind="block_scale", elements=elements, rows=rows, last=last)


def _global(suffix: str) -> Component:
    return Component(suffix=suffix, dtype="F32", kind="global_scale", elements=0, rows=0)


def _input(suffix: str = "input_scale", last: tuple[int, ...] = ()) -> Component:
    return Component(suffix=suffix, dtype="F32", kind="input_scale", elements=0, rows=0, last=last)


BF16 = (_weight("BF16"),)
FP32 = (_weight("F32"),)
INT32 = (_weight("I32"),)
NVFP4 = (_weight("U8", 2), _scale("F8_E4M3", 16), _global("weight_scale_2"), _input())
W4A8_NVFP4 = (_weight("U8", 2), _scale("F8_E4M3", 32), _global("weight_scale_2"), _input())
FP8 = (_weight("F8_E4M3"), _global("weight_scale"), _input())
FP8_CHANNEL = (_weight("F8_E4M3"), _scale("F32", 0))
FP8_BLOCK = (_weight("F8_E4M3"), _scale("F32", 128, 128))
FP8_BLOCK_UE8M0 = (_weight("F8_E4M3"), _scale("U8", 128, 128))
MXFP8 = (_weight("F8_E4M3"), _scale("U8", 32))
MXFP4 = (_weight("U8", 2), _scale("U8", 32))
INT8 = (_weight("I8"), _scale("F32", 0), _input())
INT8_DYNAMIC = (_weight("I8"), _scale("F32", 0, last=(1,)), _scale("F32", 0, suffix="weight_offset", last=(1,)))
INT8_STATIC = (
    _weight("I8"),
    _scale("F32", 0, suffix="deq_scale"),
    _scale("I32", 0, suffix="quant_bias"),
    _input(last=(1,)),
    _input("input_offset", last=(1,)),
)
INT4_PAIRS = (_weight("U8", 1, 2), _scale("F32", GROUP))
INT4_WORDS = (
    _weight("I32", 8, suffix="weight_packed"),
    _scale("F32", GROUP),
    Component(suffix="weight_shape", dtype="I64", kind="shape", elements=0, rows=0, last=(2,)),
)

ONE_SCALE = "scale 1.0, codes 0 (the library: scale 0 and NaN codes)"

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format(
            name="bf16",
            components=BF16,
            encode_block=(1, 1),
            oracle="the bytes themselves",
            encode_rows=_encode_plain,
            decode_rows=_decode_bf16,
            zero="itself",
        ),
        Format(
            name="fp32",
            components=FP32,
            encode_block=(1, 1),
            oracle="the bytes themselves",
            encode_rows=_encode_plain,
            decode_rows=_decode_fp32,
            zero="itself",
        ),
        Format(  # no weights: the maps of experts
            name="int32",
            components=INT32,
            encode_block=(1, 1),
            oracle="the bytes themselves",
            encode_rows=_encode_plain,
            decode_rows=_decode_int32,
            zero="itself",
        ),
        Format(
            name="nvfp4",
            components=NVFP4,
            encode_block=(1, 16),
            multiples=(1, 16),
            oracle="nvidia-modelopt 0.47.0, NVFP4QTensor",
            global_divisor=E2M1_MAX * E4M3_MAX,
            encode_rows=_encode_nvfp4,
            decode_rows=_decode_nvfp4,
            zero="block scale 1.0, codes 0; a whole tensor global scale 1.0 (the library: 0, and NaN block scales)",
        ),
        Format(
            name="w4a8_nvfp4",
            components=W4A8_NVFP4,
            encode_block=(1, 32),
            multiples=(1, 32),
            oracle="nvidia-modelopt 0.47.0, W4A8_NVFP4_FP8 export",
            global_divisor=E4M3_MAX,
            encode_rows=_encode_w4a8,
            decode_rows=_decode_w4a8,
            zero="block scale 1.0, codes 0; a whole tensor global scale 1.0",
        ),
        Format(
            name="fp8",
            components=FP8,
            encode_block=(0, 0),
            oracle="nvidia-modelopt 0.47.0, FP8QTensor with an FP32 scale",
            global_divisor=E4M3_MAX,
            encode_rows=_encodes(FP8, lambda rows, scale, given: floats.encode_fp8(rows, scale)),
            decode_rows=_decodes(FP8, lambda parts, scale: floats.decode_fp8(parts["weight"], scale)),
            zero=ONE_SCALE,
        ),
        Format(
            name="fp8_channel",
            components=FP8_CHANNEL,
            encode_block=(1, 0),
            oracle="nvidia-modelopt 0.47.0, to_quantized_weight('fp8_pc_pt')",
            encode_rows=_encodes(FP8_CHANNEL, lambda rows, scale, given: floats.encode_fp8_channel(rows)),
            decode_rows=_decodes(
                FP8_CHANNEL, lambda parts, scale: floats.decode_rows_scaled(parts["weight"], parts["weight_scale"])
            ),
            zero=ONE_SCALE,
        ),
        Format(
            name="fp8_block",
            components=FP8_BLOCK,
            encode_block=(128, 128),
            oracle="nvidia-modelopt 0.47.0, FP8QTensor in blocks of 128 x 128",
            encode_rows=_encodes(FP8_BLOCK, lambda rows, scale, given: floats.encode_fp8_block(rows)),
            decode_rows=_decodes(
                FP8_BLOCK, lambda parts, scale: floats.decode_fp8_block(parts["weight"], parts["weight_scale"])
            ),
            zero=ONE_SCALE,
        ),
        Format(
            name="fp8_block_ue8m0",
            components=FP8_BLOCK_UE8M0,
            encode_block=(128, 128),
            oracle="transformers 5.23.0, Fp8Quantize with ue8m0 scales",
            encode_rows=_encodes(FP8_BLOCK_UE8M0, lambda rows, scale, given: floats.encode_fp8_block_ue8m0(rows)),
            decode_rows=_decodes(
                FP8_BLOCK_UE8M0,
                lambda parts, scale: floats.decode_fp8_block_ue8m0(parts["weight"], parts["weight_scale"]),
            ),
            zero="byte 0, codes 0",
        ),
        Format(
            name="mxfp8",
            components=MXFP8,
            encode_block=(1, 32),
            multiples=(1, 32),
            oracle="nvidia-modelopt 0.47.0, MXFP8QTensor",
            encode_rows=_encodes(MXFP8, lambda rows, scale, given: floats.encode_mxfp8(rows)),
            decode_rows=_decodes(
                MXFP8, lambda parts, scale: floats.decode_mxfp8(parts["weight"], parts["weight_scale"])
            ),
            zero="byte 0, codes 0",
        ),
        Format(
            name="mxfp4",
            components=MXFP4,
            encode_block=(1, 32),
            multiples=(1, 32),
            oracle="nvidia-modelopt 0.47.0, MXFP4QTensor (ties toward zero)",
            encode_rows=_encodes(MXFP4, lambda rows, scale, given: floats.encode_mxfp4(rows)),
            decode_rows=_decodes(
                MXFP4, lambda parts, scale: floats.decode_mxfp4(parts["weight"], parts["weight_scale"])
            ),
            zero="byte 0, codes 8 (-0)",
        ),
        Format(
            name="int8",
            components=INT8,
            encode_block=(1, 0),
            oracle="nvidia-modelopt 0.47.0, to_quantized_weight('int8_sq')",
            encode_rows=_encodes(INT8, lambda rows, scale, given: ints.encode_int8(rows)),
            decode_rows=_decodes(
                INT8, lambda parts, scale: floats.decode_rows_scaled(parts["weight"], parts["weight_scale"])
            ),
            zero="scale 0, codes 0",
        ),
        Format(
            name="int8_dynamic",
            components=INT8_DYNAMIC,
            encode_block=(1, 0),
            oracle="msmodelslim 26.1.0, on_w8a8_dynamic_per_channel",
            encode_rows=_encodes(INT8_DYNAMIC, lambda rows, scale, given: ints.encode_by_row(rows, 8)),
            decode_rows=_decodes(
                INT8_DYNAMIC, lambda parts, scale: floats.decode_rows_scaled(parts["weight"], parts["weight_scale"])
            ),
            zero="scale 2^-23, codes 0",
        ),
        Format(
            name="int8_static",
            components=INT8_STATIC,
            encode_block=(1, 0),
            needs=("input_scale", "input_offset"),
            oracle="msmodelslim 26.1.0, on_w8a8_static of a BF16 model",
            encode_rows=_encodes(
                INT8_STATIC,
                lambda rows, scale, given: ints.encode_int8_static(
                    rows, given["input_scale"], given["input_offset"], given.get("bias")
                ),
            ),
            decode_rows=_decodes(
                INT8_STATIC, lambda parts, scale: ints.decode_int8_static(parts["weight"], parts["deq_scale"], parts)
            ),
            zero="scale 2^-23, codes 0",
        ),
        Format(
            name="int4_dynamic",
            components=INT8_DYNAMIC,
            encode_block=(1, 0),
            oracle="none: ModelSlim's rule for 8 bits at 4, a code a byte; no fixture holds it",
            encode_rows=_encodes(INT8_DYNAMIC, lambda rows, scale, given: ints.encode_by_row(rows, 4)),
            decode_rows=_decodes(
                INT8_DYNAMIC, lambda parts, scale: floats.decode_rows_scaled(parts["weight"], parts["weight_scale"])
            ),
            zero="scale 2^-23, codes 0",
        ),
        Format(
            name="int4_awq",
            components=INT4_PAIRS,
            encode_block=(1, GROUP),
            multiples=(2, GROUP),
            oracle="nvidia-modelopt 0.47.0, to_quantized_weight('int4_awq') in groups of 128",
            encode_rows=_encodes(INT4_PAIRS, lambda rows, scale, given: ints.encode_int4_pairs(rows, GROUP)),
            decode_rows=_decodes(
                INT4_PAIRS, lambda parts, scale: ints.decode_int4_pairs(parts["weight"], parts["weight_scale"])
            ),
            zero="scale 0, codes 0",
        ),
        Format(
            name="int4_group",
            components=INT4_WORDS,
            encode_block=(1, GROUP),
            multiples=(1, GROUP),
            oracle="compressed-tensors 0.20.0, W4A16 pack-quantized in groups of 128",
            encode_rows=_encodes(INT4_WORDS, lambda rows, scale, given: ints.encode_int4_words(rows, GROUP)),
            decode_rows=_decodes(
                INT4_WORDS, lambda parts, scale: ints.decode_int4_words(parts["weight_packed"], parts["weight_scale"])
            ),
            zero="scale 2^-23, codes 0",
        ),
    )
}
