"""Making the records of a comparison: models built in this process, and live services asked.

plan = plan_records(sides, Asked())           # everything that can be refused before a model is built
record = plan.record(sides[0], lambda done, total: None)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from protos import transfuse_pb2 as pb
from quant.checkpoint import PACKAGED, open_checkpoint
from quant.models import build_model, owners_of
from quant.modules import decode_all, mark_all_applied
from quant.pipelines import components_of, is_pipeline, meta_pipeline
from service.denoising import Denoiser
from service.loading import cold_load
from service.requests import Start
from service.sampling import Batch
from service.styles import NEGATIVE, STYLES
from service.text import TextCodec
from weight_update.errors import PlanError, VersionError
from weight_update.receiver import Receiver

from .frames import decode_frames, has_vae
from .records import CONDITIONING, Record, asked_of, load
from .rpc import denoise, generate
from .sides import Asked, Side

WINDOW = 256  # tokens of one forward; each window starts without context
PROBE_WORDS = 32  # context of a probe
PROBE_BATCH = 16  # prompts of one request: fits the limits of any service
TEXT_TOKENS = 16  # of conditioning that nobody gave

Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """kind of the records, how they will be compared, and what is asked: a saved record brings its own question.

    conditioning: of diffusion models, by the names of the Denoise call. vae: the pipeline folder whose VAE makes frames
    of both sides' latents, None where no side has one.
    """

    kind: str
    how: str
    asked: Asked
    conditioning: Mapping[str, Tensor]
    vae: Path | None = None

    def record(self, side: Side, progress: Progress) -> Record:
        """Make or read the record of one side."""
        if side.kind == "saved":
            return load(Path(side.source))
        return MAKERS[side.kind, self.kind](side, self, progress)

    def with_frames(self, record: Record) -> Record:
        """A record of latents with their frames too, where there is a VAE."""
        if self.vae is None:
            return record
        last = record.tensors["latents"][-1]
        frames = decode_frames(self.vae, last, height=self.asked.height, width=self.asked.width)
        return replace(record, tensors={**record.tensors, "frames": frames})


def plan_records(sides: Sequence[Side], asked: Asked) -> Plan:
    """What to record, and how the records will compare. Raises PlanError where the sides do not go together."""
    saved = [load(Path(side.source)) for side in sides if side.kind == "saved"]
    for record in saved[:1]:
        asked = replace(asked, **record.asked)
    kinds = {record.label: record.kind for record in saved}
    kinds |= {side.label: _kind(side) for side in sides if side.kind == "checkpoint"}
    if len(set(kinds.values())) > 1:
        raise PlanError(f"a language and a diffusion model: {kinds}; expected two of one kind")
    _require_one_class([side for side in sides if kinds.get(side.label) == "latents" and side.kind == "checkpoint"])
    # Services alone: only diffusion models are conditioned.
    kind = next(iter(kinds.values()), "latents" if asked.conditioning else "text")
    if kind == "latents":
        folders = (Path(side.source) for side in sides if side.kind == "checkpoint")
        vae = next(filter(has_vae, folders), None)
        given = _conditioning(sides, saved, asked)
        return Plan(kind=kind, how="latents", asked=asked, conditioning=given, vae=vae)
    whole = all("logits" in record.tensors for record in saved) and all(side.kind != "service" for side in sides)
    return Plan(kind=kind, how="logits" if whole else "tops", asked=asked, conditioning={})


def _kind(side: Side) -> str:
    if not Path(side.source).exists() and side.source not in PACKAGED:
        raise PlanError(f"{side.source}: not there; expected a checkpoint, HOST:PORT of a service, or a file of --save")
    return "latents" if is_pipeline(Path(side.source)) else "text"


def _require_one_class(pipelines: Sequence[Side]) -> None:
    """Refuse pipelines of different classes, and overrides that fit none, from their configs alone."""
    components = {side.label: components_of(Path(side.source), side.overrides) for side in pipelines}
    classes = {label: next(iter(each.values())).class_name for label, each in components.items()}
    if len(set(classes.values())) > 1:
        raise PlanError(f"transformers of different classes: {classes}; expected two of one class")


# ---------------------------------------------------------------- models in this process


def build(side: Side) -> tuple[nn.Module, Path]:
    """The model of a checkpoint, loaded as a service does it and decoded, on the CPU; and its folder."""
    components = side.overrides
    with open_checkpoint(side.source, components=components) as checkpoint:
        declared = checkpoint.quantization
        own = "auto" if _kind(side) == "latents" else declared.format if declared else "bf16"
        model = build_model(checkpoint.config_dir, side.format or own, side.layout, components=components)
        receiver = Receiver.from_module(model)
        if side.first:
            with open_checkpoint(side.first) as first:
                cold_load(receiver, first, None, owners_of(model))
        cold_load(receiver, checkpoint, None, owners_of(model))
    mark_all_applied(model)
    decode_all(model)
    return model, checkpoint.config_dir


def service_label(address: str, versions: set[int]) -> str:
    if len(versions) > 1:
        raise VersionError(
            f"{address}: answered with versions {', '.join(map(str, sorted(versions)))}: a push came in between; again"
        )
    return f"{address} version {max(versions)}"


# ---------------------------------------------------------------- language models


@torch.inference_mode()
def checkpoint_text(side: Side, plan: Plan, progress: Progress) -> Record:
    """Logits at every token of the text, and the likeliest token after every probe."""
    asked = plan.asked
    model, config_dir = build(side)
    codec = TextCodec(config_dir)
    ids = _encode(codec, asked.text, side.source)[: asked.max_tokens]
    if len(ids) < 2:
        raise PlanError(f"{side.source}: the text has {len(ids)} token(s); expected 2 or more")
    prompts = [_encode(codec, probe, side.source) for probe in probes(asked)]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW - 1)]
    total = len(windows) + len(prompts)
    logits: list[Tensor] = []
    for done, window in enumerate(windows):
        progress(done, total)
        logits.append(model(input_ids=torch.tensor([window]), use_cache=False).logits[0, : len(window) - 1].float())
    tops: list[tuple[int, float]] = []
    for batch in _batches(prompts):
        progress(len(windows) + len(tops), total)
        tops += _likeliest(model, batch)
    tensors = {"targets": torch.tensor(ids[1:]), "logits": torch.cat(logits)} | _top_tensors(tops)
    return Record(kind="text", label=side.label, asked=asked_of("text", asked), tensors=tensors)


def _encode(codec: TextCodec, text: str, path: str) -> Sequence[int]:
    try:
        return codec.encode(pb.Prompt(text=text))
    except ValueError as error:
        raise PlanError(f"{path}: no tokenizer.json, so no text can be compared; copy the one of the model") from error


def _likeliest(model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """As a service of one rank decodes them, padding and batch included."""
    start = Start(
        rank=0,
        keys=tuple(range(len(prompts))),
        prompts=tuple(tuple(prompt) for prompt in prompts),
        seeds=(0,) * len(prompts),
        max_new_tokens=1,
        temperature=0.0,
        ignore_eos=True,
    )
    sampled = Batch(start, eos_ids=(), device=torch.device("cpu")).step(model)
    return [(each.token_id, each.logprob) for each in sampled]


def service_text(side: Side, plan: Plan, progress: Progress) -> Record:
    """The likeliest token after every probe, and its log-probability: all that a service says of its distribution."""
    prefixes = probes(plan.asked)
    tops: list[tuple[int, float]] = []
    versions: set[int] = set()
    for batch in _batches(prefixes):
        progress(len(tops), len(prefixes))
        prompts = [pb.Prompt(text=probe) for probe in batch]
        request = pb.GenerateRequest(prompts=prompts, max_new_tokens=1, temperature=0.0, ignore_eos=True)
        tokens = {token.sequence: token for token in generate(side.source, request)}
        versions |= {token.version for token in tokens.values()}
        tops += [(tokens[i].token_id, tokens[i].logprob) for i in range(len(batch))]
    return Record(
        kind="text",
        label=service_label(side.source, versions),
        asked=asked_of("text", plan.asked),
        versions=tuple(versions),
        tensors=_top_tensors(tops),
    )


def probes(asked: Asked) -> list[str]:
    """Beginnings of the text, a word longer each, of PROBE_WORDS at most: every tokenizer can go on from them."""
    words = list(re.finditer(r"\S+", asked.text))[: asked.max_tokens]
    return [asked.text[words[max(0, i - PROBE_WORDS + 1)].start() : word.end()] for i, word in enumerate(words)]


def _batches(prompts: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (prompts[start : start + PROBE_BATCH] for start in range(0, len(prompts), PROBE_BATCH))


def _top_tensors(tops: Sequence[tuple[int, float]]) -> dict[str, Tensor]:
    ids, logprobs = zip(*tops, strict=True)
    return {"top_ids": torch.tensor(ids), "top_logprobs": torch.tensor(logprobs, dtype=torch.float32)}


# ---------------------------------------------------------------- diffusion models


def _conditioning(sides: Sequence[Side], saved: Sequence[Record], asked: Asked) -> Mapping[str, Tensor]:
    """Of the saved record, of a file, or random numbers in the shapes that the class of a checkpoint takes."""
    for record in saved:
        named = ((name, tensor) for name, tensor in record.tensors.items() if name.startswith(CONDITIONING))
        return {name.removeprefix(CONDITIONING): tensor for name, tensor in named}
    if asked.conditioning:
        try:
            return safetensors.torch.load_file(asked.conditioning)
        except (SafetensorError, OSError) as error:
            raise PlanError(f"{asked.conditioning}: cannot be read as safetensors: {error}") from error
    folder = next(Path(side.source) for side in sides if side.kind == "checkpoint")
    return random_conditioning(folder, asked)


def random_conditioning(folder: Path, asked: Asked) -> dict[str, Tensor]:
    """Normal BF16 numbers from the seed for all that a pipeline's class must be given, the negative where guided."""
    component = next(iter(meta_pipeline(components_of(folder)).components.values()))
    style, config = STYLES[type(component).__name__], getattr(component, "config", None)
    signs = ("", NEGATIVE) if max(asked.cfg_scale, asked.cfg_scale_2) > 1 else ("",)
    generator = torch.Generator().manual_seed(asked.seed)
    made = {}
    for sign in signs:
        for name, axes in style.conditioning.items():
            if name not in style.optional:
                sizes = [TEXT_TOKENS if axis == "tokens" else axis for axis in axes]
                shape = [getattr(config, axis) if isinstance(axis, str) else axis for axis in sizes]
                made[sign + name] = torch.randn(shape, generator=generator).bfloat16()
    return made


