"""Matrix products that hardware does on kernel-layout bytes: which one the forward of a quantized module calls.

A row of GEMMS is what a layout names as its `gemm`: where it runs, what it needs, and the call. Where no row can be
used, forward computes from decoded weights; `choose_gemm` says why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import gemms_fp4, gemms_fp8
from .backends import BLACKWELL, BLACKWELL_ALL, FP8_CAPABLE, Arch, Layout
from .layouts import device_arch, device_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """A row of the table.

    run: of a linear (x [..., elements], operands, rows) -> [..., rows]; of experts (hidden [tokens, hidden], index and
    weights [tokens, top k], operands) -> [tokens, hidden]. operands: by name what `QuantModule.kernel_operands` gives,
    the module's own memory. archs: devices that it runs on. package: what must be importable, "" for torch alone.
    multiples: what sizes of the module must be multiples of. act_fn: class of the only activation between the two
    products of experts that it does. tested: whether it was ever run; if not, its use is logged as a warning.
    """

    name: str
    run: Callable[..., Tensor]
    archs: frozenset[Arch]
    package: str = ""
    multiples: Mapping[str, int] = field(default_factory=dict)
    act_fn: type[nn.Module] | None = None
    tested: bool = False


GEMMS: dict[str, Gemm] = {
    row.name: row
    for row in (
        Gemm(
            name="scaled_mm",
            run=gemms_fp8.linear,
            archs=FP8_CAPABLE,
            multiples={"rows": 16, "elements": 16},
            tested=True,
        ),
        Gemm(name="mm_fp4_trtllm", run=gemms_fp4.linear_trtllm, archs=BLACKWELL, package="flashinfer"),
        Gemm(name="mm_fp4_cutlass", run=gemms_fp4.linear_cutlass, archs=BLACKWELL_ALL, package="flashinfer"),
        Gemm(
            name="trtllm_fp4_moe",
            run=gemms_fp4.experts,
            archs=BLACKWELL,
            package="flashinfer",
            multiples={"experts": 4, "hidden": 128, "inter": 128},
            act_fn=nn.SiLU,
        ),
    )
}


def choose_gemm(
    layout: Layout, sizes: Mapping[str, int], device: torch.device, act_fn: object = None
) -> tuple[Gemm | None, str]:
    """The product that a module's forward calls on this device, None where it decodes, and why.

    sizes: of the module by name, as `quant.layouts.SIZES` has them. act_fn: of experts.
    """
    if not layout.gemm:
        return None, f"layout {layout.name} has no kernel that is called here"
    row = GEMMS[layout.gemm]
    arch = device_arch(device)
    problems = [
        f"{name} {sizes[name]} is no multiple of {multiple}"
        for name, multiple in row.multiples.items()
        if sizes[name] % multiple
    ]
    if arch not in row.archs:
        problems.append(f"it does not run on {device_name(arch)}")
    if row.package and not is_installed(row.package):
        problems.append(f"{row.package} is not installed")
    if row.act_fn is not None and not isinstance(act_fn, row.act_fn):
        problems.append(f"its activation is {row.act_fn.__name__}, not {type(act_fn).__name__}")
    if problems:
        return None, f"{row.name}: {'; '.join(problems)}"
    return row, f"{row.name} on {device_name(arch)}" + ("" if row.tested else ", which was never run by its authors")


def is_installed(package: str) -> bool:
    """Without importing it."""
    return importlib.util.find_spec(package) is not None
