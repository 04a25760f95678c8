"""Name maps read both ways, are proved to be one to one, and a trainer pushes under any of them without renaming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import diffusers
import pytest
import torch
from torch import Tensor, nn

from quant.encodings import FORMATS
from quant.formats import amax, encode, global_scale
from quant.name_maps import NAME_MAPS, merging
from quant.names import COMPANIONS, IDENTITY, Link, NameMap, NameMapError, NameRule, Share, expert_parts
from quant.parameters import ParameterRow
from sharding.routes import LocalRows
from tests.local import cold, local_service
from tests.test_views import ORIGINALS, random_bytes
from tests.tiny import save, tiny_llama
from tests.tiny_dit import CONFIGS
from weight_update.client import Pusher
from weight_update.encoder import encoded
from weight_update.errors import ManifestError
from weight_update.manifest import Manifest
from weight_update.sharing import plan_push
from weight_update.source import PushPlan, _linked

FAMILY_OF = {"bfl_flux": "flux", "bfl_flux2": "flux2", "wan_original": "wan"}


def parameters(family: str) -> dict[str, Tensor]:
    class_name, config = CONFIGS[family]
    with torch.device("meta"):
        return dict(getattr(diffusers, class_name)(**config).named_parameters())


def sources(names: NameMap, name: str) -> list[tuple[str, int, int, int]]:
    shares = [link.source for link in names.reverse(name)]
    return [(share.name, share.start, share.stop, share.of) for share in shares]


# ---------------------------------------------------------------- the tables


@pytest.mark.parametrize("map_name", FAMILY_OF)
def test_every_parameter_of_the_real_class_comes_from_one_place_and_goes_back_to_it(map_name: str) -> None:
    names, model = NAME_MAPS[map_name], parameters(FAMILY_OF[map_name])
    reached: set[Link] = set()
    for name in model:
        links = names.reverse(name)
        if map_name != "wan_original" or not name.startswith("patch_embedding"):
            assert all(link.source.name != name for link in links), f"{name}: no rule"
        assert {link.target.name for link in links} == {name}
        for link in links:
            assert link in names.forward(link.source.name)
        reached.update(links)
    stored = {link.source.name for link in reached}
    assert not stored & model.keys() - {"patch_embedding.weight", "patch_embedding.bias"}
    proved = names.prove_bijective(stored, model.keys())
    assert {link for links in proved.values() for link in links} == reached


@pytest.mark.parametrize("family", ["flux", "flux2", "wan"])  # Qwen-Image's class fuses nothing
def test_a_fused_trainer_of_diffusers_maps_onto_the_model_that_is_not(family: str) -> None:
    class_name, config = CONFIGS[family]
    model = getattr(diffusers, class_name)(**config)
    names = list(dict(model.named_parameters()))
    model.fuse_qkv_projections()
    packed = {name: tensor for name, tensor in model.named_parameters() if name not in names}
    links = NAME_MAPS["diffusers_fused"].links(packed)
    assert packed and links.keys() <= set(names)
    kept = dict(model.named_parameters())  # diffusers keeps the parts beside the packed tensor
    for name, (link,) in links.items():
        start, stop = link.source.rows(len(packed[link.source.name]))
        assert torch.equal(packed[link.source.name][start:stop], kept[name]), name
    rest = [name for name in names if name not in links]
    NAME_MAPS["diffusers_fused"].prove_bijective([*packed, *rest], names)


def test_the_parts_of_flux_1_single_blocks_are_unequal() -> None:
    names, model = NAME_MAPS["bfl_flux"], parameters("flux")
    links = names.forward("single_blocks.0.linear1.weight")
    total = sum(len(model[link.target.name]) for link in links)
    at = 0
    for link in links:
        rows = len(model[link.target.name])
        assert link.source.rows(total) == (at, at + rows)
        at += rows
    assert len(links) == 4 and at == total


def test_scales_go_where_their_weight_goes() -> None:
    names = NAME_MAPS["bfl_flux2"]
    for leaf in ("weight", "weight_scale", "weight_scale_2", "input_scale", "bias"):
        targets = [link.target.name for link in names.forward(f"double_blocks.17.txt_attn.qkv.{leaf}")]
        assert targets == [f"transformer_blocks.17.attn.add_{x}_proj.{leaf}" for x in "qkv"]


def test_a_map_into_a_component_takes_names_with_and_without_it() -> None:
    names = NAME_MAPS["wan_original"].into("transformer_2")
    ours = "transformer_2.blocks.3.attn1.to_k.weight"
    for given in ("blocks.3.self_attn.k.weight", "transformer_2.blocks.3.self_attn.k.weight"):
        (link,) = names.forward(given)
        assert (link.source.name, link.target.name) == (given, ours)
    assert sources(names, ours) == [("blocks.3.self_attn.k.weight", 0, 1, 1)]
    both = NAME_MAPS["wan_original"].into("transformer", "transformer_2")
    for component in ("transformer", "transformer_2"):
        (link,) = both.forward(f"{component}.blocks.3.self_attn.k.weight")
        assert link.target.name == f"{component}.blocks.3.attn1.to_k.weight"
    assert both.forward("blocks.3.self_attn.k.weight")[0].target.name == "blocks.3.attn1.to_k.weight"


def test_names_that_no_rule_knows_stay_what_they_are() -> None:
    for names in NAME_MAPS.values():
        (link,) = names.forward("transformer_blocks.0.attn.to_out.0.weight")
        assert link.source == link.target == Share(name="transformer_blocks.0.attn.to_out.0.weight")


# ---------------------------------------------------------------- rules


def test_the_first_rule_that_matches_wins() -> None:
    names = NameMap((NameRule("a.{n}.x", ("b.{n}.x",)), NameRule("a.{n}.{leaf}", ("c.{n}.{leaf}",))))
    assert [names.forward(name)[0].target.name for name in ("a.1.x", "a.1.y", "a.z.x")] == ["b.1.x", "c.1.y", "a.z.x"]


def test_a_placeholder_takes_what_its_pattern_says_and_dots_are_literal() -> None:
    names = NameMap((NameRule("{x:q|kk}.{leaf}", ("to_{x}.{leaf}",)),))
    forward = {name: names.forward(name)[0].target.name for name in ("q.a", "kk.a", "v.a", "q.a.b", "qxa")}
    assert forward == {"q.a": "to_q.a", "kk.a": "to_kk.a", "v.a": "v.a", "q.a.b": "q.a.b", "qxa": "qxa"}
    assert names.reverse("to_kk.a")[0].source.name == "kk.a"
    assert names.reverse("to_v.a")[0].source.name == "to_v.a"


def test_a_target_that_several_tensors_fill_lists_them_in_the_order_of_its_rows() -> None:
    v, q, k = merging("qkv.{leaf}", ("v.{leaf}", "q.{leaf}", "k.{leaf}"))
    names = NameMap((k, v, q))
    assert sources(names, "qkv.bias") == [("v.bias", 0, 1, 1), ("q.bias", 0, 1, 1), ("k.bias", 0, 1, 1)]
    assert names.forward("q.bias")[0].target == Share(name="qkv.bias", start=1, stop=2, of=3)


def test_of_several_names_for_one_tensor_the_first_is_the_one_that_is_read_back() -> None:
    names = NameMap((NameRule("new.{leaf}", ("a.{leaf}",)), NameRule("old.{leaf}", ("a.{leaf}",))))
    assert sources(names, "a.weight") == [("new.weight", 0, 1, 1)]
    assert names.links(["old.weight"]).keys() == {"a.weight"}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda: NameRule("a.{n}", ("b.{m}",)), r"the placeholders differ; use \['n'\] in both"),
        (lambda: NameRule("a.{n}", ("b",)), r"a.\{n\} -> b"),
        (lambda: NameRule("a", ("b", "c"), sizes=(1,)), "1 shares for 2 targets"),
        (lambda: NameRule("a", ("b",), fills=((0, 1, 2), (1, 2, 2))), "2 shares for 1 targets"),
    ],
)
def test_a_rule_that_does_not_read_both_ways_is_refused(rule: object, said: str) -> None:
    with pytest.raises(NameMapError, match=said):
        rule()  # type: ignore[operator]


def test_rows_that_do_not_divide_are_refused() -> None:
    (link, *_) = NAME_MAPS["bfl_flux2"].forward("double_blocks.0.img_attn.qkv.weight")
    with pytest.raises(NameMapError, match=r"qkv.weight: 100 rows do not divide into 3 equal parts"):
        link.source.rows(100)


# ---------------------------------------------------------------- the proof


def test_what_is_left_over_on_either_side_is_named_with_the_nearest_names() -> None:
    names = NameMap((NameRule("qkv.{leaf}", ("q.{leaf}", "k.{leaf}", "v.{leaf}")), *merging("ab", ("a", "b"))))
    model = {"q.weight", "k.weight", "v.weight", "ab", "out_proj.weight", "norm.weight"}
    with pytest.raises(NameMapError) as refused:
        names.prove_bijective(["qkv.weight", "v.weight", "a", "out_prj.weight", "zzz"], model)
    message = str(refused.value)
    for said in (
        "6 problem(s)",
        "v.weight: filled twice, from qkv.weight and v.weight",
        "ab: only a part of its rows is there, from a",
        "out_prj.weight -> out_prj.weight: is no name of the model (nearest: out_proj.weight",
        "zzz -> zzz: is no name of the model (nothing like it)",
        "out_proj.weight: nothing in the checkpoint maps to it (nearest: out_prj.weight)",
        "norm.weight: nothing in the checkpoint maps to it",
    ):
        assert said in message


def test_a_proof_lists_no_more_than_one_can_read() -> None:
    with pytest.raises(NameMapError) as refused:
        IDENTITY.prove_bijective([f"x{i}" for i in range(3000)], ["y"])
    assert "and 2980 more: is no name of the model" in str(refused.value)
    assert str(refused.value).count("\n") == 22


def test_scales_of_a_parameter_may_come_with_it_and_no_other_name_may() -> None:
    assert {"weight_scale", "weight_scale_2", "input_scale", "quant_bias"} <= COMPANIONS
    proved = IDENTITY.prove_bijective(["a.weight", "a.weight_scale", "a.input_scale"], ["a.weight"])
    assert proved.keys() == {"a.weight", "a.weight_scale", "a.input_scale"}
    for extra in ("a.bias", "b.weight_scale"):
        with pytest.raises(NameMapError, match=rf"{extra}: is no name of the model"):
            IDENTITY.prove_bijective(["a.weight", extra], ["a.weight"])


# ---------------------------------------------------------------- pushes

PUSHED = {f"{x}_proj" for x in ("q", "k", "v", "gate", "up", "down")}
PACKED = NameMap(
    (
        NameRule(
            "blocks.{n}.qkv.weight",
            tuple(f"model.layers.{{n}}.self_attn.{x}_proj.weight" for x in "qkv"),
            sizes=(2, 1, 1),  # four heads of q, two of k and v
        ),
        NameRule(
            "blocks.{n}.gate_up", ("model.layers.{n}.mlp.gate_proj.weight", "model.layers.{n}.mlp.up_proj.weight")
        ),
        *merging("model.layers.{n}.mlp.down_proj.weight", ("blocks.{n}.down_upper", "blocks.{n}.down_lower")),
    )
)


def packed(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a Llama as another trainer would hold them: packed where the service keeps apart, and cut where
    it does not."""
    items = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for i in range(2):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        items[f"blocks.{i}.qkv.weight"] = torch.cat([items.pop(f"{attention}.{x}_proj.weight") for x in "qkv"])
        items[f"blocks.{i}.gate_up"] = torch.cat([items.pop(f"{mlp}.{x}_proj.weight") for x in ("gate", "up")])
        upper, lower = items.pop(f"{mlp}.down_proj.weight").chunk(2)
        items |= {f"blocks.{i}.down_lower": lower, f"blocks.{i}.down_upper": upper}
    return items


