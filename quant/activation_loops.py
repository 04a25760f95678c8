"""Activations to FP8 in one pass, in Triton; imported only where a CUDA device is used.

The codes are those of `quant.gemms_fp8`'s torch twins: one product by a reciprocal that was divided correctly, clamped,
ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _e4m3(values):
    return tl.minimum(tl.maximum(values, -448.0), 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def by_tensor(x, inverse, codes, count, BLOCK: tl.constexpr):
    """BF16 [count] times FP32 [1] to codes."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32) * tl.load(inverse)
    tl.store(codes + i, _e4m3(values), mask=i < count)


@triton.jit
def by_token(x, codes, scales, K, BLOCK: tl.constexpr):
    """A row of BF16 [tokens, K] a program, all of it in registers: codes, and amax / 448, 1.0 for a row of zeros."""
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(x + row * K + i, mask=i < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=0)
    largest = tl.where(largest == 0, 448.0, largest)
    tl.store(codes + row * K + i, _e4m3(values * tl.math.div_rn(448.0, largest)), mask=i < K)
    tl.store(scales + row, tl.math.div_rn(largest, 448.0))
