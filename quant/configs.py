"""What a checkpoint declares of its quantization: ModelOpt's configs in both forms.

    declared = parse({"quant_algo": "NVFP4", "ignore": ["proj_out"]}, "config.json")
    merge(declared, inferred).excludes.matches("transformer_blocks.0.attn.to_q")

ModelOpt writes the flat form into config.json (`quantization_config`) and the nested one into hf_quant_config.json.
What the tensors say is quant.inference's business, and whether their bytes are as declared quant.probe's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from .excludes import ConfigError, Dialect, Excludes, in_list
from .formats import FORMATS

log = logging.getLogger(__name__)

# ModelOpt's quant_algo, upper case -> row of quant.formats.FORMATS
QUANT_ALGOS = {
    "NVFP4": "nvfp4",
    "W4A16_NVFP4": "nvfp4",
    "W4A8_NVFP4_FP8": "w4a8_nvfp4",
    "FP8": "fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel",
    "FP8_PB_WO": "fp8_block",
    "MXFP8": "mxfp8",
    "MXFP4": "mxfp4",
    "W8A8_SQ_PER_CHANNEL": "int8",
    "W4A16_AWQ": "int4_awq",
}

ScaleLayout = Literal["linear", "swizzled"]
Config = Mapping[str, Any]

SWAP, PACKED, SCALE_LAYOUT = "swap_weight_nibbles", "checkpoint_uses_packed_qkv", "checkpoint_weight_scale_layout"
FORMS = "config.json {quantization_config: {quant_algo: ...}} or hf_quant_config.json {quantization: {quant_algo: ...}}"
NVFP4_ROWS = ("nvfp4", "w4a8_nvfp4")  # the rows that tensors can be recognized as
RELIES_ON_SWAP = "black-forest-labs/FLUX.2-dev-NVFP4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """What a checkpoint says of itself.

    format: row of FORMATS. group_size: weights that share a block scale, None where the row has no such blocks or
    nobody said. swap_nibbles: the first element lies in the high nibble. packed_qkv: several projections are one
    weight. others: modules in another row than `format`, with that row. stated: which of swap_nibbles and scale_layout
    were said, not assumed. source: who said it.
    """

    format: str
    group_size: int | None = None
    exclude: tuple[str, ...] = ()
    dialect: Dialect = "glob_full"
    swap_nibbles: bool = False
    packed_qkv: bool = False
    scale_layout: ScaleLayout = "linear"
    others: tuple[tuple[str, str], ...] = ()
    stated: frozenset[str] = frozenset()
    source: str = ""

    @property
    def excludes(self) -> Excludes:
        return Excludes(patterns=self.exclude, dialect=self.dialect)


# ---------------------------------------------------------------- declared


def parse(config: Config, source: str, dialect: Dialect = "glob_full") -> Quantization:
    """Either form, told apart by the key `quantization`."""
    form = parse_nested if isinstance(config.get("quantization"), Mapping) else parse_flat
    return form(config, source, dialect)


def parse_flat(config: Config, source: str, dialect: Dialect = "glob_full") -> Quantization:
    """quantization_config of a config.json: everything in one mapping, excludes under `ignore`.

    Nibbles are swapped by swap_weight_nibbles, else by checkpoint_uses_packed_qkv, else not. Raises ConfigError.
    """
    return _parsed(config, (config,), ("ignore", "exclude_modules"), config, source, dialect)


def parse_nested(config: Config, source: str, dialect: Dialect = "glob_full") -> Quantization:
    """hf_quant_config.json: a section `quantization`, excludes under `exclude_modules`.

    Nibbles are swapped by swap_weight_nibbles of the section, else of the top level, else by the top level's
    checkpoint_uses_packed_qkv, else not. Raises ConfigError.
    """
    section: Config = config["quantization"]
    return _parsed(section, (section, config), ("exclude_modules", "ignore"), config, source, dialect)


def _parsed(
    section: Config, levels: Sequence[Config], exclude_keys: Sequence[str], outer: Config, source: str, dialect: Dialect
) -> Quantization:
    """`levels`: where keys are looked for, in order; `outer`: where a packed qkv also means swapped nibbles."""
    problems = [*_wrong_types(levels, exclude_keys)]
    algo = section.get("quant_algo")
    if algo is None:
        method = section.get("quant_method")
        is_other = f" (quant_method {method!r} is not read here)" if method not in (None, "modelopt") else ""
        problems.append(f"quant_algo is missing{is_other}; expected {FORMS}")
    elif str(algo).upper() not in QUANT_ALGOS:
        problems.append(f"quant_algo {algo!r} is not supported; known: {', '.join(sorted(QUANT_ALGOS))}")
    row = QUANT_ALGOS.get(str(algo).upper(), "")
    group_size, conflicts = _group_size(levels, row)
    problems += conflicts
    if problems:
        raise ConfigError(in_list(source, problems))
    swap = _first(levels, SWAP)
    layout = _first(levels, SCALE_LAYOUT)
    swap = swap if swap is not None else outer.get(PACKED) or None
    return Quantization(
        format=row,
        group_size=group_size,
        exclude=tuple(_first((section,), *exclude_keys) or ()),
        dialect=dialect,
        swap_nibbles=bool(swap),
        packed_qkv=bool(_first(levels, PACKED)),
        scale_layout=layout or "linear",
        stated=frozenset(
            field for field, said in (("swap_nibbles", swap), ("scale_layout", layout)) if said is not None
        ),
        source=source,
    )


def _first(levels: Sequence[Config], *keys: str) -> Any:
    """The first value that is there and is not null."""
    return next((level[key] for key in keys for level in levels if level.get(key) is not None), None)


def _wrong_types(levels: Sequence[Config], exclude_keys: Sequence[str]) -> Iterable[str]:
    """A flag in quotes would count as true, and a string of patterns as its letters."""
    for level in levels:
        for key in (SWAP, PACKED):
            if not isinstance(level.get(key), bool | None):
                yield f"{key}: expected true or false, got {level[key]!r}"
        for key in exclude_keys:
            value = level.get(key)
            if value is not None and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
                yield f"{key}: expected a list of module name patterns, got {value!r}"
        if not isinstance(level.get("group_size"), int | None):
            yield f"group_size: expected a number, got {level['group_size']!r}"
        if level.get(SCALE_LAYOUT) not in (None, *get_args(ScaleLayout)):
            yield f"{SCALE_LAYOUT}: expected one of {', '.join(get_args(ScaleLayout))}, got {level[SCALE_LAYOUT]!r}"


def _group_size(levels: Sequence[Config], row: str) -> tuple[int | None, list[str]]:
    """The one group size that all places name, and what is wrong with it."""
    said: dict[int, list[str]] = {}
    for level in levels:
        if isinstance(level.get("group_size"), int):
            said.setdefault(level["group_size"], []).append("group_size")
        for name, group in _mapping(level.get("config_groups")).items():
            size = _mapping(_mapping(group).get("weights")).get("group_size")
            if isinstance(size, int):
                said.setdefault(size, []).append(f"config_groups.{name}.weights")
            elif size is not None:
                return None, [f"config_groups.{name}.weights.group_size: expected a number, got {size!r}"]
    places = ", ".join(f"{size} in {' and '.join(where)}" for size, where in said.items())
    if len(said) > 1:
        return None, [f"group sizes conflict: {places}"]
    size = next(iter(said), None)
    fixed = row_group_size(row) if row else None
    if size is not None and fixed is not None and size != fixed:
        return None, [f"group size {places}: format {row} has {fixed}"]
    return size, []


def _mapping(value: Any) -> Config:
    """The value, {} where it is no JSON object."""
    return value if isinstance(value, dict) else {}


def row_group_size(row: str) -> int | None:
    """Weights along a row that share a block scale in a format; None where blocks are not of that kind."""
    scale = FORMATS[row].component("block_scale")
    return scale.elements if scale is not None and scale.rows == 1 and scale.elements > 1 else None


# ---------------------------------------------------------------- together


def merge(declared: Quantization | None, inferred: Quantization | None) -> Quantization | None:
    """One from the other; None where neither is.

    Of an NVFP4 checkpoint the inferred excludes win, either's flags count, a missing group size is filled in, and a
    scale layout that was stated, or else a swizzled one, is taken. A declared other format is left alone. Raises
    ConfigError where group sizes or stated scale layouts conflict.
    """
    if declared is None or inferred is None:
        return declared or inferred
    if declared.format not in NVFP4_ROWS:
        return declared
    _require_no_conflict(declared, inferred)
    if set(declared.exclude) != set(inferred.exclude):
        log.warning(
            "%s excludes %d patterns, the tensors %d modules; those of the tensors are taken",
            declared.source,
            len(declared.exclude),
            len(inferred.exclude),
        )
    if inferred.swap_nibbles and not declared.swap_nibbles and "swap_nibbles" in declared.stated:
        log.warning("%s states no swap of nibbles, the tensors or their headers do: swapped", declared.source)
    return replace(
        declared,
        group_size=declared.group_size or inferred.group_size,
        exclude=inferred.exclude,
        dialect=inferred.dialect,
        swap_nibbles=declared.swap_nibbles or inferred.swap_nibbles,
        packed_qkv=declared.packed_qkv or inferred.packed_qkv,
        scale_layout=_merged_layout(declared, inferred),
        stated=declared.stated | inferred.stated,
        source=f"{declared.source} and {inferred.source}",
    )


def _require_no_conflict(declared: Quantization, inferred: Quantization) -> None:
    problems = []
    sizes = declared.group_size or row_group_size(declared.format), inferred.group_size
    if sizes[1] is not None and sizes[0] != sizes[1]:
        problems.append(f"group sizes conflict: {sizes[0]} declared, {sizes[1]} by the shapes of the tensors")
    layouts = declared.scale_layout, inferred.scale_layout
    if "scale_layout" in declared.stated & inferred.stated and layouts[0] != layouts[1]:
        problems.append(f"scale layouts conflict: {layouts[0]} declared, {layouts[1]} by the tensors")
    if problems:
        raise ConfigError(in_list(declared.source, problems))


def _merged_layout(declared: Quantization, inferred: Quantization) -> ScaleLayout:
    for each in (declared, inferred):
        if "scale_layout" in each.stated:
            return each.scale_layout
    return "swizzled" if "swizzled" in (declared.scale_layout, inferred.scale_layout) else "linear"


def agreed(flat: Quantization | None, nested: Quantization | None) -> Quantization | None:
    """What both files of an export say: the flat form, with what only the nested one states. Raises ConfigError."""
    if flat is None or nested is None:
        return flat or nested
    pairs = {
        "format": (flat.format, nested.format),
        "group size": (flat.group_size or nested.group_size, nested.group_size or flat.group_size),
    } | {field: (getattr(flat, field), getattr(nested, field)) for field in sorted(flat.stated & nested.stated)}
    problems = [f"{what}: {ours} and {theirs}" for what, (ours, theirs) in pairs.items() if ours != theirs]
    if problems:
        raise ConfigError(in_list(f"{flat.source} and {nested.source} disagree; correct one of them", problems))
    only = {field: getattr(nested, field) for field in nested.stated - flat.stated}
    return replace(
        flat,
        group_size=flat.group_size or nested.group_size,
        packed_qkv=flat.packed_qkv or nested.packed_qkv,
        stated=flat.stated | nested.stated,
        **only,
    )


def require_stated_swap(quantization: Quantization | None) -> None:
    """Refuse packed qkv in NVFP4 whose nibble order nobody states: its release counted on a default that is gone."""
    found = quantization
    if found is not None and found.packed_qkv and found.format == "nvfp4" and "swap_nibbles" not in found.stated:
        raise ConfigError(
            f"{found.source}: NVFP4 with packed qkv weights and no {SWAP}. {RELIES_ON_SWAP} was published when the "
            f"default was true; it is false now. Put {SWAP} into config.json's quantization_config: true for that "
            f"release and files made for ComfyUI (first element in the high nibble), false for low nibble first"
        )
