"""Families and repositories, and the folders that hold them: what is found, under which names, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cold import encode_all, read_back
from local import cold
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_dit import COMPONENTS, CONFIGS, tiny_transformer, write_tiny_pipeline
from torch import Tensor, nn

from quant.checkpoint import CheckpointError, open_checkpoint
from quant.families import FAMILIES, REPOSITORIES, FamilyError, family_of, repository_at
from quant.formats import DTYPES, FORMATS, encode, typed
from quant.models import build_model, fused_group, parameters_of, placements_of
from quant.modules import QuantModule
from quant.name_maps import NAME_MAPS
from quant.pipelines import PipelineError, components_of, pipeline_folder
from service.denoising import read_recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


def linears(model: nn.Module) -> dict[str, bool]:
    """Name of every linear -> whether it is quantized."""
    return {
        name: isinstance(module, QuantModule)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantModule)
    }


def quantized(model: nn.Module) -> set[str]:
    return {name for name, is_quantized in linears(model).items() if is_quantized}


def as_stored(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Encoded bytes in the dtypes and shapes of a checkpoint, without the component's name."""
    found = {}
    for spec in (placement.tensor for placement in placements_of(model)):
        flat = tensors[spec.name].reshape(-1).contiguous().view(torch.uint8).view(DTYPES[spec.dtype])
        found[spec.name.partition(".")[2]] = flat.reshape(spec.shape)
    return found


def quantize_folder(folder: Path, fmt: str, exclude: list[str]) -> dict[str, Tensor]:
    """Turn the weights of a component's folder into a ModelOpt export; returns its tensors."""
    model = build_model(folder, fmt, "plain", exclude=exclude)
    weights = load_file(folder / WEIGHTS)
    tensors = encode_all(model, {f"transformer.{name}": weight.bfloat16() for name, weight in weights.items()})
    tensors = as_stored(model, tensors)
    kept = [name for name, is_quantized in linears(model.get_submodule("transformer")).items() if not is_quantized]
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": fmt.upper(), "ignore": kept}
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


# ---------------------------------------------------------------- rows


def test_every_family_is_a_class_of_diffusers_with_the_blocks_and_names_that_its_row_says() -> None:
    assert FAMILIES.keys() == CONFIGS.keys()
    for name, row in FAMILIES.items():
        model = tiny_transformer(name, 0)
        assert type(model).__name__ == row.class_name and row.components == COMPONENTS[name]
        assert len(model.get_submodule(row.blocks)) == 1
        assert row.name_map in NAME_MAPS and bool(row.name_map) == bool(row.original)
        left = [each for each in row.exclude if not any(_globs(each, path) for path, _ in model.named_modules())]
        assert not left, f"patterns of {name} that no module has: {left}"


def _globs(pattern: str, name: str) -> bool:
    head, star, tail = pattern.partition("*")
    return name.startswith(head) and name.endswith(tail) if star else name == pattern


def test_recipes_keep_the_first_and_last_blocks_of_the_published_depth_only() -> None:
    wan = FAMILIES["wan"]
    assert wan.kept(39) == wan.exclude
    kept = set(wan.kept(40)) - set(wan.exclude)
    assert kept == {f"blocks.{number}.*" for number in (0, 1, 2, 37, 38, 39)}
    image = FAMILIES["qwen_image"]
    kept = set(image.kept(60)) - set(image.exclude)
    assert kept == {f"transformer_blocks.{number}.*" for number in (0, 1, 58, 59)}


def test_an_unknown_class_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(FamilyError, match=r"known: Flux.*nearest: .*Flux2Transformer2DModel"):
        family_of("Flux3Transformer2DModel")


@pytest.mark.parametrize(
    "path",
    [
        "cache/models--black-forest-labs--FLUX.2-dev-NVFP4/snapshots/142b87e70bc3006937b7093d89ff287b5f59f071",
        "black-forest-labs/FLUX.2-dev-NVFP4",
        "downloads/FLUX.2-dev-NVFP4",
        "FLUX.2-dev-NVFP4/flux2-dev-nvfp4-mixed.safetensors",
    ],
)
def test_a_repository_is_known_by_where_it_was_downloaded_to(path: str) -> None:
    row = repository_at(Path("/models") / path)
    assert row is not None and row.name == "black-forest-labs/FLUX.2-dev-NVFP4" and row.swap_nibbles


