"""INT8 and INT4 in torch: values to codes and scales, and back. Rows are BF16 [n, K].

Every library's own rule: modelopt divides by amax / 127 or amax / 7, ModelSlim keeps scales above 2^-23,
compressed-tensors takes half the integer range (127.5, 7.5) and stores 2^-23 for zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .numerics_float import pack_nibbles, unpack_nibbles

EPSILON = 2.0**-23
Numbers = dict[str, Tensor]


def _codes(quotient: Tensor, bits: int) -> Tensor:
    """Nearest integer, ties to even, saturated; 0 / 0 becomes 0."""
    top = 2 ** (bits - 1)
    return quotient.nan_to_num(0.0).round().clamp(-top, top - 1).to(torch.int8)


def _grouped(rows: Tensor, group: int) -> Tensor:
    return rows.float().view(len(rows), -1, group)


# ---------------------------------------------------------------- INT8


def encode_int8(rows: Tensor) -> Numbers:
    """modelopt: a row of zeros has scale 0 and codes 0."""
    values = rows.float()
    scale = values.abs().amax(1) / 127
    return {"weight": _codes(values / scale.unsqueeze(1), 8), "weight_scale": scale}


def encode_by_row(rows: Tensor, bits: int) -> Numbers:
    """ModelSlim, dynamic: symmetric, the offset is there and zero."""
    values = rows.float()
    scale = (values.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp(min=EPSILON)
    return {"weight": _codes(values / scale, bits), "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


def encode_int8_static(rows: Tensor, input_scale: Tensor, input_offset: Tensor, bias: Tensor | None) -> Numbers:
    """ModelSlim, static: what the kernel adds and multiplies follows from weights and activations together.

    deq_scale = input_scale * weight_scale; quant_bias = bias / deq_scale - input_offset * sum of a row's codes.
    """
    parts = encode_by_row(rows, 8)
    deq_scale = input_scale.float().view(1) * parts["weight_scale"].view(-1)
    given = torch.zeros_like(deq_scale) if bias is None else bias.float()
    quant_bias = given / deq_scale - parts["weight"].float().sum(1) * input_offset.float().view(1)
    return {"weight": parts["weight"], "deq_scale": deq_scale, "quant_bias": quant_bias.round().to(torch.int32)}


def decode_int8_static(weight: Tensor, deq_scale: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """The weight scale is deq_scale / input_scale; without an input_scale the product is left in."""
    scale = deq_scale.view(-1, 1)
    return weight.float() * (scale / given["input_scale"].view(1) if "input_scale" in given else scale)


def activation_scale(lowest: Tensor, highest: Tensor) -> Numbers:
    """ModelSlim's asymmetric activations: input_scale and input_offset of values in [lowest, highest]."""
    scale = (highest / 255 - lowest / 255).clamp(min=EPSILON)
    return {"input_scale": scale, "input_offset": (-lowest / scale).round() - 128}


def widened(deq_scale: Tensor) -> Tensor:
    """deq_scale as the file of an FP16 model has it: the same 32 bits in an int64."""
    return deq_scale.view(torch.int32).to(torch.int64)


def narrowed(deq_scale: Tensor) -> Tensor:
    """The reverse of `widened`."""
    return deq_scale.to(torch.int32).view(torch.float32)


# ---------------------------------------------------------------- INT4


def encode_int4_pairs(rows: Tensor, group: int) -> Numbers:
    """modelopt AWQ: rows 2i and 2i + 1 share bytes, low and high nibble, two's complement; scale amax / 7."""
    values = _grouped(rows, group)
    scale = values.abs().amax(2) / 7
    nibbles = _codes(values / scale.unsqueeze(2), 4).view(torch.uint8).view(rows.shape) & 15
    return {"weight": nibbles[0::2] | (nibbles[1::2] << 4), "weight_scale": scale}


def decode_int4_pairs(packed: Tensor, scale: Tensor) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), dim=1).flatten(0, 1)
    return _scaled(_signed(nibbles), scale)


def encode_int4_words(rows: Tensor, group: int) -> Numbers:
    """compressed-tensors W4A16: eight codes + 8 an int32, the first in the lowest bits; scale amax / 7.5."""
    values = _grouped(rows, group)
    largest = values.abs().amax(2)
    scale = torch.where(largest == 0, EPSILON, largest / 7.5)
    nibbles = (_codes(values / scale.unsqueeze(2), 4) + 8).to(torch.uint8).view(rows.shape)
    return {"weight_packed": pack_nibbles(nibbles).view(torch.int32), "weight_scale": scale}


def decode_int4_words(packed: Tensor, scale: Tensor) -> Tensor:
    return _scaled(unpack_nibbles(packed.view(torch.uint8)).float() - 8, scale)


def encode_int4_flat(rows: Tensor, block: int) -> Numbers:
    """modelopt's INT4QTensor: blocks of the flat tensor, codes + 8, the first HIGH; the scale is 7 / amax."""
    blocks = rows.float().reshape(-1, block)
    scale = 7 / blocks.abs().amax(1, keepdim=True)
    codes = ((blocks * scale).round().clamp(-8, 7) + 8).to(torch.uint8)
    return {"weight": ((codes[:, 0::2] << 4) | codes[:, 1::2]).view(len(rows), -1), "scales": scale}


def _signed(nibbles: Tensor) -> Tensor:
    return ((nibbles.to(torch.int8) ^ 8) - 8).float()


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    """Codes times the scale of their group."""
    return (values.view(*scale.shape, -1) * scale.unsqueeze(2)).view(values.shape)