@torch.inference_mode()
def checkpoint_latents(side: Side, plan: Plan, progress: Progress) -> Record:
    """The latents after every step, as a service denoises them."""
    asked = plan.asked
    model, config_dir = build(side)
    denoiser = Denoiser(model, config_dir, max_batch=asked.num_samples)
    try:
        work = denoiser.request(_seeds(asked), asked.num_steps, _blob(plan), **_sizes(asked), trajectory=True)
    except ValueError as error:
        raise PlanError(f"{side.label}: {error}") from error
    denoiser.refresh()
    starts = [work.share(0, 0, range(asked.num_samples))]
    found: dict[tuple[int, int], bytes] = {}
    for step, stage in enumerate(work.stages):
        progress(step, len(work.stages))
        found |= {(each.step, each.key): each.latents for each in denoiser.step(starts, (), 1 << stage)}
        starts = []
    return _latents_record(side.label, plan, found, ())


def service_latents(side: Side, plan: Plan, progress: Progress) -> Record:
    """The same of a live service."""
    asked = plan.asked
    request = pb.DenoiseRequest(
        seeds=_seeds(asked), num_steps=asked.num_steps, conditioning=_blob(plan), trajectory=True, **_sizes(asked)
    )
    found: dict[tuple[int, int], bytes] = {}
    versions: set[int] = set()
    for each in denoise(side.source, request):
        found[each.step, each.sample] = each.latents
        versions.add(each.version)
        progress(len(found), asked.num_steps * asked.num_samples)
    return _latents_record(service_label(side.source, versions), plan, found, tuple(versions))


