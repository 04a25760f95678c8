"""How each diffusers class is called: what its own pipeline does around one forward, as a table.

Read from diffusers 0.42, pipelines/{flux,flux2,wan,qwenimage}; a test compares with those pipelines bit for bit.
Latents are packed as the class takes them, and so they stay: what a pipeline returns for output_type="latent".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .samples import MAX_AXIS, MAX_TEXT_TOKENS, Size

Tensors = Mapping[str, Tensor]
COMPUTE = torch.bfloat16  # dtype of activations, whatever a client's conditioning has
NEGATIVE = "negative_"  # prefix of the conditioning that classifier-free guidance steers away from


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """One class.

    conditioning: tensors that a request brings -> their shape: a number, a key of the class's config, or "tokens";
    optional: the names among them that may be left out. patch: size of one token (frames, rows, columns). noise: its
    dtype. shape: of a sample's noise. pack: noise to latents. schedule: sets the timesteps. constants: what every
    forward of a sample takes beside latents, time and its own conditioning. time: timestep as forward takes it.
    guide: the prediction from (with conditioning, with negative conditioning, scale); None where the class has no
    classifier-free guidance.
    """

    conditioning: Mapping[str, tuple[int | str, ...]]
    optional: frozenset[str] = frozenset()
    patch: Callable[[Any], tuple[int, int, int]] = lambda config: (1, 2, 2)
    noise: torch.dtype = COMPUTE
    shape: Callable[[Any, Size], tuple[int, ...]]
    pack: Callable[[Tensor], Tensor]
    schedule: Callable[[Any, int, int], None]
    constants: Callable[[Any, Size, Tensors, float], dict[str, Any]]
    time: Callable[[Tensor, torch.dtype], Tensor] = lambda t, dtype: t.to(dtype) / 1000
    guide: Callable[[Tensor, Tensor, float], Tensor] | None = lambda given, other, scale: (
        other + scale * (given - other)
    )

    def tokens(self, config: Any, size: Size) -> int:
        """Tokens of one sample's latents."""
        return math.prod(math.ceil(n / p) for n, p in zip(_axes(size), self.patch(config), strict=True))

    def wanted(self, config: Any, name: str) -> list[int | str]:
        """Shape of a conditioning tensor for a model: numbers, and "tokens"."""
        keys = self.conditioning[name]
        return [getattr(config, each) if isinstance(each, str) and each != "tokens" else each for each in keys]

    def problems(self, config: Any, size: Size) -> list[str]:
        """What is wrong with a size for this class."""
        found = []
        largest = min(getattr(config, "rope_max_seq_len", MAX_AXIS), MAX_AXIS)
        for name, n, p in zip(("num_frames", "height", "width"), _axes(size), self.patch(config), strict=True):
            if n % p or n // p > largest:
                found.append(f"{name}: expected a multiple of {p} up to {p * largest}, got {n}")
        if len(self.shape(config, size)) < 5 and size.num_frames != 1:
            found.append(f"num_frames: expected 1 for images, got {size.num_frames}")
        return found

    def conditioning_problems(self, config: Any, tensors: Tensors) -> list[str]:
        """What is wrong with the conditioning tensors, the negative ones included."""
        signs = ("",) if self.guide is None else ("", NEGATIVE)
        known = [sign + name for sign in signs for name in self.conditioning]
        found = [f"conditioning {name}: unknown; expected {', '.join(known)}" for name in tensors if name not in known]
        given = [sign for sign in signs if not sign or any(name.startswith(sign) for name in tensors)]
        return found + [problem for sign in given for problem in self._signed_problems(config, sign, tensors)]

    def _signed_problems(self, config: Any, sign: str, tensors: Tensors) -> list[str]:
        """The same for the tensors of one sign, all of which have one number of tokens."""
        found, lengths = [], set()
        for name, shape in self.conditioning.items():
            tensor = tensors.get(sign + name)
            if tensor is None:
                if name not in self.optional:
                    found.append(f"conditioning {sign}{name}: missing; expected {self.wanted(config, name)}")
                continue
            found += _tensor_problems(sign + name, tensor, self.wanted(config, name))
            lengths |= set(tensor.shape[1:2]) if "tokens" in shape else set()
        if len(lengths) > 1:
            found.append(f"conditioning: {sign or 'given '}tensors of {sorted(lengths)} tokens; expected one number")
        return found


def _axes(size: Size) -> tuple[int, int, int]:
    return size.num_frames, size.height, size.width


def _tensor_problems(name: str, tensor: Tensor, wanted: list[int | str]) -> list[str]:
    fits = tensor.ndim == len(wanted) and all(
        1 <= n <= MAX_TEXT_TOKENS if want == "tokens" else n == want
        for n, want in zip(tensor.shape, wanted, strict=True)
    )
    got = f"expected {wanted} (tokens: 1 to {MAX_TEXT_TOKENS}), got {list(tensor.shape)}"
    found = [] if fits else [f"conditioning {name}: {got}"]
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        found.append(f"conditioning {name}: NaN or Inf; expected finite values")
    return found


# ---------------------------------------------------------------- noise and latents


def _packed_shape(config: Any, size: Size) -> tuple[int, ...]:
    return 1, config.in_channels // 4, size.height, size.width


