"""ModelSlim's schemes on Ascend NPUs: their arithmetic in integers on the CPU, and the calls that a device would get.

    forward("W8A8", x, parts)                     from checkpoint tensors: "weight", "deq_scale", ...
    forward_module(linear, x)                     from the bytes installed in a quantized linear, whatever its layout
    held = prepare("W8A8", parts, torch.float16)  on a device; then run("W8A8", x, held). NEVER RUN

A scheme quantizes activations, multiplies codes with an INT32 accumulator, and scales the sums back. What follows torch
operators follows the docstrings inside the torch-npu wheel; no Ascend device was ever at hand, so all that calls
torch_npu is unproven beyond names and arguments, which tests/test_npu.py reads from the wheel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .formats import typed
from .layouts import invert_rows
from .modules import QuantLinear
from .numerics_int import narrowed

TORCH_NPU = "2.13.0"  # the release whose names and arguments are checked; it pins torch 2.13.0 and has cp311 wheels
FRACTAL_NZ = 29  # ACL_FORMAT_FRACTAL_NZ, the tiled format that the matrix unit reads fastest
CALLS = (
    "npu_convert_weight_to_int4pack",
    "npu_dynamic_quant",
    "npu_format_cast",
    "npu_quant_matmul",
    "npu_quantize",
    "npu_trans_quant_param",
)

Parts = Mapping[str, Tensor]
Codes = tuple[Tensor, Tensor]  # int8 [m, K]; FP32 [m, 1], the scale of each token


class NpuError(RuntimeError):
    """No device that these schemes can run on; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One of ModelSlim's. format: row of FORMATS that its checkpoint tensors have. bits: of weights and activations.

    quantize: FP32 [m, K] -> Codes. scale_back: INT32 sums [m, N], scale of each token -> FP32 [m, N].
    prepare, run: the same on a device, never run.
    """

    format: str
    bits: int
    quantize: Callable[[Tensor, Parts], Codes]
    scale_back: Callable[[Tensor, Tensor, Parts], Tensor]
    prepare: Callable[[Any, Parts, torch.dtype], dict[str, Tensor]]
    run: Callable[[Any, Tensor, Parts], Tensor]


# ---------------------------------------------------------------- on the CPU


def forward(scheme: str, x: Tensor, parts: Parts, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times the weight [N, K] of checkpoint tensors, in x's dtype, [..., N].

    parts: by component suffix, in a checkpoint's dtypes and shapes; an INT64 deq_scale holds FP32 bits, as the files of
    FP16 models have it. bias [N] is added in FP32; a static scheme has it in quant_bias already and takes none.
    """
    row = _scheme(scheme)
    _check(scheme, row, parts, bias)
    codes, token_scale = row.quantize(x.float().reshape(-1, x.shape[-1]), parts)
    sums = codes.int() @ parts["weight"].int().T
    y = row.scale_back(sums, token_scale, parts)
    return (y if bias is None else y + bias.float()).to(x.dtype).view(*x.shape[:-1], -1)


def forward_module(module: QuantLinear, x: Tensor) -> Tensor:
    """The same from the bytes that are installed in a module of one of these formats."""
    scheme = next((name for name, row in SCHEMES.items() if row.format == module.fmt.name), None)
    if scheme is None:
        known = ", ".join(row.format for row in SCHEMES.values())
        raise ValueError(f"{module.name}: format {module.fmt.name} is no scheme of ModelSlim; expected one of {known}")
    parts = stored_parts(module)
    bias = None if module.bias is None or "quant_bias" in parts else module.get_parameter("bias")
    return forward(scheme, x, parts, bias)


def stored_parts(module: QuantLinear) -> dict[str, Tensor]:
    """The checkpoint tensors of a linear by suffix, read back through its layout."""
    storages = {name: value.detach().view(-1).view(torch.uint8) for name, value in module.storage_parameters()}
    read = {
        at.tensor.name.rpartition(".")[2]: invert_rows(at, 0, at.tensor.num_rows, storages[at.storage], 0)
        for at in module.plan.placements
    }
    shape = (module.out_features, module.in_features)
    by_rows = {part.suffix for part in module.fmt.row_components}
    whole = {suffix: value.view(-1).view(torch.float32) for suffix, value in read.items() if suffix not in by_rows}
    return typed(module.fmt, {suffix: read[suffix] for suffix in by_rows}, shape) | whole


