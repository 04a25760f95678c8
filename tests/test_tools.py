"""Checkpoints made from others: every byte that is copied, every number that is made, every input that is refused."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from launch import exits, tools
from quant.checkpoint import open_checkpoint
from quant.formats import FORMATS, amax, encode, global_scale, typed
from quant.fp8_checkpoint import KEEP_BF16, plan_fp8
from quant.mixed import PRESETS, plan_mixed
from quant.models import build_model
from quant.modules import QuantLinear
from quant.output import REPORT, ToolError, output_folder
from quant.rewriting import Item, Rewrite, write_shard
from quant.scales import read_scales
from quant.specs import TensorSpec
from tests.tiny import save, tiny_llama
from tests.tiny_dit import tiny_transformer, write_tiny_pipeline
from weight_update.errors import PlanError, WeightUpdateError

NVFP4, QUIET = FORMATS["nvfp4"], lambda done, total: None
PRODUCER = {"name": "modelopt", "version": "0.47.0"}
BLOCK = "model.layers.0"


def contents(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by safetensors' own reader."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bytes."""
    as_bytes = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*as_bytes)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def to_nvfp4(weights: dict[str, Tensor], modules: list[str]) -> dict[str, Tensor]:
    """The weights, some of them in NVFP4 with made-up activation scales."""
    made = dict(weights)
    for number, module in enumerate(modules):
        weight = made.pop(f"{module}.weight")
        scale = global_scale(NVFP4, amax(weight))
        parts = typed(NVFP4, encode(NVFP4, weight, scale), tuple(weight.shape))
        parts |= {"weight_scale_2": scale, "input_scale": torch.tensor(0.25 + number)}
        made |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
    return made