def _pack(noise: Tensor) -> Tensor:
    """[1, C, H, W] -> [1, H/2 * W/2, 4C]: every 2 x 2 pixels one token, channels outermost in it."""
    _, channels, height, width = noise.shape
    tiles = noise.view(1, channels, height // 2, 2, width // 2, 2)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(1, (height // 2) * (width // 2), channels * 4)


def _tiled_shape(config: Any, size: Size) -> tuple[int, ...]:
    """FLUX.2 draws its noise with each 2 x 2 pixels as channels already."""
    return 1, config.in_channels // 4 * 4, size.height // 2, size.width // 2


def _flatten(noise: Tensor) -> Tensor:
    """[1, C, H, W] -> [1, H * W, C]."""
    return noise.flatten(2).transpose(1, 2)


def _video_shape(config: Any, size: Size) -> tuple[int, ...]:
    return 1, config.in_channels, size.num_frames, size.height, size.width


# ---------------------------------------------------------------- schedules


def _sigmas(scheduler: Any, num_steps: int) -> Any:
    """From 1 down to 1 / num_steps, unless the scheduler makes its own."""
    own = getattr(scheduler.config, "use_flow_sigmas", False)
    return None if own else np.linspace(1.0, 1 / num_steps, num_steps)


def _flux_schedule(scheduler: Any, num_tokens: int, num_steps: int) -> None:
    """Shift by resolution: a line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift)."""
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base = config.get("base_shift", 0.5)
    slope = (config.get("max_shift", 1.15) - base) / (high - low)
    _shifted(scheduler, num_steps, num_tokens * slope + (base - slope * low))


def _flux2_schedule(scheduler: Any, num_tokens: int, num_steps: int) -> None:
    """FLUX.2's published fit: mu is linear in tokens at 10 and at 200 steps, and linear in steps between those."""
    at_200 = 0.00016927 * num_tokens + 0.45666666
    at_10 = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    _shifted(scheduler, num_steps, at_200 if num_tokens > 4300 else slope * num_steps + (at_200 - 200.0 * slope))


def _shifted(scheduler: Any, num_steps: int, mu: float) -> None:
    sigmas = _sigmas(scheduler, num_steps)
    steps = {"num_inference_steps": num_steps} if sigmas is None else {"sigmas": sigmas}
    scheduler.set_timesteps(**steps, mu=mu)


def _plain_schedule(scheduler: Any, num_tokens: int, num_steps: int) -> None:
    scheduler.set_timesteps(num_steps)


# ---------------------------------------------------------------- constants


def _grid(*axes: int) -> Tensor:
    """Every position of a box, the last axis fastest: [product of axes, len(axes)]."""
    return torch.as_tensor(torch.cartesian_prod(*(torch.arange(n) for n in axes)))


def embeds_guidance(config: Any) -> bool:
    """Whether guidance is an input of the model, which was distilled with it."""
    return bool(getattr(config, "guidance_embeds", False))


def _embedded(config: Any, guidance: float) -> Tensor | None:
    return torch.full([1], guidance, dtype=torch.float32) if embeds_guidance(config) else None


def _flux_constants(config: Any, size: Size, tensors: Tensors, guidance: float) -> dict[str, Any]:
    image = _grid(1, size.height // 2, size.width // 2)
    text = torch.zeros(tensors["encoder_hidden_states"].shape[1], 3, dtype=COMPUTE)
    return {"img_ids": image.to(COMPUTE), "txt_ids": text, "guidance": _embedded(config, guidance)}


def _flux2_constants(config: Any, size: Size, tensors: Tensors, guidance: float) -> dict[str, Any]:
    image = _grid(1, size.height // 2, size.width // 2, 1)
    text = _grid(1, 1, 1, tensors["encoder_hidden_states"].shape[1])
    return {"img_ids": image[None], "txt_ids": text[None], "guidance": _embedded(config, guidance)}


def _qwen_constants(config: Any, size: Size, tensors: Tensors, guidance: float) -> dict[str, Any]:
    image = [[(1, size.height // 2, size.width // 2)]]
    return {"img_shapes": image, "guidance": _embedded(config, guidance)}


def _rescaled(given: Tensor, other: Tensor, scale: float) -> Tensor:
    """Guided, at the norm that the prediction had before, token by token."""
    guided = other + scale * (given - other)
    before, after = (torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (given, guided))
    return torch.as_tensor(guided * (before / after))


STYLES: Mapping[str, Style] = {
    "FluxTransformer2DModel": Style(
        conditioning={
            "encoder_hidden_states": (1, "tokens", "joint_attention_dim"),
            "pooled_projections": (1, "pooled_projection_dim"),
        },
        shape=_packed_shape,
        pack=_pack,
        schedule=_flux_schedule,
        constants=_flux_constants,
    ),
    "Flux2Transformer2DModel": Style(
        conditioning={"encoder_hidden_states": (1, "tokens", "joint_attention_dim")},
        shape=_tiled_shape,
        pack=_flatten,
        schedule=_flux2_schedule,
        constants=_flux2_constants,
        guide=None,
    ),
    "WanTransformer3DModel": Style(
        conditioning={"encoder_hidden_states": (1, "tokens", "text_dim")},
        patch=lambda config: tuple(config.patch_size),
        noise=torch.float32,
        shape=_video_shape,
        pack=lambda noise: noise,
        schedule=_plain_schedule,
        constants=lambda config, size, tensors, guidance: {},
        time=lambda t, dtype: t,
    ),
    "QwenImageTransformer2DModel": Style(
        conditioning={
            "encoder_hidden_states": (1, "tokens", "joint_attention_dim"),
            "encoder_hidden_states_mask": (1, "tokens"),
        },
        optional=frozenset({"encoder_hidden_states_mask"}),
        shape=_packed_shape,
        pack=_pack,
        schedule=_flux_schedule,
        constants=_qwen_constants,
        guide=_rescaled,
    ),
}
