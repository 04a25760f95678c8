"""Tiny random pipelines with the real classes of diffusers, saved as diffusers saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

# Hidden size 64. Square weights: the attention projections. Feed-forwards of 256 rows are whole tiles of 128, the rest
# is partly padding.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": (
        "FluxTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "pooled_projection_dim": 32,
            "guidance_embeds": True,
            "axes_dims_rope": [8, 12, 12],
        },
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": [8, 8, 8, 8],
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 48,
            "freq_dim": 32,
            "ffn_dim": 128,
            "num_layers": 1,
            "rope_max_seq_len": 48,
        },
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "axes_dims_rope": [8, 12, 12],
        },
    ),
}
PIPELINES = {"flux": "FluxPipeline", "flux2": "Flux2Pipeline", "wan": "WanPipeline", "qwen_image": "QwenImagePipeline"}
COMPONENTS = {name: ("transformer", "transformer_2") if name == "wan" else ("transformer",) for name in CONFIGS}


def tiny_transformer(family: str, seed: int, *, fp32: bool = False) -> nn.Module:
    """A diffusers transformer with random weights that keep activations in range; in BF16 as its class's loader casts
    it, or all in FP32."""
    class_name, config = CONFIGS[family]
    model: nn.Module = getattr(diffusers, class_name)(**config)
    generator = torch.Generator().manual_seed(seed)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim < 2 else 0.08)
        value = value + 1.0 if "norm" in name and name.endswith("weight") and parameter.ndim == 1 else value
        parameter.data = value if fp32 or kept & set(name.split(".")) else value.to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def write_tiny_pipeline(directory: Path, family: str, seed: int) -> Path:
    """A pipeline folder of one family: two transformers for Wan, and a flow matching scheduler."""
    index: dict[str, Any] = {"_class_name": PIPELINES[family], "_diffusers_version": diffusers.__version__}
    for number, name in enumerate(COMPONENTS[family]):
        model: Any = tiny_transformer(family, seed + number)
        model.save_pretrained(directory / name)
        index[name] = ["diffusers", type(model).__name__]
    if family == "wan":
        index["boundary_ratio"] = 0.875
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(directory / "scheduler")
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    index |= {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "T5EncoderModel"]}
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))
    return directory


def tiny_inputs(family: str, seed: int = 0, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """What one call of a tiny transformer takes: a latent of 4 x 4 tokens (two frames of 2 x 2 for Wan), 3 tokens of
    text."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    text, time = noise(1, 3, 48), torch.tensor([0.5], dtype=dtype)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    zeros = torch.zeros(16, 1, dtype=grid.dtype)
    if family == "wan":
        return {
            "hidden_states": noise(1, 4, 2, 4, 4),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": text,
        }
    tokens = {"hidden_states": noise(1, 16, 16), "encoder_hidden_states": text, "timestep": time}
    if family == "qwen_image":
        return tokens | {"img_shapes": [[(1, 4, 4)]]}
    if family == "flux2":
        image = torch.cat([zeros, grid, zeros], dim=1)
        return tokens | {"img_ids": image, "txt_ids": torch.zeros(3, 4), "guidance": torch.tensor([3.5])}
    image = torch.cat([zeros, grid], dim=1)
    pooled = {"pooled_projections": noise(1, 32), "guidance": torch.tensor([3.5])}
    return tokens | pooled | {"img_ids": image, "txt_ids": torch.zeros(3, 3)}
