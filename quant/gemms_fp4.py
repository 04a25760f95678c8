"""flashinfer's FP4 products on NVFP4 weights: UNTESTED. They need compute capability 10.0 and were never run here.

Written from the signatures and checks of flashinfer 0.7.2.post1. What is tested is what they are given: shapes, dtypes,
strides, scales and that weights are the module's own memory, against the fixtures; the names, against the library.

    mm_fp4                               linear: layouts trtllm_linear, trtllm_dit, cutlass_linear, cutlass_dit
    trtllm_fp4_block_scale_routed_moe    experts: layout trtllm_moe. trtllm_fp4_block_scale_moe is the same with the
                                         router's logits in place of topk_ids: modules here are called with a choice
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Operands = Mapping[str, Tensor]

# Of flashinfer's enumerations; a slow test compares.
RENORMALIZE = 1  # RoutingMethodType: not looked at where the choice is given
SWIGLU = 3  # ActivationType


def linear_arguments(codes: Tensor, scales: Tensor, operands: Operands, backend: str) -> dict[str, Any]:
    """Of mm_fp4, for quantized activations: codes uint8 [tokens, elements / 2], scales swizzled, padded to 128 x 4.

    Weights are padded to a multiple of 32 (cutlass) or 64 elements (trtllm): activations are given zeros for those.
    """
    weight = operands["weight"]
    padding = weight.shape[1] - codes.shape[1]
    return {
        "a": F.pad(codes, (0, padding)) if padding else codes,
        "b": weight.t(),
        "a_descale": scales,
        "b_descale": operands["weight_scale"].view(torch.uint8).t(),
        "alpha": operands["alpha"],
        "out_dtype": torch.bfloat16,
        "backend": backend,
    }


def _linear(x: Tensor, operands: Operands, num_rows: int, *, backend: str) -> Tensor:
    """[..., num_rows] in x's dtype from x [..., elements]. Untested: see the top."""
    flashinfer = importlib.import_module("flashinfer")
    tokens = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    if not len(tokens):
        return x.new_empty(*x.shape[:-1], num_rows)
    codes, scales = flashinfer.fp4_quantize(tokens, operands["input_scale_inv"])
    y: Tensor = flashinfer.mm_fp4(**linear_arguments(codes, scales, operands, backend))[:, :num_rows]
    y = y + operands["bias"] if "bias" in operands else y
    return y.reshape(*x.shape[:-1], num_rows).to(x.dtype)


linear_trtllm = partial(_linear, backend="trtllm")
linear_cutlass = partial(_linear, backend="cutlass")


def experts_arguments(
    codes: Tensor, scales: Tensor, top_k_index: Tensor, top_k_weights: Tensor, operands: Operands
) -> dict[str, Any]:
    """Of trtllm_fp4_block_scale_routed_moe: codes uint8 [tokens, hidden / 2], scales [tokens, hidden / 16] by rows.

    An index past the last expert, transformers' mark of a token that is routed elsewhere, becomes a weight of 0.
    """
    num_experts, gate_and_up, _ = operands["w13_weight"].shape
    here = top_k_index < num_experts
    index = torch.where(here, top_k_index, 0).to(torch.int32)
    return {
        "topk_ids": (index, torch.where(here, top_k_weights, 0).float()),
        "routing_bias": None,
        "hidden_states": codes,
        "hidden_states_scale": scales.view(torch.float8_e4m3fn),
        "gemm1_weights": operands["w13_weight"],
        "gemm1_weights_scale": operands["w13_weight_scale"],
        "gemm1_bias": None,
        "gemm1_alpha": None,
        "gemm1_beta": None,
        "gemm1_clamp_limit": None,
        "gemm2_weights": operands["w2_weight"],
        "gemm2_weights_scale": operands["w2_weight_scale"],
        "gemm2_bias": None,
        "output1_scale_scalar": operands["g1_scale_c"].view(-1),
        "output1_scale_gate_scalar": operands["g1_alphas"].view(-1),
        "output2_scale_scalar": operands["g2_alphas"].view(-1),
        "num_experts": num_experts,
        "top_k": top_k_index.shape[1],
        "n_group": None,
        "topk_group": None,
        "intermediate_size": gate_and_up // 2,
        "local_expert_offset": 0,
        "local_num_experts": num_experts,
        "routed_scaling_factor": None,
        "routing_method_type": RENORMALIZE,
        "activation_type": SWIGLU,
    }


def experts(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, operands: Operands) -> Tensor:
    """[tokens, hidden] in the dtype of hidden_states. Untested: see the top."""
    flashinfer, fused = (importlib.import_module(name) for name in ("flashinfer", "flashinfer.fused_moe"))
    if not len(hidden_states):
        return torch.empty_like(hidden_states)
    codes, scales = flashinfer.fp4_quantize(
        hidden_states.to(torch.bfloat16), operands["w13_input_scale_quant"].view(-1), is_sf_swizzled_layout=False
    )
    arguments = experts_arguments(codes, scales, top_k_index, top_k_weights, operands)
    layout = importlib.import_module("flashinfer.tllm_enums").SfLayout.layout_linear
    y: Tensor = fused.trtllm_fp4_block_scale_routed_moe(**arguments, hidden_states_scale_layout=layout)[0]
    return y.to(hidden_states.dtype)
