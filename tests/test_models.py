"""Models of transformers: what they hold, how they are built, and that real weights come out as they went in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import goldens
import numpy as np
import pytest
import torch
from cold import encode_all, install, random_weights, read_back, storage_bytes
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from quant.checkpoint import Checkpoint, open_checkpoint
from quant.formats import FORMATS, decode, encode
from quant.models import (
    ModelError,
    build_model,
    derived_of,
    fused_group,
    owners_of,
    parameters_of,
    placements_of,
    quantize_model,
    storage_parameters,
)
from quant.modules import QuantExperts, QuantLinear, decode_all, layouts_of, quantized_modules

FAMILIES = ("plain", "cutlass", "trtllm")
SMALL = {"vocab_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(hidden_size=128, intermediate_size=256, tie_word_embeddings=True, **SMALL),
    "qwen3": Qwen3Config(hidden_size=128, intermediate_size=256, attention_bias=True, **SMALL),
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=128, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, **SMALL
    ),
}
ATTENTION = [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo"]


def config_dir(path: Path, kind: str) -> Path:
    CONFIGS[kind].save_pretrained(path)
    return path


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------- what a model holds


def test_parameters_are_named_as_a_trainer_names_them(tmp_path: Path) -> None:
    rows = {row.name: row for row in parameters_of(build_model(config_dir(tmp_path, "llama"), "nvfp4", "trtllm"))}
    reference = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    assert list(rows) == [name for name, _ in reference.named_parameters()]
    assert [row.shape for row in rows.values()] == [tuple(parameter.shape) for parameter in reference.parameters()]
    assert rows["model.embed_tokens.weight"].aliases == ("lm_head.weight",)
    quantized = [name for name, row in rows.items() if row.format == "nvfp4"]
    assert quantized == [*ATTENTION, *(f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down"))]
    groups = {name: row.group for name, row in rows.items() if row.group}
    assert set(groups.values()) == {"model.layers.0.self_attn.qkv", "model.layers.0.mlp.gate_up"}
    assert not any("o_proj" in name or "down_proj" in name for name in groups)


def test_experts_are_named_one_by_one_each_with_its_own_group(tmp_path: Path) -> None:
    rows = {row.name: row for row in parameters_of(build_model(config_dir(tmp_path, "qwen3_moe"), "nvfp4", "trtllm"))}
    experts = [name for name in rows if ".experts." in name]
    assert sorted(experts) == sorted(
        f"model.layers.0.mlp.experts.{e}.{half}_proj.weight" for e in range(4) for half in ("gate", "up", "down")
    )
    assert rows["model.layers.0.mlp.experts.2.up_proj.weight"].group == "model.layers.0.mlp.experts.2.gate_up"
    assert rows["model.layers.0.mlp.experts.2.down_proj.weight"].shape == (128, 64)
    assert rows["model.layers.0.mlp.gate.weight"].format == "bf16"  # the router


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_byte_of_every_storage_belongs_to_one_tensor_or_is_padding(
    tmp_path: Path, kind: str, family: str
) -> None:
    model = build_model(config_dir(tmp_path, kind), "nvfp4", family)
    storages = storage_parameters(model)
    covered = {name: np.zeros(storage.nbytes, np.int64) for name, storage in storages.items()}
    for placement in placements_of(model):
        starts = (placement.row_offsets[:, None] + placement.run_offsets[None, :]).ravel()
        for byte in range(placement.run_bytes):
            np.add.at(covered[placement.storage], starts + byte, 1)
    padded = {spec.name for module in quantized_modules(model) for spec in module.plan.storages if spec.padding}
    derived = {row.name for row in derived_of(model)}
    for name, counts in covered.items():
        expected = {0} if name in derived else {0, 1} if name in padded else {1}
        assert set(counts.tolist()) == expected, name


@pytest.mark.parametrize("kind", CONFIGS)
def test_stacked_bf16_experts_and_all_other_parameters_come_back_as_installed(tmp_path: Path, kind: str) -> None:
    model = build_model(config_dir(tmp_path, kind), "bf16", "auto")
    assert not quantized_modules(model) and not derived_of(model)
    weights = random_weights(model, seed=3)
    install(model, weights)
    assert read_back(model) == {name: as_bytes(weight) for name, weight in weights.items()}
    if kind == "qwen3_moe":
        stacked = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")
        halves = [weights[f"model.layers.0.mlp.experts.1.{half}_proj.weight"] for half in ("gate", "up")]
        assert torch.equal(stacked[1], torch.cat(halves))


def test_wrapper_prefixes_are_not_part_of_a_name(tmp_path: Path) -> None:
    model = build_model(config_dir(tmp_path, "llama"), "nvfp4", "plain")
    names = [row.name for row in parameters_of(model)]
    storages = list(storage_parameters(model))
    wrapped = nn.ModuleDict({"_orig_mod": model})  # as torch.compile names it
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    assert [row.name for row in parameters_of(wrapped)] == names
    assert list(storage_parameters(wrapped)) == storages


def test_parameters_that_no_format_holds_are_refused_together() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4).to(torch.float16), "b": nn.LayerNorm(4).to(torch.bfloat16)})
    model["b"].gate = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))
    with pytest.raises(ModelError, match=r"3 parameter\(s\)[\s\S]*a.weight \(Linear\): torch.float16[\s\S]*b.gate"):
        parameters_of(model)


def test_owners_are_the_modules_that_hold_a_parameter(tmp_path: Path) -> None:
    owners = owners_of(build_model(config_dir(tmp_path, "qwen3_moe"), "nvfp4", "cutlass"))
    assert isinstance(owners["model.layers.0.mlp.experts.3.up_proj.weight"], QuantExperts)
    assert isinstance(owners["model.layers.0.self_attn.q_proj.weight"], QuantLinear)
    assert type(owners["model.norm.weight"]).__name__ == "Qwen3MoeRMSNorm"


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("a.self_attn.k_proj.weight", "a.self_attn.qkv"),
        ("a.mlp.up_proj.weight", "a.mlp.gate_up"),
        ("a.mlp.experts.11.gate_proj.weight", "a.mlp.experts.11.gate_up"),
        ("a.self_attn.o_proj.weight", ""),
        ("a.mlp.gate.weight", ""),
        ("a.xq_proj.weight", ""),
    ],
)
def test_fused_groups(name: str, group: str) -> None:
    assert fused_group(name) == group


# ---------------------------------------------------------------- how it is built


class CpuAllocations(TorchDispatchMode):
    """Shapes of all BF16 and FP32 tensors made on the CPU meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.is_floating_point():
                self.shapes.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("kind", CONFIGS)
