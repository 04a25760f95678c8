"""A request for denoised samples: its limits, its shares, and what one step of a sample is to rank and client.

Conditioning and latents travel as safetensors: text encoders and VAEs are the client's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .work import Running

MAX_STEPS = 1000
MAX_AXIS = 1024  # patches along one axis: what Wan's rotary table holds
MAX_TEXT_TOKENS = 2048  # Qwen-Image's rotary table holds 4096, half a picture's axis included
MAX_CONDITIONING_BYTES = 64 << 20  # FLUX.2's embeddings of 512 tokens are 15 MiB
MAX_LATENTS_BYTES = 128 << 20  # of one sample; one message carries them
MAX_SEED = (1 << 32) - 1  # torch's CPU generator keeps the low 32 bits only
MAX_SCALE = 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of a VAE's latents: pixels / 8 for most."""

    num_frames: int
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleStart:
    """The share of one request that one rank denoises. `keys` name samples within the engine, `seeds` are theirs."""

    rank: int
    keys: tuple[int, ...]
    seeds: tuple[int, ...]
    num_steps: int
    num_frames: int
    height: int
    width: int
    guidance: float
    cfg_scale: float
    cfg_scale_2: float
    conditioning: bytes
    trajectory: bool

    @property
    def size(self) -> Size:
        return Size(num_frames=self.num_frames, height=self.height, width=self.width)


class Denoised(NamedTuple):
    """Step number `step` of the sample `key`. latents (safetensors): with the last step, or with each if asked for."""

    key: int
    step: int
    last: bool
    latents: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentsOut:
    """One step of one sample, whose seed has index `sample` in the request.

    version: of the weights that did the step; versions, with the last step only: of every step.
    """

    sample: int
    step: int
    version: int
    last: bool
    latents: bytes
    versions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """One checked request for samples (see service.work.Work).

    stages: for every step the index of the component that does it.
    """

    start: SampleStart  # of all seeds
    stages: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.start.seeds)

    def share(self, rank: int, first_key: int, indices: Sequence[int]) -> SampleStart:
        """What `rank` denoises: the samples `indices`."""
        keys = tuple(first_key + index for index in indices)
        return replace(self.start, rank=rank, keys=keys, seeds=tuple(self.start.seeds[index] for index in indices))

    def output(self, entry: Denoised, running: Running[Any]) -> LatentsOut:
        """What the client gets for every step."""
        versions = running.versions
        return LatentsOut(
            sample=running.index,
            step=entry.step,
            version=versions[-1],
            last=entry.last,
            latents=entry.latents,
            versions=tuple(versions) if entry.last else (),
        )


def start_problems(start: SampleStart, max_batch: int) -> list[str]:
    """What is wrong with the numbers of a request, whatever the model; start: with the seeds of all its samples."""
    seeds = start.seeds
    checks = {
        "no seeds: expected at least one; each makes one sample": len(seeds) > 0,
        f"too many seeds: expected at most {max_batch}, got {len(seeds)}; split the request": len(seeds) <= max_batch,
        f"seeds: expected 0 to {MAX_SEED}, got {max(seeds, default=0)}": max(seeds, default=0) <= MAX_SEED,
        f"num_steps: expected 1 to {MAX_STEPS}, got {start.num_steps}": 1 <= start.num_steps <= MAX_STEPS,
    }
    for name in ("num_frames", "height", "width"):
        value = getattr(start, name)
        checks[f"{name}: expected at least 1, got {value}"] = value >= 1
    for name in ("guidance", "cfg_scale", "cfg_scale_2"):
        value = getattr(start, name)
        checks[f"{name}: expected 0 to {MAX_SCALE:.0f}, got {value}"] = math.isfinite(value) and 0 <= value <= MAX_SCALE
    size = len(start.conditioning)
    checks[f"conditioning: {size} bytes, at most {MAX_CONDITIONING_BYTES} are taken"] = size <= MAX_CONDITIONING_BYTES
    return [text for text, passed in checks.items() if not passed]
