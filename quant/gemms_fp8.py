"""torch's scaled matrix product on FP8 weights: y = (x8 @ weight) * scale of x * scale of the weight + bias.

The weight is E4M3 [elements, rows] of strides (1, elements), which is what layout cutlass_linear_fp8 shows of the
checkpoint's rows where they lie. Two kinds of scales, as the format has them:

    fp8          one of the tensor; x by the checkpoint's input_scale, one of the tensor too
    fp8_channel  one of each row;   x by the largest magnitude of each token / 448

Both sizes are multiples of 16; the number of tokens is any.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import numerics_float as floats
from .formats import FORMATS, encode

# Sums of products are kept in the tensor cores' own registers, about 14 bits, over the whole of K if this is set.
FAST_ACCUMULATION = False
BLOCK = 2048  # elements that one program quantizes


def linear(x: Tensor, operands: Mapping[str, Tensor], num_rows: int) -> Tensor:
    """[..., num_rows] in x's dtype from x [..., elements]; BF16 on the way."""
    tokens = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    if not len(tokens):
        return x.new_empty(*x.shape[:-1], num_rows)
    weight_scale = operands["weight_scale"]
    if "input_scale" in operands:
        codes, scale = quantize_tensor(tokens, operands["input_scale"]), operands["input_scale"]
    else:
        codes, scale = quantize_tokens(tokens)
        weight_scale = weight_scale.view(1, -1)
    y = torch._scaled_mm(
        codes,
        operands["weight"],
        scale,
        weight_scale,
        bias=operands.get("bias"),
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
    )
    return y.view(*x.shape[:-1], num_rows).to(x.dtype)


def quantize_tensor(tokens: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of BF16 [tokens, elements] over one FP32 scale [1], without waiting for it."""
    if _by_kernel(tokens):
        codes, grid = torch.empty_like(tokens, dtype=torch.uint8), (-(-tokens.numel() // BLOCK),)
        with torch.cuda.device(tokens.device):
            _loops().encode_fp8[grid](tokens, scale, codes, tokens.numel(), BLOCK=BLOCK)
        return codes.view(torch.float8_e4m3fn)
    return floats.encode_fp8(tokens, scale)["weight"]


def quantize_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of BF16 [tokens, elements], and FP32 [tokens, 1] of what to multiply them by."""
    if _by_kernel(tokens):
        parts = encode(FORMATS["fp8_channel"], tokens)
        return parts["weight"].view(torch.float8_e4m3fn), parts["weight_scale"].view(torch.float32)
    parts = floats.encode_fp8_channel(tokens)
    return parts["weight"], parts["weight_scale"].view(-1, 1)


def _by_kernel(tokens: Tensor) -> bool:
    """A compiler fuses the torch version by itself, and cannot look into ours."""
    return tokens.is_cuda and not torch.compiler.is_compiling()


@cache
def _loops() -> ModuleType:
    return importlib.import_module(".cuda_loops", __package__)
