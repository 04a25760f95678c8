"""The manifest: one fingerprint on both ends, and every mismatch of a push in one message."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest

from quant.formats import FORMATS, TensorSpec
from quant.parameters import ParameterRow
from weight_update.errors import ManifestError
from weight_update.manifest import Manifest, check_push

LAYER = "model.layers.0"
ROWS = (
    ParameterRow(name="model.embed_tokens.weight", shape=(64, 32), format="bf16", aliases=("lm_head.weight",)),
    *(
        ParameterRow(name=f"{LAYER}.self_attn.{x}_proj.weight", shape=(32, 32), format="nvfp4", group=f"{LAYER}.qkv")
        for x in "qkv"
    ),
    ParameterRow(name=f"{LAYER}.mlp.down_proj.weight", shape=(32, 64), format="nvfp4"),
    ParameterRow(name="model.norm.weight", shape=(32,), format="bf16"),
)


def specs_of(row: ParameterRow) -> list[TensorSpec]:
    return list(FORMATS[row.format].tensors(row.name, row.shape))


def held() -> Manifest:
    return Manifest(tensors=tuple(spec for row in ROWS for spec in specs_of(row)), parameters=ROWS)


MANIFEST = held()
DOWN = f"{LAYER}.mlp.down_proj"


def down() -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs_of(ROWS[4])}


def test_a_full_push_in_any_order_gives_the_manifest_positions() -> None:
    order = np.random.default_rng(0).permutation(len(MANIFEST.tensors))
    assert check_push(MANIFEST, [MANIFEST.tensors[i] for i in order]).tolist() == order.tolist()


@pytest.mark.parametrize(
    "names",
    [
        [DOWN + suffix for suffix in (".weight", ".weight_scale", ".weight_scale_2")],
        [DOWN + ".input_scale"],
        ["model.norm.weight"],
        [f"{LAYER}.self_attn.{x}_proj.{s}" for x in "qkv" for s in ("weight", "weight_scale", "weight_scale_2")],
    ],
)
def test_whole_parameters_and_lone_input_scales_are_taken(names: list[str]) -> None:
    specs = [MANIFEST.tensors[MANIFEST.index[name]] for name in names]
    assert [MANIFEST.tensors[i].name for i in check_push(MANIFEST, specs)] == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {}, "the push holds no tensor"),
        (
            lambda s: s | {"x": TensorSpec(name=f"{LAYER}.mlp.dwn_proj.weight", dtype="U8", shape=(32, 32))},
            rf"dwn_proj\.weight: unknown; nearest: {LAYER}\.mlp\.down_proj\.weight",
        ),
        (lambda s: s | {"x": TensorSpec(name="???", dtype="U8", shape=(1,))}, r"\?\?\?: unknown; leave it out"),
        (
            lambda s: s | {"x": TensorSpec(name="lm_head.weight", dtype="BF16", shape=(64, 32))},
            r"lm_head\.weight: is tied to model\.embed_tokens\.weight, push that",
        ),
        (lambda s: s | {"x": s[f"{DOWN}.weight"]}, r"down_proj\.weight: given 2 times"),
        (
            lambda s: s | {f"{DOWN}.weight": replace(s[f"{DOWN}.weight"], shape=(32, 16))},
            r"down_proj\.weight: got \[32, 16\] of U8, expected \[32, 32\] of U8; push it as it is held",
        ),
        (
            lambda s: s | {f"{DOWN}.weight": replace(s[f"{DOWN}.weight"], dtype="I8")},
            r"down_proj\.weight: got \[32, 32\] of I8, expected \[32, 32\] of U8; push it as it is held",
        ),
        (
            lambda s: s | {f"{DOWN}.weight": replace(s[f"{DOWN}.weight"], dtype="BF16")},
            r"down_proj\.weight: got \[32, 32\] of BF16, expected \[32, 32\] of U8; an implicit float-to-packed cast",
        ),
        (
            lambda s: {f"{DOWN}.weight": s[f"{DOWN}.weight"]},
            r"down_proj\.weight: without \S+down_proj\.weight_scale, \S+down_proj\.weight_scale_2; a parameter",
        ),
        (
            lambda s: s | {spec.name: spec for spec in specs_of(ROWS[2])},
            r"fused group model\.layers\.0\.qkv: without \S+q_proj\.weight, \S+v_proj\.weight; its members",
        ),
    ],
)
def test_a_push_that_does_not_fit_is_refused(change: object, message: str) -> None:
    assert callable(change)
    with pytest.raises(ManifestError, match=message):
        check_push(MANIFEST, list(change(down()).values()))


def test_all_mismatches_come_in_one_message() -> None:
    specs = [
        TensorSpec(name="nowhere", dtype="U8", shape=(1,)),
        TensorSpec(name="model.norm.weight", dtype="F32", shape=(32,)),
        TensorSpec(name="model.embed_tokens.weight", dtype="BF16", shape=(64, 33)),
        *specs_of(ROWS[1]),
        *specs_of(ROWS[4])[:2],
        *specs_of(ROWS[4])[:1],
    ]
    with pytest.raises(ManifestError) as caught:
        check_push(MANIFEST, specs)
    text = str(caught.value)
    assert text.startswith("push refused, nothing was changed: 6 problems")
    for part in ("nowhere", "of F32", "[64, 33]", "fused group", "without model.layers.0.mlp.down", "given 2 times"):
        assert part in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


def test_a_manifest_without_parameters_checks_tensors_alone() -> None:
    bare = Manifest(tensors=MANIFEST.tensors)
    assert check_push(bare, [MANIFEST.tensors[2]]).tolist() == [2]
    with pytest.raises(ManifestError, match="unknown"):
        check_push(bare, [TensorSpec(name="nowhere", dtype="U8", shape=(1,))])


def test_the_fingerprint_changes_with_everything_that_a_push_depends_on() -> None:
    tensors, rows = MANIFEST.tensors, MANIFEST.parameters
    others = [
        Manifest(tensors=tensors, parameters=rows[:-1]),
        Manifest(tensors=tensors, parameters=(*rows[:-1], replace(rows[-1], aliases=("n",)))),
        Manifest(tensors=tensors, parameters=(*rows[:-1], replace(rows[-1], group="g"))),
        Manifest(tensors=tensors[::-1], parameters=rows),
        Manifest(tensors=(*tensors, TensorSpec(name="n", dtype="U8", shape=(1,))), parameters=rows),
    ]
    assert held().fingerprint == MANIFEST.fingerprint and held() == MANIFEST
    assert len({each.fingerprint for each in (MANIFEST, *others)}) == 1 + len(others)


def test_a_manifest_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ManifestError, match=r"2 tensors of this name"):
        Manifest(tensors=(*MANIFEST.tensors, MANIFEST.tensors[0]))
    with pytest.raises(ManifestError, match=r"norm\.weight: its tensor model\.norm\.weight \[32\] of BF16"):
        Manifest(tensors=MANIFEST.tensors[:-1], parameters=ROWS)
    with pytest.raises(ManifestError, match=r"format 'int3'; known: bf16"):
        Manifest(tensors=(), parameters=(replace(ROWS[0], format="int3"),))


def test_tensors_of_a_parameter_follow_the_format() -> None:
    suffixes = [spec.name.rpartition(".")[2] for spec in MANIFEST.tensors_of(ROWS[4])]
    assert suffixes == ["weight", "weight_scale", "weight_scale_2", "input_scale"]
    without = Manifest(tensors=tuple(t for t in MANIFEST.tensors if "input_scale" not in t.name), parameters=ROWS)
    assert [spec.name for spec in without.tensors_of(ROWS[4])] == [spec.name for spec in specs_of(ROWS[4])[:3]]