def linears_of(weights: dict[str, Tensor], within: str) -> list[str]:
    return [
        name.removesuffix(".weight")
        for name, value in weights.items()
        if re.search(within, name) and name.endswith(".weight") and value.ndim == 2
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BF16 Llama of one layer."""
    return save(tiny_llama(seed=0, num_layers=1), tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def export(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What modelopt exports of it in NVFP4, in two shards, with leftovers of its quantizers."""
    folder = tmp_path_factory.mktemp("export")
    weights = contents(base)
    made = to_nvfp4(weights, linears_of(weights, r"\.layers\."))
    made[f"{BLOCK}.mlp.down_proj.input_quantizer._amax"] = torch.tensor(3.0)
    attention = {name: value for name, value in made.items() if "self_attn" in name}
    files = {"model-1.safetensors": attention, "model-2.safetensors": {k: made[k] for k in made.keys() - attention}}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt", "of": file})
    where = {name: file for file, tensors in files.items() for name in tensors}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    config = read_json(base / "config.json")
    flat = {"quant_algo": "NVFP4", "quant_method": "modelopt", "ignore": ["lm_head"], "producer": PRODUCER}
    write_json(folder / "config.json", config | {"quantization_config": flat})
    section = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    write_json(folder / "hf_quant_config.json", {"producer": PRODUCER, "quantization": section})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("not copied")
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of a tiny FLUX.1."""
    return write_tiny_pipeline(tmp_path_factory.mktemp("flux"), "flux", seed=0)


def write(plan: Rewrite, folder: Path) -> Path:
    folder.mkdir()
    plan.write(folder, QUIET)
    return folder


def formats_of(folder: Path, format: str) -> dict[str, type[nn.Module]]:
    """What a cold load makes of every linear. Pipelines find their excludes themselves."""
    with open_checkpoint(folder) as checkpoint:
        declared = checkpoint.quantization
    exclude = () if declared is None else declared.exclude
    model = build_model(folder, format, "auto", exclude=exclude, device="meta")
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantLinear)}


# ---------------------------------------------------------------- files


def test_a_file_written_tensor_by_tensor_is_what_safetensors_reads(tmp_path: Path) -> None:
    codes = torch.arange(240, dtype=torch.uint8).view(torch.float8_e4m3fn)
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "scalar": torch.tensor(1.5),
        "codes": codes.view(6, 40),
        "bf16": torch.randn(3, 5).to(torch.bfloat16),
        "none": torch.zeros(0, 4),
        "column": torch.randn(4, 6).t(),
        "wide": torch.arange(3),
    }
    names = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16", torch.int64: "I64"}
    items = [
        Item(
            spec=TensorSpec(name=name, dtype=names.get(value.dtype, "F8_E4M3"), shape=tuple(value.shape)),
            file="f",
            did="copied",
            source="",
            read=lambda value=value: value,
        )
        for name, value in tensors.items()
    ]
    told: list[int] = []
    write_shard(tmp_path / "f", items, {"format": "pt", "why": "\u00e9"}, told.append)
    found = load_file(tmp_path / "f")
    assert found.keys() == tensors.keys() and all(same(found[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "f", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "why": "\u00e9"}
    assert sum(told) == sum(value.nbytes for value in tensors.values())
    header_bytes = int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def read() -> Tensor:
        assert sum(each() is not None for each in alive) <= 1
        tensor = torch.ones(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    specs = [TensorSpec(name=str(number), dtype="F32", shape=(1000,)) for number in range(5)]
    items = [Item(spec=spec, file="f", did="copied", source="", read=read) for spec in specs]
    write_shard(tmp_path / "f", items, {}, lambda num_bytes: None)
    assert len(alive) == 5


# ---------------------------------------------------------------- build-mixed


def test_a_mixed_checkpoint_copies_every_byte_of_both_sources(export: Path, base: Path, tmp_path: Path) -> None:
    kept = f"{BLOCK}.mlp.down_proj"
    out = write(plan_mixed(export, base, keep=["*.down_proj"]), tmp_path / "out")
    made, quantized, plain = contents(out), contents(export), contents(base)
    gone = {f"{kept}.{leaf}" for leaf in ("weight_scale", "weight_scale_2", "input_scale", "input_quantizer._amax")}
    assert made.keys() == quantized.keys() - gone
    for name, tensor in made.items():
        assert same(tensor, plain[name] if name == f"{kept}.weight" else quantized[name]), name
    assert made[f"{kept}.weight"].dtype == torch.bfloat16
    assert made[f"{BLOCK}.self_attn.q_proj.weight"].dtype == torch.uint8


def test_a_mixed_checkpoint_says_what_it_holds(export: Path, base: Path, tmp_path: Path) -> None:
    out = write(plan_mixed(export, base, keep=["*.down_proj"]), tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "hf_quant_config.json", "tokenizer.json", "model.safetensors.index.json"),
        *("model-1.safetensors", "model-2.safetensors"),
    }
    flat = read_json(out / "config.json")["quantization_config"]
    section = read_json(out / "hf_quant_config.json")["quantization"]
    assert flat["ignore"] == section["exclude_modules"] == ["lm_head", f"{BLOCK}.mlp.down_proj"]
    assert flat["swap_weight_nibbles"] is section["swap_weight_nibbles"] is False
    assert flat["producer"] == PRODUCER and section["group_size"] == 16
    index = read_json(out / "model.safetensors.index.json")
    tensors = contents(out)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    for file in ("model-1.safetensors", "model-2.safetensors"):
        with safe_open(out / file, framework="pt") as opened:
            assert set(opened.keys()) == {name for name, at in index["weight_map"].items() if at == file}
            metadata = opened.metadata()
        assert metadata["of"] == file and json.loads(metadata["quantization_config"]) == flat
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        assert layers[f"{BLOCK}.self_attn.o_proj"] == {"format": "nvfp4"}
        assert f"{BLOCK}.mlp.down_proj" not in layers and len(layers) == 6


def test_a_mixed_checkpoint_opens_and_loads_with_the_kept_modules_in_bf16(
    export: Path, base: Path, tmp_path: Path
) -> None:
    out = write(plan_mixed(export, base, keep=["*.down_proj", "*.o_proj"]), tmp_path / "out")
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.quantization is not None and checkpoint.quantization.format == "nvfp4"
        assert checkpoint.spec(f"{BLOCK}.mlp.down_proj.weight").dtype == "BF16"
    found = formats_of(out, "nvfp4")
    kept = {"lm_head", f"{BLOCK}.mlp.down_proj", f"{BLOCK}.self_attn.o_proj"}
    assert {name for name, kind in found.items() if kind is nn.Linear} == kept
    assert sum(kind is QuantLinear for kind in found.values()) == 5


def test_the_flux_preset_keeps_what_is_published_and_loads_as_a_pipeline(flux: Path, tmp_path: Path) -> None:
    plain = contents(flux / "transformer")
    blocks = linears_of(plain, r"transformer_blocks\.")
    export = tmp_path / "export"
    export.mkdir()
    save_file(
        to_nvfp4(plain, [name for name in blocks if name != "single_transformer_blocks.0.proj_out"]),
        export / "diffusion_pytorch_model.safetensors",
    )
    flat = {"quant_algo": "NVFP4", "quant_method": "modelopt", "group_size": 16, "ignore": ["proj_out"]}
    write_json(export / "config.json", read_json(flux / "transformer" / "config.json") | {"quantization_config": flat})
    out = write(plan_mixed(export, flux / "transformer", preset="flux1-nvfp4"), tmp_path / "out")
    published = re.compile(
        r"transformer_blocks\.\d+\.(norm1\.linear|norm1_context\.linear|ff(_context)?\.net\.(0\.proj|2))"
        r"|single_transformer_blocks\.\d+\.(norm\.linear|proj_mlp)"
    )
    made, quantized = contents(out), contents(export)
    expected = {name for name in blocks if published.fullmatch(name)}
    assert len(expected) == 8
    for name, tensor in made.items():
        module = name.rpartition(".")[0]
        assert same(tensor, (plain if module in expected else quantized)[name]), name
    assert made.keys() == {name for name in quantized if name in plain or name.rpartition(".")[0] not in expected}
    in_fp4 = {f"transformer.{name}" for name in blocks if f"{name}.weight_scale" in made}
    found = formats_of(out, "auto")
    assert {name for name, kind in found.items() if kind is QuantLinear} == in_fp4 and len(in_fp4) == 11
    biased = "transformer_blocks.0.norm1.linear.bias"
    (tmp_path / "less").mkdir()
    save_file({name: value for name, value in plain.items() if name != biased}, tmp_path / "less" / "a.safetensors")
    with pytest.raises(ToolError, match=f"1 problem\n  - {biased}: not in "):
        plan_mixed(export, tmp_path / "less", preset="flux1-nvfp4")


def test_a_base_in_fp32_is_rounded_to_bf16(export: Path, base: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    exact = {name: value.float() * 1.001 for name, value in contents(base).items()}
    save_file(exact, wide / "model.safetensors")
    plan = plan_mixed(export, wide, keep=["*.down_proj"])
    name = f"{BLOCK}.mlp.down_proj.weight"
    assert next(item.did for item in plan.items if item.spec.name == name) == "from base, rounded to BF16"
    assert same(contents(write(plan, tmp_path / "out"))[name], exact[name].to(torch.bfloat16))


def test_swapped_nibbles_are_written_down_when_they_are_there(export: Path, base: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "swapped"
    swapped.mkdir()
    tensors = contents(export)
    turned = {name: value // 16 + value % 16 * 16 for name, value in tensors.items() if value.dtype == torch.uint8}
    save_file(tensors | turned, swapped / "model.safetensors")
    for name in ("config.json", "hf_quant_config.json"):
        (swapped / name).write_bytes((export / name).read_bytes())
    plan = plan_mixed(swapped, base, keep=["*.down_proj"], swap_nibbles=True)
    assert "verified" in plan.checked
    out = write(plan, tmp_path / "out")
    assert read_json(out / "config.json")["quantization_config"]["swap_weight_nibbles"] is True
    name = f"{BLOCK}.mlp.up_proj.weight"
    assert same(contents(out)[name], turned[name])
    with open_checkpoint(out) as checkpoint:
        assert [each.declared.swap_nibbles for each in checkpoint.readings] == [True]
        assert same(checkpoint.rows(name), tensors[name])  # in checkpoint form again
    for source, swap in ((swapped, False), (swapped, None), (export, True)):
        with pytest.raises(ToolError, match="nibble first, linear scales fits the BF16 rows better"):
            plan_mixed(source, base, keep=["*.down_proj"], swap_nibbles=swap)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"keep": ["*.down_prj"]}, r"'\*\.down_prj': matches none of"),
        ({"keep": ["*.q_proj"]}, r"q_proj would be BF16 and .*k_proj, .*v_proj not, but engines fuse them"),
        ({"preset": "flux1-nvfp4"}, "preset 'flux1-nvfp4': matches no module"),
        ({"preset": "flux9"}, "preset 'flux9': unknown; known: none, flux1-nvfp4"),
    ],
)
def test_build_mixed_refuses_patterns_that_cannot_be_meant(
    export: Path, base: Path, options: dict[str, Any], why: str
) -> None:
    with pytest.raises(ToolError, match=why):
        plan_mixed(export, base, **options)


def test_build_mixed_refuses_a_base_that_cannot_stand_in(export: Path, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    weights = contents(base)
    weights[f"{BLOCK}.mlp.down_proj.weight"] = torch.zeros(128, 64, dtype=torch.bfloat16)
    weights[f"{BLOCK}.self_attn.o_proj.weight"] = torch.zeros(128, 128, dtype=torch.uint8)
    del weights[f"{BLOCK}.mlp.up_proj.weight"]
    save_file(weights, other / "model.safetensors")
    with pytest.raises(ToolError, match="3 problems") as caught:
        plan_mixed(export, other, keep=["*.down_proj", "*.o_proj", "*.gate_proj", "*.up_proj"])
    for why in (r"down_proj.weight: \[128, 64\]", r"o_proj.weight: U8", r"up_proj.weight: not in"):
        assert re.search(why, str(caught.value))


def test_build_mixed_refuses_the_weights_of_another_model(export: Path, tmp_path: Path) -> None:
    other = save(tiny_llama(seed=1, num_layers=1), tmp_path / "other")
    with pytest.raises(ToolError, match=r"is not the base of .*relative error 1\.\d+ at best; give the BF16 model"):
        plan_mixed(export, other, keep=["*.down_proj"])


def test_build_mixed_refuses_what_is_no_nvfp4_export(base: Path, export: Path) -> None:
    with pytest.raises(ToolError, match="declares format none; expected a ModelOpt export in nvfp4"):
        plan_mixed(base, base)


# ---------------------------------------------------------------- convert-fp8


def amax_state(weights: dict[str, Tensor], modules: list[str]) -> dict[str, Tensor]:
    """What modelopt keeps after calibration, in BF16: the inputs' part is made up."""
    state: dict[str, Tensor] = {}
    for number, module in enumerate(modules):
        state[f"{module}.weight_quantizer._amax"] = weights[f"{module}.weight"].abs().max()
        state[f"{module}.input_quantizer._amax"] = torch.tensor(1.0 + number).to(torch.bfloat16)
    return state


def by_torch(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers by torch alone; a 0-d FP32 scale divides BF16 in BF16."""
    scale = amax.float() / 448
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def saved_state(state: dict[str, Tensor], path: Path, weights: dict[str, Tensor]) -> Path:
    """A whole training state, as modelopt saves it, or the scales alone."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"modelopt_state": {"version": "1"}, "model_state_dict": weights | state}, path)
    return path


@pytest.mark.parametrize("file", ["backbone.pt", "amax.safetensors"])
def test_fp8_weights_are_torch_s_and_everything_else_is_copied(flux: Path, tmp_path: Path, file: str) -> None:
    plain = contents(flux / "transformer")
    modules = linears_of(plain, r"transformer_blocks\.|x_embedder")
    state = amax_state(plain, modules)
    found = read_scales(saved_state(state, tmp_path / file, plain))
    assert found.keys() == state.keys()
    out = write(plan_fp8(flux / "transformer", found), tmp_path / "out")
    made = contents(out)
    kept = re.compile(r".*\.(norm1|norm1_context|norm)\.linear|.*\.ff(_context)?\.net\.(0\.proj|2)")
    encoded = [name for name in modules if not kept.fullmatch(name)]
    assert "transformer_blocks.0.attn.to_q" in encoded and len(encoded) == len(modules) - 7
    for module in encoded:
        codes, scale = by_torch(plain[f"{module}.weight"], state[f"{module}.weight_quantizer._amax"])
        assert same(made[f"{module}.weight"], codes), module
        assert same(made[f"{module}.weight_scale"], scale)
        assert same(made[f"{module}.input_scale"], state[f"{module}.input_quantizer._amax"].float() / 448)
    square = made["transformer_blocks.0.attn.to_q.weight"]
    assert square.shape == (64, 64) and not torch.equal(square.float(), square.float().t())
    fresh = {f"{module}.{leaf}" for module in encoded for leaf in ("weight", "weight_scale", "input_scale")}
    assert made.keys() == plain.keys() | fresh
    assert all(same(made[name], plain[name]) for name in plain.keys() - fresh)
    flat = read_json(out / "config.json")["quantization_config"]
    assert flat["quant_algo"] == "FP8" and flat["quant_method"] == "modelopt"
    assert {name.removesuffix(".weight") for name in plain if plain[name].ndim == 2} - set(encoded) >= set(
        flat["ignore"]
    )
    in_fp8 = {name for name, kind in formats_of(out, "auto").items() if kind is QuantLinear}
    assert in_fp8 == {f"transformer.{name}" for name in encoded}


def test_scales_in_the_export_serve_as_well_as_a_state(base: Path, tmp_path: Path) -> None:
    plain = contents(base)
    modules = linears_of(plain, r"\.layers\.")
    state = amax_state(plain, modules)
    as_scales = {
        name.replace("weight_quantizer._amax", "weight_scale").replace(
            "input_quantizer._amax", "input_scale"
        ): value.float() / 448
        for name, value in state.items()
    }
    results = []
    for number, extra in enumerate((state, as_scales)):
        source = tmp_path / str(number)
        source.mkdir()
        save_file(plain | extra, source / "model.safetensors")
        write_json(source / "config.json", read_json(base / "config.json"))
        results.append(contents(write(plan_fp8(source), tmp_path / f"out{number}")))
    assert results[0].keys() == results[1].keys()
    assert all(same(results[0][name], results[1][name]) for name in results[0])
    assert set(formats_of(tmp_path / "out0", "fp8").values()) == {QuantLinear, nn.Linear}
    # As a source, it is in FP8 already: its bytes are copied, and BF16 comes from the base.
    other = {name: 2 * value for name, value in state.items()}
    again = plan_fp8(tmp_path / "out0", other, base=base, keep=["*.o_proj"])
    third = contents(write(again, tmp_path / "again"))
    kept = f"{BLOCK}.self_attn.o_proj"
    assert third.keys() == results[0].keys() - {f"{kept}.weight_scale", f"{kept}.input_scale"}
    assert all(same(value, (plain if name == f"{kept}.weight" else results[0])[name]) for name, value in third.items())
    with pytest.raises(ToolError, match="stays BF16, but the export has it in F8_E4M3; give the base"):
        plan_fp8(tmp_path / "out0", keep=["*.o_proj"])


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("how", ["pickle", "torch", "torch_legacy"])
def test_a_state_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    state = {"a.weight_quantizer._amax": torch.tensor(1.0), "x": Bomb(tmp_path / "ran")}
    path = tmp_path / "backbone.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(ToolError, match="refused, since reading it would run code"):
        read_scales(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False) if how == "torch" else None
    assert (tmp_path / "ran").exists() == (how == "torch")  # the bomb is a real one


def test_a_state_without_scales_is_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "a.pt")
    save_file({"a.weight": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    for name, why in (
        ("a.pt", "no tensor ends with"),
        ("a.safetensors", "no tensor ends with"),
        ("b.safetensors", "cannot be read as safetensors"),
        ("c.pt", "no such file"),
    ):
        with pytest.raises(ToolError, match=why):
            read_scales(tmp_path / name)


def test_convert_fp8_lists_every_scale_that_is_wrong(base: Path) -> None:
    plain = contents(base)
    q, k, v, o = (f"{BLOCK}.self_attn.{name}_proj" for name in "qkvo")
    state = amax_state(plain, [q, k, v, o])
    del state[f"{q}.input_quantizer._amax"]
    state[f"{k}.weight_quantizer._amax"] = torch.ones(64, 1)
    state[f"{v}.input_quantizer._amax"] = torch.tensor(math.inf)
    state[f"{o}.weight_quantizer._amax"] = torch.tensor(-1.0)
    with pytest.raises(ToolError, match="4 problems") as caught:
        plan_fp8(base, state)
    for why in (
        "q_proj: has no input_quantizer._amax or input_scale",
        r"k_proj.*\[64, 1\]",
        "v_proj.*inf",
        "o_proj.*-1",
    ):
        assert re.search(why, str(caught.value)), why


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"family": "sd3"}, "family 'sd3': unknown; known: auto, none, flux"),
        ({"keep": ["nothing.*"]}, r"'nothing\.\*': matches none of"),
        ({}, "no module has scales; give the calibrated state"),
    ],
)
def test_convert_fp8_refuses_what_it_cannot_start_with(base: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ToolError, match=why):
        plan_fp8(base, **options)


