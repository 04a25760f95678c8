"""Pipelines of diffusers: the folders that hold them, and the modules that serve their transformers.

    folders = components_of(Path("flux"))                      {"transformer": Component(...)}
    with open_pipeline(Path("wan"), {"transformer": "mine"}) as checkpoint:
        checkpoint.rows("transformer_2.blocks.0.attn1.to_q.weight", 0, 128)
    model = meta_pipeline(folders)                             model.transformer(...), parameters on the meta device

A pipeline folder is what diffusers saves: model_index.json, and a folder a component. A folder with the config.json of
one transformer counts as a pipeline of that component alone. Text encoders and VAEs are not served.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint, CheckpointError, read_object, read_quantization
from .configs import NVFP4_ROWS, Quantization
from .excludes import Excludes
from .families import Family, Repository, family_of, is_served, repository_at
from .formats import TensorSpec
from .name_maps import COMFY_PREFIX, NAME_MAPS
from .names import IDENTITY, NameMap, NameMapError, nearest
from .probe import Hypothesis, ProbeError, Reading, rows_of, verify
from .views import CheckpointView

log = logging.getLogger(__name__)

MODEL_INDEX, CONFIG = "model_index.json", "config.json"

# Classes that compute tensors when they are made, which no checkpoint holds -> the attributes that they are made from.
COMPUTED: dict[str, tuple[str, ...]] = {
    "WanRotaryPosEmbed": ("attention_head_dim", "patch_size", "max_seq_len"),
    "QwenEmbedRope": ("theta", "axes_dim", "scale_rope"),
    "QwenEmbedLayer3DRope": ("theta", "axes_dim", "scale_rope"),
}


class PipelineError(ValueError):
    """A pipeline folder cannot be served as it is; the message lists every reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One transformer of a pipeline: where its config and its weights are. An override moves the weights, and the
    config where it has one; `base` is then where the pipeline's own weights are."""

    name: str
    config: Path
    weights: Path
    base: Path | None = None

    @property
    def class_name(self) -> str:
        return str(read_object(self.config)["_class_name"])

    @property
    def family(self) -> Family:
        return family_of(self.class_name)

    @property
    def has_weights(self) -> bool:
        return self.weights.is_file() or any(self.weights.glob("*.safetensors"))

    def open(self, model: nn.Module | None = None) -> Checkpoint:
        """Its checkpoint in the names of the class and in checkpoint form, whatever the files have.

        model: of its class, not yet quantized, where that is at hand: weights are cut to its shapes.
        """
        stored = self.stored()
        names = self._names_of(stored)
        if names is IDENTITY and stored.quantization is None:
            return stored
        is_padded = stored.quantization is not None and stored.quantization.format in NVFP4_ROWS  # it may be
        shaped = (model or _transformer(self)).named_parameters() if is_padded else ()
        shapes = {name: tuple(parameter.shape) for name, parameter in shaped}
        return CheckpointView(stored, name_map=names, shapes=shapes)

    def stored(self) -> Checkpoint:
        """Its checkpoint as the files have it."""
        known = repository_at(self.weights)
        if known is None:
            return Checkpoint(self.weights)
        if known.swap_nibbles is not None:
            log.info(
                "%s is %s: swap_weight_nibbles=%s by the registry, unless its files state it",
                self.weights, known.name, known.swap_nibbles,
            )  # fmt: skip
        path = self.weights / known.file
        return Checkpoint(path if path.exists() else self.weights, swap_nibbles=known.swap_nibbles)

    def _names_of(self, stored: Checkpoint) -> NameMap:
        is_original = any(self.family.is_original(name.removeprefix(COMFY_PREFIX)) for name in stored.names())
        return NAME_MAPS[self.family.name_map] if is_original else IDENTITY

    def verify(self) -> Reading | None:
        """Compare sampled rows with the pipeline's own BF16 weights: are nibbles and scales in the order stated?

        Logs and returns what is certain; None where there is nothing to be. Raises PipelineError where another order
        fits better.
        """
        with self.stored() as stored, ExitStack() as opened:
            if stored.quantization is None:
                return None
            names = self._names_of(stored)
            base = None if self.base is None else opened.enter_context(Checkpoint(self.base))
            plain = None if base is None else rows_of(base, lambda name: names.forward(name)[0].target.name)
            try:
                verdict = verify(stored, plain, quantization=stored.quantization, metadata=stored.metadata())
            except ProbeError as error:
                raise PipelineError(f"{self.name} ({self.weights}): {error}") from error
            if stored.quantization.format not in NVFP4_ROWS:
                return None
            declared = Hypothesis.declared_by(stored.quantization)
            return Reading(component=self.name, declared=declared, verdict=verdict)


def is_pipeline(path: Path) -> bool:
    """Whether a folder is what diffusers saves, of a whole pipeline or of one transformer, or a known release."""
    known = repository_at(path)
    is_alone = known is not None and bool(known.only)
    return is_alone or (path / MODEL_INDEX).is_file() or "_class_name" in read_object(path / CONFIG)


