"""CPU loops behind formats and layouts: numba's where importable, a torch twin otherwise, the same bytes from both.

The twins also serve other devices. One thread; the numba loops release the GIL.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .steps import Located, Offsets

U64 = NDArray[np.uint64]

_PIECE_ELEMENTS = 1 << 18  # the twins work in pieces, so that their FP32 scratch stays small
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the integer in the low mantissa bits, rounded once, ties to even
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_TYPES: dict[type[np.generic], tuple[str, int]] = {
    np.uint8: ("|u1", 1),
    np.uint16: ("<u2", 2),
    np.uint32: ("<u4", 4),
    np.uint64: ("<u8", 8),
}
_ITEMS: dict[int, type[np.generic]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@cache
def numba_loops() -> ModuleType | None:
    """The compiled loops, None where numba is not installed."""
    if importlib.util.find_spec("numba") is None:
        return None
    return importlib.import_module(".loops", __package__)


def amax_bits(rows: Tensor) -> int:
    """BF16 bits of the largest absolute value of contiguous rows."""
    loops = _loops_for(rows)
    return amax_bits_torch(rows) if loops is None else int(loops.amax(_flat(rows, np.uint16)))


def encode_nvfp4_rows(rows: Tensor, scale: float, weight: Tensor, block_scale: Tensor) -> None:
    """BF16 [n, K] to codes [n, K / 2] and block scales [n, K / 16], all contiguous."""
    _check_nvfp4(rows, weight, block_scale)
    loops = _loops_for(rows)
    if loops is None:
        encode_nvfp4_rows_torch(rows, scale, weight, block_scale)
    else:
        parts = _flat(weight, np.uint8), _flat(block_scale, np.uint8)
        loops.encode_nvfp4(_flat(rows, np.uint32), np.float32(scale), *parts)


def decode_nvfp4_rows(weight: Tensor, block_scale: Tensor, scale: float, out: Tensor) -> None:
    """The reverse: code * (block scale * scale), rounded to FP32 and then to BF16."""
    _check_nvfp4(out, weight, block_scale)
    loops = _loops_for(out)
    if loops is None:
        decode_nvfp4_rows_torch(weight, block_scale, scale, out)
    else:
        parts = _flat(weight, np.uint8), _flat(block_scale, np.uint8)
        loops.decode_nvfp4(*parts, np.float32(scale), _e4m3_values(), _flat(out, np.uint32))


def scatter_rows(src: Tensor, located: Located, row0: int, shift: int, local: Tensor) -> None:
    """Write contiguous rows [row0, row0 + len(src)) of a tensor where they lie in `local`, shifted by bytes."""
    loops = _loops_for(local)
    if loops is None:
        scatter_rows_torch(src, located, row0, shift, local)
    elif src.numel():
        item, bits = _item(located, shift)
        rows, runs = located.rows[row0 : row0 + len(src)], located.runs
        wide = _flat(src, item).reshape(len(src), -1)
        loops.scatter(wide, rows, shift, runs, located.run_bytes >> bits, bits, _flat(local, item))


def gather_rows(local: Tensor, located: Located, row0: int, shift: int, out: Tensor) -> None:
    """The reverse: read rows [row0, row0 + len(out)) from `local`."""
    loops = _loops_for(local)
    if loops is None:
        gather_rows_torch(local, located, row0, shift, out)
    elif out.numel():
        item, bits = _item(located, shift)
        rows, runs = located.rows[row0 : row0 + len(out)], located.runs
        wide = _flat(out, item).reshape(len(out), -1)
        loops.gather(_flat(local, item), rows, shift, runs, located.run_bytes >> bits, bits, wide)


def locate_bytes(located: Located, row_bytes: int, shift: int, positions: Offsets) -> Offsets:
    """Where single bytes of a tensor lie, shifted by bytes; positions lie inside the tensor."""
    at = np.empty(len(positions), np.int64)
    loops = numba_loops()
    if loops is None or not len(positions):
        row, column = np.divmod(positions, max(1, row_bytes))
        run, within = np.divmod(column, max(1, located.run_bytes))
        return located.rows[row] + (located.runs[run] + within + shift)
    loops.locate(located.rows, located.runs, located.run_bytes, row_bytes, shift, positions, at)
    return at


def gather_words(local: Tensor, located: Located, row_bytes: int, shift: int, words: Offsets, swap: bool) -> U64 | None:
    """Words of 8 bytes of a tensor by number, None where only `locate_bytes` can read them."""
    loops = _loops_for(local)
    if loops is None:
        return None
    out = np.empty(len(words), np.uint64)
    if len(words):
        flat = _flat(local, np.uint8)
        loops.gather_words(flat, located.rows, located.runs, located.run_bytes, row_bytes, shift, words, swap, out)
    return out


def word_view(local: Tensor, at: Offsets) -> U64 | None:
    """Memory as words of 8 bytes, a view; None unless words that start at these bytes are words of it."""
    if local.device.type != "cpu" or local.data_ptr() % 8 or (at % 8).any():
        return None
    return _flat(local[: len(local) // 8 * 8], np.uint64)


def take_words(view: U64, at: Offsets) -> U64:
    """view[at], for indices that lie inside."""
    loops = numba_loops()
    if loops is None:
        return view.take(at)
    out = np.empty(len(at), np.uint64)
    loops.take(view, at, out)
    return out


def taker(memory: Tensor, index: Tensor) -> Callable[[Tensor], object]:
    """What writes memory[index] of a flat tensor into a given one; numpy is fast where little is taken often."""
    if memory.device.type != "cpu":
        return lambda out: torch.index_select(memory, 0, index, out=out.view(memory.dtype))
    flat, at = _flat(memory, _ITEMS[memory.element_size()]), index.numpy()
    # The index was checked when it was made, so that clipping, which needs no copy in between, changes nothing.
    return lambda out: flat.take(at, out=out.numpy().view(flat.dtype), mode="clip")


def putter(memory: Tensor, index: Tensor) -> Callable[[Tensor], object]:
    """What does memory[index] = rows, of a contiguous matrix and contiguous rows of it."""
    if memory.device.type != "cpu":
        return lambda rows: memory.index_copy_(0, index, rows)
    item = _ITEMS[next(width for width in (8, 4, 2) if not memory[:1].nbytes % width and not memory.data_ptr() % width)]
    flat, at = _flat(memory, item).reshape(len(memory), -1), index.numpy()

    def put(rows: Tensor) -> None:
        flat[at] = rows.view(torch.int16).numpy().view(item)

    return put


def byte_view(local: Tensor) -> NDArray[np.uint8] | None:
    """Memory as bytes, a view; None where it is not the host's."""
    return _flat(local, np.uint8) if local.device.type == "cpu" else None