def _seeds(asked: Asked) -> list[int]:
    return [asked.seed + index for index in range(asked.num_samples)]


def _sizes(asked: Asked) -> dict[str, Any]:
    names = ("num_frames", "height", "width", "guidance", "cfg_scale", "cfg_scale_2")
    return {name: getattr(asked, name) for name in names}


def _blob(plan: Plan) -> bytes:
    return safetensors.torch.save(dict(plan.conditioning))


def _latents_record(
    label: str, plan: Plan, found: Mapping[tuple[int, int], bytes], versions: tuple[int, ...]
) -> Record:
    """found: safetensors of [1, ...] by (step, sample)."""
    latents = {key: safetensors.torch.load(blob)["latents"][0].float() for key, blob in found.items()}
    num_steps, num_samples = (1 + max(column) for column in zip(*latents, strict=True))
    steps = [torch.stack([latents[step, sample] for sample in range(num_samples)]) for step in range(num_steps)]
    given = {CONDITIONING + name: tensor for name, tensor in plan.conditioning.items()}
    return Record(
        kind="latents",
        label=label,
        asked=asked_of("latents", plan.asked),
        versions=versions,
        tensors={"latents": torch.stack(steps), **given},
    )


# (kind of the side, kind of the record) -> what makes it
MAKERS: dict[tuple[str, str], Callable[[Side, Plan, Progress], Record]] = {
    ("checkpoint", "text"): checkpoint_text,
    ("checkpoint", "latents"): checkpoint_latents,
    ("service", "text"): service_text,
    ("service", "latents"): service_latents,
}