def test_convert_fp8_refuses_an_export_in_another_format(export: Path) -> None:
    with pytest.raises(ToolError, match="declares format nvfp4; expected fp8, or none"):
        plan_fp8(export)


def test_weights_beyond_what_was_calibrated_are_clipped_and_reported(base: Path, tmp_path: Path) -> None:
    plain = contents(base)
    modules = [f"{BLOCK}.mlp.down_proj", f"{BLOCK}.mlp.up_proj"]
    state = amax_state(plain, modules)
    name = f"{modules[0]}.weight"
    state[f"{modules[0]}.weight_quantizer._amax"] /= 2
    plan = plan_fp8(base, state)
    codes = contents(write(plan, tmp_path / "out"))[name]
    warnings = plan.report()["warnings"]
    assert len(warnings) == 1 and re.match(rf"{name}: up to .*: is clipped; another model's state\?", warnings[0])
    assert codes.float().abs().max() == 448
    assert same(codes, by_torch(plain[name], state[f"{modules[0]}.weight_quantizer._amax"])[0])


def test_only_matrices_become_fp8_and_fp32_stays_fp32(base: Path, tmp_path: Path) -> None:
    source, other = tmp_path / "source", tmp_path / "other"
    linear = torch.randn(32, 16).to(torch.bfloat16)
    weights = {"conv.weight": torch.randn(8, 4, 2, 2), "time.weight": torch.randn(8, 8), "a.weight": linear}
    for folder, tensors in ((source, weights), (other, {name: value * 2 for name, value in weights.items()})):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        write_json(folder / "config.json", {})
    plan = plan_fp8(source, amax_state(weights, ["conv", "time", "a"]), base=other, keep=["time"])
    assert plan.report()["warnings"] == ["conv: has scales, but is no matrix: stays plain"]
    made = contents(write(plan, tmp_path / "out"))
    assert same(made["conv.weight"], weights["conv.weight"])
    assert same(made["time.weight"], weights["time.weight"] * 2)
    assert made["a.weight"].dtype == torch.float8_e4m3fn and len(made) == 5


