"""Denoising on one rank: samples with their latents, each stepped by its own scheduler. No communication, no threads.

A sample is alone in every forward: its latents are a function of weights, seed, sizes, steps, guidance and
conditioning, in every bit, whatever the traffic around it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from quant.checkpoint import read_object
from quant.pipelines import pipeline_folder
from sharding.fsdp import check_capturable, layers_of
from weight_update.errors import PlanError

from .residence import Offload, Residence
from .samples import MAX_LATENTS_BYTES, Denoised, Samples, SampleStart, Size, start_problems
from .styles import COMPUTE, NEGATIVE, STYLES, Style, embeds_guidance
from .work import OnCommit, Running

SCHEDULER = Path("scheduler") / "scheduler_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a pipeline folder says of denoising, beside its transformers.

    boundary: timestep below which the second transformer takes over; None where there is one only.
    """

    style: Style
    scheduler: Callable[[], Any]
    boundary: float | None

    def scheduled(self, config: Any, start: SampleStart) -> Any:
        """A scheduler of its own for one sample, at its first step."""
        scheduler = self.scheduler()
        self.style.schedule(scheduler, self.style.tokens(config, start.size), start.num_steps)
        scheduler.set_begin_index(0)
        return scheduler

    def stage(self, timestep: Tensor) -> int:
        """Index of the component that does this step."""
        return int(self.boundary is not None and float(timestep) < self.boundary)


def read_recipe(directory: Path, components: Mapping[str, nn.Module]) -> Recipe:
    """From model_index.json and the scheduler's config."""
    directory = pipeline_folder(directory)
    index = read_object(directory / "model_index.json")
    config = read_object(directory / SCHEDULER)
    classes = sorted({type(each).__name__.removeprefix("FSDP") for each in components.values()})
    ratio = index.get("boundary_ratio")
    problems = [] if config else [f"no {SCHEDULER}; copy the folder 'scheduler' of the pipeline"]
    if len(classes) != 1 or classes[0] not in STYLES:
        problems.append(f"transformers of {', '.join(classes)}: expected one of {', '.join(STYLES)}")
    if len(components) > 2:
        problems.append(f"{len(components)} transformers: expected one or two")
    if len(components) == 2 and ratio is None:
        problems.append("two transformers and no boundary_ratio in model_index.json: nothing says when the second runs")
    if index.get("expand_timesteps"):
        problems.append("expand_timesteps in model_index.json: a timestep for each token is not supported")
    if problems:
        raise PlanError("\n  - ".join([f"{directory}: cannot be denoised with", *problems]))
    make = _scheduler_class(directory, str(config.get("_class_name")))
    scheduler = make.from_config(config)
    boundary = ratio * scheduler.config.num_train_timesteps if len(components) == 2 else None
    return Recipe(style=STYLES[classes[0]], scheduler=lambda: make.from_config(config), boundary=boundary)


