"""Decoding what changed gives the buffers that decoding everything gives, in every format and layout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from quant.cells import touched_cells
from quant.formats import FORMATS, Format
from quant.layouts import LAYOUTS, Layout, apply_bytes, apply_rows, invert_bytes, misfits
from quant.modules import QuantExperts, QuantLinear, QuantModule, plan_refresh
from tests.plans import experts_shape, linear_shape, pairs


def _modules() -> dict[str, Callable[[], QuantModule]]:
    found: dict[str, Callable[[], QuantModule]] = {}
    for name, layout, fmt in pairs():
        if fmt.is_quantized and layout.kind != "experts":
            found[f"{name}-linear"] = lambda a=layout, f=fmt: linear(a, f)  # type: ignore[misc]
        if fmt.is_quantized and layout.kind != "linear":
            found[f"{name}-experts"] = lambda a=layout, f=fmt: experts(a, f)  # type: ignore[misc]
    return found


def linear(layout: Layout, fmt: Format) -> QuantModule:
    rows, elements = linear_shape(layout, fmt, 260, 256)
    assert not misfits(layout, "linear", fmt, (rows, elements))
    return QuantLinear(elements, rows, False, fmt, layout, "a")


def experts(layout: Layout, fmt: Format) -> QuantModule:
    return QuantExperts(*experts_shape(layout, fmt, 2, 128, 128), torch.nn.functional.silu, fmt, layout, "a")


def bytes_of(module: QuantModule) -> dict[str, torch.Tensor]:
    return {name: value.detach().view(-1).view(torch.uint8) for name, value in module.storage_parameters()}


def filled(module: QuantModule, rng: np.random.Generator) -> None:
    """Bytes that decode to numbers, numbers where scales are FP32."""
    for placement in module.plan.placements:
        shape = (placement.tensor.num_rows, placement.tensor.row_bytes)
        data = rng.integers(0, 120, shape, np.uint8)
        if placement.tensor.dtype == "F32":
            data = rng.uniform(0.1, 9, (shape[0], shape[1] // 4)).astype(np.float32).view(np.uint8)
        apply_rows(placement, torch.from_numpy(data), 0, bytes_of(module)[placement.storage], 0)
    module.mark_applied()
    module.decode_()


def touch(module: QuantModule, rng: np.random.Generator) -> dict[str, np.ndarray | None]:
    """Change a few bytes of every tensor that goes by rows; of FP32 only the last bit."""
    changed: dict[str, np.ndarray | None] = {}
    for placement in module.plan.placements:
        spec, storage = placement.tensor, bytes_of(module)[placement.storage]
        if spec.dtype == "F32" and spec.num_bytes < 64:
            continue
        at = np.unique(rng.integers(0, spec.num_bytes, 3))
        at = at // 4 * 4 if spec.dtype == "F32" else at
        changed[spec.name] = np.unique(at)
        old = invert_bytes(placement, changed[spec.name], storage, 0)
        flipped = old ^ (1 if spec.dtype == "F32" else 7)
        apply_bytes(placement, changed[spec.name], flipped, storage, 0)
    return changed


def buffers(module: QuantModule) -> dict[str, bytes]:
    return {name: module.get_buffer(name).view(torch.uint8).numpy().tobytes() for name in module.decoded_shapes}


@pytest.mark.parametrize("case", _modules())
def test_touched_cells_decode_to_what_everything_decodes_to(case: str) -> None:
    rng = np.random.default_rng(len(case))
    module = _modules()[case]()
    filled(module, rng)
    before = buffers(module)
    addresses = [module.get_buffer(name).data_ptr() for name in module.decoded_shapes]
    changed = touch(module, rng)
    refresh = plan_refresh(module, changed)
    assert refresh.covers(changed) and not refresh.covers({**changed, "other": None})
    with torch.no_grad():
        refresh.run()
    partly = buffers(module)
    module.decode_()
    assert partly == buffers(module) != before
    assert addresses == [module.get_buffer(name).data_ptr() for name in module.decoded_shapes]


def test_only_the_cells_of_changed_bytes_are_decoded() -> None:
    """NVFP4: 16 elements of a row; a changed scale byte and a changed code byte of one block are one cell."""
    rng = np.random.default_rng(0)
    module = linear(LAYOUTS["trtllm_linear"], FORMATS["nvfp4"])
    filled(module, rng)
    matrix = module.matrices[0]
    changed = {"a.weight": np.array([3 * 128 + 17]), "a.weight_scale": np.array([3 * 16 + 2, 5 * 16])}
    cells = touched_cells(module.fmt, matrix.placements, changed, (260, 256))
    assert cells is not None and cells.tolist() == [3 * 16 + 2, 5 * 16]
    buffer = module.get_buffer("decoded")
    buffer.fill_(7)
    module.decode_(changed)
    left = (buffer.view(-1, 16) == 7).all(1)
    assert (~left).nonzero().flatten().tolist() == cells.tolist()


def test_a_tensor_that_may_have_changed_anywhere_is_decoded_whole() -> None:
    module = linear(LAYOUTS["cutlass_linear"], FORMATS["nvfp4"])
    filled(module, np.random.default_rng(0))
    placements = module.matrices[0].placements
    assert touched_cells(module.fmt, placements, {"a.weight": None}, (260, 256)) is None
    many = np.arange(0, 260 * 128, 16)
    assert touched_cells(module.fmt, placements, {"a.weight": many}, (260, 256)) is None
    none = touched_cells(module.fmt, placements, {"a.weight_scale_2": None}, (260, 256))
    assert none is not None and not len(none)  # global scales reach the output through derived values