def test_a_zero_weight_gets_scale_one(base: Path, tmp_path: Path) -> None:
    plain = contents(base)
    name = f"{BLOCK}.mlp.down_proj"
    plain[f"{name}.weight"].zero_()
    source = tmp_path / "zero"
    source.mkdir()
    save_file(plain | amax_state(plain, [name]), source / "model.safetensors")
    write_json(source / "config.json", {})
    made = contents(write(plan_fp8(source), tmp_path / "out"))
    assert made[f"{name}.weight_scale"] == 1 and not made[f"{name}.weight"].view(torch.uint8).any()


# ---------------------------------------------------------------- keep lists


@pytest.mark.parametrize("family", ["flux", "flux2", "wan", "qwen_image"])
def test_published_lists_name_modules_that_their_classes_have(family: str) -> None:
    modules = [name for name, module in tiny_transformer(family, seed=0).named_modules() if hasattr(module, "weight")]
    preset = PRESETS["flux1-nvfp4" if family == "flux" else f"{family}-nvfp4"]
    deep = re.compile(r"(transformer_)?blocks\.[1-9]\d*\.\*")  # the tiny classes have one block
    for pattern in (*preset, *KEEP_BF16[family]):
        found = [name for name in modules if re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), name)]
        assert found or deep.fullmatch(pattern), pattern


