"""ModelSlim's description of an export: what it says of every module, whatever the names, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quant.checkpoint import CheckpointError, open_checkpoint
from quant.excludes import ConfigError
from quant.models import build_model, owners_of, parameters_of, placements_of, storage_parameters
from quant.modelslim import FILE, UNSUPPORTED, as_quantization, formats_of, parse, read
from quant.name_maps import NAME_MAPS, merging
from quant.names import NameMap
from quant.placements import invert_rows
from service.loading import cold_load
from tests import goldens
from tests.tiny_dit import write_tiny_pipeline
from weight_update.receiver import Receiver

WAN = {
    "model_quant_type": "W8A8_DYNAMIC",
    "version": "1.0.0",
    "group_size": 0,
    "metadata": {},
    "optional": {"quarot": {"rotation_map": {}}},
    "ignore": ["head.head"],
    "blocks.0.self_attn.q.weight": "W8A8_DYNAMIC",
    "blocks.0.self_attn.q.weight_scale": "W8A8_DYNAMIC",
    "blocks.0.self_attn.q.weight_offset": "W8A8_DYNAMIC",
    "blocks.0.self_attn.q.bias": "FLOAT",
    "blocks.0.self_attn.o.weight": "W8A8",
    "blocks.0.self_attn.o.deq_scale": "W8A8",
    "blocks.0.self_attn.o.quant_bias": "W8A8",
    "blocks.0.ffn.0.weight": "W4A4_DYNAMIC",
    "text_embedding.0.weight": "FLOAT",
    "blocks.0.modulation": "FLOAT",
}


def described(**schemes: str) -> dict[str, str]:
    return {f"{module}.weight": scheme for module, scheme in schemes.items()}


def test_every_scheme_has_its_row_and_notes_that_are_no_tensors_are_passed_over() -> None:
    description = parse(WAN, FILE)
    assert description.schemes.keys() == {
        "blocks.0.self_attn.q",
        "blocks.0.self_attn.o",
        "blocks.0.ffn.0",
        "text_embedding.0",
    }
    assert formats_of(description, description.schemes) == {
        "blocks.0.self_attn.q": "int8_dynamic",
        "blocks.0.self_attn.o": "int8_static",
        "blocks.0.ffn.0": "int4_dynamic",
        "text_embedding.0": "bf16",
    }


def test_modules_of_the_model_are_looked_up_through_the_reversed_map_those_left_alone_too() -> None:
    modules = {
        "blocks.0.attn1.to_q": "int8_dynamic",
        "blocks.0.attn1.to_out.0": "int8_static",
        "blocks.0.ffn.net.0.proj": "int4_dynamic",
        "condition_embedder.text_embedder.linear_1": "bf16",
    }
    names = NAME_MAPS["wan_original"]
    assert formats_of(parse(WAN, FILE), modules, names) == modules
    inside = {f"transformer_2.{module}": row for module, row in modules.items()}
    assert formats_of(parse(WAN, FILE), inside, names.into("transformer_2")) == inside
    with pytest.raises(ConfigError, match=r"text_embedder.linear_1: no entry for .*text_embedder.linear_1"):
        formats_of(parse(WAN, FILE), modules)


def test_a_description_in_the_models_own_names_needs_no_map() -> None:
    description = parse(described(**{"blocks.0.attn1.to_q": "W8A8"}), FILE)
    for names in (NameMap(), NAME_MAPS["wan_original"]):
        assert formats_of(description, ["blocks.0.attn1.to_q"], names) == {"blocks.0.attn1.to_q": "int8_static"}


def test_parts_of_a_packed_tensor_share_its_scheme() -> None:
    description = parse(described(**{"double_blocks.0.txt_attn.qkv": "W8A8_DYNAMIC"}), FILE)
    parts = [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"]
    assert formats_of(description, parts, NAME_MAPS["bfl_flux2"]) == dict.fromkeys(parts, "int8_dynamic")


QKV = NameMap(merging("{block}.qkv.{leaf}", tuple(f"{{block}}.{x}.{{leaf}}" for x in "qkv")))


@pytest.mark.parametrize(("last", "agrees"), [("W8A8", True), ("W8A8_DYNAMIC", False), ("FLOAT", False)])
def test_packed_parts_that_disagree_are_all_listed(last: str, agrees: bool) -> None:
    schemes = {f"{block}.{x}": "W8A8" for block in "ab" for x in "qkv"} | {"a.v": last, "b.v": last}
    description = parse(described(**schemes), FILE)
    if agrees:
        assert formats_of(description, ["a.qkv", "b.qkv"], QKV) == {"a.qkv": "int8_static", "b.qkv": "int8_static"}
        return
    with pytest.raises(ConfigError) as refused:
        formats_of(description, ["a.qkv", "b.qkv"], QKV)
    for block in "ab":
        said = f"{block}.qkv: packs parts of several schemes: {block}.q W8A8, {block}.k W8A8, {block}.v {last}"
        assert said in str(refused.value)


def test_modules_that_are_not_described_are_all_listed_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError) as refused:
        formats_of(parse(WAN, FILE), ["blocks.0.attn1.to_k", "blocks.0.ffn.net.2"], NAME_MAPS["wan_original"])
    assert "blocks.0.attn1.to_k: no entry for blocks.0.self_attn.k (nearest: blocks.0.self_attn." in str(refused.value)
    assert "blocks.0.ffn.net.2: no entry for blocks.0.ffn.2 (nearest: blocks.0.ffn.0" in str(refused.value)


def test_schemes_that_are_not_read_are_all_listed_with_why() -> None:
    schemes = {f"m{i}": scheme for i, scheme in enumerate((*UNSUPPORTED, "W2A2"))} | {
        f"n{i}": "W8A8S" for i in range(6)
    }
    with pytest.raises(ConfigError) as refused:
        parse(described(**schemes), "here.json")
    message = str(refused.value)
    for scheme, why in UNSUPPORTED.items():
        assert f"scheme {scheme} of m" in message and why in message
    assert "scheme W2A2 of m6: unknown; schemes that are read: FLOAT, W8A8, W8A8_DYNAMIC, W4A4_DYNAMIC" in message
    assert "n3 and 2 more" in message and message.startswith("here.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model_quant_type": "W8A8"}, "names no weight"),
        (described(a="W8A8") | {"a.deq_scale": "W8A8_DYNAMIC"}, "a.deq_scale is W8A8_DYNAMIC, and its weight W8A8"),
        (described(a="FLOAT") | {"a.weight_offset": "W8A8"}, "a.weight_offset is W8A8, and its weight FLOAT"),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(content: Mapping[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(content, FILE)


def test_a_description_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ConfigError, match=rf"{tmp_path / FILE}: no JSON"):
        read(tmp_path / FILE)


def test_most_modules_name_the_format_and_the_others_are_listed() -> None:
    rows = {"a": "int8_dynamic", "b": "int8_static", "c": "int8_dynamic", "d": "bf16", "e": "int4_dynamic"}
    stated = as_quantization(rows, FILE)
    assert stated is not None
    assert (stated.format, stated.exclude, stated.source) == ("int8_dynamic", ("d",), FILE)
    assert stated.others == (("b", "int8_static"), ("e", "int4_dynamic"))
    assert as_quantization({"a": "bf16"}, FILE) is None


# ---------------------------------------------------------------- a whole export

# Original module -> the scheme that its weight gets; everything else is FLOAT
SCHEMES = {
    "blocks.0.self_attn.q": "W8A8_DYNAMIC",
    "blocks.0.self_attn.k": "W8A8_DYNAMIC",
    "blocks.0.cross_attn.v": "W8A8_DYNAMIC",
    "blocks.0.self_attn.o": "W8A8",
    "blocks.0.ffn.2": "W4A4_DYNAMIC",
}
ROWS = {
    "blocks.0.attn1.to_q": "int8_dynamic",
    "blocks.0.attn1.to_k": "int8_dynamic",
    "blocks.0.attn2.to_v": "int8_dynamic",
    "blocks.0.attn1.to_out.0": "int8_static",
    "blocks.0.ffn.net.2": "int4_dynamic",
}


def quantized(name: str, shape: tuple[int, int], scheme: str) -> dict[str, Tensor]:
    """Tensors of the dtypes and shapes that the real quantizer writes (fixtures int_*); their values are arbitrary."""
    generator = torch.Generator().manual_seed(len(name))
    limit = 8 if scheme.startswith("W4") else 128
    weight = torch.randint(-limit, limit, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[0], generator=generator) / 64 + 2**-8
    if scheme == "W8A8":
        return {
            f"{name}.weight": weight,
            f"{name}.deq_scale": scale,
            f"{name}.quant_bias": torch.randint(-999, 999, (shape[0],), dtype=torch.int32, generator=generator),
            f"{name}.input_scale": torch.tensor([0.03]),
            f"{name}.input_offset": torch.tensor([-7.0]),
        }
    offset = torch.zeros(shape[0], 1)
    return {f"{name}.weight": weight, f"{name}.weight_scale": scale.view(-1, 1), f"{name}.weight_offset": offset}


def test_the_tensors_written_here_have_the_dtypes_and_shapes_of_the_real_quantizer() -> None:
    fixture = goldens.load("int_a128x128")
    for prefix, scheme in {"modelslim_dynamic": "W8A8_DYNAMIC", "modelslim_static_bf16model": "W8A8"}.items():
        real = {name.partition(".")[2]: t for name, t in fixture.items() if name.startswith(f"{prefix}.")}
        real.pop("bias")
        ours = {name.partition(".")[2]: t for name, t in quantized("a", (128, 128), scheme).items()}
        assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {
            name: (t.dtype, t.shape) for name, t in real.items()
        }


def export(folder: Path) -> dict[str, Tensor]:
    """Rewrites a transformer of a tiny Wan pipeline as ModelSlim does, under the original repository's names; returns
    the quantized tensors under diffusers' names."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    names = NAME_MAPS["wan_original"]
    original = {names.reverse(name)[0].source.name: tensor for name, tensor in tensors.items()}
    description = dict.fromkeys(original, "FLOAT")
    expected: dict[str, Tensor] = {}
    for module, scheme in SCHEMES.items():
        shape = tuple(original.pop(f"{module}.weight").shape)
        made = quantized(module, (shape[0], shape[1]), scheme)
        original |= made
        description |= dict.fromkeys(made, scheme)
        expected |= {names.forward(name)[0].target.name: tensor for name, tensor in made.items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in original.items()}, folder / "quant_model_weights.safetensors"
    )
    (folder / FILE).write_text(json.dumps({"model_quant_type": "W8A8_DYNAMIC", "group_size": 0} | description))
    return expected


