"""CPU loops behind formats and layouts: numba where importable, a torch twin otherwise, the same bytes from both."""

from __future__ import annotations

import torch
from torch import Tensor

from .steps import Offsets

# Rows of the torch twins go in pieces of this many elements, so that their FP32 scratch stays small.
_PIECE_ELEMENTS = 1 << 18

# 1.5 * 2^23: adding it leaves the integer part in the low mantissa bits, rounded once, ties to even.
_MAGIC = 12582912.0


def amax_bits(rows: Tensor) -> int:
    return amax_bits_torch(rows)


def encode_nvfp4_rows(rows: Tensor, scale: float, weight: Tensor, block_scale: Tensor) -> None:
    encode_nvfp4_rows_torch(rows, scale, weight, block_scale)


def decode_nvfp4_rows(weight: Tensor, block_scale: Tensor, scale: float, out: Tensor) -> None:
    decode_nvfp4_rows_torch(weight, block_scale, scale, out)


def scatter_rows(src: Tensor, rows: Offsets, shift: int, runs: Offsets, run_bytes: int, local: Tensor) -> None:
    scatter_rows_torch(src, rows, shift, runs, run_bytes, local)


def gather_rows(local: Tensor, rows: Offsets, shift: int, runs: Offsets, run_bytes: int, out: Tensor) -> None:
    gather_rows_torch(local, rows, shift, runs, run_bytes, out)


def amax_bits_torch(rows: Tensor) -> int:
    bits = torch.split(rows.view(torch.int16).flatten(), _PIECE_ELEMENTS)
    return max((int(piece.bitwise_and(0x7FFF).max()) for piece in bits if piece.numel()), default=0)


def encode_nvfp4_rows_torch(rows: Tensor, scale: float, weight: Tensor, block_scale: Tensor) -> None:
    step = max(1, _PIECE_ELEMENTS // max(1, rows.shape[1]))
    pieces = (torch.split(tensor, step) for tensor in (rows, weight, block_scale))
    for piece, codes, scales in zip(*pieces, strict=True):
        _encode_piece(piece, scale, codes, scales)


def _encode_piece(rows: Tensor, scale: float, weight: Tensor, block_scale: Tensor) -> None:
    bits = rows.view(torch.int16).to(torch.int32)
    magnitude = (bits & 0x7FFF).bitwise_left_shift(16).view(torch.float32).view(len(rows), -1, 16)
    scale_2 = torch.tensor(scale, dtype=torch.float32, device=rows.device)
    block = magnitude.amax(2) / (6.0 * scale_2)
    block = torch.where(block == 0, 1.0, block).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
    block_scale.copy_(block.view(torch.uint8))
    quotient = (magnitude / (block.float() * scale_2).unsqueeze(2)).flatten(1)
    code = torch.where(quotient > 0, (bits >> 12) & 8, 0).to(torch.uint8) | _e2m1(quotient)
    weight.copy_(code[:, 0::2] | (code[:, 1::2] << 4))


def _e2m1(quotient: Tensor) -> Tensor:
    """Codes 0..7: the least of the four lines of the E2M1 grid, each rounded once; a NaN stays at 7."""
    rounded = torch.full_like(quotient, _MAGIC + 7)
    for line in (quotient * 0.5 + (_MAGIC + 4), quotient + (_MAGIC + 2), quotient * 2 + _MAGIC):
        rounded = torch.where(line < rounded, line, rounded)
    return (rounded.view(torch.int32) & 7).to(torch.uint8)


def decode_nvfp4_rows_torch(weight: Tensor, block_scale: Tensor, scale: float, out: Tensor) -> None:
    step = max(1, _PIECE_ELEMENTS // max(1, out.shape[1]))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], device=weight.device)
    pieces = (torch.split(tensor, step) for tensor in (weight, block_scale, out))
    for codes, scales, piece in zip(*pieces, strict=True):
        wide = torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).to(torch.int32)
        factor = scales.view(torch.float8_e4m3fn).float() * torch.tensor(scale, dtype=torch.float32)
        piece.copy_((values[wide].view(len(wide), -1, 16) * factor.unsqueeze(2)).flatten(1))


def _runs(local: Tensor, rows: Offsets, shift: int, runs: Offsets, run_bytes: int) -> tuple[Tensor, Tensor]:
    """`local` as every run of run_bytes that starts anywhere in it, and the starts of the runs, row after row."""
    starts = torch.from_numpy((rows[:, None] + (runs[None, :] + shift)).ravel()).to(local.device)
    return local.unfold(0, run_bytes, 1), starts


def scatter_rows_torch(
    src: Tensor, rows: Offsets, shift: int, runs: Offsets, run_bytes: int, local: Tensor
) -> None:
    windows, starts = _runs(local, rows, shift, runs, run_bytes)
    windows[starts] = src.reshape(-1, run_bytes)


def gather_rows_torch(
    local: Tensor, rows: Offsets, shift: int, runs: Offsets, run_bytes: int, out: Tensor
) -> None:
    windows, starts = _runs(local, rows, shift, runs, run_bytes)
    out.copy_(windows[starts].view(out.shape))