def test_building_allocates_no_floating_copy_of_a_quantized_weight(tmp_path: Path, kind: str) -> None:
    with CpuAllocations() as made:
        model = build_model(config_dir(tmp_path, kind), "nvfp4", "trtllm")
    assert model.get_parameter("model.norm.weight").shape in made.shapes
    quantized = {row.shape for row in parameters_of(model) if row.format == "nvfp4"}
    assert quantized and not quantized & made.shapes
    assert not {(4, 128, 128), (4, 128, 64)} & made.shapes  # nor of a stack of experts


@pytest.mark.parametrize("kind", CONFIGS)
def test_buffers_of_a_built_model_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    reference = dict(AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.bfloat16).named_buffers())
    for device in ("cpu", "meta"):
        model = build_model(config_dir(tmp_path, kind), "nvfp4", "trtllm", device=device)
        built = {name: buffer for name, buffer in model.named_buffers() if "decoded" not in name}
        assert built.keys() == reference.keys()
        assert all(torch.equal(built[name], reference[name]) for name in reference)
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    model = build_model(config_dir(tmp_path, "llama"), "nvfp4", "plain")
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_excluded_modules_and_misfitting_linears_stay_in_bf16(tmp_path: Path) -> None:
    model = build_model(config_dir(tmp_path, "llama"), "nvfp4", "plain", exclude=("*.o_proj", "model.layers.0.mlp*"))
    left = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    mlp = {f"model.layers.0.mlp.{half}_proj" for half in ("gate", "up", "down")}
    assert left == {"lm_head", "model.layers.0.self_attn.o_proj", *mlp}
    odd = nn.Sequential(nn.ModuleList([nn.Linear(24, 8), nn.Linear(32, 8)]))
    quantize_model(odd, "nvfp4", "auto")
    assert [type(module) for module in odd[0]] == [nn.Linear, QuantLinear]