def test_other_folders_are_no_repository_and_rows_point_at_rows() -> None:
    assert repository_at(Path("/models/FLUX.2-dev-NVFP4-mine/transformer")) is None
    for row in REPOSITORIES.values():
        assert row.family in FAMILIES and (not row.base or row.base in REPOSITORIES)
        assert not row.only or row.only in FAMILIES[row.family].components


@pytest.mark.parametrize(
    ("name", "fmt", "group"),
    [
        ("a.attn.to_k.weight", "nvfp4", "a.attn.to_qkv"),
        ("a.attn.add_k_proj.weight", "nvfp4", "a.attn.add_qkv"),
        ("blocks.0.attn1.to_q.weight", "nvfp4", "blocks.0.attn1.to_qkv"),
        ("blocks.0.attn2.to_v.weight", "nvfp4", "blocks.0.attn2.to_kv"),
        ("blocks.0.attn2.to_q.weight", "nvfp4", ""),
        ("a.attn.to_out.0.weight", "nvfp4", ""),
        ("a.attn.to_k.weight", "fp8", ""),
    ],
)
def test_projections_of_one_input_share_a_global_scale_as_in_modelopts_export(name: str, fmt: str, group: str) -> None:
    assert fused_group(name, fmt) == group


# ---------------------------------------------------------------- folders


def test_a_pipeline_folder_holds_its_transformers_and_nothing_else(tmp_path: Path) -> None:
    write_tiny_pipeline(tmp_path, "wan", 0)
    with open_checkpoint(tmp_path) as checkpoint:
        expected: dict[str, Tensor] = {}
        for component in ("transformer", "transformer_2"):
            expected |= {f"{component}.{k}": v for k, v in load_file(tmp_path / component / WEIGHTS).items()}
        assert checkpoint.names() == tuple(sorted(expected))
        for name, tensor in expected.items():
            spec = checkpoint.spec(name)
            assert (spec.name, spec.shape) == (name, tuple(tensor.shape)) and name in checkpoint
            assert torch.equal(checkpoint.rows(name), tensor) and torch.equal(checkpoint.rows(name, 1, 3), tensor[1:3])
        assert "vae.encoder.weight" not in checkpoint and "transformer" not in checkpoint
        with pytest.raises(CheckpointError, match=r"no component 'vae'.*it has transformer, transformer_2"):
            checkpoint.rows("vae.encoder.weight")


def test_a_folder_of_one_transformer_is_a_pipeline_of_it_and_may_be_indexed(tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path, "flux", 0) / "transformer"
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.names() == tuple(f"transformer.{name}" for name in names)
        assert all(torch.equal(checkpoint.rows(f"transformer.{name}"), tensors[name]) for name in names)
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json names files that are not there: b.safetensors"):
        open_checkpoint(folder)


