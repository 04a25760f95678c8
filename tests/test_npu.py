"""ModelSlim's schemes: integer arithmetic against numpy on what the real quantizer wrote, and the names that we call in
torch-npu against the wheel itself, which is read and never imported."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant import npu
from quant.formats import FORMATS
from quant.layouts import LAYOUTS, apply_rows
from quant.modules import QuantLinear
from tests import goldens

FIXTURES = goldens.names("int_")
DOWNLOAD_S = 12
F32 = np.float32


def parts_of(fixture: str, prefix: str) -> dict[str, Tensor]:
    tensors = goldens.load(fixture)
    return {name.rpartition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def activations(fixture: str, seed: int = 0) -> Tensor:
    """Tokens in the range that the fixture's static scales were calibrated for, the ends and one beyond included."""
    tensors = goldens.load(fixture)
    low, high = tensors["in.act_min"].item(), tensors["in.act_max"].item()
    x = torch.rand(7, tensors["in.weight"].shape[1], generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    x[0, :3] = torch.tensor([low, high, 2 * high])
    x[1] = 0
    return x


def numpy_static(x: NDArray[Any], parts: dict[str, Tensor]) -> NDArray[Any]:
    at = {name: value.numpy() for name, value in parts.items()}
    codes = np.clip(np.rint(x * (F32(1) / at["input_scale"]) + at["input_offset"]), -128, 127).astype(np.int32)
    sums = np.einsum("mk,nk->mn", codes, at["weight"].astype(np.int32)) + at["quant_bias"]
    scale = at["deq_scale"]
    # The widened scales of FP16 models: the low half of each little-endian word is the float.
    floats = scale if scale.dtype == F32 else np.ascontiguousarray(scale).view(F32)[0::2]
    return sums.astype(F32) * floats


def numpy_dynamic(x: NDArray[Any], weight: NDArray[Any], weight_scale: NDArray[Any], top: int) -> NDArray[Any]:
    scale = np.abs(x).max(axis=1, keepdims=True) / F32(top)
    codes = np.rint(x / np.where(scale == 0, F32(1), scale)).astype(np.int32)
    sums = np.einsum("mk,nk->mn", codes, weight.astype(np.int32))
    return sums.astype(F32) * weight_scale.reshape(-1) * scale


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("fixture", FIXTURES)
@pytest.mark.parametrize("model", ["bf16model", "fp16model"])
def test_static_sums_equal_numpy_on_the_real_quantizer_s_tensors(fixture: str, model: str) -> None:
    parts = parts_of(fixture, f"modelslim_static_{model}")
    assert parts["deq_scale"].dtype == (torch.float32 if model == "bf16model" else torch.int64)
    x = activations(fixture)
    expected = numpy_static(x.numpy(), parts)
    assert np.array_equal(npu.forward("W8A8", x, parts).numpy(), expected)
    half = npu.forward("W8A8", x.half(), parts)
    assert half.dtype == torch.float16
    assert torch.equal(half, torch.from_numpy(numpy_static(x.half().float().numpy(), parts)).half())


@pytest.mark.parametrize("fixture", FIXTURES)
def test_dynamic_sums_equal_numpy_on_the_real_quantizer_s_tensors(fixture: str) -> None:
    parts = parts_of(fixture, "modelslim_dynamic")
    bias = parts.pop("bias")
    x = activations(fixture)
    expected = numpy_dynamic(x.numpy(), parts["weight"].numpy(), parts["weight_scale"].numpy(), 127)
    assert np.array_equal(npu.forward("W8A8_DYNAMIC", x, parts).numpy(), expected)
    assert np.array_equal(npu.forward("W8A8_DYNAMIC", x, parts, bias).numpy(), expected + bias.numpy())
    assert not npu.forward("W8A8_DYNAMIC", x, parts)[1].any(), "a token of zeros"


@pytest.mark.parametrize("fixture", FIXTURES)
def test_four_bit_sums_equal_numpy(fixture: str) -> None:
    weight = goldens.load(fixture)["in.weight"].float().numpy()
    scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / F32(7), F32(2**-23))
    codes = np.clip(np.rint(weight / scale), -8, 7).astype(np.int8)
    parts = {"weight": torch.from_numpy(codes), "weight_scale": torch.from_numpy(scale)}
    x = activations(fixture)
    assert np.array_equal(npu.forward("W4A4_DYNAMIC", x, parts).numpy(), numpy_dynamic(x.numpy(), codes, scale, 7))


