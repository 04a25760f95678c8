"""Dialects: the names, dtypes and shapes that other libraries give the same bytes.

    from_dialect("nvfp4", "compressed-tensors", {"weight_packed": ..., "weight_scale": ..., "weight_global_scale": ...})
    to_dialect("nvfp4", "compressed-tensors", {"weight": ..., "weight_scale": ..., "weight_scale_2": ...})

Nothing is quantized again: codes and block scales keep their bytes. A reciprocal global scale is rounded to FP32, so
that it comes back within one last bit; all else comes back exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .numerics_float import pack_nibbles, unpack_nibbles
from .numerics_int import narrowed, widened
from .specs import Parts

Change = Callable[[Tensor], Tensor]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _reciprocal(scale: Tensor) -> Tensor:
    return (1.0 / scale.float()).reshape(1)


def _reciprocal_scalar(scale: Tensor) -> Tensor:
    return (1.0 / scale.float()).reshape(())


def _one_item(scale: Tensor) -> Tensor:
    return scale.reshape(1)


def _scalar(scale: Tensor) -> Tensor:
    return scale.float().reshape(())


def _column(scale: Tensor) -> Tensor:
    return scale.unsqueeze(1)


def _vector(scale: Tensor) -> Tensor:
    return scale.float().reshape(len(scale))


def _squeezed(scale: Tensor) -> Tensor:
    """[n, 1, k, 1], and a scalar where there is one block."""
    return scale.reshape(()) if scale.numel() == 1 else scale[:, None, :, None]


def _matrix(scale: Tensor) -> Tensor:
    return scale.reshape(1, 1) if scale.ndim == 0 else scale[:, 0, :, 0]


def pairs_to_words(packed: Tensor) -> Tensor:
    """modelopt's INT4 (rows 2i and 2i + 1 in a byte, two's complement) as compressed-tensors' int32 of code + 8."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=1).flatten(0, 1)
    return pack_nibbles(nibbles ^ 8).view(torch.int32)


def words_to_pairs(words: Tensor) -> Tensor:
    """The reverse of pairs_to_words."""
    nibbles = unpack_nibbles(words.contiguous().view(torch.uint8)) ^ 8
    return nibbles[0::2] | (nibbles[1::2] << 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One tensor in both tongues: our suffix, theirs, and how its values become theirs and ours again."""

    ours: str
    theirs: str
    to: Change = _same
    back: Change = _same


def _kept(*suffixes: str) -> tuple[Field, ...]:
    return tuple(Field(ours=suffix, theirs=suffix) for suffix in suffixes)


CT, TRANSFORMERS, EXPORT, FP16 = "compressed-tensors", "transformers", "modelopt export", "modelslim fp16"

# (row of FORMATS, dialect) -> its tensors. Ours are those of the row; what a checkpoint lacks is left out.
DIALECTS: dict[tuple[str, str], tuple[Field, ...]] = {
    ("nvfp4", CT): (
        Field(ours="weight", theirs="weight_packed"),
        *_kept("weight_scale"),
        Field(ours="weight_scale_2", theirs="weight_global_scale", to=_reciprocal, back=_reciprocal_scalar),
        Field(ours="input_scale", theirs="input_global_scale", to=_reciprocal, back=_reciprocal_scalar),
    ),
    ("fp8", CT): (
        *_kept("weight"),
        Field(ours="weight_scale", theirs="weight_scale", to=_one_item, back=_scalar),
        Field(ours="input_scale", theirs="input_scale", to=_one_item, back=_scalar),
    ),
    ("fp8_channel", CT): (
        *_kept("weight"),
        Field(ours="weight_scale", theirs="weight_scale", to=_column, back=_vector),
    ),
    ("fp8_block", CT): _kept("weight", "weight_scale"),
    ("fp8_block", TRANSFORMERS): (*_kept("weight"), Field(ours="weight_scale", theirs="weight_scale_inv")),
    ("fp8_block", EXPORT): (
        *_kept("weight"),
        Field(ours="weight_scale", theirs="weight_scale", to=_squeezed, back=_matrix),
    ),
    ("fp8_block_ue8m0", TRANSFORMERS): (*_kept("weight"), Field(ours="weight_scale", theirs="weight_scale_inv")),
    ("mxfp8", CT): _kept("weight", "weight_scale"),
    ("mxfp4", CT): (Field(ours="weight", theirs="weight_packed"), *_kept("weight_scale")),
    ("int8", CT): (
        *_kept("weight"),
        Field(ours="weight_scale", theirs="weight_scale", to=_column, back=_vector),
    ),
    ("int8_static", FP16): (
        *_kept("weight", "quant_bias", "input_scale", "input_offset"),
        Field(ours="deq_scale", theirs="deq_scale", to=widened, back=narrowed),
    ),
    ("int4_awq", CT): (
        Field(ours="weight", theirs="weight_packed", to=pairs_to_words, back=words_to_pairs),
        *_kept("weight_scale"),
    ),
}


def to_dialect(fmt: str, dialect: str, tensors: Parts) -> dict[str, Tensor]:
    """The tensors of a parameter, by our suffixes, as a dialect has them."""
    fields = {field.ours: field for field in _fields(fmt, dialect)}
    _require_known(fmt, dialect, tensors, fields)
    return {fields[suffix].theirs: fields[suffix].to(tensor) for suffix, tensor in tensors.items()}


def from_dialect(fmt: str, dialect: str, tensors: Parts) -> dict[str, Tensor]:
    """The reverse: the tensors of a dialect by our suffixes."""
    fields = {field.theirs: field for field in _fields(fmt, dialect)}
    _require_known(fmt, dialect, tensors, fields)
    return {fields[suffix].ours: fields[suffix].back(tensor) for suffix, tensor in tensors.items()}


def _fields(fmt: str, dialect: str) -> tuple[Field, ...]:
    if (fmt, dialect) not in DIALECTS:
        known = ", ".join(f"{name} in {tongue}" for name, tongue in DIALECTS)
        raise ValueError(f"{fmt} in {dialect}: no such dialect; known: {known}")
    return DIALECTS[fmt, dialect]


def _require_known(fmt: str, dialect: str, tensors: Parts, fields: dict[str, Field]) -> None:
    unknown = sorted(tensors.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{fmt} in {dialect}: unknown tensors {', '.join(unknown)}; known: {', '.join(fields)}")