def write_index(path: Path, entries: Mapping[str, Any]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": "P", **entries}))
    return path


def test_components_that_are_null_are_absent_and_unknown_or_missing_ones_are_refused(tmp_path: Path) -> None:
    write_tiny_pipeline(tmp_path, "wan", 0)
    served = {"transformer": ["diffusers", "WanTransformer3DModel"]}
    write_index(tmp_path, served | {"transformer_2": [None, None]})
    assert components_of(tmp_path).keys() == {"transformer"}
    write_index(tmp_path, served | {"transformer_2": ["diffusers", "WanVACETransformer3DModel"]})
    with pytest.raises(FamilyError, match=r"WanVACETransformer3DModel.*nearest: WanTransformer3DModel"):
        components_of(tmp_path)
    write_index(tmp_path, served | {"transformer_3": ["diffusers", "WanTransformer3DModel"]})
    with pytest.raises(PipelineError, match=r"components that are not there: .*transformer_3/config.json"):
        components_of(tmp_path)
    write_index(tmp_path, {"vae": ["diffusers", "AutoencoderKL"]})
    with pytest.raises(PipelineError, match="names no transformer, only vae"):
        components_of(tmp_path)


# ---------------------------------------------------------------- overrides


def test_an_override_moves_one_component_and_leaks_into_no_other(tmp_path: Path) -> None:
    wan, other = write_tiny_pipeline(tmp_path / "wan", "wan", 0), write_tiny_pipeline(tmp_path / "other", "wan", 7)
    tensors = quantize_folder(other / "transformer", "nvfp4", [])
    overrides = {"transformer": other / "transformer"}
    with open_checkpoint(wan, components=overrides) as checkpoint, open_checkpoint(wan) as plain:
        second = [name for name in plain.names() if name.startswith("transformer_2.")]
        assert second == [name for name in checkpoint.names() if name.startswith("transformer_2.")]
        assert all(torch.equal(checkpoint.rows(name), plain.rows(name)) for name in second)
        assert {name.removeprefix("transformer.") for name in {*checkpoint.names()} - {*second}} == set(tensors)
    model = build_model(wan, "auto", "cutlass", components=overrides)
    formats = {row.name.partition(".")[0]: set() for row in parameters_of(model)}
    for row in parameters_of(model):
        formats[row.name.partition(".")[0]].add(row.format)
    assert formats == {"transformer": {"nvfp4", "bf16", "fp32"}, "transformer_2": {"bf16", "fp32"}}


def test_an_override_may_be_a_single_file_without_a_config(tmp_path: Path) -> None:
    flux, other = (write_tiny_pipeline(tmp_path / name, "flux", seed) for seed, name in enumerate("ab"))
    file = shutil.move(other / "transformer" / WEIGHTS, tmp_path / "mine.safetensors")
    with open_checkpoint(flux, components={"transformer": file}) as checkpoint:
        name = "transformer_blocks.0.attn.to_q.weight"
        assert torch.equal(checkpoint.rows(f"transformer.{name}"), load_file(file)[name])
    assert build_model(flux, "nvfp4", "plain", device="meta", components={"transformer": file})


def test_overrides_that_fit_nothing_are_refused_together(tmp_path: Path) -> None:
    flux, wan = (write_tiny_pipeline(tmp_path / name, name, 0) for name in ("flux", "wan"))
    with pytest.raises(PipelineError) as error:
        open_checkpoint(wan, components={"transformer_3": wan, "transformer": tmp_path / "absent"})
    text = str(error.value)
    assert "2 problem(s)" in text and "no such component; it has transformer, transformer_2; nearest:" in text
    assert "absent: not there" in text
    with pytest.raises(PipelineError, match="is a FluxTransformer2DModel, the pipeline has a WanTransformer3DModel"):
        open_checkpoint(wan, components={"transformer": flux / "transformer"})
    with pytest.raises(CheckpointError, match="not a pipeline folder, and components are given: transformer"):
        open_checkpoint(tmp_path, components={"transformer": flux})


# ---------------------------------------------------------------- formats


def test_formats_differ_by_component_and_what_is_not_named_is_what_its_checkpoint_says(tmp_path: Path) -> None:
    wan = write_tiny_pipeline(tmp_path, "wan", 0)
    model = build_model(wan, "transformer=nvfp4,transformer_2=fp8", "auto", arch=100, device="meta")
    rows = {row.name: row.format for row in parameters_of(model)}
    assert rows["transformer.blocks.0.ffn.net.2.weight"] == "nvfp4"
    assert rows["transformer_2.blocks.0.ffn.net.2.weight"] == "fp8"
    assert rows["transformer.condition_embedder.time_embedder.linear_1.weight"] == "fp32"
    assert not quantized(build_model(wan, "auto", "auto", device="meta"))
    half = build_model(wan, "transformer_2=int8_dynamic", "auto", device="meta")
    assert {name.partition(".")[0] for name in quantized(half)} == {"transformer_2"}
    with pytest.raises(PipelineError, match="transformer_4: no such component; it has transformer, transformer_2"):
        build_model(wan, "transformer_4=nvfp4", "auto", device="meta")


def test_what_a_checkpoint_excludes_stays_in_high_precision_and_what_it_quantized_does_not(tmp_path: Path) -> None:
    flux = write_tiny_pipeline(tmp_path, "flux", 0)
    by_recipe = quantized(build_model(flux, "nvfp4", "plain", device="meta"))
    assert not any(part in name for name in by_recipe for part in ("x_embedder", "time_text_embed", "norm_out"))
    assert "transformer.single_transformer_blocks.0.proj_out" in by_recipe and "transformer.proj_out" not in by_recipe
    quantize_folder(flux / "transformer", "nvfp4", ["*.to_q", "*.to_k", "*.to_v"])
    declared = quantized(build_model(flux, "auto", "plain", device="meta"))
    assert by_recipe - declared == {name for name in by_recipe if name[-5:-1] == ".to_"} and declared < by_recipe
    with pytest.raises(PipelineError, match=r"asked for fp8, and .*transformer is in nvfp4 .*; leave the format"):
        build_model(flux, "fp8", "plain", device="meta")


def test_linears_outside_of_blocks_are_quantized_where_a_checkpoint_holds_them_so(tmp_path: Path) -> None:
    flux = write_tiny_pipeline(tmp_path, "flux", 0)
    folder = flux / "transformer"
    quantize_folder(folder, "nvfp4", [])
    tensors = load_file(folder / WEIGHTS)
    stem = "norm_out.linear"
    codes, scales = torch.zeros(128, 32, dtype=torch.uint8), torch.ones(128, 4).to(torch.float8_e4m3fn)
    tensors |= {f"{stem}.weight": codes, f"{stem}.weight_scale": scales}
    tensors |= {f"{stem}.{suffix}": torch.ones(()) for suffix in ("weight_scale_2", "input_scale")}
    save_file(tensors, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"].remove(stem)
    (folder / "config.json").write_text(json.dumps(config))
    assert f"transformer.{stem}" in quantized(build_model(flux, "auto", "plain", device="meta"))


def test_modules_in_several_schemes_of_modelslim_are_each_held_in_their_own(tmp_path: Path) -> None:
    flux = write_tiny_pipeline(tmp_path, "flux", 0)
    folder = flux / "transformer"
    weights = load_file(folder / WEIGHTS)
    model = build_model(flux, "int8_dynamic", "plain", exclude=["*.to_out.0"])
    encoded = encode_all(model, {f"transformer.{name}": weight for name, weight in weights.items()})
    tensors = as_stored(model, encoded)
    static = "transformer_blocks.0.ff.net.2"
    given = {"input_scale": torch.tensor([0.25]), "input_offset": torch.tensor([3.0])}
    for suffix in ("weight", "weight_scale", "weight_offset"):
        del tensors[f"{static}.{suffix}"]
    row = FORMATS["int8_static"]
    parts = typed(row, encode(row, weights[f"{static}.weight"], given=given), tuple(weights[f"{static}.weight"].shape))
    tensors |= {f"{static}.{suffix}": part for suffix, part in (parts | given).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    dynamic = {name.removesuffix(".weight_offset") for name in tensors if name.endswith(".weight_offset")}
    schemes = {static: "W8A8"} | dict.fromkeys(dynamic, "W8A8_DYNAMIC")
    words = {name: schemes.get(name.rpartition(".")[0], "FLOAT") for name in tensors}
    (folder / "quant_model_description.json").write_text(json.dumps(words))
    served, _ = cold(flux, "plain", "auto")
    rows = {each.name: each.format for each in parameters_of(served)}
    assert rows[f"transformer.{static}.weight"] == "int8_static"
    assert {name for name, fmt in rows.items() if fmt == "int8_dynamic"} == {f"transformer.{d}.weight" for d in dynamic}
    assert rows["transformer.transformer_blocks.0.attn.to_out.0.weight"] == "bf16"
    stored = {f"transformer.{name}": each.reshape(-1).view(torch.uint8) for name, each in tensors.items()}
    assert read_back(served) == {name: each.numpy().tobytes() for name, each in stored.items()}


def test_names_that_the_class_does_not_have_are_refused_with_the_nearest(tmp_path: Path) -> None:
    flux = write_tiny_pipeline(tmp_path, "flux", 0)
    tensors = load_file(flux / "transformer" / WEIGHTS)
    tensors["transformer_blocks.0.attn.to_qq.weight"] = tensors.pop("transformer_blocks.0.attn.to_q.weight")
    save_file(tensors, flux / "transformer" / WEIGHTS)
    with pytest.raises(PipelineError) as error:
        build_model(flux, "nvfp4", "plain", device="meta")
    assert "transformer_blocks.0.attn.to_qq.weight" in str(error.value)
    assert "nearest: transformer_blocks.0.attn.to_q.weight" in str(error.value)


# ---------------------------------------------------------------- published releases


def bfl_flux2(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a tiny FLUX.2 as Black Forest Labs name and pack them: MLPs in NVFP4 with the first code in the
    high nibble, attention in BF16, q, k and v in one."""
    state = model.state_dict()
    pair = {name: "transformer_blocks.0." + name for name in ("attn", "ff", "ff_context")}
    found: dict[str, Tensor] = {}
    for ours, theirs, q in (("to_{}", "img", "norm_{}"), ("add_{}_proj", "txt", "norm_added_{}")):
        parts = [state[f"{pair['attn']}.{ours.format(x)}.weight"] for x in "qkv"]
        found[f"double_blocks.0.{theirs}_attn.qkv.weight"] = torch.cat(parts)
        for x, name in (("q", "query"), ("k", "key")):
            norm = state[f"{pair['attn']}.{q.format(x)}.weight"]
            found[f"double_blocks.0.{theirs}_attn.norm.{name}_norm.scale"] = norm
    plain = {
        "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
        "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.linear": "proj_out",
        "single_blocks.0.linear2": "single_transformer_blocks.0.attn.to_out",
    }
    found |= {f"{theirs}.weight": state[f"{ours}.weight"] for theirs, ours in plain.items()}
    for name in ("query", "key"):
        found[f"single_blocks.0.norm.{name}_norm.scale"] = state[
            f"single_transformer_blocks.0.attn.norm_{name[0]}.weight"
        ]
    shift_last = state["norm_out.linear.weight"].chunk(2)
    found["final_layer.adaLN_modulation.1.weight"] = torch.cat(shift_last[::-1])
    return {name: tensor.clone() for name, tensor in found.items()}


PACKED = {
    "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.linear_in",
    "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.linear_out",
    "double_blocks.0.txt_mlp.0": "transformer_blocks.0.ff_context.linear_in",
    "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.linear_out",
    "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
}


def write_release(hub: Path, *, high_first: bool = True) -> tuple[Path, dict[str, Tensor]]:
    """FLUX.2-dev and its NVFP4 release side by side; returns the release and what it holds in checkpoint form."""
    base = write_tiny_pipeline(hub / "FLUX.2-dev", "flux2", 5)
    model = tiny_transformer("flux2", 5)
    build = build_model(base, "nvfp4", "plain")
    weights = {f"transformer.{name}": value for name, value in model.state_dict().items()}
    encoded = as_stored(build, encode_all(build, weights))
    tensors = bfl_flux2(base, model)
    canonical = dict(model.state_dict())
    for theirs, ours in PACKED.items():
        for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
            value = encoded[f"{ours}.{suffix}"]
            canonical[f"{ours}.{suffix}"] = value
            is_swapped = high_first and suffix == "weight"
            tensors[f"{theirs}.{suffix}"] = (value >> 4 | value << 4 if is_swapped else value).contiguous()
    release = hub / "FLUX.2-dev-NVFP4"
    release.mkdir()
    save_file(tensors, release / "flux2-dev-nvfp4-mixed.safetensors")
    save_file(tensors, release / "flux2-dev-nvfp4.safetensors")
    return release, canonical


def test_a_published_release_needs_only_its_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    release, canonical = write_release(tmp_path)
    assert pipeline_folder(release) == tmp_path / "FLUX.2-dev"
    caplog.set_level("INFO")
    with open_checkpoint(release) as checkpoint:
        assert {name.removeprefix("transformer.") for name in checkpoint.names()} == set(canonical)
        for name, expected in canonical.items():
            got = checkpoint.rows(f"transformer.{name}")
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
            assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (got, expected))), name
    said = [record.getMessage() for record in caplog.records]
    assert any("swap_weight_nibbles=True by the registry" in text for text in said)
    assert any(": verified: relative error" in text for text in said)  # with the base that lies beside it
    model = build_model(release, "auto", "cutlass", device="meta")
    assert read_recipe(release, dict(model.named_children())).scheduler().config.shift == 3.0
    assert quantized(model) == {f"transformer.{ours}" for ours in PACKED.values()}


def test_loading_stops_where_the_stated_nibble_order_fits_the_base_worse(tmp_path: Path) -> None:
    release, _ = write_release(tmp_path, high_first=False)
    said = "declared is high nibble first, linear scales, but low nibble first, linear scales fits the BF16 rows better"
    with pytest.raises(PipelineError, match=said):
        open_checkpoint(release)


def test_without_a_base_the_order_of_an_nvfp4_checkpoint_is_said_to_be_unverified(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flux = write_tiny_pipeline(tmp_path, "flux", 0)
    quantize_folder(flux / "transformer", "nvfp4", [])
    with open_checkpoint(flux):
        assert any("unverified" in each.getMessage() for each in caplog.records if each.levelname == "WARNING")


def test_a_release_without_its_base_says_what_to_download(tmp_path: Path) -> None:
    release, _ = write_release(tmp_path)
    (tmp_path / "FLUX.2-dev").rename(tmp_path / "mine")
    with pytest.raises(PipelineError, match=r"holds only the transformer of black-forest-labs/FLUX.2-dev, .*download"):
        open_checkpoint(release)
    with open_checkpoint(tmp_path / "mine", components={"transformer": release}) as checkpoint:
        assert "transformer.transformer_blocks.0.ff.linear_in.weight_scale" in checkpoint
    with safe_open(release / "flux2-dev-nvfp4.safetensors", "pt") as file:
        assert "double_blocks.0.img_attn.qkv.weight" in file.keys()  # noqa: SIM118  (no mapping)