def components_of(path: Path, overrides: Mapping[str, str | Path] | None = None) -> dict[str, Component]:
    """The served transformers of a pipeline folder, by component name.

    overrides: component -> folder or safetensors file that holds its weights instead; the other components keep theirs.
    """
    base = pipeline_folder(path)
    known = repository_at(path)
    given = {known.only: path} if known is not None and base != path else {}
    wanted = given | {name: Path(where) for name, where in (overrides or {}).items()}
    found = {name: Component(name=name, config=at / CONFIG, weights=at) for name, at in _folders(base).items()}
    problems = [
        f"override {name}={where}: no such component; it has {', '.join(found)}; {nearest(name, found)}"
        for name, where in wanted.items()
        if name not in found
    ]
    problems += [f"override {name}={where}: not there" for name, where in wanted.items() if not where.exists()]
    if problems:
        raise PipelineError("\n  - ".join([f"{path}: {len(problems)} problem(s) with overrides", *problems]))
    return {name: _overridden(each, wanted[name]) if name in wanted else each for name, each in found.items()}


def pipeline_folder(path: Path) -> Path:
    """The folder with the configs and the scheduler: the path itself, or of a release that holds one component alone
    the pipeline that it belongs to, downloaded beside it."""
    known = repository_at(path)
    if known is None or not known.only or (path / MODEL_INDEX).is_file():
        return path
    for base in _beside(path, known):
        if (base / MODEL_INDEX).is_file():
            return base
    raise PipelineError(
        f"{path}: {known.name} holds only the {known.only} of {known.base}, which is not beside it; download that, or "
        f"open it with the override {known.only}={path}"
    )


def _beside(path: Path, known: Repository) -> Iterator[Path]:
    """Where the base of a release would be: in the same folder, or in the same cache of huggingface_hub."""
    owner, _, name = known.base.partition("/")
    for folder in (path, *path.parents):
        yield folder.parent / name
        yield from sorted((folder.parent / f"models--{owner}--{name}" / "snapshots").glob("*"))


def _folders(path: Path) -> dict[str, Path]:
    """Component name -> its folder."""
    if not (path / MODEL_INDEX).is_file():
        family_of(str(read_object(path / CONFIG).get("_class_name")))
        return {"transformer": path}
    listed = {name: value[1] for name, value in read_object(path / MODEL_INDEX).items() if isinstance(value, list)}
    served = {name: path / name for name, class_name in listed.items() if class_name and is_served(class_name)}
    others = {name: value for name, value in listed.items() if name.startswith("transformer") and name not in served}
    for class_name in filter(None, others.values()):
        family_of(class_name)
    if not served:
        raise PipelineError(f"{path / MODEL_INDEX}: names no transformer, only {', '.join(listed)}")
    missing = [str(folder / CONFIG) for folder in served.values() if not (folder / CONFIG).is_file()]
    if missing:
        raise PipelineError(f"{path}: {MODEL_INDEX} names components that are not there: {', '.join(missing)}")
    return served


def _overridden(component: Component, where: Path) -> Component:
    own = where / CONFIG
    config = own if "_class_name" in read_object(own) else component.config
    given = replace(component, config=config, weights=where, base=component.weights)
    if given.class_name != component.class_name:
        what = f"{component.name}={where}: is a {given.class_name}"
        raise PipelineError(f"override {what}, the pipeline has a {component.class_name}; expected the same class")
    return given


# ---------------------------------------------------------------- their checkpoints


