"""Frames through a VAE: what diffusers' own pipelines make of the same latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from launch.frames import decode_frames, has_vae
from tests.tiny_dit import COMPONENTS, PIPELINES, tiny_transformer, write_tiny_pipeline

IMAGE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
NORMS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 2.0, 0.5, 1.0]}
VIDEO: dict[str, Any] = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **NORMS}
VAES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("AutoencoderKL", {**IMAGE, "scaling_factor": 0.36, "shift_factor": 0.12}),
    "flux2": ("AutoencoderKLFlux2", IMAGE),
    "wan": ("AutoencoderKLWan", VIDEO),
    "qwen_image": ("AutoencoderKLQwenImage", VIDEO),
}


def tiny_vae(family: str) -> Any:
    class_name, config = VAES[family]
    torch.manual_seed(0)
    vae = getattr(diffusers, class_name)(**config).eval()
    if family == "flux2":
        vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
        vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return vae


def painted(family: str, folder: Path, vae: Any, kind: str) -> Tensor:
    """What the pipeline returns after two steps, as "latent" or as pictures ("pt")."""
    parts: dict[str, Any] = {"vae": vae, "text_encoder": None, "tokenizer": None}
    parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    parts |= {name: tiny_transformer(family, i, fp32=True) for i, name in enumerate(COMPONENTS[family])}
    parts |= {"flux": {"text_encoder_2": None, "tokenizer_2": None}, "wan": {"boundary_ratio": 0.875}}.get(family, {})
    text = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(1))
    call: dict[str, Any] = {"prompt_embeds": text, "height": 64, "width": 32, "num_inference_steps": 2}
    call |= {"generator": torch.Generator().manual_seed(2), "output_type": kind, "return_dict": False}
    call |= {
        "flux": {"pooled_prompt_embeds": torch.ones(1, 32)},
        "wan": {"num_frames": 5, "guidance_scale": 1.0},
        "qwen_image": {"prompt_embeds_mask": torch.ones(1, 5, dtype=torch.int64)},
    }.get(family, {})
    pipeline = getattr(diffusers, PIPELINES[family])(**parts)
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        return torch.as_tensor(pipeline(**call)[0])


@pytest.mark.parametrize("family", VAES)
def test_frames_are_the_pictures_that_the_pipeline_of_diffusers_makes(family: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = write_tiny_pipeline(tmp_path, family, 0)
    assert not has_vae(folder)
    vae = tiny_vae(family)
    vae.save_pretrained(folder / "vae")
    assert has_vae(folder)
    latents = painted(family, folder, vae, "latent")
    expected = painted(family, folder, vae, "pt")
    frames = decode_frames(folder, latents, height=8, width=4)
    expected = expected if family == "wan" else expected[:, None]
    assert frames.shape == expected.shape == (1, 5 if family == "wan" else 1, 3, 64, 32)
    assert expected.std() > 0.01
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)
