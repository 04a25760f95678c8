"""ModelSlim's exports: quant_model_description.json, which names a scheme for every tensor.

    description = read(directory / FILE)
    formats_of(description, ["transformer_blocks.0.attn.to_q"], NAME_MAPS["wan_original"])    {...: "int8_dynamic"}
    as_quantization(formats, FILE)                                                            quant.configs.Quantization

The names are those of the checkpoint that ModelSlim read. A module of the model is looked up through the reversed name
map, whether it is quantized or left in high precision. The arithmetic of the schemes is in quant.npu.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .configs import Quantization
from .excludes import ConfigError, in_list
from .names import COMPANIONS, IDENTITY, NameMap, nearest
from .specs import TensorSpec

FILE = "quant_model_description.json"
PLAIN = "bf16"  # the row of what is left in high precision

# ModelSlim's word -> row of quant.formats.FORMATS
SCHEMES = {"FLOAT": PLAIN, "W8A8": "int8_static", "W8A8_DYNAMIC": "int8_dynamic", "W4A4_DYNAMIC": "int4_dynamic"}

UNPROVEN = "its block scales are unproven, for lack of an export to compare with; export MX formats with ModelOpt"
UNSUPPORTED = {
    "W8A8_MXFP8": UNPROVEN,
    "W4A4_MXFP4": UNPROVEN,
    "W4A4_MXFP4_DUALSCALE": "a second scale over the block scales is in no format here",
    "W8A8S": "sparse weights are in no format here",
    "W8A16": "no format here has INT8 weights and plain activations",
    "W4A8_DYNAMIC": "no format here has packed INT4 weights and INT8 activations",
}
MAX_NAMES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """schemes: module of the checkpoint -> ModelSlim's word. source: which file said so, for messages."""

    schemes: Mapping[str, str]
    source: str


def read(path: Path) -> Description:
    """The description in a file; ConfigError where it is none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: no JSON ({error}); copy it again") from error
    return parse(content, str(path))


def parse(content: Mapping[str, Any], source: str) -> Description:
    """What a description says of modules; it says so for each of their tensors, and all of them must agree.

    Raises ConfigError that lists every scheme that is not read, with its reason, and every module with two.
    """
    weights = {name.removesuffix(".weight"): each for name, each in content.items() if name.endswith(".weight")}
    problems = [] if weights else ["names no weight; expected entries such as 'blocks.0.attn1.to_q.weight': 'W8A8'"]
    by_scheme: dict[str, list[str]] = {}
    for module, scheme in weights.items():
        by_scheme.setdefault(str(scheme), []).append(module)
    problems += [_not_read(scheme, modules) for scheme, modules in by_scheme.items() if scheme not in SCHEMES]
    for name, scheme in content.items():
        module, _, leaf = name.rpartition(".")
        if leaf in COMPANIONS and weights.get(module, scheme) != scheme:
            problems.append(f"{name} is {scheme}, and its weight {weights[module]}; expected one scheme a module")
    if problems:
        raise ConfigError(in_list(source, problems))
    return Description(schemes=weights, source=source)


def read_quantization(path: Path, specs: Iterable[TensorSpec]) -> Quantization | None:
    """What a description says of the modules of a checkpoint, under the names that the checkpoint has.

    Every INT8 weight must be described; without tensors (a folder of configs) all that is described counts.
    """
    description = read(path)
    weights = {spec.name.removesuffix(".weight"): spec.dtype for spec in specs if spec.name.endswith(".weight")}
    described = (module for module in description.schemes if module in weights or not weights)
    unlisted = (module for module, dtype in weights.items() if dtype == "I8" and module not in description.schemes)
    return as_quantization(formats_of(description, [*described, *unlisted]), str(path))


def _not_read(scheme: str, modules: list[str]) -> str:
    shown = ", ".join(modules[:MAX_NAMES]) + (f" and {len(modules) - MAX_NAMES} more" if modules[MAX_NAMES:] else "")
    reason = UNSUPPORTED.get(scheme, "unknown")
    return f"scheme {scheme} of {shown}: {reason}; schemes that are read: {', '.join(SCHEMES)}"


def formats_of(description: Description, modules: Iterable[str], names: NameMap = IDENTITY) -> dict[str, str]:
    """Module of the model -> row of FORMATS, PLAIN for those left in high precision.

    names: from the checkpoint's names to the model's. What the description names as the model does needs no map.
    Raises ConfigError that lists every module that it does not know, and every one that packs parts of several schemes.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    for module in modules:
        links = names.reverse(f"{module}.weight")
        sources = dict.fromkeys(link.source.name.removesuffix(".weight") for link in links)
        parts = [module] if module in description.schemes else list(sources)
        schemes = {part: description.schemes[part] for part in parts if part in description.schemes}
        absent = [part for part in parts if part not in schemes]
        if absent:
            near = nearest(absent[0], description.schemes)
            problems.append(f"{module}: no entry for {', '.join(absent)} ({near}); wrong name map?")
        elif len(set(schemes.values())) > 1:
            listed = ", ".join(f"{part} {scheme}" for part, scheme in schemes.items())
            problems.append(f"{module}: packs parts of several schemes: {listed}; quantize them alike")
        else:
            found[module] = SCHEMES[next(iter(schemes.values()))]
    if problems:
        raise ConfigError(in_list(description.source, problems))
    return found


def as_quantization(formats: Mapping[str, str], source: str) -> Quantization | None:
    """The same as the value that loading goes by; None where nothing is quantized.

    `format` is the row of most modules, `others` are the modules in another one, `exclude` those in none.
    """
    rows = Counter(row for row in formats.values() if row != PLAIN)
    if not rows:
        return None
    most = max(sorted(rows), key=lambda row: rows[row])
    return Quantization(
        format=most,
        exclude=tuple(sorted(module for module, row in formats.items() if row == PLAIN)),
        others=tuple(sorted((module, row) for module, row in formats.items() if row not in (PLAIN, most))),
        source=source,
    )
