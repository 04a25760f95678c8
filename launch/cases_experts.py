"""What the conformance command checks of experts: from BF16 or checkpoint tensors to what kernels are fed, scalars
among it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from quant import numerics_float as floats
from quant.derived import fp8_scalars_of_multipliers
from quant.formats import FORMATS, amax, global_scale
from quant.layouts import LAYOUTS, LayoutPlan, plan_experts

from .cases_formats import Case, Produce, Tensors, case, encoded
from .cases_layouts import FLASHINFER, MODELOPT, SGLANG, applied, as_tensor, given
from .fixtures import Fixture


def _storages(fixture: Fixture, layout: str) -> tuple[LayoutPlan, Tensors]:
    """Storages of the checkpoint tensors in a fixture, activation scales among them."""

    def make() -> tuple[LayoutPlan, Tensors]:
        tensors: Tensors = {}
        for key, half in {"w1": "gate", "w3": "up", "w2": "down"}.items():
            for suffix in ("weight", "weight_scale", "weight_scale_2"):
                tensors[f"moe.{half}_proj.{suffix}"] = given(fixture, f"ckpt.{suffix}_{key}")
        w13 = given(fixture, "in.w13_input_scale")
        tensors |= {f"moe.{half}_proj.input_scale": w13[:, i].contiguous() for i, half in enumerate(("gate", "up"))}
        tensors["moe.down_proj.input_scale"] = given(fixture, "in.w2_input_scale")
        experts, inter, packed = tensors["moe.gate_proj.weight"].shape
        plan = plan_experts(LAYOUTS[layout], FORMATS["nvfp4"], "moe", experts, 2 * packed, inter)
        return plan, applied(plan, tensors)

    return fixture.once(("experts", layout), make)


def _experts(layout: str, **leaves: str) -> Produce:
    """leaves: tensor of the fixture -> storage of the plan."""

    def produce(fixture: Fixture, match: re.Match[str]) -> Tensor:
        meta = fixture.entry["tensors"][match[0]]
        storage = _storages(fixture, layout)[1][f"moe.{leaves[match['part']]}"]
        return as_tensor(storage, getattr(torch, meta["dtype"]), meta["shape"])

    return produce


def _expert_scalar(layout: str) -> Produce:
    def produce(fixture: Fixture, match: re.Match[str]) -> Tensor:
        plan, storages = _storages(fixture, layout)
        shapes = {spec.name: spec.shape for spec in plan.storages}
        derived = next(derived for derived in plan.derived if derived.leaf == match["part"])
        return derived.function(*(as_tensor(storages[name], torch.float32, shapes[name]) for name in derived.inputs))[0]

    return produce


def _halves(fixture: Fixture) -> Tensors:
    """The BF16 experts that a companion fixture holds: as many as this one took."""
    source = fixture.companion()
    count = int(fixture.args["experts"].rpartition(" ")[2])
    names = {"gate": "in.w1_gate", "up": "in.w3_up", "down": "in.w2_down"}
    return {half: given(source, name)[:count].contiguous() for half, name in names.items()}


def _experts_of(fixture: Fixture, layout: str, fmt: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Storages of stacked experts; scalars that no fixture gives are 1."""
    halves = _halves(fixture)
    experts, inter, hidden = halves["gate"].shape
    row = FORMATS[fmt]
    scalars = {
        f"moe.{half}_proj.{part.suffix}": torch.ones(experts)
        for half in halves
        for part in row.components
        if not part.rows
    }
    plan = plan_experts(LAYOUTS[layout], row, "moe", experts, hidden, inter)
    return applied(plan, {**scalars, **tensors})


def _prepared(layout: str, fmt: str) -> Produce:
    """Encoded by the row of the format, then applied."""
    row = FORMATS[fmt]

    def make(fixture: Fixture) -> Tensors:
        tensors: Tensors = {}
        for half, weight in _halves(fixture).items():
            parts = encoded(row, weight) if row.is_quantized else {"weight": weight}
            tensors |= {f"moe.{half}_proj.{suffix}": tensor for suffix, tensor in parts.items()}
        return _experts_of(fixture, layout, fmt, tensors)

    def produce(fixture: Fixture, match: re.Match[str]) -> Tensor:
        meta = fixture.entry["tensors"][match[0]]
        leaf = match["part"].replace("gemm1_weights", "w13_weight").replace("gemm2_weights", "w2_weight")
        storage = fixture.once((layout, fmt), lambda: make(fixture))[f"moe.{leaf}"]
        return as_tensor(storage, getattr(torch, meta["dtype"]), meta["shape"])

    return produce