class PipelineCheckpoint(Checkpoint):
    """The checkpoints of all components as one: every name is "<component>.<name inside the class>"."""

    def __init__(self, config_dir: Path, components: Mapping[str, Checkpoint]) -> None:
        self.config_dir = config_dir
        self.components = dict(components)
        self.quantization = None  # of the whole; each component has its own

    @property
    def quantizations(self) -> dict[str, Quantization | None]:
        """What each component's checkpoint says of itself."""
        return {name: checkpoint.quantization for name, checkpoint in self.components.items()}

    def __contains__(self, name: object) -> bool:
        component, _, rest = str(name).partition(".")
        return component in self.components and rest in self.components[component]

    def close(self) -> None:
        for checkpoint in self.components.values():
            checkpoint.close()

    def names(self) -> tuple[str, ...]:
        named = (f"{name}.{tensor}" for name, checkpoint in self.components.items() for tensor in checkpoint.names())
        return tuple(sorted(named))

    def spec(self, name: str) -> TensorSpec:
        checkpoint, rest = self._at(name)
        return replace(checkpoint.spec(rest), name=name)

    def rows(self, name: str, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        checkpoint, rest = self._at(name)
        return checkpoint.rows(rest, row_start, row_stop)

    def _at(self, name: str) -> tuple[Checkpoint, str]:
        component, _, rest = name.partition(".")
        if component not in self.components:
            held = ", ".join(self.components)
            raise CheckpointError(f"{self.config_dir}: no component {component!r} for tensor {name!r}; it has {held}")
        return self.components[component], rest


def open_pipeline(path: Path, overrides: Mapping[str, str | Path] | None = None) -> PipelineCheckpoint:
    """Open the checkpoints of a pipeline folder's transformers; files are mapped, and only sampled rows are read."""
    components = components_of(path, overrides)
    readings = [component.verify() for component in components.values()]
    opened = PipelineCheckpoint(path, {name: each.open() for name, each in components.items()})
    opened.readings = tuple(filter(None, readings))
    return opened


def resolved_formats(
    formats: str, components: Mapping[str, Component], quantizations: Mapping[str, Quantization | None]
) -> dict[str, str]:
    """Component -> row of FORMATS, of "auto", one row for all, or "transformer=nvfp4,transformer_2=bf16".

    "auto", and what is not named, is what the component's checkpoint says, else bf16. A component whose checkpoint says
    one format and is asked for another is refused: a packed weight cannot be taken for another kind.
    """
    asked = dict(part.split("=", 1) for part in formats.split(",")) if "=" in formats else {}
    problems = [
        f"{name}: no such component; it has {', '.join(components)}; {nearest(name, components)}"
        for name in asked
        if name not in components
    ]
    chosen: dict[str, str] = {}
    for name, component in components.items():
        declared = quantizations[name]
        wanted = asked.get(name, "auto" if asked else formats)
        held = "bf16" if declared is None else declared.format
        chosen[name] = held if wanted == "auto" else wanted
        if declared is not None and chosen[name] != held:
            problems.append(
                f"{name}: asked for {wanted}, and {component.weights} is in {held} ({declared.source}); "
                f"leave the format to 'auto', or give an override with BF16 weights"
            )
    if problems:
        raise PipelineError("\n  - ".join([f"formats {formats!r} do not fit", *problems]))
    return chosen


def linears_by_format(
    component: Component, declared: Quantization | None, fmt: str, model: nn.Module
) -> dict[str, list[str]]:
    """Row of FORMATS -> the linears to hold in it: what the component's quantized checkpoint says, or else those that
    the recipe of its family does not leave in high precision."""
    family = component.family
    recipe = Excludes(patterns=family.kept(len(getattr(model, family.blocks))))
    excludes = recipe if declared is None else declared.excludes
    others = {} if declared is None else dict(declared.others)
    chosen: dict[str, list[str]] = {fmt: []}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not excludes.matches(name):
            chosen.setdefault(others.get(name, fmt), []).append(name)
    return chosen


def proved_quantization(component: Component, model: nn.Module) -> Quantization | None:
    """What a component's checkpoint says of itself, once its names are proved to be those of the model, one to one.

    A folder without weights says what its config files do.
    """
    if not component.has_weights:
        return read_quantization(component.weights)
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    with component.open(model) as checkpoint:
        names = [name for name in checkpoint.names() if not any(pattern.search(name) for pattern in ignored)]
        try:
            IDENTITY.prove_bijective(names, [name for name, _ in model.named_parameters()])
        except NameMapError as error:
            raise PipelineError(f"{component.name} ({component.weights}): {error}") from error
        return checkpoint.quantization


# ---------------------------------------------------------------- their modules


class Pipeline(nn.Module):
    """The transformers of a pipeline as children, called one by one by whoever denoises; it has no forward itself."""

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, component in components.items():
            self.add_module(name, component)

    @property
    def components(self) -> dict[str, nn.Module]:
        return dict(self.named_children())


def meta_pipeline(components: Mapping[str, Component]) -> Pipeline:
    """The classes of a pipeline, made from their configs: parameters on the meta device in the dtypes that
    from_pretrained(torch_dtype=torch.bfloat16) gives them, whatever else they hold as a normal instance has it."""
    return Pipeline({name: _transformer(component) for name, component in components.items()})


def _transformer(component: Component) -> nn.Module:
    try:
        import diffusers
    except ImportError as error:
        extra = "pip install 'transfuse[diffusion]'"
        raise PipelineError(f"{component.config}: building a pipeline needs diffusers ({error}); {extra}") from error
    config = {name: value for name, value in read_object(component.config).items() if name != "quantization_config"}
    with torch.device("meta"):
        model: nn.Module = getattr(diffusers, component.family.class_name).from_config(config)
    _cast(model)
    _compute(model)
    return model


def _cast(model: nn.Module) -> None:
    """BF16, but FP32 where a part of the name is listed by the class, as diffusers' loader does it."""
    fp32 = frozenset(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            kept = not fp32.isdisjoint([*path.split("."), leaf])
            value = torch.empty_like(parameter, dtype=torch.float32 if kept else torch.bfloat16)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))


def _compute(model: nn.Module) -> None:
    """Make again, off the meta device, what classes compute when they are made."""
    for path, module in list(model.named_modules()):
        made_from = COMPUTED.get(type(module).__name__)
        if made_from is not None:
            with torch.device("cpu"):
                model.set_submodule(path, type(module)(*(getattr(module, name) for name in made_from)))
    left = [
        f"{path}.{name} ({type(module).__name__})"
        for path, module in model.named_modules()
        for name, value in (*module.named_buffers(recurse=False), *vars(module).items())
        if isinstance(value, Tensor) and value.is_meta
    ]
    if left:
        what = f"{type(model).__name__}: {len(left)} tensor(s) that its class computes and COMPUTED has no row for"
        raise PipelineError("\n  - ".join([what, *left]))
