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
from torch.nn import functional as F

from .numerics_float import E4M3_MAX, e4m3

# Sums of products stay in the tensor cores' own registers, about 14 bits, over the whole of K if this is set: 8 to 19 %
# faster on an H100 at 4608 tokens (docs/performance.md).
FAST_ACCUMULATION = False
MIN_TOKENS = 17  # fewer are filled up with zeros, as vLLM does since products of fewer are slow; not measured apart
BLOCK = 4096  # elements that one program quantizes by the tensor
MAX_ELEMENTS = 32768  # of a token that a program keeps in its registers


def linear(x: Tensor, operands: Mapping[str, Tensor], num_rows: int) -> Tensor:
    """[..., num_rows] in x's dtype from x [..., elements]; BF16 on the way."""
    tokens = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
    count, missing = len(tokens), MIN_TOKENS - len(tokens)
    if not count:
        return x.new_empty(*x.shape[:-1], num_rows)
    tokens = F.pad(tokens, (0, 0, 0, missing)) if missing > 0 else tokens
    weight_scale = operands["weight_scale"]
    if "input_scale" in operands:
        codes, scale = quantize_tensor(tokens, operands["input_scale_inv"]), operands["input_scale"]
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
    y = y[:count] if missing > 0 else y
    return y.view(*x.shape[:-1], num_rows).to(x.dtype)


def quantize_tensor(tokens: Tensor, inverse: Tensor) -> Tensor:
    """E4M3 codes of contiguous BF16 [tokens, elements] times one FP32 factor [1], without waiting for it."""
    if not _by_kernel(tokens):
        return e4m3(tokens.float() * inverse)
    codes, grid = torch.empty_like(tokens, dtype=torch.float8_e4m3fn), (-(-tokens.numel() // BLOCK),)
    with torch.cuda.device(tokens.device):
        _loops().by_tensor[grid](tokens, inverse, codes.view(torch.uint8), tokens.numel(), BLOCK=BLOCK, num_warps=8)
    return codes


def quantize_tokens(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes of contiguous BF16 [tokens, elements], and FP32 [tokens, 1] of what to multiply them by."""
    if not _by_kernel(tokens):
        values = tokens.float()
        largest = values.abs().amax(1, keepdim=True)
        top = torch.full_like(largest, E4M3_MAX)  # a number over a tensor would be its rounded reciprocal, times it
        largest = torch.where(largest == 0, top, largest)
        return e4m3(values * (top / largest)), largest / top
    count, elements = tokens.shape
    codes = torch.empty_like(tokens, dtype=torch.float8_e4m3fn)
    scales = torch.empty(count, 1, dtype=torch.float32, device=tokens.device)
    block = 1 << (elements - 1).bit_length()
    shape = {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}
    with torch.cuda.device(tokens.device):
        _loops().by_token[(count,)](tokens, codes.view(torch.uint8), scales, elements, **shape)
    return codes, scales


def _by_kernel(tokens: Tensor) -> bool:
    """A compiler fuses the torch version by itself, and cannot look into ours."""
    return tokens.is_cuda and tokens.shape[1] <= MAX_ELEMENTS and not torch.compiler.is_compiling()


@cache
def _loops() -> ModuleType:
    return importlib.import_module(".activation_loops", __package__)