def put_bytes(local: Tensor, at: Tensor, values: Tensor) -> None:
    """local[at] = values of uint8, at int64; numpy's is six times as fast as torch's."""
    if local.device.type != "cpu":
        local[at] = values
    else:
        _flat(local, np.uint8)[at.numpy()] = values.numpy()


def _check_nvfp4(rows: Tensor, weight: Tensor, block_scale: Tensor) -> None:
    """The loops check no bounds."""
    num_rows, num_elements = rows.shape
    expected = [(num_rows, num_elements // size) for size in (1, 2, 16)]
    if [tuple(tensor.shape) for tensor in (rows, weight, block_scale)] != expected or num_elements % 16:
        raise ValueError(
            f"nvfp4 of {tuple(rows.shape)}: codes {tuple(weight.shape)} and block scales {tuple(block_scale.shape)}; "
            f"expected {expected[1]} and {expected[2]}, of a multiple of 16 elements"
        )


def _loops_for(tensor: Tensor) -> ModuleType | None:
    return numba_loops() if tensor.device.type == "cpu" else None


class _Memory:
    """The memory of a contiguous tensor, as numpy asks for it."""

    # Not Tensor.numpy(): that pins the storage for good, and FSDP2 resizes what it gathered to free it.

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, tensor: Tensor, dtype: type[np.generic]) -> None:
        code, item = _TYPES[dtype]
        shape = (tensor.numel() * tensor.element_size() // item,)
        self.owner = tensor
        self.__array_interface__ = {"version": 3, "typestr": code, "shape": shape, "data": (tensor.data_ptr(), False)}


def _flat(tensor: Tensor, dtype: type[np.generic]) -> NDArray[Any]:
    """The bytes of a contiguous tensor as a flat array of another type; no copy."""
    if not tensor.is_contiguous():
        raise ValueError(f"tensor {tuple(tensor.shape)}, strides {tensor.stride()}: expected contiguous memory")
    return np.asarray(_Memory(tensor, dtype)) if tensor.numel() else np.empty(0, dtype)


def _item(located: Located, shift: int) -> tuple[type[np.generic], int]:
    """Runs of 4 bytes at multiples of 4 move as one word: type of an item, log2 of its bytes."""
    return (np.uint32, 2) if located.words and not shift % 4 else (np.uint8, 0)


@cache
def _e4m3_values() -> NDArray[np.float32]:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values: NDArray[np.float32] = codes.float().numpy()
    return values


def amax_bits_torch(rows: Tensor) -> int:
    pieces = torch.split(rows.view(torch.int16).flatten(), _PIECE_ELEMENTS)
    return max((int(piece.bitwise_and(0x7FFF).max()) for piece in pieces if piece.numel()), default=0)


def encode_nvfp4_rows_torch(rows: Tensor, scale: float, weight: Tensor, block_scale: Tensor) -> None:
    step = max(1, _PIECE_ELEMENTS // max(1, rows.shape[1]))
    pieces = (torch.split(tensor, step) for tensor in (rows, weight, block_scale))
    for piece, codes, scales in zip(*pieces, strict=True):
        _encode_piece(piece, scale, codes, scales)


def _block(rows: Tensor, block_scale: Tensor) -> int:
    """Elements that share a scale: 16, or 32 where activations are FP8."""
    return rows.shape[1] // max(1, block_scale.shape[1])


def _encode_piece(rows: Tensor, scale: float, weight: Tensor, block_scale: Tensor) -> None:
    bits = rows.view(torch.int16).to(torch.int32)
    magnitude = (
        (bits & 0x7FFF).bitwise_left_shift(16).view(torch.float32).view(*block_scale.shape, _block(rows, block_scale))
    )
    scale_2 = torch.tensor(scale, dtype=torch.float32, device=rows.device)
    block = magnitude.amax(2) / (6.0 * scale_2)
    block = torch.where(block == 0, 1.0, block).clamp(2.0**-9, 448.0).to(torch.float8_e4m3fn)
    block_scale.copy_(block.view(torch.uint8))
    quotient = (magnitude / (block.float() * scale_2).unsqueeze(2)).flatten(1)
    code = torch.where(quotient > 0, (bits >> 12) & 8, 0).to(torch.uint8) | e2m1_codes(quotient)
    weight.copy_(code[:, 0::2] | (code[:, 1::2] << 4))


def e2m1_codes(quotient: Tensor) -> Tensor:
    """Codes 0..7: the least of the four lines of the E2M1 grid, each rounded once; a NaN stays at 7."""
    least = torch.full_like(quotient, _MAGIC + 7)
    for line in (quotient * 0.5 + (_MAGIC + 4), quotient + (_MAGIC + 2), quotient * 2 + _MAGIC):
        least = torch.where(line < least, line, least)
    return (least.view(torch.int32) & 7).to(torch.uint8)


def decode_nvfp4_rows_torch(weight: Tensor, block_scale: Tensor, scale: float, out: Tensor) -> None:
    step = max(1, _PIECE_ELEMENTS // max(1, out.shape[1]))
    values = torch.tensor(_E2M1, device=weight.device)
    scale_2 = torch.tensor(scale, dtype=torch.float32, device=weight.device)
    pieces = (torch.split(tensor, step) for tensor in (weight, block_scale, out))
    for codes, scales, piece in zip(*pieces, strict=True):
        both = torch.stack((codes & 15, codes >> 4), dim=2).to(torch.int32)
        factor = scales.view(torch.float8_e4m3fn).float() * scale_2
        piece.copy_((values[both].view(*scales.shape, _block(piece, scales)) * factor.unsqueeze(2)).view(piece.shape))


def scatter_rows_torch(src: Tensor, located: Located, row0: int, shift: int, local: Tensor) -> None:
    if src.numel():
        windows, starts = _windows(local, located, row0, shift, len(src))
        windows[starts] = src.reshape(-1, located.run_bytes)


def gather_rows_torch(local: Tensor, located: Located, row0: int, shift: int, out: Tensor) -> None:
    if out.numel():
        windows, starts = _windows(local, located, row0, shift, len(out))
        out.copy_(windows[starts].view(out.shape))


def _windows(local: Tensor, located: Located, row0: int, shift: int, n: int) -> tuple[Tensor, Tensor]:
    """`local` as a window of one run at every byte, and where the runs of n rows start."""
    rows = located.rows[row0 : row0 + n]
    starts = (rows[:, None] + (located.runs[None, :] + shift)).ravel()
    return local.unfold(0, located.run_bytes, 1), torch.from_numpy(starts).to(local.device)
