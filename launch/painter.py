"""The diffusion demo's trainer: a tiny FLUX.1 transformer that paints discs, and learns which colour is liked.

    pretrain(Painter(), progress)              # discs of any colour
    report = painter.step(latents)             # latents that actors denoised; then push painter.model

A picture is its own latent: 16 x 16 pixels in RGB, [-1, 1], packed into 64 tokens of 2 x 2 pixels, as FLUX.1's own
pipeline packs a latent. Time t runs from 0 (picture) to 1 (noise); the model predicts the velocity, noise - picture.

Learning is reward-weighted regression: flow matching on the actors' own samples, each weighted by exp(advantage)
(Peters and Schaal 2007). It needs no log-probabilities, which a deterministic sampler does not have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SIZE, PATCH = 16, 2  # pixels
SIDE = SIZE // PATCH
TOKENS, CHANNELS = SIDE * SIDE, 3 * PATCH * PATCH
TEXT_DIM = 32
# 300 batches of 48 discs: about 45 s on two cores, and shapes and colours are there. FLUX.1's classes at 1.2 M weights.
PRETRAIN_STEPS, PRETRAIN_BATCH, PRETRAIN_RATE = 300, 48, 2e-3
LEARNING_RATE, NUM_PASSES, GREED = 3e-4, 8, 1.5
REWARD_MEANS = "Reward: how red the picture is, red minus the mean of green and blue, 4 where every pixel is pure red."

Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step saw."""

    reward: float
    loss: float
    seconds: float


class Painter:
    """Owns the FP32 masters and the optimizer."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = tiny_flux()
        self._noise = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def step(self, latents: Tensor) -> StepReport:
        """Learn from samples [n, TOKENS, CHANNELS] of the actors; the weights it leaves are what to push."""
        start_s = time.perf_counter()
        rewards = reward_of(latents)
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        weights = (GREED * advantage).exp()
        losses = [self._regress(latents, weights / weights.mean()) for _ in range(NUM_PASSES)]
        return StepReport(reward=rewards.mean().item(), loss=losses[0], seconds=time.perf_counter() - start_s)

    def _regress(self, latents: Tensor, weights: Tensor) -> float:
        noise = torch.randn(latents.shape, generator=self._noise)
        loss = flow_loss(self.model, latents, noise, torch.rand(len(latents), generator=self._noise), weights)
        descend(self.model, self._optimizer, loss)
        return loss.item()


def pretrain(painter: Painter, progress: Progress) -> None:
    """Teach discs of every colour."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(painter.model.parameters(), lr=PRETRAIN_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAIN_RATE, PRETRAIN_STEPS)
    even = torch.ones(PRETRAIN_BATCH)
    for done in range(PRETRAIN_STEPS):
        progress(done, PRETRAIN_STEPS)
        pictures = pack(discs(PRETRAIN_BATCH, generator))
        noise = torch.randn(pictures.shape, generator=generator)
        # Middle times are the hard ones: logit-normal, as Stable Diffusion 3 draws them (Esser et al. 2024).
        times = torch.randn(PRETRAIN_BATCH, generator=generator).sigmoid()
        descend(painter.model, optimizer, flow_loss(painter.model, pictures, noise, times, even))
        schedule.step()


def save_pipeline(painter: Painter, directory: Path) -> None:
    """A pipeline folder in BF16, as diffusers lays it out, without text encoder and VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler
    scheduler(shift=1.0).save_pretrained(directory / "scheduler")
    published: Any = tiny_flux()
    weights = {name: value.to(torch.bfloat16) for name, value in painter.model.state_dict().items()}
    published.load_state_dict(weights, assign=True)
    published.save_pretrained(directory / "transformer")
    (directory / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],'
        ' "transformer": ["diffusers", "FluxTransformer2DModel"]}\n'
    )


def tiny_flux() -> nn.Module:
    """FLUX.1's class, small: every linear of a block fits every format."""
    from diffusers import FluxTransformer2DModel

    flux: Any = FluxTransformer2DModel
    made: nn.Module = flux(
        patch_size=1,
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    return made


def flow_loss(model: nn.Module, pictures: Tensor, noise: Tensor, times: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error of the velocity at `times` [n] on the straight path from picture to noise."""
    at = times[:, None, None]
    velocity: Tensor = model(
        hidden_states=(1 - at) * pictures + at * noise,
        timestep=times,
        **conditioning(len(pictures)),
        return_dict=False,
    )[0]
    return (weights * (velocity - (noise - pictures)).square().mean((1, 2))).mean()


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One optimizer step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def conditioning(count: int) -> Mapping[str, Tensor]:
    """What FLUX.1 is called with beside latent and time; there is no prompt, so the text is one zero token."""
    places = torch.stack([torch.zeros(TOKENS), torch.arange(TOKENS) // SIDE, torch.arange(TOKENS) % SIDE], dim=1)
    return {
        "encoder_hidden_states": torch.zeros(count, 1, TEXT_DIM),
        "pooled_projections": torch.zeros(count, TEXT_DIM),
        "img_ids": places,
        "txt_ids": torch.zeros(1, 3),
    }


def reward_of(latents: Tensor) -> Tensor:
    """[n] rewards of latents [n, TOKENS, CHANNELS]."""
    red, green, blue = pictures_of(latents).unbind(1)
    return 4.0 * (red - (green + blue) / 2).mean((1, 2))


def pictures_of(latents: Tensor) -> Tensor:
    """Pictures [n, 3, SIZE, SIZE] in [0, 1] of packed latents."""
    grid = latents.float().view(-1, SIDE, SIDE, 3, PATCH, PATCH)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE).clamp(-1, 1) / 2 + 0.5


def pack(pictures: Tensor) -> Tensor:
    """Inverse of pictures_of, from [-1, 1]."""
    grid = pictures.view(-1, 3, SIDE, PATCH, SIDE, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, TOKENS, CHANNELS)


def discs(count: int, generator: torch.Generator) -> Tensor:
    """Soft discs of random colour, place and size on near black, [count, 3, SIZE, SIZE] in [-1, 1]."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    column, row, size = torch.rand(3, count, 1, 1, generator=generator)
    far = ((x - 5 - 6 * column).square() + (y - 5 - 6 * row).square()).sqrt()
    inside = torch.sigmoid(2 * (3 + 2 * size - far))[:, None]
    colour = 2 * torch.rand(count, 3, 1, 1, generator=generator) - 1
    return inside * colour + (1 - inside) * -0.9