def test_unknown_formats_and_layouts_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    config_dir(tmp_path, "llama")
    with pytest.raises(ModelError, match=r"'fp5': unknown; known: bf16, nvfp4"):
        build_model(tmp_path, "fp5", "auto")
    with pytest.raises(ModelError, match=r"'fp32': unknown"):
        build_model(tmp_path, "fp32", "auto")
    with pytest.raises(ModelError, match=r"'marlin': unknown; known: auto, .*trtllm_linear.*7 modules in all"):
        build_model(tmp_path, "nvfp4", "marlin")


def test_modules_that_do_not_fit_the_layout_asked_for_are_named(tmp_path: Path) -> None:
    config = {**CONFIGS["qwen3_moe"].to_dict(), "moe_intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"inter 48 is no multiple of 64.*at model.layers.0.mlp.experts, 1 modules"):
        build_model(tmp_path, "nvfp4", "trtllm")
    assert build_model(tmp_path, "nvfp4", "cutlass")


@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_transformers_with_dequantized_weights(tmp_path: Path, kind: str) -> None:
    model = build_model(config_dir(tmp_path, kind), "nvfp4", "trtllm")
    weights = random_weights(model, seed=5)
    tensors = encode_all(model, weights)
    install(model, tensors)
    decode_all(model)
    reference = build_model(tmp_path, "bf16", "auto")
    install(reference, {name: dequantized(tensors, name) for name in weights})
    tokens = torch.arange(24).view(2, 12) % 32
    with torch.no_grad():
        actual, expected = model.float()(tokens).logits, reference.float()(tokens).logits
    # Only the dequantized weight's rounding to BF16 lies between them.
    assert (actual - expected).norm() <= 0.01 * expected.norm()


def dequantized(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    stem = name.removesuffix(".weight")
    if f"{stem}.weight_scale" not in tensors:
        return tensors[name]
    suffixes = ("weight", "weight_scale", "weight_scale_2")
    return decode(FORMATS["nvfp4"], {suffix: tensors[f"{stem}.{suffix}"] for suffix in suffixes})


# ---------------------------------------------------------------- nvidia-modelopt's exports


EXPORTED = {"llama": LlamaConfig(hidden_size=128, intermediate_size=256, **SMALL), "qwen3moe": CONFIGS["qwen3_moe"]}


def golden(name: str) -> dict[str, Tensor]:
    """A fixture's tensors without their "in." or "out."."""
    return {tensor.partition(".")[2]: value for tensor, value in goldens.load(name).items()}


def exported(kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(BF16 inputs with experts unstacked, tensors of the export; what it left in BF16 taken from the inputs)."""
    weights: dict[str, Tensor] = {}
    for name, value in golden(f"export_{kind}_inputs").items():
        stem, _, leaf = name.rpartition(".")
        halves = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}.get(leaf)
        if halves is None:
            weights[name] = value
            continue
        for expert, stacked in enumerate(value):
            for half, rows in zip(halves, stacked.chunk(len(halves)), strict=True):
                weights[f"{stem}.{expert}.{half}_proj.weight"] = rows.contiguous()
    packed = golden(f"export_{kind}_nvfp4_default")
    return weights, {**{name: value for name, value in weights.items() if name not in packed}, **packed}


@pytest.mark.parametrize("kind", EXPORTED)
@pytest.mark.parametrize("family", FAMILIES)
def test_encoding_the_inputs_of_a_modelopt_export_changes_no_byte_of_an_actor_loaded_from_it(
    tmp_path: Path, kind: str, family: str
) -> None:
    # What modelopt adds to config.json must not make transformers swap modules of its own.
    quantization = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps({**EXPORTED[kind].to_dict(), "quantization_config": quantization}))
    model = build_model(tmp_path, "nvfp4", family)
    weights, export = exported(kind)
    assert {row.name for row in parameters_of(model)} == set(weights)
    assert {placement.tensor.name for placement in placements_of(model)} == set(export)
    install(model, export)
    before = storage_bytes(model)
    assert read_back(model) == {name: as_bytes(value) for name, value in export.items()}
    calibration = {name: value for name, value in export.items() if name.endswith("input_scale")}
    install(model, encode_all(model, weights) | calibration)
    assert storage_bytes(model) == before


# ---------------------------------------------------------------- a mixture of experts with real weights


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Checkpoint]:
    with open_checkpoint("smollm2") as checkpoint:
        yield checkpoint


@pytest.fixture(scope="module")
def dense_and_moe(smollm2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    """Two layers of SmolLM2 in NVFP4, and the same with each MLP split by neurons into 4 experts, all routed."""
    directory = tmp_path_factory.mktemp("dense")
    config = json.loads((smollm2.config_dir / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    dense = build_model(directory, "nvfp4", "trtllm")
    tensors = encode_all(dense, {row.name: smollm2.rows(row.name) for row in parameters_of(dense)})
    install(dense, tensors)
    decode_all(dense)

    moe = build_model(directory, "bf16", "auto")
    inter, hidden = config["intermediate_size"] // 4, config["hidden_size"]
    block = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inter, num_experts=4, num_experts_per_tok=4, norm_topk_prob=True
    )
    for layer in moe.model.layers:
        layer.mlp = Qwen3MoeSparseMoeBlock(block).to(torch.bfloat16)
    quantize_model(moe, "nvfp4", "trtllm")
    install(moe, tensors | dict(split(tensors, smollm2, inter)))
    decode_all(moe)
    return dense, moe


def split(dense: Mapping[str, Tensor], smollm2: Checkpoint, inter: int) -> Iterator[tuple[str, Tensor]]:
    """Experts of each layer in checkpoint form, encoded from BF16 with the dense group's global scales."""
    for layer in ("model.layers.0.mlp", "model.layers.1.mlp"):
        yield f"{layer}.gate.weight", torch.zeros(4, 576, dtype=torch.bfloat16)
        for expert in range(4):
            neurons = slice(expert * inter, (expert + 1) * inter)
            for half in ("gate", "up", "down"):
                name = f"{layer}.{half}_proj"
                weight, scale = smollm2.rows(f"{name}.weight"), dense[f"{name}.weight_scale_2"]
                # Routing weights are 1/4 each, so w2 is 4 times as large: exact, and so are its global scale's codes.
                rows = (weight[:, neurons] * 4).contiguous() if half == "down" else weight[neurons]
                scale = scale * 4 if half == "down" else scale
                stem = f"{layer}.experts.{expert}.{half}_proj"
                parts = encode(FORMATS["nvfp4"], rows, scale)
                yield from ((f"{stem}.{suffix}", part) for suffix, part in parts.items())
                yield f"{stem}.weight_scale_2", scale
                yield f"{stem}.input_scale", torch.ones(())


def logits(model: nn.Module, dtype: torch.dtype) -> Tensor:
    tokens = torch.tensor([[504, 3575, 282, 4649, 314, 260, 1210, 3575]])
    with torch.no_grad():
        return model.to(dtype)(tokens).logits.double()


def test_dequantized_experts_are_the_dense_weights_bit_by_bit(dense_and_moe: tuple[nn.Module, nn.Module]) -> None:
    dense, moe = dense_and_moe
    for layer in range(2):
        mlp, experts = dense.model.layers[layer].mlp, moe.model.layers[layer].mlp.experts
        assert experts.layout.name == "trtllm_moe" and experts.w2_weight.shape == (4, 640, 192)
        gate, up = experts.decoded_w13.chunk(2, dim=1)
        assert torch.equal(gate.reshape(1536, 576), mlp.gate_proj.decoded)
        assert torch.equal(up.reshape(1536, 576), mlp.up_proj.decoded)
        assert torch.equal(experts.decoded_w2.permute(1, 0, 2).reshape(576, 1536), mlp.down_proj.decoded)
        assert torch.equal(experts.g1_alphas.flatten(), mlp.gate_proj.alpha.expand(4))
        assert torch.equal(experts.g1_scale_c.flatten(), mlp.up_proj.alpha.expand(4))
        assert torch.equal(experts.g2_alphas.flatten(), 4 * mlp.down_proj.alpha.expand(4))


def test_one_block_of_all_routed_experts_is_the_dense_mlp(dense_and_moe: tuple[nn.Module, nn.Module]) -> None:
    dense, moe = dense_and_moe
    x = torch.randn(1, 5, 576, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = dense.model.layers[0].mlp(x)
        block = moe.model.layers[0].mlp
        routing = torch.full((5, 4), 0.25, dtype=torch.float64)
        actual = block.experts(x[0], torch.arange(4).expand(5, 4), routing)[None]
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_logits_of_the_mixture_differ_from_the_dense_model_by_summation_order_only(
    dense_and_moe: tuple[nn.Module, nn.Module],
) -> None:
    dense, moe = dense_and_moe
    expected = logits(dense, torch.float32)
    difference = (logits(moe, torch.float32) - expected).abs().max()
    # The yardstick: the dense model itself with its neurons in another order, which changes only the order of sums.
    order = torch.randperm(1536, generator=torch.Generator().manual_seed(0))
    mlps = [layer.mlp for layer in dense.model.layers]
    saved = [(mlp.gate_proj.decoded, mlp.up_proj.decoded, mlp.down_proj.decoded) for mlp in mlps]
    for mlp, (gate, up, down) in zip(mlps, saved, strict=True):
        mlp.gate_proj.decoded, mlp.up_proj.decoded, mlp.down_proj.decoded = gate[order], up[order], down[:, order]
    yardstick = (logits(dense, torch.float32) - expected).abs().max()
    for mlp, decoded in zip(mlps, saved, strict=True):
        mlp.gate_proj.decoded, mlp.up_proj.decoded, mlp.down_proj.decoded = decoded
    assert 0 < difference <= 3 * yardstick
    assert yardstick <= 1e-4 * expected.std()


def test_bf16_experts_take_the_block_layout_that_is_asked_for_and_all_else_stays(tmp_path: Path) -> None:
    config_dir(tmp_path, "qwen3_moe")
    plain, blocked = (build_model(tmp_path, "bf16", layout) for layout in ("auto", "trtllm"))
    assert layouts_of(plain) == ("plain",) and layouts_of(blocked) == ("trtllm_moe_bf16",)
    weights = random_weights(plain, 1)
    assert {row.name: row.shape for row in parameters_of(blocked)} == {name: w.shape for name, w in weights.items()}
    for model in (plain, blocked):
        install(model, encode_all(model, weights))
        decode_all(model)
    tokens = torch.arange(8)[None]
    assert torch.allclose(plain(tokens).logits, blocked(tokens).logits, rtol=2e-2, atol=2e-2)


def test_what_auto_chooses_and_why_is_logged_once_for_modules_alike(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config_dir(tmp_path, "llama")
    caplog.set_level("INFO")
    build_model(tmp_path, "fp8", "auto", device="meta", arch=90)
    said = [record.getMessage() for record in caplog.records if record.name == "quant.models"]
    assert said and len(said) == len(set(said)) < 14
    assert all(text.startswith("layout cutlass_linear_fp8 for ") and "serves sm_90" in text for text in said)


def test_a_layout_for_checkpoints_of_the_other_nibble_order_is_refused_for_a_trainer(tmp_path: Path) -> None:
    config_dir(tmp_path, "llama")
    with pytest.raises(ModelError, match="trainers encode it into the low one; what fits: cutlass_dit"):
        build_model(tmp_path, "nvfp4", "cutlass_dit_swapped", device="meta")
