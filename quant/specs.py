"""What a format is made of: dtypes and shapes of checkpoint tensors, components, and the row of the format table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# safetensors' names
DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# weight and block_scale go by rows (block_scale: whatever accompanies rows, of weights or of blocks of them);
# global_scale is one value a tensor or fused group; input_scale is calibration; shape follows from the shape alone.
Kind = Literal["weight", "block_scale", "global_scale", "input_scale", "shape"]
Parts = Mapping[str, Tensor]


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    if dtype not in _DTYPE_NAMES:
        raise ValueError(f"{dtype}: has no name in a checkpoint; known: {', '.join(map(str, _DTYPE_NAMES))}")
    return _DTYPE_NAMES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor in checkpoint form. A row is an index along dim 0; a 0-d tensor has one row."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One checkpoint tensor of a format. One stored item covers `rows` x `elements` weights; 0 means all of that dim,
    which then is absent from the shape: (0, 0) is a scalar, (1, 0) one item a row. `last`: dims added at the end."""

    suffix: str
    dtype: str
    kind: Kind
    elements: int
    rows: int = 1
    last: tuple[int, ...] = ()

    def shape(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this tensor for a weight of `weight_shape`."""
        if self.rows == self.elements == 1:
            return weight_shape
        *lead, num_rows, num_elements = weight_shape
        covered = ((num_rows, self.rows), (num_elements, self.elements))
        return (*lead, *(-(-size // cover) for size, cover in covered if cover), *self.last)


# rows, global scale, what else is given (calibration, bias), out: uint8 [n, row bytes] by suffix
EncodeRows = Callable[[Tensor, float, Parts, Parts], None]
# uint8 [n, row bytes] by suffix, global scale, out: BF16 [n, K]
DecodeRows = Callable[[Parts, float, Tensor], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """A row of the table.

    encode_block: (rows, elements) that share one block scale, 0 for all of that dim: ranks that share such a block
    reduce its amax; with a global scale they also reduce the amax of the tensor, or of its fused group.
    multiples: what rows and elements of a weight must be multiples of. needs: what `encode` must be given besides.
    zero: what an all-zero block becomes; nothing ever dequantizes to NaN.
    """

    name: str
    components: tuple[Component, ...]
    encode_block: tuple[int, int]
    oracle: str
    encode_rows: EncodeRows
    decode_rows: DecodeRows
    global_divisor: float | None = None
    multiples: tuple[int, int] = (1, 1)
    needs: tuple[str, ...] = ()
    zero: str = "codes 0"

    @property
    def has_global_scale(self) -> bool:
        return self.global_divisor is not None

    @property
    def is_quantized(self) -> bool:
        return len(self.components) > 1

    @property
    def rows_dtype(self) -> torch.dtype:
        """What `encode` takes: BF16, or the dtype itself of a format that keeps values as they are."""
        return torch.bfloat16 if self.is_quantized else DTYPES[self.components[0].dtype]

    @property
    def row_components(self) -> tuple[Component, ...]:
        """The components that hold something for every row: what `encode` returns."""
        return tuple(component for component in self.components if component.rows)

    @property
    def row_step(self) -> int:
        """Rows are encoded in runs that start at a multiple of this: so many share a row of some component."""
        return max(component.rows for component in self.components)

    def component(self, kind: Kind) -> Component | None:
        return next((component for component in self.components if component.kind == kind), None)

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape can be in this format."""
        if not self.is_quantized:
            return True
        return len(shape) >= 2 and not any(n % m for n, m in zip(shape[-2:], self.multiples, strict=True))

    def tensors(self, parameter_name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The checkpoint tensors that hold a parameter, in the order of the components."""
        self._check(parameter_name, shape)
        stem = parameter_name.removesuffix(".weight")
        return tuple(
            TensorSpec(
                name=parameter_name if part.suffix == "weight" else f"{stem}.{part.suffix}",
                dtype=part.dtype,
                shape=part.shape(tuple(shape)),
            )
            for part in self.components
        )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if not self.holds(shape):
            rows, elements = self.multiples
            by_rows = f" and rows a multiple of {rows}" if rows > 1 else ""
            raise ValueError(
                f"{name}: shape {tuple(shape)} does not fit {self.name}; expected two dims and a last one that is a "
                f"multiple of {elements}{by_rows}; keep it in bf16"
            )
        if self.is_quantized and not name.endswith(".weight"):
            raise ValueError(f"{name}: a parameter in {self.name} is named '<module>.weight'; keep it in bf16")
