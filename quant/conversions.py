"""Checkpoint conversions: what rounds, or puts a foreign checkpoint in order, before a digest is taken.

They are no layouts: their outputs are new checkpoint tensors, from which nothing leads back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from . import numerics_float as floats
from .specs import Parts
from .steps import Swizzle128x4, round_up


def rebase_block_scales(block_scale: Tensor, scales: Sequence[float], rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Move packed projections, stacked by rows, onto the largest of their global scales.

    block_scale: E4M3 [sum(rows), blocks]; scales: weight_scale_2 of every part. Returns new block scales and the
    scale that all of them now share. The rule of sglang's _rebase_partition_weight_scales: E4M3(scale * s2 / max).
    """
    if len(scales) != len(rows) or sum(rows) != len(block_scale):
        raise ValueError(
            f"{len(scales)} scales for parts of {list(rows)} rows; expected {len(block_scale)} rows in all"
        )
    given = torch.tensor(scales, dtype=torch.float32)
    ratio = (given / given.max()).repeat_interleave(torch.tensor(rows)).unsqueeze(1)
    return floats.e4m3(block_scale.float() * ratio), given.max()


def requantize_to_largest(parts: Sequence[Parts]) -> list[dict[str, Tensor]]:
    """Put FP8 tensors of one fused group onto the largest of their scales: decoded in FP32 and rounded once more.

    parts: weight (E4M3) and weight_scale (F32 []) of every member. Who has the largest scale keeps its bytes.
    """
    largest = torch.stack([part["weight_scale"].float().reshape(()) for part in parts]).max()
    return [
        {
            "weight": floats.e4m3(part["weight"].float() * part["weight_scale"].float() / largest),
            "weight_scale": largest,
        }
        if part["weight_scale"].float() < largest
        else {"weight": part["weight"], "weight_scale": largest}
        for part in parts
    ]


def linear_scales(swizzled: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Block scales of a checkpoint that has them swizzled 128 x 4, back in rows: [num_rows, num_columns]."""
    expected = round_up(num_rows, 128) * round_up(num_columns, 4)
    if swizzled.numel() != expected or swizzled.element_size() != 1:
        raise ValueError(
            f"swizzled scales of {swizzled.numel()} x {swizzled.element_size()} bytes; expected {expected} bytes for "
            f"[{num_rows}, {num_columns}] padded to 128 x 4"
        )
    flat = swizzled.contiguous().view(-1).view(torch.uint8)
    return flat[_swizzled_at(num_rows, num_columns)].view(swizzled.dtype)


def swizzled_scales(linear: Tensor) -> Tensor:
    """The inverse for whole tiles: rows of a multiple of 128, columns of 4; the same shape, the bytes swizzled."""
    rows = linear.contiguous().view(torch.uint8)
    if rows.ndim != 2 or rows.shape[0] % 128 or rows.shape[1] % 4:
        raise ValueError(f"linear scales of {list(rows.shape)} bytes; expected whole tiles of 128 x 4")
    flat = torch.empty_like(rows).view(-1)
    flat[_swizzled_at(*rows.shape)] = rows
    return flat.view(rows.shape).view(linear.dtype)


def _swizzled_at(num_rows: int, num_columns: int) -> Tensor:
    """Where the byte of each scale lies: [num_rows, num_columns]."""
    located = Swizzle128x4().locate(np.arange(num_rows, dtype=np.int64), num_rows, num_columns)
    return torch.from_numpy(located.rows[:, None] + (located.runs[:, None] + np.arange(located.run_bytes)).ravel())


def swap_nibbles(packed: Tensor) -> Tensor:
    """Packed FP4 of a checkpoint that has the first element in the high nibble (ComfyUI); its own inverse."""
    return (packed >> 4) | (packed << 4)


def pad_rows_and_blocks(packed: Tensor, block_scale: Tensor, *, columns: bool) -> tuple[Tensor, Tensor]:
    """modelopt's ComfyUI export: rows padded to 16 with zeros, and, if asked for, packed bytes and scale columns."""
    return _padded(packed, columns), _padded(block_scale.view(torch.uint8), columns).view(block_scale.dtype)


def _padded(matrix: Tensor, columns: bool) -> Tensor:
    rows, width = matrix.shape
    out = matrix.new_zeros(round_up(rows, 16), round_up(width, 16) if columns else width)
    out[:rows, :width] = matrix
    return out
