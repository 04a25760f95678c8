"""What checkpoints declare of their quantization: every rule by itself, then the exports of nvidia-modelopt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from quant.configs import QUANT_ALGOS, Quantization, agreed, parse, parse_flat, parse_nested
from quant.excludes import ConfigError
from quant.formats import FORMATS, TensorSpec
from quant.inference import read
from tests.goldens import fixtures, names

FLAT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["proj_out"]}
SECTION: dict[str, Any] = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["proj_out"]}


def flat(**changes: Any) -> Quantization:
    return parse_flat({**FLAT, **changes}, "config.json")


def nested(section: Mapping[str, Any] = {}, top: Mapping[str, Any] = {}) -> Quantization:
    return parse_nested({"quantization": {**SECTION, **section}, **top}, "hf_quant_config.json")


# ---------------------------------------------------------------- quant_algo


@pytest.mark.parametrize(
    ("algo", "row"),
    [
        ("NVFP4", "nvfp4"),
        ("W4A16_NVFP4", "nvfp4"),
        ("W4A8_NVFP4_FP8", "w4a8_nvfp4"),
        ("FP8", "fp8"),
        ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_channel"),
        ("fp8_pb_wo", "fp8_block"),
        ("MXFP8", "mxfp8"),
        ("mxfp4", "mxfp4"),
        ("W8A8_SQ_PER_CHANNEL", "int8"),
        ("W4A16_AWQ", "int4_awq"),
    ],
)
def test_every_algorithm_names_a_row_in_either_case(algo: str, row: str) -> None:
    for spelled in (algo, algo.upper(), algo.lower()):
        assert parse_flat({"quant_algo": spelled}, "config.json").format == row
        assert parse_nested({"quantization": {"quant_algo": spelled}}, "hf_quant_config.json").format == row
    assert row in FORMATS and algo.upper() in QUANT_ALGOS


@pytest.mark.parametrize("config", [{"ignore": []}, {"quantization": {"group_size": 16}}])
def test_a_missing_quant_algo_is_an_error_that_names_both_forms(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(config, "the file")
    assert "quant_algo is missing" in str(caught.value)
    assert "config.json {quantization_config: {quant_algo" in str(caught.value)
    assert "hf_quant_config.json {quantization: {quant_algo" in str(caught.value)


def test_an_unknown_quant_algo_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"config.json: quant_algo 'MIXED_PRECISION' is not supported; known: FP8, "):
        flat(quant_algo="MIXED_PRECISION")


def test_a_config_of_another_library_says_whose_it_is() -> None:
    with pytest.raises(ConfigError, match=r"quant_algo is missing \(quant_method 'compressed-tensors' is not read"):
        parse({"quant_method": "compressed-tensors", "config_groups": {}}, "config.json")


# ---------------------------------------------------------------- group size


def groups(*sizes: object) -> dict[str, Any]:
    return {f"group_{i}": {"weights": {"num_bits": 4, "group_size": size}} for i, size in enumerate(sizes)}


def test_the_group_size_is_that_of_its_key_or_of_the_config_groups() -> None:
    bare = {"quant_algo": "NVFP4", "ignore": []}
    assert flat().group_size == 16
    assert parse_flat({**bare, "config_groups": groups(16, 16)}, "f").group_size == 16
    assert parse_flat({**bare, "group_size": None, "config_groups": groups(None, 16)}, "f").group_size == 16
    assert parse_nested({"quantization": {"quant_algo": "NVFP4"}, "group_size": 16}, "n").group_size == 16
    assert parse_nested({"quantization": {**bare, "config_groups": groups(16)}}, "n").group_size == 16
    assert parse_nested({"quantization": bare, "config_groups": groups(16)}, "n").group_size == 16
    assert parse_flat(bare, "f").group_size is None


@pytest.mark.parametrize(
    "config",
    [
        {"quant_algo": "NVFP4", "group_size": 16, "config_groups": groups(32)},
        {"quant_algo": "NVFP4", "config_groups": groups(16, 32)},
        {"quantization": {"quant_algo": "NVFP4", "group_size": 16}, "group_size": 32},
        {"quantization": {"quant_algo": "NVFP4", "group_size": 16}, "config_groups": groups(32)},
    ],
)
def test_conflicting_group_sizes_are_an_error_that_says_where_they_are(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"group sizes conflict: 16 in [a-z_0-9.]+, 32 in [a-z_0-9.]+"):
        parse(config, "the file")


def test_a_group_size_that_the_format_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"group size 32 in group_size: format nvfp4 has 16"):
        flat(group_size=32)
    assert flat(quant_algo="W4A8_NVFP4_FP8", group_size=32).group_size == 32
    assert flat(quant_algo="W4A16_AWQ", group_size=128).group_size == 128


# ---------------------------------------------------------------- excludes


def test_excludes_come_from_ignore_or_exclude_modules_in_both_forms() -> None:
    assert flat().exclude == ("proj_out",)
    assert flat(ignore=None, exclude_modules=["a", "b*"]).exclude == ("a", "b*")
    assert flat(exclude_modules=["b"]).exclude == ("proj_out",)
    assert nested().exclude == ("proj_out",)
    assert nested({"exclude_modules": None, "ignore": ["a"]}).exclude == ("a",)
    assert nested({"ignore": ["a"]}).exclude == ("proj_out",)
    assert nested({"exclude_modules": [], "ignore": ["a"]}).exclude == ()


def test_excludes_that_are_no_list_are_refused_not_taken_as_letters() -> None:
    with pytest.raises(ConfigError, match=r"ignore: expected a list of module name patterns, got 'lm_head'"):
        flat(ignore="lm_head")


# ---------------------------------------------------------------- nibbles: own key, then packed qkv, then False


def test_flat_nibbles_are_swapped_by_the_own_key_then_by_packed_qkv_then_not() -> None:
    assert flat().swap_nibbles is False
    assert flat(swap_weight_nibbles=True).swap_nibbles is True
    assert flat(checkpoint_uses_packed_qkv=True).swap_nibbles is True
    assert flat(checkpoint_uses_packed_qkv=False).swap_nibbles is False
    assert flat(swap_weight_nibbles=False, checkpoint_uses_packed_qkv=True).swap_nibbles is False
    assert flat(swap_weight_nibbles=True, checkpoint_uses_packed_qkv=False).swap_nibbles is True


def test_nested_nibbles_are_swapped_by_section_then_top_then_top_packed_qkv_then_not() -> None:
    swap, packed = "swap_weight_nibbles", "checkpoint_uses_packed_qkv"
    assert nested().swap_nibbles is False
    assert nested({swap: True}, {swap: False}).swap_nibbles is True
    assert nested({swap: False}, {swap: True, packed: True}).swap_nibbles is False
    assert nested({}, {swap: True}).swap_nibbles is True
    assert nested({}, {swap: False, packed: True}).swap_nibbles is False
    assert nested({}, {packed: True}).swap_nibbles is True
    # Only the top level's: in the section it says that projections are packed, nothing of nibbles.
    assert nested({packed: True}).swap_nibbles is False and nested({packed: True}).packed_qkv is True


def test_what_is_stated_is_told_from_what_is_assumed() -> None:
    assert flat().stated == frozenset()
    assert flat(swap_weight_nibbles=False).stated == {"swap_nibbles"}
    assert flat(checkpoint_uses_packed_qkv=True).stated == {"swap_nibbles"}
    assert flat(checkpoint_weight_scale_layout="linear").stated == {"scale_layout"}


def test_the_scale_layout_is_linear_unless_stated() -> None:
    assert flat().scale_layout == "linear"
    assert flat(checkpoint_weight_scale_layout="swizzled").scale_layout == "swizzled"
    with pytest.raises(ConfigError, match=r"checkpoint_weight_scale_layout: expected one of linear, swizzled, got 'x'"):
        flat(checkpoint_weight_scale_layout="x")


def test_a_flag_in_quotes_is_refused_not_taken_as_true() -> None:
    with pytest.raises(ConfigError, match=r"swap_weight_nibbles: expected true or false, got 'false'"):
        flat(swap_weight_nibbles="false")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("group_size", "16", "group_size: expected a number, got '16'"),
        ("group_size", [16], r"group_size: expected a number, got \[16\]"),
        ("group_size", True, "group_size: expected a number, got True"),
        ("config_groups", [16], r"config_groups: expected objects with an object `weights`, got \[16\]"),
        ("config_groups", {"g": None}, "config_groups: expected objects"),
        ("config_groups", {"g": {"weights": 16}}, "config_groups: expected objects"),
        ("config_groups", groups("16"), "config_groups.group_0.weights.group_size: expected a number, got '16'"),
    ],
)
def test_values_of_another_type_are_named(key: str, value: Any, said: str) -> None:
    section = {**SECTION, key: value}
    for config in ({**FLAT, key: value}, {"quantization": SECTION, key: value}, {"quantization": section}):
        with pytest.raises(ConfigError, match=f"the file: {said}"):
            parse(config, "the file")


def test_a_config_that_is_no_object_is_refused() -> None:
    for config in ("nvfp4", [FLAT]):
        with pytest.raises(ConfigError, match=r"config\.json quantization_config: expected a JSON object, got "):
            read({"quantization_config": config}, {}, [])


def test_all_that_is_wrong_with_a_config_is_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"swap_weight_nibbles": 1, "ignore": "x", "group_size": 16, "config_groups": groups(32)}, "config.json")
    assert str(caught.value).startswith("config.json:") and str(caught.value).count("\n  - ") == 4


def test_the_form_is_told_by_the_section() -> None:
    assert parse(FLAT, "config.json") == flat()
    assert parse({"quantization": SECTION}, "hf_quant_config.json") == nested()


# ---------------------------------------------------------------- both files of an export


def test_both_files_of_an_export_may_each_state_what_the_other_does_not() -> None:
    found = agreed(flat(group_size=None), nested({}, {"swap_weight_nibbles": True}))
    assert found is not None
    assert (found.group_size, found.swap_nibbles, found.source) == (16, True, "config.json")
    assert agreed(None, nested()) == nested() and agreed(flat(), None) == flat() and agreed(None, None) is None


def test_files_of_an_export_that_disagree_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        agreed(flat(swap_weight_nibbles=False), nested({"quant_algo": "FP8", "swap_weight_nibbles": True}))
    assert "config.json and hf_quant_config.json disagree" in str(caught.value)
    assert "format: nvfp4 and fp8" in str(caught.value) and "swap_nibbles: False and True" in str(caught.value)


# ---------------------------------------------------------------- what nvidia-modelopt 0.47.0 really writes

EXPORTS = [name for name in names("export_") if "json_files" in fixtures()[name]["args"]]
DTYPE_NAMES = {"bfloat16": "BF16", "float32": "F32", "uint8": "U8", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_are_read_the_same_from_either_file_and_as_their_tensors_are(name: str) -> None:
    files, tensors = fixtures()[name]["args"]["json_files"], fixtures()[name]["tensors"]
    config = files["config.json"]
    specs = [
        TensorSpec(name=full.removeprefix("out."), dtype=DTYPE_NAMES[entry["dtype"]], shape=tuple(entry["shape"]))
        for full, entry in tensors.items()
    ]
    found = read(config, files.get("hf_quant_config.json", {}), specs)
    assert found is not None
    by_file = [read(config, {}, []), read({}, files["hf_quant_config.json"], [])] if len(files) > 1 else []
    for each in by_file:
        assert each is not None and (each.format, each.group_size) == (found.format, found.group_size)
        assert each.exclude == tuple(config["quantization_config"]["ignore"])
    modules = {spec.name.removesuffix(".weight") for spec in specs if spec.name.endswith(".weight")}
    scaled = {spec.name.removesuffix(".weight_scale") for spec in specs if spec.name.endswith(".weight_scale")}
    assert scaled and {module for module in modules if not found.excludes.matches(module)} == scaled
    assert not found.swap_nibbles and not found.packed_qkv and found.scale_layout == "linear"
