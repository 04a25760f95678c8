"""Families of diffusion transformers, and the published repositories that hold them.

    family_of("FluxTransformer2DModel").exclude        module names that ModelOpt's recipe leaves in high precision
    repository_at(Path(".../models--black-forest-labs--FLUX.2-dev-NVFP4/snapshots/abc"))

A row is values only. A new family is one row and a line in tests/tiny_dit.py; what its class computes when it is made,
and no checkpoint holds, is listed in quant.pipelines.COMPUTED.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .names import nearest


class FamilyError(ValueError):
    """A class or component is not served; the message names what is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A diffusers class and how its checkpoints are treated.

    components: what pipelines call their transformers of this class. exclude: module name patterns (globs on the full
    name inside the class) that stay in high precision unless a checkpoint says itself what it quantized. recipe: the
    same, for models of exactly that many blocks: ModelOpt's recipes keep the first and last blocks of the published
    depth. name_map: key of quant.name_maps.NAME_MAPS for checkpoints that name their tensors as `original` does, a
    prefix that only those names have.
    """

    name: str
    class_name: str
    components: tuple[str, ...] = ("transformer",)
    blocks: str = "transformer_blocks"
    exclude: tuple[str, ...] = ()
    recipe: tuple[int, tuple[str, ...]] = (0, ())
    name_map: str = ""
    original: tuple[str, ...] = ()

    def is_original(self, name: str) -> bool:
        """Whether a tensor's name is one that only the original repository gives."""
        return name.startswith(self.original) if self.original else False

    def kept(self, num_blocks: int) -> tuple[str, ...]:
        """Patterns of the modules left in high precision, for a model of that many blocks."""
        depth, patterns = self.recipe
        return (*self.exclude, *(patterns if num_blocks == depth else ()))


def _ends(blocks: str, depth: int, count: int) -> tuple[int, tuple[str, ...]]:
    """The first and last `count` blocks of a model of `depth`."""
    numbers = (*range(count), *range(depth - count, depth))
    return depth, tuple(f"{blocks}.{number}.*" for number in numbers)


_EMBEDDERS = ("x_embedder", "context_embedder", "norm_out.*", "proj_out")

# exclude and recipe: nvidia-modelopt examples/diffusers/quantization/utils.py, filter_func_flux_dev, _wan_video and
# _qwen_image; of FLUX.2, which has none there, the FP8 keep list of sglang 0.5.23.
FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="flux",
            class_name="FluxTransformer2DModel",
            exclude=(*_EMBEDDERS, "time_text_embed.*"),
            name_map="bfl_flux",
            original=("double_blocks.", "single_blocks."),
        ),
        Family(
            name="flux2",
            class_name="Flux2Transformer2DModel",
            exclude=(
                *_EMBEDDERS,
                "time_guidance_embed.*",
                "double_stream_modulation_*",
                "single_stream_modulation.*",
            ),
            name_map="bfl_flux2",
            original=("double_blocks.", "single_blocks."),
        ),
        Family(
            name="wan",
            class_name="WanTransformer3DModel",
            components=("transformer", "transformer_2"),
            blocks="blocks",
            exclude=("condition_embedder.*", "patch_embedding", "proj_out"),
            recipe=_ends("blocks", 40, 3),
            name_map="wan_original",
            original=("text_embedding.", "head.head."),
        ),
        Family(
            name="qwen_image",
            class_name="QwenImageTransformer2DModel",
            exclude=("time_text_embed.*", "img_in", "txt_in", "norm_out.*", "proj_out"),
            recipe=_ends("transformer_blocks", 60, 2),
        ),
    )
}
_BY_CLASS = {row.class_name: row for row in FAMILIES.values()}


def is_served(class_name: str) -> bool:
    """Whether some family has this diffusers class."""
    return class_name in _BY_CLASS


def family_of(class_name: str) -> Family:
    """The row of a diffusers class."""
    if class_name not in _BY_CLASS:
        near = nearest(class_name, _BY_CLASS)
        raise FamilyError(f"{class_name}: no such class is served; known: {', '.join(_BY_CLASS)}; {near}")
    return _BY_CLASS[class_name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A published repository: what its files do not say.

    file: the safetensors file to read where several hold the same tensors. swap_nibbles: stated where the release
    relies on what loaders once assumed; None where the config says it or the standard order holds. only: the one
    component that the repository holds, for use as an override over `base`.
    """

    name: str
    family: str
    file: str = ""
    swap_nibbles: bool | None = None
    only: str = ""
    base: str = ""


REPOSITORIES: dict[str, Repository] = {
    row.name: row
    for row in (
        Repository(name="black-forest-labs/FLUX.1-dev", family="flux"),
        Repository(name="black-forest-labs/FLUX.2-dev", family="flux2"),
        Repository(
            name="black-forest-labs/FLUX.2-dev-NVFP4",
            family="flux2",
            file="flux2-dev-nvfp4-mixed.safetensors",
            swap_nibbles=True,  # its qkv are packed too, which its names say
            only="transformer",
            base="black-forest-labs/FLUX.2-dev",
        ),
        Repository(name="Wan-AI/Wan2.2-T2V-A14B-Diffusers", family="wan"),
        Repository(name="nvidia/Wan2.2-T2V-A14B-Diffusers-FP8", family="wan"),
        Repository(name="nvidia/Wan2.2-T2V-A14B-Diffusers-NVFP4", family="wan"),
        Repository(name="Qwen/Qwen-Image", family="qwen_image"),
    )
}


MAX_LEVELS = 4  # a file, revision, "snapshots", models--owner--name


def repository_at(path: Path) -> Repository | None:
    """The row of the repository that a folder (or a file in it) was downloaded from.

    Known by the folder's name in huggingface_hub's cache (models--owner--name/snapshots/revision), or by "owner/name"
    or "name" at the end of its path.
    """
    whole = path.absolute()
    for folder in (whole, *whole.parents)[:MAX_LEVELS]:
        owner_name = folder.name.removeprefix("models--").replace("--", "/", 1)
        beside = f"{folder.parent.name}/{folder.name}"
        for row in REPOSITORIES.values():
            if row.name in (owner_name, beside) or folder.name == row.name.partition("/")[2]:
                return row
    return None