def _fp8_multiplied(fixture: Fixture, match: re.Match[str]) -> Tensor:
    """flashinfer quantizes up and gate of an expert by one multiplier, and keeps multipliers."""

    def make() -> Tensors:
        halves = _halves(fixture)
        w13 = floats.encode_fp8_multiplier(torch.cat((halves["up"], halves["gate"]), 1))
        w2 = floats.encode_fp8_multiplier(halves["down"])
        up, gate = w13["weight"].chunk(2, 1)
        weights = {"gate": gate.contiguous(), "up": up.contiguous(), "down": w2["weight"]}
        tensors = {f"moe.{half}_proj.weight": weight for half, weight in weights.items()}
        storages = _experts_of(fixture, "trtllm_moe_fp8", "fp8", tensors)
        hidden, inter = (torch.tensor(fixture.args[f"{at}_scale_global"]) for at in ("hidden_states", "intermediate"))
        scalars = fp8_scalars_of_multipliers(w13["multiplier"], w2["multiplier"], hidden, inter)
        return {
            "gemm1_weights": storages["moe.w13_weight"],
            "gemm2_weights": storages["moe.w2_weight"],
            "output1_scales_scalar": scalars["g1_scale_c"],
            "output1_scales_gate_scalar": scalars["g1_alphas"],
            "output2_scales_scalar": scalars["g2_alphas"],
            "hidden_states_scale_global": hidden,
            "intermediate_scale_global": inter,
        }

    meta = fixture.entry["tensors"][match[0]]
    tensor = fixture.once("multiplied", make)[match["part"]]
    return as_tensor(tensor, getattr(torch, meta["dtype"]), meta["shape"]) if tensor.dtype == torch.uint8 else tensor


def _expert_checkpoint(fixture: Fixture, match: re.Match[str]) -> Tensor:
    """Experts in NVFP4, each with its own scale; gate and up share one where the checkpoint's are the same."""

    def make() -> Tensors:
        source = fixture.companion()
        weights = {key: given(source, f"in.{key}_{half}") for key, half in _PROJECTIONS.items()}
        bits = {key: [amax(expert) for expert in weight] for key, weight in weights.items()}
        w1, w3 = (given(fixture, f"ckpt.weight_scale_2_{key}") for key in ("w1", "w3"))
        if torch.equal(w1, w3):
            bits["w1"] = bits["w3"] = [max(pair) for pair in zip(bits["w1"], bits["w3"], strict=True)]
        tensors: Tensors = {}
        for key, weight in weights.items():
            scales = [global_scale(FORMATS["nvfp4"], largest) for largest in bits[key]]
            each = [encoded(FORMATS["nvfp4"], expert, scale) for expert, scale in zip(weight, scales, strict=True)]
            tensors |= {f"{suffix}_{key}": torch.stack([parts[suffix] for parts in each]) for suffix in each[0]}
        return tensors

    return fixture.once("checkpoint", make)[match["part"]]


_PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down"}
_GEMM = r"(?P<part>gemm[12]_weights(?:_scale)?)"

EXPERT_CASES: tuple[Case, ...] = (
    case(
        "nvfp4", MODELOPT, "moe", r"ckpt\.(?P<part>(?:weight|weight_scale|weight_scale_2)_w[123])", _expert_checkpoint
    ),
    case(
        "trtllm_moe",
        SGLANG,
        "moe",
        r"out\.trtllm\." + _GEMM,
        _experts(
            "trtllm_moe",
            gemm1_weights="w13_weight",
            gemm1_weights_scale="w13_weight_scale",
            gemm2_weights="w2_weight",
            gemm2_weights_scale="w2_weight_scale",
        ),
    ),
    case("trtllm_moe", SGLANG, "moe", r"out\.trtllm\.(?P<part>g1_alphas|g1_scale_c)", _expert_scalar("trtllm_moe")),
    case("cutlass_moe", SGLANG, "moe", r"out\.trtllm\.(?P<part>g1_alphas_up)", _expert_scalar("cutlass_moe")),
    case(
        "cutlass_moe",
        SGLANG,
        "moe",
        r"out\.(?:cutlass\.)?(?P<part>w13_blockscale_swizzled|w2_blockscale_swizzled|swap_w13_to_w31)",
        _experts(
            "cutlass_moe",
            w13_blockscale_swizzled="w13_weight_scale",
            w2_blockscale_swizzled="w2_weight_scale",
            swap_w13_to_w31="w13_weight",
        ),
    ),
    case(
        "trtllm_moe_fp8",
        FLASHINFER,
        "moe",
        r"out\.fp8_per_tensor\.(?P<part>gemm[12]_weights|output[12]_scales(?:_gate)?_scalar|\w+_scale_global)",
        _fp8_multiplied,
    ),
    case(
        "trtllm_moe_fp8_block",
        FLASHINFER,
        "moe",
        r"out\.fp8_deepseek\." + _GEMM,
        _prepared("trtllm_moe_fp8_block", "fp8_block"),
    ),
    case("trtllm_moe_mxfp8", FLASHINFER, "moe", r"out\.mxfp8\." + _GEMM, _prepared("trtllm_moe_mxfp8", "mxfp8")),
    case(
        "trtllm_moe_bf16",
        SGLANG,
        "moe",
        r"out\.bf16_block\.(?P<part>w13_weight|w2_weight)",
        _prepared("trtllm_moe_bf16", "bf16"),
    ),
)
