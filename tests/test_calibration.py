"""Calibration by nvidia-modelopt: the activation scales are those that the data has, and how far others drifted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from launch import tools
from quant.calibration import prompt_calls, read_calls
from quant.checkpoint import open_checkpoint
from quant.drift import activation_amax, amax_of, scale_drift
from quant.formats import FORMATS
from quant.output import REPORT, ToolError
from tests.test_cli import byte_tokenizer
from tests.tiny import save, tiny_llama
from tests.tiny_dit import tiny_inputs, tiny_transformer, write_tiny_pipeline
from weight_update.errors import PlanError

# modelopt warns of newer transformers, of its own deprecated calls, and of CUDA that is not there.
pytestmark = pytest.mark.filterwarnings("ignore")

DIVISOR = {"nvfp4": 6 * 448, "fp8": 448}


def input_amaxes(model: nn.Module, calls: list[dict[str, Any]]) -> dict[str, float]:
    """What forward hooks see: the largest magnitude that enters each linear."""
    seen: dict[str, float] = {}

    def hook(name: str) -> Any:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), args[0].abs().max().item())

        return look

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for call in calls:
            model(**call)
    return seen


def calibrate(model: Path, out: Path, **options: Any) -> None:
    tools.calibrate(model, out, **{"prompt": [], "keep_bf16": [], "max_calls": 512, "max_length": 2048, **options})


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
def test_a_diffusion_transformer_gets_the_scales_of_its_recorded_inputs(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = write_tiny_pipeline(tmp_path / "pipeline", family, seed=3)
    calls = [tiny_inputs(family, seed) for seed in range(3)]
    recorded = {f"{i}.{name}": torch.as_tensor(value) for i, call in enumerate(calls) for name, value in call.items()}
    save_file({name: value.contiguous() for name, value in recorded.items()}, tmp_path / "inputs.safetensors")
    out, data = tmp_path / "out", tmp_path / "inputs.safetensors"

    calibrate(pipeline, out, data=data, dry_run=True)
    assert not out.exists() and "would write" in capsys.readouterr().out
    calibrate(pipeline, out, data=data, keep_bf16=["*.to_add_out"], as_json=True)

    report = json.loads((out / REPORT).read_text())
    told = json.loads(capsys.readouterr().out)  # modelopt prints, and nothing of it comes here
    assert told["tensors"] == report["tensors"] and report["options"]["calls"] == 3 and report["warnings"] == []
    tensors = load_file(out / "diffusion_pytorch_model.safetensors")
    amaxes = input_amaxes(tiny_transformer(family, seed=3), calls)
    scaled = {name.removesuffix(".input_scale"): value for name, value in tensors.items() if "input_scale" in name}
    assert len(scaled) == report["quantized_modules"] > 8
    for module, scale in scaled.items():
        assert math.isclose(scale.item(), amaxes[module] / 2688, rel_tol=1e-6), module
        assert tensors[f"{module}.weight"].dtype == torch.uint8
    plain = {name for name in amaxes if f"{name}.input_scale" not in tensors}
    assert {name for name in amaxes if name.endswith("to_add_out") or name.startswith("time_text_embed")} <= plain
    with open_checkpoint(pipeline, components={"transformer": out}) as checkpoint:
        assert checkpoint.spec("transformer.transformer_blocks.0.attn.to_q.weight").dtype == "U8"


def test_a_causal_lm_is_calibrated_with_prompts_and_compared_with_what_a_trainer_carries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(tiny_llama(seed=0, num_layers=1), tmp_path / "model")
    byte_tokenizer().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / "prompts.txt").write_text("one two\n\nthree\n")
    # Loaded as transformers loads it: its rotary table stays FP32.
    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    amaxes = input_amaxes(model, prompt_calls(["one two", "three"], source))
    carried = {f"{name}.input_quantizer._amax": torch.tensor(2 * amax) for name, amax in amaxes.items()}
    save_file(carried, tmp_path / "state.safetensors")

    options = {"data": tmp_path / "prompts.txt", "against": tmp_path / "state.safetensors"}
    calibrate(source, tmp_path / "out", format="fp8", **options)

    assert "7 modules: smallest 2.000, geometric mean 2.000" in capsys.readouterr().out
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name: value for name, value in tensors.items() if name.endswith("input_scale")}
    assert len(scales) == 7
    for name, scale in scales.items():
        assert math.isclose(scale.item(), amaxes[name.removesuffix(".input_scale")] / 448, rel_tol=1e-6), name
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    drift = json.loads((tmp_path / "out" / REPORT).read_text())["drift"]
    assert drift["extra"] == ["lm_head"] and drift["missing"] == [] and drift["far"] == 7
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.quantization is not None and checkpoint.quantization.format == "fp8"


# ---------------------------------------------------------------- data


def test_recorded_calls_are_read_in_their_order(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    tensors = {f"{i}.timestep": torch.tensor([float(i)]) for i in range(11)} | {
        "2.img_shapes": torch.tensor([[[1, 4, 2]]])
    }
    save_file(tensors, tmp_path / "calls.safetensors")
    calls = read_calls(tmp_path / "calls.safetensors", model)
    assert [call["timestep"].item() for call in calls] == list(range(11))
    assert calls[2]["img_shapes"] == [[[1, 4, 2]]] and "img_shapes" not in calls[1]
    assert len(read_calls(tmp_path / "calls.safetensors", model, max_calls=4)) == 4
    save_file({"input_ids": torch.arange(12).view(3, 4)}, tmp_path / "ids.safetensors")
    ids = read_calls(tmp_path / "ids.safetensors", model, max_length=2)
    assert [call["input_ids"].tolist() for call in ids] == [[[0, 1]], [[4, 5]], [[8, 9]]]


def test_data_that_no_model_can_take_is_refused(tmp_path: Path) -> None:
    pipeline = write_tiny_pipeline(tmp_path / "pipeline", "flux", seed=0) / "transformer"
    save_file({"timestep": torch.ones(1)}, tmp_path / "bare.safetensors")
    save_file({"0.timestep": torch.ones(1)}, tmp_path / "part.safetensors")
    (tmp_path / "a.jsonl").write_text('{"txt": "a"}\n')
    (tmp_path / "a.csv").write_text("a")
    for name, why in (
        ("bare.safetensors", "expected '<call>.<argument>'"),
        ("a.jsonl", "expected a JSON object with 'text'"),
        ("a.csv", r"\.csv; expected one of \.safetensors, \.txt, \.jsonl"),
        ("b.txt", "no such file"),
    ):
        with pytest.raises(ToolError, match=why):
            read_calls(tmp_path / name, pipeline)
    with pytest.raises(ToolError, match="takes no prompts; record its inputs"):
        prompt_calls(["a"], pipeline)
    with pytest.raises(PlanError, match=r"call 1 of 1: FluxTransformer2DModel refuses \{'timestep': \[1\]\}"):
        calibrate(pipeline, tmp_path / "out", data=tmp_path / "part.safetensors")
    for options, why in (
        ({"device": "cuda:99"}, "device 'cuda:99': .*expected cpu, or cuda:N where torch sees a GPU"),
        ({"device": "gpu"}, "device 'gpu': .*expected cpu"),
        ({"keep_bf16": ["*.to_q", "*.to_qq"]}, r"1 problem\n  - pattern '\*\.to_qq': matches none of \d+ modules"),
    ):
        for dry_run in (True, False):
            with pytest.raises(PlanError, match=why):
                calibrate(pipeline, tmp_path / "out", data=tmp_path / "part.safetensors", dry_run=dry_run, **options)
    with pytest.raises(PlanError, match="format 'int9': no recipe; known: nvfp4, fp8"):
        calibrate(pipeline, tmp_path / "out", data=tmp_path / "part.safetensors", format="int9")
    assert not any(path.name.startswith((".", "out")) for path in tmp_path.iterdir())


# ---------------------------------------------------------------- drift


def test_drift_is_carried_over_calibrated_with_the_farthest_first() -> None:
    drift = scale_drift({"a": 2.0, "b": 1.0, "c": 4.0, "d": 1.0}, {"a": 2.0, "b": 4.0, "c": 0.5, "e": 9.0})
    assert [(row.module, row.calibrated, row.carried, row.ratio) for row in drift.rows] == [
        ("c", 4.0, 0.5, 0.125),
        ("b", 1.0, 4.0, 4.0),
        ("a", 2.0, 2.0, 1.0),
    ]
    assert (drift.smallest, drift.median, drift.largest) == (0.125, 1.0, 4.0)
    assert math.isclose(drift.geometric_mean, 0.5 ** (1 / 3))
    assert (drift.far, drift.missing, drift.extra) == (2, ("d",), ("e",))


def test_drift_of_nothing_in_common_is_none() -> None:
    drift = scale_drift({"a": 1.0}, {"b": 1.0})
    assert drift.rows == () and drift.geometric_mean == 1.0 and drift.far == 0


def test_scales_that_are_no_scales_are_listed() -> None:
    with pytest.raises(ToolError, match="3 problems") as caught:
        scale_drift({"a": 0.0, "b": math.nan}, {"a": 1.0, "c": math.inf})
    assert all(each in str(caught.value) for each in ("a: calibrated 0.0", "b: calibrated nan", "c: carried inf"))


@pytest.mark.parametrize("format", DIVISOR)
def test_scales_and_amaxes_of_any_format_compare(tmp_path: Path, format: str) -> None:
    tensors = {"a.input_scale": torch.tensor(3.0 / DIVISOR[format]), "b.input_quantizer._amax": torch.tensor(5.0)}
    both = tensors | {"b.input_scale": torch.tensor(77.0), "b.weight": torch.ones(2, 2)}
    assert amax_of(both, FORMATS[format]) == pytest.approx({"a": 3.0, "b": 5.0})
    save_file(both, tmp_path / "model.safetensors")
    assert activation_amax(tmp_path / "model.safetensors", FORMATS[format]) == pytest.approx({"a": 3.0, "b": 5.0})
    algo = {"quantization_config": {"quant_algo": format.upper(), "group_size": 16 if format == "nvfp4" else None}}
    (tmp_path / "config.json").write_text(json.dumps(algo))
    other = FORMATS["fp8" if format == "nvfp4" else "nvfp4"]  # the folder's own format counts
    assert activation_amax(tmp_path, other) == pytest.approx({"a": 3.0, "b": 5.0})