def _scheduler_class(directory: Path, name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        extra = "pip install 'transfuse[diffusion]'"
        raise PlanError(f"{directory}: denoising needs diffusers ({error}); {extra}") from error
    if not hasattr(diffusers, name):
        raise PlanError(f"{directory / SCHEDULER}: _class_name {name}: diffusers {diffusers.__version__} has none")
    return getattr(diffusers, name)


class Sample:
    """One sample: its latents, its scheduler, and what every forward takes besides."""

    def __init__(self, start: SampleStart, seed: int, recipe: Recipe, config: Any, device: torch.device) -> None:
        style, tensors = recipe.style, conditioning_of(start.conditioning, device)
        self.index = 0
        self.scheduler = recipe.scheduled(config, start)
        self._recipe = recipe
        self._trajectory = start.trajectory
        # On the CPU whatever the model's device: a seed then means the same everywhere.
        self._generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(style.shape(config, start.size), generator=self._generator, dtype=style.noise)
        self.latents = style.pack(noise).contiguous().to(device)
        self._given = _inputs(style, config, start, tensors, "", device)
        guided = any(name.startswith(NEGATIVE) for name in tensors)
        self._other = _inputs(style, config, start, tensors, NEGATIVE, device) if guided else None
        self._scales = (start.cfg_scale, start.cfg_scale_2 or start.cfg_scale)

    @property
    def stage(self) -> int:
        """Index of the component that does the next step."""
        return self._recipe.stage(self.scheduler.timesteps[self.index])

    def advance(self, model: nn.Module) -> tuple[int, bool, bytes]:
        """One step with the component of `stage`: (its number, whether it was the last, latents if to be given)."""
        style, stage, step = self._recipe.style, self.stage, self.index
        t = self.scheduler.timesteps[step].to(self.latents.device)
        inputs = {
            "hidden_states": self.latents.to(COMPUTE),
            "timestep": style.time(t.expand(1), self.latents.dtype),
            "return_dict": False,
        }
        noise = model(**inputs, **self._given)[0]
        if self._other is not None and style.guide is not None:
            noise = style.guide(noise, model(**inputs, **self._other)[0], self._scales[stage])
        extra = {"generator": self._generator} if _takes_generator(type(self.scheduler)) else {}
        self.latents = self.scheduler.step(noise, t, self.latents, return_dict=False, **extra)[0]
        self.index += 1
        last = self.index == len(self.scheduler.timesteps)
        wanted = last or self._trajectory
        return step, last, save({"latents": self.latents.cpu().contiguous()}) if wanted else b""


def _takes_generator(scheduler: type[Any]) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def _inputs(
    style: Style, config: Any, start: SampleStart, tensors: Mapping[str, Tensor], sign: str, device: torch.device
) -> dict[str, Any]:
    """What a forward takes beside latents and time; sign: "" or NEGATIVE."""
    own = {name: tensors[sign + name] for name in style.conditioning if sign + name in tensors}
    # A mask that hides nothing is left out, as diffusers does: attention then takes its fast path.
    own = {name: value for name, value in own.items() if not (value.dtype == torch.bool and bool(value.all()))}
    constants = style.constants(config, start.size, own, start.guidance)
    return own | {name: each.to(device) if isinstance(each, Tensor) else each for name, each in constants.items()}


def conditioning_of(blob: bytes, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tensors of a request, activations in BF16 and masks as booleans."""
    tensors = load(blob) if blob else {}
    return {
        name: value.to(device, torch.bool if name.endswith("_mask") else COMPUTE) for name, value in tensors.items()
    }


class Denoiser:
    """All samples of one rank; a step is one denoising step of each (see service.work.Worker).

    model         one child a transformer, in the order in which they denoise
    directory     of the pipeline: model_index.json and the scheduler's config
    max_tokens    of one forward, text and latents
    offload       see service.residence
    on_refresh    makes new weights visible to forward; by default everything that is resident is decoded again
    compile_with  backend of torch.compile for the blocks, at warm-up; "" for none
    """

    rpc = "Denoise"
    on_commit: OnCommit = "continue"

    def __init__(
        self,
        model: nn.Module,
        directory: Path,
        *,
        max_batch: int = 32,
        max_tokens: int = 131072,
        device: torch.device | str = "cpu",
        offload: Offload = "none",
        on_refresh: Callable[[], None] | None = None,
        compile_with: str = "",
    ) -> None:
        components = dict(model.named_children())
        self.max_batch = max_batch
        self._max_tokens = max_tokens
        self._components = components
        self._config: Any = next(iter(components.values())).config
        self._recipe = read_recipe(directory, components)
        self._device = torch.device(device)
        self._residence = Residence(components, offload, on_refresh)
        self._compile_with = compile_with
        self._samples: dict[int, Sample] = {}
        self.refresh = self._residence.refresh

    @property
    def num_sequences(self) -> int:
        return len(self._samples)

    def request(
        self,
        seeds: Sequence[int],
        num_steps: int,
        conditioning: bytes,
        *,
        height: int,
        width: int,
        num_frames: int = 1,
        guidance: float = 0.0,
        cfg_scale: float = 0.0,
        cfg_scale_2: float = 0.0,
        trajectory: bool = False,
    ) -> Samples:
        """One sample a seed; sizes are those of the VAE's latents, conditioning is a safetensors blob."""
        start = SampleStart(
            rank=0,
            keys=(),
            seeds=tuple(seeds),
            num_steps=num_steps,
            num_frames=num_frames,
            height=height,
            width=width,
            guidance=guidance,
            cfg_scale=cfg_scale,
            cfg_scale_2=cfg_scale_2,
            conditioning=conditioning,
            trajectory=trajectory,
        )
        problems = start_problems(start, self.max_batch)
        if not problems:
            problems = self._problems(start)
        if problems:
            raise ValueError("\n  - ".join([f"denoising request: {len(problems)} problem(s)", *problems]))
        timesteps = self._recipe.scheduled(self._config, start).timesteps
        return Samples(start=start, stages=tuple(map(self._recipe.stage, timesteps)))

    def _problems(self, start: SampleStart) -> list[str]:
        """What is wrong with a request for this model."""
        style, config = self._recipe.style, self._config
        problems = style.problems(config, start.size)
        try:
            tensors = conditioning_of(start.conditioning)
        except (SafetensorError, ValueError) as error:
            return [*problems, f"conditioning: not a safetensors file ({error}); use safetensors.torch.save"]
        problems += style.conditioning_problems(config, tensors)
        problems += self._size_problems(start.size, tensors)
        negative = any(name.startswith(NEGATIVE) for name in tensors)
        scale, scale_2 = start.cfg_scale, start.cfg_scale_2
        if style.guide is None and scale:
            problems.append(f"cfg_scale: this class has no classifier-free guidance, expected 0, got {scale}")
        elif negative != (scale > 1.0):
            problems.append(f"cfg_scale {scale}: above 1 it needs {NEGATIVE} conditioning, and that needs it above 1")
        if scale_2 and scale <= 1.0:
            problems.append(f"cfg_scale_2 {scale_2}: expected 0 where cfg_scale is not above 1")
        if scale_2 and self._recipe.boundary is None:
            problems.append("cfg_scale_2: this pipeline has one transformer; expected 0")
        if start.guidance and not embeds_guidance(config):
            problems.append(f"guidance: this model takes none as input, expected 0, got {start.guidance}")
        return problems

    def _size_problems(self, size: Size, tensors: Mapping[str, Tensor]) -> list[str]:
        style, config = self._recipe.style, self._config
        text = max((each.shape[1] for each in tensors.values() if each.ndim == 3), default=0)
        tokens = style.tokens(config, size) + text
        found = []
        if tokens > self._max_tokens:
            found.append(f"size: {tokens} tokens of latents and text, at most {self._max_tokens} are taken")
        num_bytes = 4 * math.prod(style.shape(config, size))
        if num_bytes > MAX_LATENTS_BYTES:
            found.append(f"size: latents of {num_bytes} bytes, at most {MAX_LATENTS_BYTES} are taken")
        return found

    def plan(self, running: Collection[Running[Any]]) -> int:
        """Mask of the components that any rank needs in this step, where they take turns."""
        mask = 0
        for each in running:
            work: Any = each.request.work
            mask |= 1 << work.stages[len(each.versions)]
        return mask

    def step(self, starts: Sequence[SampleStart], cancels: Collection[int], plan: int) -> list[Denoised]:
        """Take in, free, and go on with every sample by one step."""
        for start in starts:
            for key, seed in zip(start.keys, start.seeds, strict=True):
                self._samples[key] = Sample(start, seed, self._recipe, self._config, self._device)
        for key in cancels:
            self._samples.pop(key, None)
        # Fixed before the first step: one that comes to the next component now goes on there in the next turn.
        due = {key: self._residence.names[sample.stage] for key, sample in self._samples.items()}
        done = []
        for names in self._residence.visits(plan):
            for key in [key for key, name in due.items() if name in names]:
                step, last, latents = self._samples[key].advance(self._components[due[key]])
                done.append(Denoised(key, step, last, latents))
                if last:
                    del self._samples[key]
        return done

    def renew(self) -> None:
        """Nothing: a sample's only state is its latents."""

    def warm_up(self) -> None:
        """A forward of every component, before and, where it is asked for, after its blocks are compiled."""
        self.refresh()
        self._dummies()
        if self._compile_with:
            for component in self._components.values():
                compile_blocks(component, self._compile_with)
            self._dummies()

    def _dummies(self) -> None:
        """The smallest sample that there is, one step in each component."""
        start = self._smallest().start
        for names in self._residence.visits((1 << len(self._components)) - 1):
            for name in names:
                with torch.no_grad():
                    Sample(start, 0, self._recipe, self._config, self._device).advance(self._components[name])

    def _smallest(self) -> Samples:
        style, config = self._recipe.style, self._config
        tensors = {
            name: torch.zeros([1 if each == "tokens" else each for each in style.wanted(config, name)])  # type: ignore[misc]
            for name in style.conditioning
            if name not in style.optional
        }
        frames, height, width = style.patch(config)
        return self.request((0,), 1, save(tensors), num_frames=frames, height=height, width=width)


def compile_blocks(component: nn.Module, backend: str = "inductor") -> None:
    """Compile the forward of every block. What FSDP hooks around it stays as it is.

    A graph takes parameters and buffers as inputs, so it computes with what is in them. One graph a shape and no
    dynamic ones: which kernels a sample meets must not depend on the shapes that came before. A backend that replays
    CUDA graphs keeps addresses, so it is refused over sharded blocks.
    """
    if backend == "cudagraphs":
        check_capturable(component)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 1 << 16)
    for block in layers_of(component):
        compiled: Any = torch.compile(block.forward, backend=backend, dynamic=False)
        block.forward = compiled
