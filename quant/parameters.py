"""One logical weight as a trainer names it, before quantization. Imports nothing, so that every folder can name it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRow:
    """One row of the list of parameters.

    name: the trainer's, "model.layers.0.mlp.gate_proj.weight". format: row of quant.formats.FORMATS.
    group: members of a fused group share one global scale; "" when alone. aliases: tied names.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    group: str = ""
    aliases: tuple[str, ...] = ()