def test_the_help_names_every_list() -> None:
    assert tools.PRESETS.split(", ") == [*PRESETS]
    assert sorted(tools.KEEP_LISTS.split(", ")) == sorted(["auto", *KEEP_BF16])


# ---------------------------------------------------------------- commands


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    app = typer.Typer()
    for command in (tools.build_mixed, tools.convert_fp8, tools.calibrate):
        app.command()(command)

    def run(*args: str | Path) -> tuple[str, str]:
        """stdout and stderr of a command."""
        app([str(arg) for arg in args], standalone_mode=False)
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_build_mixed_reports_every_tensor_and_a_dry_run_writes_nothing(
    export: Path, base: Path, tmp_path: Path, shell: Callable[..., tuple[str, str]]
) -> None:
    args = ("build-mixed", export, "--base", base, "--keep-bf16", "*.down_proj", "--out", tmp_path / "out", "--json")
    planned = json.loads(shell(*args, "--dry-run")[0])
    assert planned["dry_run"] and list(tmp_path.iterdir()) == []
    told, err = shell(*args)
    assert "write tensors ..." in err
    report = read_json(tmp_path / "out" / REPORT)
    shown = json.loads(told)
    assert shown["out"] == str(tmp_path / "out") and shown["counts"] == report["counts"]
    assert report["tensors"] == planned["tensors"] == shown["tensors"] and report["seconds"] >= 0
    assert report["tool"] == "transfuse build-mixed" and report["inputs"] == [str(export), str(base)]
    tensors = contents(tmp_path / "out")
    rows = {row["name"]: row for row in report["tensors"]}
    assert report["counts"] == {"copied": len(tensors) - 1, "from base": 1, "dropped": 4}
    assert {name for name, row in rows.items() if row["did"] != "dropped"} == tensors.keys()
    assert all(rows[name]["bytes"] == value.nbytes for name, value in tensors.items())
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir() if path.name != REPORT}
    assert report["files"] == sizes
    text, _ = shell(*args[:-1], "--overwrite")
    assert re.match(r"transfuse build-mixed: wrote in .* s .*out: .* 1 from base.* 6 modules quantized", text)