def _scheme(name: str) -> Scheme:
    if name not in SCHEMES:
        raise ValueError(f"scheme {name!r}: unknown; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _check(name: str, row: Scheme, parts: Parts, bias: Tensor | None) -> None:
    """Raise one ValueError with everything that the arithmetic would get wrong."""
    weight, top = parts["weight"], 2 ** (row.bits - 1)
    num_rows = len(parts["deq_scale" if "deq_scale" in parts else "weight_scale"])
    checks = {
        f"weight: {weight.dtype}, expected torch.int8": weight.dtype == torch.int8,
        f"weight: {len(weight)} rows, its scale has {num_rows}; two rows in a byte are not read": len(weight)
        == num_rows,
        f"weight: codes outside {-top}..{top - 1}": -top <= int(weight.min()) and int(weight.max()) < top,
        "weight_offset: not zero, the kernels are symmetric": not bool(parts.get("weight_offset", weight[:0]).any()),
        "bias: a static scheme has it in quant_bias": bias is None or "quant_bias" not in parts,
    }
    problems = [text for text, passed in checks.items() if not passed]
    if problems:
        raise ValueError("\n  - ".join([f"{name}: {len(problems)} problem(s)", *problems]))


def _quantize_static(x: Tensor, parts: Parts) -> Codes:
    """round(x * (1 / input_scale) + input_offset), saturated: npu_quantize with div_mode=False."""
    codes = (x * (1 / parts["input_scale"].float()) + parts["input_offset"].float()).round().clamp(-128, 127)
    return codes.to(torch.int8), x.new_ones(len(x), 1)


def _quantize_by_token(bits: int) -> Callable[[Tensor, Parts], Codes]:
    """round(x / scale), scale = largest absolute value of the token / top: npu_dynamic_quant. Zeros stay zero."""
    top = 2 ** (bits - 1) - 1

    def quantize(x: Tensor, parts: Parts) -> Codes:
        scale = x.abs().amax(1, keepdim=True) / top
        codes = (x / scale).nan_to_num(0.0).round().clamp(-top - 1, top)
        return codes.to(torch.int8), scale

    return quantize


def _scale_back_static(sums: Tensor, token_scale: Tensor, parts: Parts) -> Tensor:
    """(sums + quant_bias) * deq_scale; quant_bias undoes the input offset and holds the bias."""
    deq_scale = parts["deq_scale"]
    return (sums + parts["quant_bias"]).float() * (narrowed(deq_scale) if deq_scale.dtype == torch.int64 else deq_scale)


def _scale_back_by_token(sums: Tensor, token_scale: Tensor, parts: Parts) -> Tensor:
    return sums.float() * parts["weight_scale"].float().view(-1) * token_scale


# ---------------------------------------------------------------- on a device: never run


def torch_npu_module() -> Any:
    """torch_npu with a device behind it, or NpuError with all that is missing. Never run past the import."""
    try:
        npu: Any = import_module("torch_npu")
    except (ImportError, OSError) as error:
        raise NpuError(
            f"ModelSlim's kernels need torch-npu and CANN: {error}; on a machine with Ascend's toolkit:"
            f" pip install 'transfuse[npu]' torch-npu=={TORCH_NPU}; elsewhere serve in the layout 'plain'"
        ) from error
    problems = [
        f"torch_npu.{name}: not in this release; expected {TORCH_NPU}" for name in CALLS if not hasattr(npu, name)
    ]
    if not npu.npu.is_available():
        problems.append("torch_npu.npu.is_available() is False: no device; see npu-smi info")
    if problems:
        raise NpuError("\n  - ".join([f"torch_npu: {len(problems)} problem(s)", *problems]))
    return npu


def prepare(scheme: str, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that `run` reads, on the device, for activations of a dtype. Never run."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{scheme}: activations in {dtype}; the kernels take torch.bfloat16 and torch.float16")
    row = _scheme(scheme)
    _check(scheme, row, parts, None)
    npu = torch_npu_module()
    return row.prepare(npu, {name: value.to("npu") for name, value in parts.items()}, dtype)


def update_(held: Parts, fresh: Parts) -> None:
    """Write freshly prepared tensors over those that a kernel or graph holds: addresses and formats stay. Never run."""
    for name, value in held.items():
        value.copy_(fresh[name])


def run(scheme: str, x: Tensor, held: Parts, bias: Tensor | None = None) -> Tensor:
    """`forward` on the device, x [m, K]. bias as there. Never run."""
    y = _scheme(scheme).run(torch_npu_module(), x, held)
    return y if bias is None else y + bias


def _transposed_nz(npu: Any, weight: Tensor) -> Tensor:
    """[N, K] -> [K, N] in FRACTAL_NZ."""
    nz: Tensor = npu.npu_format_cast(weight.t().contiguous(), FRACTAL_NZ)
    return nz


def _prepare_static(npu: Any, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    num_elements, deq_scale = parts["weight"].shape[1], parts["deq_scale"]
    scale = narrowed(deq_scale) if deq_scale.dtype == torch.int64 else deq_scale
    return {
        "weight": _transposed_nz(npu, parts["weight"]),
        "reciprocal": (1 / parts["input_scale"].float()).repeat(num_elements),
        "offset": parts["input_offset"].float().repeat(num_elements),
        # INT64 with the scale in its low bits, of which FP16 output's unit keeps the upper 19 of 32.
        "scale": npu.npu_trans_quant_param(scale) if dtype == torch.float16 else scale,
        "bias": parts["quant_bias"],
    }


def _run_static(npu: Any, x: Tensor, held: Parts) -> Tensor:
    codes = npu.npu_quantize(x, held["reciprocal"], held["offset"], torch.qint8, -1, False)
    y: Tensor = npu.npu_quant_matmul(codes, held["weight"], held["scale"], bias=held["bias"], output_dtype=x.dtype)
    return y


def _prepare_dynamic(npu: Any, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"weight": _transposed_nz(npu, parts["weight"]), "scale": parts["weight_scale"].float().view(-1)}


def _prepare_int4(npu: Any, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """INT32 [K, N/8] of eight codes each; this product takes the plain format only."""
    packed = npu.npu_convert_weight_to_int4pack(parts["weight"].int().t().contiguous())
    return {"weight": packed, "scale": parts["weight_scale"].float().view(-1)}


def _run_dynamic(npu: Any, x: Tensor, held: Parts) -> Tensor:
    codes, scale = npu.npu_dynamic_quant(x)
    y: Tensor = npu.npu_quant_matmul(codes, held["weight"], held["scale"], pertoken_scale=scale, output_dtype=x.dtype)
    return y


def _run_int4(npu: Any, x: Tensor, held: Parts) -> Tensor:
    """The wheel's own table lists four bits without pertoken_scale only; engines pass it, and so is it here."""
    codes, scale = npu.npu_dynamic_quant(x, dst_type=torch.quint4x2)
    y: Tensor = npu.npu_quant_matmul(codes, held["weight"], held["scale"], pertoken_scale=scale, output_dtype=x.dtype)
    return y


# By the word in quant_model_description.json.
SCHEMES: dict[str, Scheme] = {
    "W8A8": Scheme(
        format="int8_static",
        bits=8,
        quantize=_quantize_static,
        scale_back=_scale_back_static,
        prepare=_prepare_static,
        run=_run_static,
    ),
    "W8A8_DYNAMIC": Scheme(
        format="int8_dynamic",
        bits=8,
        quantize=_quantize_by_token(8),
        scale_back=_scale_back_by_token,
        prepare=_prepare_dynamic,
        run=_run_dynamic,
    ),
    "W4A4_DYNAMIC": Scheme(
        format="int4_dynamic",
        bits=4,
        quantize=_quantize_by_token(4),
        scale_back=_scale_back_by_token,
        prepare=_prepare_int4,
        run=_run_int4,
    ),
}