def test_a_push_of_packed_and_renamed_tensors_lands_as_a_cold_load(tmp_path: Path) -> None:
    layouts = ("trtllm", "plain")
    old, new = tiny_llama(seed=0), tiny_llama(seed=1)
    with local_service(save(old, tmp_path / "old"), tmp_path, layouts) as service:
        pusher = Pusher(service.address, names=PACKED)
        report = pusher.push(packed(new).items())
        expected = [cold(save(new, tmp_path / "new"), layout)[1].storage_bytes() for layout in layouts]
        assert service.bytes() == expected
        assert report.digest_verified and report.carried_over == 0
        partial = pusher.push(packed(old).items(), scope=["blocks.1.*"])
        assert not partial.widened and partial.carried_over > 0
        changed = dict(new.named_parameters())
        for name, parameter in old.named_parameters():
            if name.startswith("model.layers.1.") and name.split(".")[4] in PUSHED:
                changed[name].data.copy_(parameter)
        expected = [cold(save(new, tmp_path / "mixed"), layout)[1].storage_bytes() for layout in layouts]
        assert service.bytes() == expected
        with pytest.raises(ManifestError, match=r"down_proj.weight: only a part of its rows is there"):
            pusher.push([item for item in packed(new).items() if item[0] != "blocks.0.down_lower"])
        assert service.bytes() == expected
        pusher.close()