def test_what_does_not_fit_ends_with_the_exit_code_of_refusals(
    export: Path, base: Path, tmp_path: Path, shell: Callable[..., tuple[str, str]]
) -> None:
    mixed = ("build-mixed", export, "--base", base, "--out")
    refused = [
        (*mixed, export),
        (*mixed, tmp_path / "out", "--keep-bf16", "nothing"),
        ("build-mixed", tmp_path, "--base", base, "--out", tmp_path / "out"),
        ("convert-fp8", base, "--out", tmp_path / "out"),
        ("convert-fp8", base, "--out", tmp_path / "out", "--state", base / "config.json"),
        ("calibrate", base, "--out", tmp_path / "out"),
        ("calibrate", base, "--out", tmp_path / "out", "--data", base / "config.json"),
    ]
    for args in refused:
        with pytest.raises(PlanError) as caught:
            shell(*args)
        assert exits.exit_code(caught.value) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_breaks_leaves_nothing(base: Path, tmp_path: Path, shell: Callable[..., tuple[str, str]]) -> None:
    plain = contents(base)
    name = f"{BLOCK}.mlp.down_proj"
    save_file(amax_state(plain, [name]), tmp_path / "amax.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    plain[f"{name}.weight"][1, 2] = math.nan
    save_file(plain, broken / "model.safetensors")
    write_json(broken / "config.json", {})
    with pytest.raises(WeightUpdateError, match=r"down_proj\.weight holds nan at \[1, 2\]; repair the weights"):
        shell("convert-fp8", broken, "--state", tmp_path / "amax.safetensors", "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["amax.safetensors", "broken"]


def test_a_run_that_is_told_to_end_cleans_up(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(KeyboardInterrupt),
        tools.refusals(),
        output_folder(tmp_path / "out", "transfuse test", [], overwrite=False) as folder,
    ):
        (folder / "half").write_text("written")
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("SIGTERM was not noticed")
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) is before
