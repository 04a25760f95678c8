"""CPU loops behind formats and layouts: numba's where importable, a torch twin otherwise, the same bytes from both.

The twins also serve other devices. Single thread; the numba loops release the GIL.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .steps import Located

# Rows of the torch twins go in pieces of this many elements, so that their FP32 scratch stays small.
_PIECE_ELEMENTS = 1 << 18

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the integer in the low mantissa bits, rounded once, ties to even
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@cache
def numba_loops() -> ModuleType | None:
    """The compiled loops, None where numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module(".loops", __package__)


def _loops(tensor: Tensor) -> ModuleType | None:
    return numba_loops() if tensor.device.type == "cpu" else None


def _array(tensor: Tensor, dtype: type[np.generic]) -> NDArray[np.generic]:
    """The bytes of a contiguous tensor as a flat array of another type, not copied."""
    return tensor.view(torch.uint8).numpy().reshape(-1).view(dtype)


def amax_bits(rows: Tensor) -> int:
    """BF16 bits of the largest absolute value of contiguous rows."""
    loops = _loops(rows)
    return int(loops.amax(_array(rows, np.uint16))) if loops else amax_bits_torch(rows)


def encode_nvfp4_rows(rows: Tensor, scale: float, weight: Tensor, block_scale: Tensor) -> None:
    """BF16 [n, K] to codes [n, K / 2] and block scales [n, K / 16], all contiguous."""
    loops = _loops(rows)
    if loops is None:
        return encode_nvfp4_rows_torch(rows, scale, weight, block_scale)
    parts = (_array(weight, np.uint8), _array(block_scale, np.uint8))
    loops.encode_nvfp4(_array(rows, np.uint32), np.float32(scale), *parts)
    return None


def decode_nvfp4_rows(weight: Tensor, block_scale: Tensor, scale: float, out: Tensor) -> None:
    """The reverse: e2m1 * (block scale * scale) in FP32, rounded to BF16."""
    loops = _loops(out)
    if loops is None:
        return decode_nvfp4_rows_torch(weight, block_scale, scale, out)
    parts = (_array(weight, np.uint8), _array(block_scale, np.uint8))
    loops.decode_nvfp4(*parts, np.float32(scale), _e4m3_values(), _array(out, np.uint32))
    return None


def scatter_rows(src: Tensor, located: Located, row0: int, shift: int, local: Tensor) -> None:
    """Rows [row0, row0 + len(src)) of a tensor to where they lie in `local`, `shift` bytes on."""
    loops, item = _loops(local), _item_bytes(located, shift, src, local)
    rows = located.rows[row0 : row0 + len(src)]
    if loops is None:
        return scatter_rows_torch(src, located, row0, shift, local)
    wide = _array(src, _ITEMS[item]).reshape(len(src), -1)
    loops.scatter(wide, rows, shift, located.runs, located.run_bytes // item, _array(local, _ITEMS[item]))
    return None


def gather_rows(local: Tensor, located: Located, row0: int, shift: int, out: Tensor) -> None:
    """The reverse of scatter_rows."""
    loops, item = _loops(local), _item_bytes(located, shift, out, local)
    rows = located.rows[row0 : row0 + len(out)]
    if loops is None:
        return gather_rows_torch(local, located, row0, shift, out)
    wide = _array(out, _ITEMS[item]).reshape(len(out), -1)
    loops.gather(_array(local, _ITEMS[item]), rows, shift, located.runs, located.run_bytes // item, wide)
    return None
