"""What tensors say of their quantization, merged with what is declared; every rule by itself, then directories."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quant.checkpoint import Checkpoint, CheckpointError, read_quantization, tensor_files
from quant.configs import Quantization, merge, parse_flat
from quant.excludes import ConfigError
from quant.formats import FORMATS, TensorSpec, encode, global_scale, typed
from quant.inference import infer_from_tensors, read

FLAT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["proj_out"]}


def flat(**changes: Any) -> Quantization:
    return parse_flat({**FLAT, **changes}, "config.json")


def quantized(module: str, rows: int = 128, elements: int = 64, group: int = 16) -> list[TensorSpec]:
    return [
        TensorSpec(name=f"{module}.weight", dtype="U8", shape=(rows, elements // 2)),
        TensorSpec(name=f"{module}.weight_scale", dtype="F8_E4M3", shape=(rows, elements // group)),
        TensorSpec(name=f"{module}.weight_scale_2", dtype="F32", shape=()),
    ]


def plain(*modules: str) -> list[TensorSpec]:
    return [TensorSpec(name=f"{module}.weight", dtype="BF16", shape=(64, 64)) for module in modules]


def inferred(specs: list[TensorSpec], *headers: dict[str, str]) -> Quantization:
    found = infer_from_tensors(specs, headers)
    assert found is not None
    return found


def test_tensors_say_their_format_group_size_and_excludes() -> None:
    found = inferred([*quantized("blocks.0.to_q"), *plain("proj_out", "blocks.0.norm")])
    assert (found.format, found.group_size) == ("nvfp4", 16)
    assert found.exclude == ("blocks.0.norm", "proj_out") and found.dialect == "glob_full"
    assert not found.excludes.matches("blocks.0.proj_out") and not found.excludes.matches("blocks.0.to_q")
    assert inferred(quantized("a", group=32)).format == "w4a8_nvfp4"


def test_plain_tensors_say_nothing() -> None:
    assert infer_from_tensors(plain("a", "b")) is None


def test_scalar_scales_are_fp8_and_bytes_with_other_scales_are_no_nvfp4() -> None:
    def module(weight: str, scale: str, shape: tuple[int, ...]) -> list[TensorSpec]:
        return [
            TensorSpec(name="a.weight", dtype=weight, shape=(128, 64)),
            TensorSpec(name="a.weight_scale", dtype=scale, shape=shape),
        ]

    fp8, fp8_in_bytes = module("F8_E4M3", "F32", ()), module("U8", "F32", ())
    for specs in (fp8, fp8_in_bytes, module("U8", "U8", (128, 4)), module("U8", "F32", (256, 1))):
        assert infer_from_tensors(specs) is None
    assert inferred([*quantized("b"), *fp8_in_bytes]).exclude == ("a",)


def test_metadata_may_list_a_module_as_nvfp4_but_not_one_that_is_not_packed() -> None:
    layers = {"a": {"format": "nvfp4"}, "b": {"format": "nvfp4"}, "c": {"format": "fp8"}}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    specs = [
        TensorSpec(name="a.weight", dtype="U8", shape=(64, 32)),
        TensorSpec(name="c.weight", dtype="U8", shape=(64, 32)),
        *plain("b"),
    ]
    found = inferred(specs, {}, header)
    assert found.exclude == ("b", "c") and found.group_size is None and found.format == "nvfp4"


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks.3.img_attn.qkv",
        "double_blocks.0.txt_attn.qkv",
        "single_blocks.11.linear1",
        "model.diffusion_model.double_blocks.0.img_attn.qkv",
    ],
)
def test_packed_qkv_is_known_by_its_names(name: str) -> None:
    assert inferred(quantized(name)).packed_qkv and inferred(quantized(name)).scale_layout == "swizzled"
    assert inferred([*quantized("a"), *plain(name)]).packed_qkv


@pytest.mark.parametrize(
    "name", ["double_blocks.0.img_attn.proj", "single_blocks.0.linear2", "transformer_blocks.0.qkv"]
)
def test_other_names_are_not_packed(name: str) -> None:
    assert not inferred(quantized(name)).packed_qkv and inferred(quantized(name)).scale_layout == "linear"


def test_shapes_prove_a_scale_layout_where_they_can() -> None:
    def scaled(rows: int, columns: int) -> Quantization:
        weight = TensorSpec(name="single_blocks.0.linear1.weight", dtype="U8", shape=(40, 32))
        scale = TensorSpec(name="single_blocks.0.linear1.weight_scale", dtype="F8_E4M3", shape=(rows, columns))
        return inferred([weight, scale])

    assert scaled(128, 4).scale_layout == "swizzled" and "scale_layout" in scaled(128, 4).stated
    assert scaled(40, 4).scale_layout == "linear" and "scale_layout" in scaled(40, 4).stated
    assert "scale_layout" not in inferred(quantized("a")).stated


def test_markers_of_comfyui_mean_swapped_nibbles_and_swizzled_scales() -> None:
    marker = TensorSpec(name="a.comfy_quant", dtype="U8", shape=(20,))
    found = inferred([*quantized("a"), marker])
    assert found.swap_nibbles and found.scale_layout == "swizzled"


def test_padding_of_scale_columns_does_not_change_the_group_size() -> None:
    padded = [
        TensorSpec(name="a.weight", dtype="U8", shape=(128, 24)),
        TensorSpec(name="a.weight_scale", dtype="F8_E4M3", shape=(128, 4)),
    ]
    assert inferred([*padded, *quantized("b")]).group_size == 16
    assert inferred(padded).group_size is None


def test_a_renamed_module_that_is_both_is_an_error_that_lists_its_parts() -> None:
    specs = [*quantized("b.q"), *plain("b.k"), *quantized("c.q"), *quantized("c.k"), *plain("d")]
    with pytest.raises(ConfigError, match=r"b.qk: b.k excluded, b.q quantized"):
        infer_from_tensors(specs, rename=lambda name: [f"{name[0]}.qk.weight"])
    found = infer_from_tensors(specs, rename=lambda name: [f"m.{name}", f"n.{name}"])
    assert found is not None and found.exclude == ("m.b.k", "m.d", "n.b.k", "n.d")


# ---------------------------------------------------------------- merge


def test_inferred_excludes_win_and_a_warning_counts_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = merge(flat(ignore=["x", "y", "z"]), inferred([*quantized("a"), *plain("b", "c")]))
    assert found is not None and found.exclude == ("b", "c")
    assert "config.json excludes 3 patterns, the tensors 2 modules" in caplog.text
    caplog.clear()
    merge(flat(ignore=["b"]), inferred([*quantized("a"), *plain("b")]))
    assert caplog.text == ""


def test_inferred_excludes_are_whole_names_whatever_was_declared() -> None:
    declared = parse_flat(FLAT, "config.json", "per_part")
    found = merge(declared, inferred([*quantized("blocks.0.proj_out"), *plain("proj_out")]))
    assert found is not None and found.excludes.matches("proj_out")
    assert declared.excludes.matches("blocks.0.proj_out") and not found.excludes.matches("blocks.0.proj_out")


@pytest.mark.parametrize(("ours", "theirs"), [(False, False), (False, True), (True, False), (True, True)])
def test_both_flags_count_from_either_side(ours: bool, theirs: bool) -> None:
    tensors = Quantization(format="nvfp4", swap_nibbles=theirs, packed_qkv=theirs, group_size=16)
    declared = flat(swap_weight_nibbles=ours, checkpoint_uses_packed_qkv=ours)
    found = merge(declared, tensors)
    assert found is not None and found.swap_nibbles == found.packed_qkv == (ours or theirs)


def test_a_missing_group_size_is_filled_in() -> None:
    found = merge(flat(group_size=None), inferred(quantized("a")))
    assert found is not None and found.group_size == 16
    kept = merge(flat(), Quantization(format="nvfp4"))
    assert kept is not None and kept.group_size == 16


def test_a_declared_group_size_that_the_shapes_contradict_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"group sizes conflict: 16 declared, 32 by the shapes"):
        merge(flat(), inferred(quantized("a", group=32)))


def test_a_stated_scale_layout_wins_over_one_from_names_and_shapes_contradict_it() -> None:
    names = inferred(quantized("single_blocks.0.linear1"))
    stated, unstated = merge(flat(checkpoint_weight_scale_layout="linear"), names), merge(flat(), names)
    assert stated is not None and stated.scale_layout == "linear"
    assert unstated is not None and unstated.scale_layout == "swizzled"
    with pytest.raises(ConfigError, match=r"scale layouts conflict: swizzled declared, linear by the tensors"):
        merge(flat(checkpoint_weight_scale_layout="swizzled"), inferred(quantized("a", rows=40)))


def test_other_formats_are_left_alone() -> None:
    declared = flat(quant_algo="FP8", group_size=None)
    assert merge(declared, inferred([*quantized("a"), *plain("b")])) is declared
    assert merge(declared, None) is declared and merge(None, None) is None


def test_what_nobody_declares_is_inferred() -> None:
    tensors = inferred(quantized("a"))
    assert merge(None, tensors) is tensors
    assert read({}, {}, quantized("a")) == tensors


# ---------------------------------------------------------------- directories

LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")


def write_shards(directory: Path, *modules: str, **config: Any) -> None:
    """A shard a module, in NVFP4; and one with a BF16 weight."""
    scale = global_scale(FORMATS["nvfp4"], 0x3F80)
    for i, module in enumerate(modules):
        weight = torch.linspace(-1, 1, 128 * 64).reshape(128, 64).to(torch.bfloat16)
        parts = typed(FORMATS["nvfp4"], encode(FORMATS["nvfp4"], weight, scale), (128, 64))
        tensors = {f"{module}.{suffix}": tensor for suffix, tensor in {**parts, "weight_scale_2": scale}.items()}
        save_file(tensors, directory / f"shard-{i}.safetensors")
    save_file({"final.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}, directory / "shard-last.safetensors")
    if config:
        (directory / "config.json").write_text(json.dumps({"_class_name": "X", "quantization_config": config}))


def test_inference_reads_all_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, "a", "b", "c")
    with Checkpoint(tmp_path) as checkpoint:
        found = checkpoint.quantization
    assert found is not None and found.exclude == ("final",)
    assert not any(found.excludes.matches(module) for module in "abc")


def test_the_release_that_relied_on_swapping_by_default_needs_the_flag(tmp_path: Path) -> None:
    write_shards(tmp_path, *LAYERS)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path)
    for said in (str(tmp_path), "black-forest-labs/FLUX.2-dev-NVFP4", "swap_weight_nibbles", "true for that"):
        assert said in str(caught.value)
    write_shards(tmp_path, *LAYERS, **FLAT)
    with pytest.raises(CheckpointError, match="swap_weight_nibbles"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("swap", [True, False])
def test_with_the_flag_it_is_read_either_way(tmp_path: Path, swap: bool) -> None:
    write_shards(tmp_path, *LAYERS, **FLAT, swap_weight_nibbles=swap)
    with Checkpoint(tmp_path) as checkpoint:
        found = checkpoint.quantization
    assert found is not None and found.swap_nibbles is swap and found.packed_qkv and found.scale_layout == "swizzled"


def test_who_knows_the_repository_may_state_the_flag(tmp_path: Path) -> None:
    write_shards(tmp_path, *LAYERS)
    found = read_quantization(tmp_path, tensor_files(tmp_path), swap_nibbles=True)
    assert found is not None and found.swap_nibbles and found.packed_qkv
    write_shards(tmp_path, *LAYERS, **FLAT, swap_weight_nibbles=False)  # what the files state counts
    found = read_quantization(tmp_path, tensor_files(tmp_path), swap_nibbles=True)
    assert found is not None and not found.swap_nibbles


def test_nvfp4_without_packed_names_needs_no_flag(tmp_path: Path) -> None:
    write_shards(tmp_path, "transformer_blocks.0.attn.to_q", **FLAT)
    with Checkpoint(tmp_path) as checkpoint:
        found = checkpoint.quantization
    assert found is not None and found.swap_nibbles is False and found.exclude == ("final",)


def test_a_config_in_a_header_is_used_where_no_file_declares_one(tmp_path: Path) -> None:
    header = {"quantization_config": json.dumps({"quant_algo": "FP8", "ignore": ["a"]})}
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors", metadata=header)
    with Checkpoint(tmp_path) as checkpoint:
        found = checkpoint.quantization
    assert found is not None and (found.format, found.exclude, found.source) == ("fp8", ("a",), "the header of a shard")


def test_flags_of_a_header_count_beside_a_declared_config() -> None:
    header = {"quantization_config": json.dumps({**FLAT, "swap_weight_nibbles": True})}
    found = read({"_class_name": "X", "quantization_config": FLAT}, {}, quantized("a"), [{}, header])
    assert found is not None and found.swap_nibbles and "swap_nibbles" in found.stated


def test_a_damaged_header_is_an_error_that_shows_it() -> None:
    with pytest.raises(ConfigError, match=r"the header of a shard: no JSON: .*\{not"):
        infer_from_tensors(quantized("a"), [{"_quantization_metadata": "{not"}])
    for layers in ([], {"a": 1}):
        with pytest.raises(ConfigError, match=r"_quantization_metadata: expected an object a layer, got "):
            infer_from_tensors(quantized("a"), [{"_quantization_metadata": json.dumps({"layers": layers})}])


def test_a_damaged_config_is_an_error_that_names_its_file(tmp_path: Path) -> None:
    write_shards(tmp_path, "a", **FLAT)
    for text, said in (("{", r"no JSON \(.*\); copy it again"), ("[1]", r"expected a JSON object, got \[1\]")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=rf"config\.json: {said}"):
            Checkpoint(tmp_path)


@pytest.mark.parametrize(("weight", "scale"), [((4,), (4, 1)), ((), (4, 1)), ((4, 8), (4, 0)), ((4, 8), (4,))])
def test_shapes_that_no_nvfp4_weight_has_are_none(weight: tuple[int, ...], scale: tuple[int, ...]) -> None:
    specs = [TensorSpec(name="a.weight", dtype="U8", shape=weight)]
    specs += [TensorSpec(name="a.weight_scale", dtype="F8_E4M3", shape=scale)]
    assert infer_from_tensors(specs) is None


def test_the_dialect_follows_from_whose_config_it_is() -> None:
    fp8 = {"quant_algo": "FP8", "ignore": ["gate"]}
    diffusion = read({"_class_name": "FluxTransformer2DModel", "quantization_config": fp8}, {}, [])
    language = read({"architectures": ["LlamaForCausalLM"], "quantization_config": fp8}, {}, [])
    assert diffusion is not None and not diffusion.excludes.matches("layers.0.gate")
    assert language is not None and language.excludes.matches("layers.0.gate")


def test_a_single_file_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    write_shards(tmp_path, *LAYERS, **FLAT, swap_weight_nibbles=True)
    with Checkpoint(tmp_path / "shard-0.safetensors") as checkpoint:
        found = checkpoint.quantization
        assert all(name.startswith(LAYERS[0]) for name in checkpoint.names())
    assert (
        found is not None and found.swap_nibbles and found.source == "config.json quantization_config and the tensors"
    )
