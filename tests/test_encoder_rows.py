"""What a trainer sends for every row of FORMATS: the bytes of the whole weight, block by block, from any rank."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from quant.formats import FORMATS, amax, constants, decode, encode, global_scale
from quant.parameters import ParameterRow
from sharding.routes import LocalRows
from weight_update import encoder
from weight_update.encoder import encoded
from weight_update.manifest import Manifest
from weight_update.sharing import plan_push
from weight_update.source import Source, _not_encodable

SHAPE = (384, 256)
NAMES = [row.name for row in FORMATS.values() if row.is_quantized and not row.needs]


def manifest_of(name: str) -> Manifest:
    row = ParameterRow(name="a.weight", shape=SHAPE, format=name)
    return Manifest(tensors=FORMATS[name].tensors(row.name, SHAPE), parameters=(row,))


def source_of(name: str, weight: Tensor, first: int) -> Source:
    manifest = manifest_of(name)
    calibrated = {f"a.{part.suffix}" for part in FORMATS[name].components if part.kind == "input_scale"}
    return Source(
        name="a.weight",
        kind="encode",
        parameter=manifest.parameters[0],
        specs=tuple(spec for spec in manifest.tensors if spec.name not in calibrated),
        rows=weight,
        runs=((first, first + len(weight)),) if len(weight) else (),
        sent=((first, first + len(weight)),) if len(weight) else (),
    )


def sent(name: str, weight: Tensor, cuts: Sequence[int], scale: Tensor | None) -> dict[str, Tensor]:
    """All tensors put together from what ranks with rows between the cuts send; each byte once."""
    specs = {spec.name: spec for spec in manifest_of(name).tensors}
    out = {key: torch.zeros(spec.num_rows, spec.row_bytes, dtype=torch.int16) - 1 for key, spec in specs.items()}
    for start, stop in zip((0, *cuts), (*cuts, SHAPE[0]), strict=True):
        for spec, row0, data in encoded(source_of(name, weight[start:stop], start), scale):
            assert out[spec.name][row0 : row0 + len(data)].eq(-1).all()
            out[spec.name][row0 : row0 + len(data)] = data.to(torch.int16)
    return {key.removeprefix("a."): tensor for key, tensor in out.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [(), (128,), (128, 128, 256)])
def test_ranks_together_send_the_whole(name: str, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "BLOCK_BYTES", 130 * 2 * SHAPE[1])  # cut between blocks of 128 rows, not in one
    row = FORMATS[name]
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(11)).bfloat16()
    scale = global_scale(row, amax(weight)) if row.has_global_scale else None
    whole: dict[str, Tensor] = encode(row, weight, scale) | constants(row, SHAPE)
    part = row.component("global_scale")
    if part is not None and scale is not None:
        whole[part.suffix] = scale
    got = sent(name, weight, cuts, scale)
    for suffix, tensor in whole.items():
        rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
        assert torch.equal(got[suffix].to(torch.uint8).flatten(), rows.contiguous().view(-1).view(torch.uint8)), suffix
        assert got[suffix].ge(0).all()
    assert decode(row, whole).isfinite().all()


def test_rows_that_cut_a_block_are_refused_before_anything_is_sent() -> None:
    manifest, weight = manifest_of("fp8_block"), torch.zeros(SHAPE).bfloat16()
    plan, problems = plan_push(manifest, [("a.weight", weight)], "all")
    assert plan is not None and not problems
    source = source_of("fp8_block", weight[:100], 0)
    for first, count, cut in ((0, 100, True), (100, 28, True), (128, 128, False), (256, 128, False), (7, 0, False)):
        runs = ((first, first + count),) if count else ()
        rows = LocalRows(rows=weight[first : first + count], runs=runs, shape=SHAPE)
        problem = _not_encodable(source.parameter, rows)
        assert bool(problem) is cut and (not cut or "cut a block of 128 rows" in str(problem))


def test_what_needs_calibration_is_pushed_in_checkpoint_form() -> None:
    manifest = manifest_of("int8_static")
    plan, problems = plan_push(manifest, [("a.weight", torch.zeros(SHAPE).bfloat16())], "all")
    assert plan is None and "needs input_scale, input_offset" in problems[0] and "checkpoint form" in problems[0]