def manifest_of(format_name: str, shapes: Mapping[str, tuple[int, int]]) -> Manifest:
    rows = tuple(ParameterRow(name=name, shape=shape, format=format_name) for name, shape in shapes.items())
    tensors = tuple(spec for row in rows for spec in FORMATS[format_name].tensors(row.name, row.shape))
    return Manifest(tensors=tensors, parameters=rows)


def planned(manifest: Manifest, items: Mapping[str, Tensor], names: NameMap) -> PushPlan:
    plan, problems = plan_push(manifest, items.items(), "all", names=names)
    assert plan is not None, problems
    return plan


@pytest.mark.parametrize("map_name", ORIGINALS)
def test_a_trainer_with_the_original_names_pushes_what_diffusers_would_convert_it_to(map_name: str) -> None:
    stored, convert, rows = ORIGINALS[map_name]
    items = {name: random_bytes((rows.get(name, 12), 2), torch.bfloat16, i) for i, name in enumerate(stored)}
    expected = {f"transformer.{name}": tensor for name, tensor in convert(dict(items)).items()}
    manifest = manifest_of("bf16", {name: (len(tensor), 2) for name, tensor in expected.items()})
    plan = planned(manifest, items, NAME_MAPS[map_name].into("transformer"))
    pushed = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    for source in plan.sources:
        pushed[source.name][source.first : source.first + len(source.rows)] = source.rows
    for name, tensor in expected.items():
        assert torch.equal(pushed[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_pieces_of_one_parameter_are_encoded_as_the_whole_would_be() -> None:
    manifest = manifest_of("nvfp4", {"qkv.weight": (96, 32)})
    whole = torch.randn(96, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = NameMap(merging("qkv.weight", ("q", "k", "v")))
    plan = planned(manifest, dict(zip("vqk", (whole[64:], whole[:32], whole[32:64]), strict=True)), names)
    assert [spec.name for spec in plan.specs] == ["qkv.weight", "qkv.weight_scale", "qkv.weight_scale_2"]
    scale = global_scale(FORMATS["nvfp4"], amax(whole))
    expected = encode(FORMATS["nvfp4"], whole, scale) | {"weight_scale_2": scale.view(1, 1).view(torch.uint8)}
    sent: dict[str, Tensor] = {name: torch.full(rows.shape, -1, dtype=torch.int16) for name, rows in expected.items()}
    for source in plan.sources:
        for spec, first, data in encoded(source, scale):
            into = sent[spec.name.removeprefix("qkv.")][first : first + len(data)]
            assert into.eq(-1).all()  # each byte once, whichever piece it comes from
            into.copy_(data)
    for name, rows in expected.items():
        assert torch.equal(sent[name].to(torch.uint8), rows), name


def test_packed_tensors_in_checkpoint_form_are_split_by_rows_and_single_values_go_to_every_part() -> None:
    manifest = manifest_of("nvfp4", {f"{x}.weight": (32, 32) for x in "qkv"})
    names = NameMap((NameRule("qkv.{leaf}", tuple(f"{x}.{{leaf}}" for x in "qkv")),))
    codes = torch.arange(96 * 16, dtype=torch.int32).to(torch.uint8).view(96, 16)
    items = {"qkv.weight": codes, "qkv.weight_scale": torch.ones(96, 2).to(torch.float8_e4m3fn)}
    plan = planned(manifest, items | {"qkv.weight_scale_2": torch.tensor(0.5)}, names)
    by_name = {source.name: source for source in plan.sources}
    for i, x in enumerate("qkv"):
        assert torch.equal(by_name[f"{x}.weight"].rows, codes[32 * i : 32 * i + 32])
        assert (by_name[f"{x}.weight"].first, by_name[f"{x}.weight_scale"].rows.shape) == (0, (32, 2))
        assert by_name[f"{x}.weight_scale_2"].rows.item() == 0.5


def test_parts_in_checkpoint_form_agree_on_the_one_scale_of_what_packs_them() -> None:
    manifest = manifest_of("nvfp4", {"qkv.weight": (96, 32)})
    names = NameMap(merging("qkv.{leaf}", tuple(f"{x}.{{leaf}}" for x in "qkv")))
    items = {f"{x}.weight": torch.full((32, 16), i, dtype=torch.uint8) for i, x in enumerate("qkv")}
    items |= {f"{x}.weight_scale": torch.ones(32, 2).to(torch.float8_e4m3fn) for x in "qkv"}
    agreed = {f"{x}.weight_scale_2": torch.tensor(0.5) for x in "qkv"}
    plan = planned(manifest, items | agreed, names)
    assert [(source.name, source.first) for source in plan.sources if source.name == "qkv.weight"] == [
        ("qkv.weight", 0),
        ("qkv.weight", 32),
        ("qkv.weight", 64),
    ]
    assert [source.name for source in plan.sources].count("qkv.weight_scale_2") == 1
    unlike = items | agreed | {"k.weight_scale_2": torch.tensor(0.25)}
    plan_or_none, problems = plan_push(manifest, unlike.items(), "all", names=names)
    assert plan_or_none is None and "qkv.weight_scale_2: tied to qkv.weight and its bytes differ" in problems[0]


@pytest.mark.parametrize("cuts", [(), (20,), (5, 5, 13), (8, 16), (0, 24)])
def test_shards_of_a_packed_tensor_are_shards_of_its_parts(cuts: tuple[int, ...]) -> None:
    whole = torch.arange(24 * 2).view(24, 2)
    for rule in (
        NameRule("p", ("a", "b", "c"), sizes=(1, 1, 4)),
        NameRule("p", ("d", "d"), fills=((1, 2, 2), (0, 1, 2))),
    ):
        for link in rule.forward("p"):
            start, stop = link.source.rows(24)
            offset = {("d", 1): 12}.get((link.target.name, link.target.start), 0)
            length = 24 if link.target.name == "d" else stop - start
            seen = torch.zeros(length, dtype=torch.int64)
            for first, last in zip((0, *cuts), (*cuts, 24), strict=True):
                runs = ((first, last),) if first < last else ()
                part = _linked(link, LocalRows(rows=whole[first:last], runs=runs, shape=(24, 2)))
                assert part.shape == (length, 2)
                for i, row in enumerate(part.rows):
                    assert torch.equal(row, whole[start + part.first - offset + i])
                    seen[part.first + i] += 1
            assert seen[offset : offset + stop - start].eq(1).all() and seen.sum() == stop - start


def test_a_packed_tensor_given_beside_one_of_its_parts_is_refused() -> None:
    manifest = manifest_of("bf16", {f"{x}.weight": (4, 2) for x in "qkv"})
    names = NameMap((NameRule("qkv.{leaf}", tuple(f"{x}.{{leaf}}" for x in "qkv")),))
    items = {"qkv.weight": torch.zeros(12, 2).bfloat16(), "k.weight": torch.zeros(4, 2).bfloat16()}
    plan, problems = plan_push(manifest, items.items(), "all", names=names)
    assert plan is None and problems == ["k.weight: given twice; give every name once"]
    plan, problems = plan_push(
        manifest, [("qkv.weight", torch.zeros(13, 2).bfloat16())], "all", names=names
    )
    assert plan is None and "qkv.weight: 13 rows do not divide into 3 equal parts" in problems[0]


def test_stacked_experts_are_taken_apart_under_a_map_too() -> None:
    names = NameMap((NameRule("moe.{leaf}", ("layer.experts.{leaf}",)),))
    parts = expert_parts("layer.experts.gate_up_proj", (2, 8, 4))
    manifest = manifest_of("bf16", {part.name: (4, 4) for part in parts})
    stacked = torch.arange(64).view(2, 8, 4).bfloat16()
    plan = planned(manifest, {"moe.gate_up_proj": stacked}, names)
    for part, source in zip(parts, plan.sources, strict=True):
        assert source.name == part.name
        assert torch.equal(source.rows, stacked[part.expert, part.row0 : part.row1])
