"""What an exported checkpoint says of itself, in ModelOpt's words: the inverse of reading a quantization config.

Shape of both files: what nvidia-modelopt 0.47.0 writes beside its exports (fixtures `export_*`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .formats import FORMATS
from .parameters import ParameterRow

# Row of FORMATS -> (ModelOpt's quant_algo, its group size). Formats without a name of ModelOpt's have no row: their
# checkpoints are read by this project alone.
ALGOS: dict[str, tuple[str, int | None]] = {
    "nvfp4": ("NVFP4", 16),
    "w4a8_nvfp4": ("W4A8_NVFP4_FP8", 32),
    "fp8": ("FP8", None),
    "fp8_channel": ("FP8_PER_CHANNEL_PER_TOKEN", None),
    "fp8_block": ("fp8_pb_wo", None),
    "mxfp8": ("MXFP8", 32),
    "mxfp4": ("mxfp4", None),
    "int8": ("W8A8_SQ_PER_CHANNEL", None),
    "int4_awq": ("W4A16_AWQ", 128),
}
PRODUCER = {"name": "transfuse"}


def excluded_modules(parameters: Sequence[ParameterRow]) -> tuple[str, ...]:
    """Modules that stay in high precision although they hold a matrix, tied names included."""
    names = [
        name.removesuffix(".weight")
        for row in parameters
        if len(row.shape) == 2 and not FORMATS[row.format].is_quantized
        for name in (row.name, *row.aliases)
        if name.endswith(".weight")
    ]
    return tuple(sorted(names))


def quantization_configs(parameters: Sequence[ParameterRow]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(`quantization_config` of config.json, content of hf_quant_config.json); None where nothing is quantized, or in a
    format, or a mixture, that ModelOpt has no name for."""
    formats = {row.format for row in parameters if FORMATS[row.format].is_quantized}
    if len(formats) != 1 or not formats <= ALGOS.keys():
        return None
    algo, group_size = ALGOS[formats.pop()]
    excluded = list(excluded_modules(parameters))
    grouped = {} if group_size is None else {"group_size": group_size}
    inside = {"quant_method": "modelopt", "quant_algo": algo, **grouped, "ignore": excluded, "producer": PRODUCER}
    section = {"quant_algo": algo, "kv_cache_quant_algo": None, **grouped, "exclude_modules": excluded}
    return inside, {"producer": PRODUCER, "quantization": section}
