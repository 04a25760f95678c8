"""Writes golden/engines.safetensors: what vLLM and SGLang leave in a linear's parameters after their own processing.

    pip download --no-deps vllm==0.33.0 sglang==0.5.23      # wheels, hundreds of MB: by hand, not in CI
    python -m tests.engine_goldens vllm-0.33.0-*.whl sglang-0.5.23-*.whl

The functions are read out of the wheels and executed as they stand, one by one, since neither package imports without
its compiled parts and a GPU. What they call of their surroundings is given here: the platform is said to be Blackwell,
the GEMM backend CUTLASS, and `.cuda()` does nothing. Nothing of this project runs.
"""

from __future__ import annotations

import ast
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

TARGET = Path(__file__).parent / "golden" / "engines.safetensors"
# Rows of the parts that are fused, and columns: nothing to pad; rows and columns to pad; scales to pad only.
SHAPES = {"even": ((128, 64, 64), 128), "ragged": ((72, 24, 24), 80), "scales": ((96, 32, 32), 96)}

SGLANG = {
    "sglang/srt/layers/utils/common.py": ["copy_or_rebind_param", "alias_or_bind_derived_param"],
    "sglang/srt/layers/quantization/modelopt_quant.py": [
        "FP4_GEMM_ALIGNMENT",
        "round_up_to_multiple",
        "pad_nvfp4_weight",
        "ModelOptFp4LinearMethod.process_weights_after_loading",
    ],
}
VLLM = {
    "vllm/model_executor/utils.py": ["set_weight_attrs", "replace_parameter"],
    "vllm/utils/math_utils.py": ["round_up"],
    "vllm/model_executor/layers/quantization/utils/nvfp4_utils.py": [
        "swizzle_blockscale",
        "pad_nvfp4_weight_for_cutlass",
    ],
    "vllm/model_executor/layers/quantization/modelopt.py": [
        "KNvfp4Static.process",
        "KNvfp4Dynamic.process",
        "maybe_fuse_global_scales",
    ],
    "vllm/model_executor/kernels/linear/nvfp4/cutlass.py": ["CutlassNvFp4LinearKernel.process_weights_after_loading"],
}


def functions(wheel: Path, wanted: dict[str, list[str]], given: dict[str, Any]) -> dict[str, Any]:
    """The named functions of the sources in a wheel, methods as "Class.method", in one namespace with `given`."""
    space = {"torch": torch, "Parameter": nn.Parameter, "Any": Any, **given}
    found: dict[str, Any] = {}
    with zipfile.ZipFile(wheel) as archive:
        for path, names in wanted.items():
            tree = ast.parse(archive.read(path))
            for name in names:
                node = find(tree.body, name.split("."))
                future = ast.parse("from __future__ import annotations").body
                exec(compile(ast.Module([*future, node], []), path, "exec"), space)
                last = name.rpartition(".")[2]
                found[name] = space[last]
    return found


def find(body: list[ast.stmt], path: list[str]) -> ast.stmt:
    for node in body:
        targets = getattr(node, "targets", [])
        names = [node.name] if hasattr(node, "name") else [getattr(each, "id", "") for each in targets]
        if path[0] in names:
            return node if len(path) == 1 else find(node.body, path[1:])  # type: ignore[attr-defined]
    raise LookupError(".".join(path))


def checkpoint(parts: tuple[int, ...], columns: int) -> dict[str, Tensor]:
    """Random packed weights of the parts, with one pair of scales, as ModelOpt writes fused groups."""
    generator = torch.Generator().manual_seed(sum(parts) + columns)
    tensors: dict[str, Tensor] = {}
    for i, rows in enumerate(parts):
        tensors[f"{i}.weight"] = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
        scale = torch.rand((rows, columns // 16), generator=generator) + 0.1
        tensors[f"{i}.weight_scale"] = scale.to(torch.float8_e4m3fn)
        tensors[f"{i}.weight_scale_2"] = torch.tensor(0.0123)
        tensors[f"{i}.input_scale"] = torch.tensor(0.37)
    return tensors


def layer_of(tensors: dict[str, Tensor], num_parts: int) -> nn.Module:
    """A module with the parameters that the engines' loaders have filled."""
    layer = nn.Module()
    for leaf in ("weight", "weight_scale"):
        whole = torch.cat([tensors[f"{i}.{leaf}"].view(torch.uint8) for i in range(num_parts)])
        layer.register_parameter(leaf, nn.Parameter(whole.view(tensors[f"0.{leaf}"].dtype), requires_grad=False))
    for leaf in ("weight_scale_2", "input_scale"):
        value = torch.stack([tensors[f"{i}.{leaf}"] for i in range(num_parts)])
        layer.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return layer


def sglang(wheel: Path, layer: nn.Module) -> None:
    given = {
        "get_fp4_gemm_runner_backend": lambda: SimpleNamespace(
            is_marlin=lambda: False, is_flashinfer_trtllm=lambda: False
        ),
        "get_platform": lambda: SimpleNamespace(is_blackwell=True),
    }
    process = functions(wheel, SGLANG, given)["ModelOptFp4LinearMethod.process_weights_after_loading"]
    process(SimpleNamespace(quant_mode="w4a4", quant_config=None), layer)


def vllm(wheel: Path, layer: nn.Module) -> None:
    given = {"WEIGHT": "weight", "ACT": "act", "logger": SimpleNamespace(warning_once=print)}
    found = functions(wheel, VLLM, given)
    found["KNvfp4Static.process"](None, layer, "weight")
    found["KNvfp4Dynamic.process"](None, layer, "act")
    found["maybe_fuse_global_scales"](layer)
    found["CutlassNvFp4LinearKernel.process_weights_after_loading"](None, layer)


def main(wheels: list[str]) -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    engines = {"vllm": vllm, "sglang": sglang}
    stored: dict[str, Tensor] = {}
    versions = {}
    for name, process in engines.items():
        wheel = next(Path(each) for each in wheels if Path(each).name.startswith(f"{name}-"))
        versions[name] = wheel.name.split("-")[1]
        for case, (parts, columns) in SHAPES.items():
            tensors = checkpoint(parts, columns)
            layer = layer_of(tensors, len(parts))
            process(wheel, layer)
            stored |= {f"{case}.in.{key}": value for key, value in tensors.items()}
            held = dict(layer.named_parameters())  # an alias is listed once
            stored |= {f"{case}.{name}.{key}": value.detach().clone() for key, value in held.items()}
    save_file(stored, TARGET, metadata=versions)


if __name__ == "__main__":
    main(sys.argv[1:])
