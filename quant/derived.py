"""Derived scalars: what kernels are fed besides bytes, as functions of the raw scales kept beside it.

They are recomputed in place after every install, never patched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

ModuleKind = Literal["linear", "experts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """A storage whose value is a function of others: `storage.copy_(function(*inputs))` after every install."""

    name: str
    inputs: tuple[str, ...]
    function: Callable[..., Tensor]
    shape: tuple[int, ...]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


def derive(
    kind: ModuleKind, prefix: str, wanted: Collection[str], roles: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[Derived, ...]:
    """The wanted rows of DERIVED for the module `prefix`, whose scales are storages (leaf, shape) by role.

    A row whose inputs the module lacks is left out: bf16 has no scales, hence no alpha.
    """
    derived = []
    for name, (inputs, function) in DERIVED[kind].items():
        if name in wanted and roles.keys() >= set(inputs):
            shape = function(*(torch.empty(roles[role][1], device="meta") for role in inputs)).shape
            full = tuple(f"{prefix}.{roles[role][0]}" for role in inputs)
            derived.append(Derived(name=f"{prefix}.{name}", inputs=full, function=function, shape=tuple(shape)))
    return tuple(derived)


def _reciprocal_of_max(input_scale: Tensor) -> Tensor:
    return input_scale.max().reciprocal().reshape([1] * min(input_scale.ndim, 2))


def _alpha(input_scale: Tensor, scale_2: Tensor) -> Tensor:
    return input_scale.max() * scale_2


def _alpha_gate(input_scale: Tensor, scale_2: Tensor) -> Tensor:
    return input_scale.max() * scale_2[..., 0]


def _alpha_up(input_scale: Tensor, scale_2: Tensor) -> Tensor:
    return input_scale.max() * scale_2[..., 1]


def _scale_c(w13_input_scale: Tensor, w13_scale_2: Tensor, w2_input_scale: Tensor) -> Tensor:
    return w2_input_scale.max().reciprocal() * _alpha_up(w13_input_scale, w13_scale_2)


def fp8_scalars_of_multipliers(w13: Tensor, w2: Tensor, hidden: Tensor, inter: Tensor) -> dict[str, Tensor]:
    """The same three scalars where a checkpoint holds what it multiplied by (448 / amax) and not what to multiply by.

    w13, w2: of each expert's weights; hidden, inter: of both activations. Divided as flashinfer does, so that no
    reciprocal is rounded on the way.
    """
    return {
        "g1_scale_c": inter / (w13 * hidden),
        "g1_alphas": 1 / (w13 * hidden),
        "g2_alphas": 1 / (inter * w2),
    }


_W13 = ("w13_input_scale", "w13_global_scale")
_W2 = ("w2_input_scale", "w2_global_scale")

LINEAR_SCALARS = ("alpha", "input_scale_inv")
EXPERT_SCALARS = ("g1_alphas", "g1_alphas_up", "g2_alphas", "w13_input_scale_quant", "w2_input_scale_quant")

# kind of module -> derived name -> roles of its inputs, function of them. The role is the kind of the scale, in experts
# after the matrix it belongs to; the format says which tensor that is. One activation scale serves all experts.
DERIVED: dict[ModuleKind, dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]]] = {
    "linear": {
        "alpha": (("input_scale", "global_scale"), _alpha),
        "input_scale_inv": (("input_scale",), _reciprocal_of_max),
    },
    "experts": {
        "g1_alphas": (_W13, _alpha_gate),
        "g1_alphas_up": (_W13, _alpha_up),
        "g2_alphas": (_W2, _alpha),
        "g1_scale_c": ((*_W13, "w2_input_scale"), _scale_c),
        "w13_input_scale_quant": (("w13_input_scale",), _reciprocal_of_max),
        "w2_input_scale_quant": (("w2_input_scale",), _reciprocal_of_max),
    },
}