def test_an_export_of_several_schemes_under_original_names_is_built_and_loaded_byte_for_byte(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    pipeline = write_tiny_pipeline(tmp_path / "wan", "wan", seed=3)
    expected = export(pipeline / "transformer")
    model = build_model(pipeline, "auto", "plain")
    rows = {row.name: row.format for row in parameters_of(model)}
    for module, row in ROWS.items():
        assert rows.pop(f"transformer.{module}.weight") == row, module
    assert set(rows.values()) == {"bf16", "fp32"}  # nothing else, and nothing of transformer_2
    receiver = Receiver.from_module(model)
    with open_checkpoint(pipeline) as checkpoint:
        cold_load(receiver, checkpoint, None, owners_of(model))
    storages = storage_parameters(model)
    found = {placement.tensor.name: placement for placement in placements_of(model)}
    for name, tensor in expected.items():
        placement = found[f"transformer.{name}"]
        local = storages[placement.storage].detach().contiguous().view(-1).view(torch.uint8)
        held = invert_rows(placement, 0, placement.tensor.num_rows, local, 0)
        assert torch.equal(held.reshape(-1), goldens.bytes_of(tensor)), name


def test_an_int8_weight_that_nobody_describes_is_refused(tmp_path: Path) -> None:
    save_file(
        {"a.weight": torch.zeros(2, 2, dtype=torch.int8), "b.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors"
    )
    (tmp_path / FILE).write_text(json.dumps({"b.weight": "FLOAT"}))
    with pytest.raises(CheckpointError, match="a: no entry for a"):
        open_checkpoint(tmp_path)
