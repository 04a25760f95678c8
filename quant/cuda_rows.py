"""Rows of one matrix on a CUDA device, as the table of formats has them; many matrices at once are `quant.cuda`'s."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import kernels
from .cuda import SCALES, Matrix, amax, encode_nvfp4, plan_batch, run, scale_table
from .specs import EncodeRows, Parts


def amax_bits(rows: Tensor) -> int:
    """BF16 bits of the largest absolute value of contiguous rows; waits for the device."""
    if rows.numel() % 16 or rows.data_ptr() % 16 or not rows.numel():
        return kernels.amax_bits_torch(rows)
    none = torch.empty(0, dtype=torch.uint8, device=rows.device)
    return int(amax(plan_batch([Matrix(rows=rows.view(-1, 16), weight=none, block_scale=none)])))


def _encode_nvfp4(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    if not SCALES[0] <= scale <= SCALES[1]:
        kernels.encode_nvfp4_rows_torch(rows, scale, out["weight"], out["weight_scale"])
    elif rows.numel():
        rows = rows if rows.data_ptr() % 16 == 0 else rows.clone()
        batch = plan_batch([Matrix(rows=rows, weight=out["weight"], block_scale=out["weight_scale"])])
        encode_nvfp4(batch, scale_table(torch.tensor([scale], device=rows.device)))


def _encode_fp8(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    if rows.numel():
        divisor = torch.tensor([scale], dtype=torch.float32, device=rows.device)
        grid = (-(-rows.numel() // 2048),)
        run("encode_fp8", rows.device, grid, rows, divisor, out["weight"], rows.numel(), BLOCK=2048)


def _encode_fp8_channel(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    if rows.numel():
        scales = out["weight_scale"].view(torch.float32)
        grid = (len(rows),)
        run("encode_fp8_channel", rows.device, grid, rows, out["weight"], scales, rows.shape[1], BK=1024)


def _encode_fp8_block(rows: Tensor, scale: float, given: Parts, out: Parts) -> None:
    if rows.numel():
        scales, (n, k) = out["weight_scale"].view(torch.float32), rows.shape
        grid = (-(-n // 128), -(-k // 128))
        run("encode_fp8_block", rows.device, grid, rows, out["weight"], scales, n, k, TILE=128, num_warps=16)


def _encode_mx(rows: Tensor, scale: float, given: Parts, out: Parts, *, fp4: bool) -> None:
    if rows.numel():
        blocks = rows.numel() // 32
        bits, grid = rows.view(torch.int16), (-(-blocks // 128),)
        parts = (out["weight"], out["weight_scale"])
        run("encode_mx", rows.device, grid, bits, *parts, blocks, BLOCKS=128, FP4=fp4)


ENCODERS: dict[str, EncodeRows] = {
    "nvfp4": _encode_nvfp4,
    "fp8": _encode_fp8,
    "fp8_channel": _encode_fp8_channel,
    "fp8_block": _encode_fp8_block,
    "mxfp8": partial(_encode_mx, fp4=False),
    "mxfp4": partial(_encode_mx, fp4=True),
}