@pytest.mark.parametrize(("scheme", "prefix"), [("W8A8", "static_bf16model"), ("W8A8_DYNAMIC", "dynamic")])
@pytest.mark.parametrize("fixture", ["int_a128x128", "int_b192x256", "int_c66x320"])
def test_the_product_is_that_of_the_weights_before_quantization(fixture: str, scheme: str, prefix: str) -> None:
    """Scales, offsets and the bias inside quant_bias all enter once: without the bias 3.6 % and more would be off."""
    tensors, parts = goldens.load(fixture), parts_of(fixture, f"modelslim_{prefix}")
    bias = parts.pop("bias")
    x = activations(fixture).clamp(tensors["in.act_min"], tensors["in.act_max"])
    exact = x @ tensors["in.weight"].float().T + tensors["in.bias"]
    got = npu.forward(scheme, x, parts, None if scheme == "W8A8" else bias)
    assert (got - exact).norm() < 0.03 * exact.norm()


def test_leading_dims_and_dtype_of_the_activations_are_kept() -> None:
    parts = parts_of(FIXTURES[0], "modelslim_dynamic")
    bias = parts.pop("bias")
    x = activations(FIXTURES[0])[:6].bfloat16()
    y = npu.forward("W8A8_DYNAMIC", x.view(2, 3, -1), parts, bias)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 3, len(parts["weight"]))
    assert torch.equal(y.view(6, -1), npu.forward("W8A8_DYNAMIC", x, parts, bias))


@pytest.mark.parametrize("layout", ["plain", "npu_linear"])
@pytest.mark.parametrize(
    ("scheme", "prefix"), [("W8A8", "modelslim_static_bf16model"), ("W8A8_DYNAMIC", "modelslim_dynamic")]
)
def test_an_installed_linear_computes_from_its_stored_bytes(scheme: str, prefix: str, layout: str) -> None:
    parts = parts_of("int_c66x320", prefix)
    bias = parts.pop("bias")
    fmt = FORMATS[npu.SCHEMES[scheme].format]
    n, k = parts["weight"].shape
    module = QuantLinear(k, n, True, fmt, LAYOUTS[layout], "a.b")
    module.get_parameter("bias").copy_(bias)
    storages = {name: value.view(-1).view(torch.uint8) for name, value in module.storage_parameters()}
    for at in module.plan.placements:
        rows = parts[at.tensor.name.rpartition(".")[2]].contiguous().view(-1).view(torch.uint8)
        apply_rows(at, rows.view(at.tensor.num_rows, at.tensor.row_bytes), 0, storages[at.storage], 0)
    x = activations("int_c66x320")
    expected = npu.forward(scheme, x, parts, None if scheme == "W8A8" else bias.bfloat16())
    assert torch.equal(npu.forward_module(module, x), expected)


def test_what_the_arithmetic_would_get_wrong_is_refused_in_one_message() -> None:
    parts = parts_of(FIXTURES[0], "modelslim_dynamic")
    bias = parts.pop("bias")
    x = activations(FIXTURES[0])
    wrong = parts | {"weight_offset": parts["weight_offset"] + 1}
    with pytest.raises(
        ValueError, match=r"W4A4_DYNAMIC: 2 problem\(s\)[\s\S]*codes outside -8\.\.7[\s\S]*weight_offset"
    ):
        npu.forward("W4A4_DYNAMIC", x, wrong)
    with pytest.raises(ValueError, match="two rows in a byte"):
        npu.forward("W8A8_DYNAMIC", x, parts | {"weight": parts["weight"][::2]})
    with pytest.raises(ValueError, match="quant_bias"):
        npu.forward("W8A8", x, parts_of(FIXTURES[0], "modelslim_static_bf16model"), bias)
    with pytest.raises(ValueError, match="known: W8A8, W8A8_DYNAMIC, W4A4_DYNAMIC"):
        npu.forward("W8A8_MXFP8", x, parts)


# ---------------------------------------------------------------- the seam


