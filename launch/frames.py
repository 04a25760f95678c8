"""Frames of latents, through the VAE of a pipeline folder: the part of a pipeline that no service holds.

if has_vae(folder): frames = decode_frames(folder, latents, height=8, width=4)     # [samples, frames, 3, H, W]

What each class does to its latents before the VAE is that of diffusers' pipeline for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.pipelines import components_of
from weight_update.errors import PlanError


def has_vae(folder: Path) -> bool:
    """Whether a pipeline folder brings a VAE."""
    return (folder / "vae" / "config.json").is_file()


@torch.inference_mode()
def decode_frames(folder: Path, latents: Tensor, *, height: int, width: int) -> Tensor:
    """FP32 pictures in [0, 1], [samples, frames, 3, H, W], of a service's latents [samples, ...].

    height, width: of the latents before packing, as they were asked for.
    """
    vae = _vae(folder)
    class_name = next(iter(components_of(folder).values())).class_name
    pictures = [_decoded(vae, UNPACKED[class_name](vae, sample[None].float(), height, width)) for sample in latents]
    return torch.stack(pictures)


def _vae(folder: Path) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise PlanError(f"{folder}: a VAE needs diffusers ({error}); pip install 'transfuse[diffusion]'") from error
    name = json.loads((folder / "vae" / "config.json").read_text())["_class_name"]
    if not hasattr(diffusers, name):
        raise PlanError(f"{folder / 'vae'}: class {name}: diffusers {diffusers.__version__} has none")
    return getattr(diffusers, name).from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()


def _decoded(vae: Any, latents: Tensor) -> Tensor:
    """[1, C, H, W] or [1, C, F, H, W] -> [frames, 3, H, W]."""
    pictures: Tensor = vae.decode(latents, return_dict=False)[0][0]
    frames = pictures[None] if pictures.ndim == 3 else pictures.transpose(0, 1)
    return torch.clamp(frames / 2 + 0.5, 0, 1)


def _unpacked(latents: Tensor, height: int, width: int) -> Tensor:
    """[1, H/2 * W/2, 4C] -> [1, C, H, W]: a token is 2 x 2 pixels, channels outermost in it."""
    tiles = latents.view(1, height // 2, width // 2, -1, 2, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, height, width)


def _flux(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
    shifted: Tensor = _unpacked(latents, height, width) / vae.config.scaling_factor + vae.config.shift_factor
    return shifted


def _flux2(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Normalized over the channels of the tokens, as they come."""
    std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    return _unpacked(latents * std + vae.bn.running_mean, height, width)


def _normalized(vae: Any, latents: Tensor) -> Tensor:
    mean, std = (torch.tensor(each).view(1, -1, 1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
    return latents * std + mean


def _qwen_image(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """One frame of a video VAE."""
    return _normalized(vae, _unpacked(latents, height, width)[:, :, None])


def _wan(vae: Any, latents: Tensor, height: int, width: int) -> Tensor:
    return _normalized(vae, latents)


# By transformer class: a sample's latents [1, ...] as its VAE takes them.
UNPACKED: dict[str, Callable[[Any, Tensor, int, int], Tensor]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "WanTransformer3DModel": _wan,
}