def test_without_torch_npu_the_seam_says_what_to_install() -> None:
    parts = parts_of(FIXTURES[0], "modelslim_static_bf16model")
    with pytest.raises(npu.NpuError, match=rf"transfuse\[npu\].*torch-npu=={npu.TORCH_NPU}.*plain"):
        npu.prepare("W8A8", parts, torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.float32; the kernels take"):
        npu.prepare("W8A8", parts, torch.float32)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The pinned release for Python 3.11 on x86-64, whatever runs this test."""
    folder = tmp_path_factory.mktemp("torch-npu")
    target = ("--python-version", "3.11", "--platform", "manylinux_2_28_x86_64", "--only-binary", ":all:")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", *target]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), f"torch-npu=={npu.TORCH_NPU}"],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"torch-npu {npu.TORCH_NPU} (44 MB) took over {DOWNLOAD_S} s to download")
    if done.returncode:
        pytest.skip(f"torch-npu {npu.TORCH_NPU} could not be downloaded: {done.stderr.strip()[-300:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield archive


def calls() -> list[ast.Call]:
    """Every call of a torch_npu function in quant/npu.py: there the module is always called npu."""
    tree = ast.parse(Path(npu.__file__).read_text())
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "npu"
    ]


def name_of(call: ast.Call) -> str:
    assert isinstance(call.func, ast.Attribute)
    return call.func.attr


def schemas(archive: zipfile.ZipFile, name: str) -> list[Any]:
    """The operator schemas that the wheel declares under a name, parsed by torch."""
    text = archive.read("torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml").decode()
    lines = (line.strip().removeprefix("- ").removeprefix("func: ") for line in text.splitlines() if "func: " in line)
    return [torch._C.parse_schema(f"npu::{line}") for line in lines if line.startswith((f"{name}(", f"{name}."))]


def fits(call: ast.Call, schema: Any) -> bool:
    """Whether positions and keywords of a call are those of a schema, and all that it requires is given."""
    positional = [each.name for each in schema.arguments if not each.kwarg_only]
    keywords = [each.arg for each in call.keywords]
    given = {*positional[: len(call.args)], *keywords}
    required = {each.name for each in schema.arguments if not each.has_default_value()}
    known = {each.name for each in schema.arguments}
    return len(call.args) <= len(positional) and set(keywords) <= known and required <= given


def test_every_call_is_listed_for_the_capability_check() -> None:
    assert {name_of(call) for call in calls()} == set(npu.CALLS)


def test_every_call_has_a_schema_with_these_arguments_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    for call in calls():
        found = schemas(wheel, name_of(call))
        assert any(fits(call, schema) for schema in found), f"{ast.unparse(call)}: {list(map(str, found))}"
    wrong = ast.parse("npu.npu_dynamic_quant(x, dst_dtype=1)").body[0]
    assert isinstance(wrong, ast.Expr) and isinstance(wrong.value, ast.Call)
    assert not any(fits(wrong.value, schema) for schema in schemas(wheel, "npu_dynamic_quant")), "the check can fail"


def test_the_wheel_exports_every_name_on_its_module(wheel: zipfile.ZipFile) -> None:
    """utils/custom_ops.py binds them: torch_npu.npu_quantize = torch.ops.npu.npu_quantize."""
    tree = ast.parse(wheel.read("torch_npu/utils/custom_ops.py"))
    bound = {
        ast.unparse(target).removeprefix("torch_npu."): ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
    }
    assert {name: bound.get(name) for name in npu.CALLS} == {name: f"torch.ops.npu.{name}" for name in npu.CALLS}
    functions = ast.parse(wheel.read("torch_npu/npu/__init__.py")).body
    assert "is_available" in {node.name for node in functions if isinstance(node, ast.FunctionDef)}


def test_the_wheel_is_the_pinned_release_and_asks_for_the_torch_that_we_test(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(f"torch_npu-{npu.TORCH_NPU}.dist-info/METADATA").decode()
    assert f"\nVersion: {npu.TORCH_NPU}\n" in metadata
    assert f"torch=={npu.TORCH_NPU.rpartition('.')[0]}" in metadata.replace(" ", "").replace("(", "").replace(")", "")
