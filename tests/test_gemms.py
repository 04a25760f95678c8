"""Matrix products on kernel-layout bytes: which is chosen, what it is given, and what torch's gives on a CPU.

flashinfer's cannot run here: what stands for it is its contract, computed by hand from the arguments alone.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cold import encode_all, install, random_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from quant import gemms, gemms_fp8
from quant.backends import LAYOUTS
from quant.formats import FORMATS
from quant.gemms import GEMMS, choose_gemm
from quant.gemms_fp4 import experts_arguments, linear_arguments
from quant.modules import QuantExperts, QuantLinear, QuantModule, decode_all, quantized_modules
from sharding.fsdp import reshard_all, shard_model, unshard_all
from tests import goldens, reference

LINEAR = {"rows": 48, "elements": 64}
EXPERTS = {"experts": 4, "hidden": 256, "inter": 128}
FP8 = ("fp8", "fp8_channel")
FP4 = ("trtllm_linear", "cutlass_linear", "trtllm_dit", "cutlass_dit")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

Say = Callable[[Any], None]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Say which compute capability the device has, and that packages are there."""

    def say(arch: int | None) -> None:
        monkeypatch.setattr(gemms, "device_arch", lambda device: arch)
        monkeypatch.setattr(gemms, "is_installed", lambda package: True)

    return say


def linear(layout: str, fmt: str, shape: tuple[int, int], bias: bool = True) -> nn.ModuleDict:
    return nn.ModuleDict({"block": QuantLinear(shape[1], shape[0], bias, FORMATS[fmt], LAYOUTS[layout], "block")})


def loaded(model: nn.ModuleDict, seed: int = 0, input_scale: float = 0.02) -> dict[str, Tensor]:
    """Random weights put in; returns them in checkpoint form."""
    tensors = encode(model, seed, input_scale)
    install(model, tensors)
    decode_all(model)
    return tensors


def encode(model: nn.ModuleDict, seed: int, input_scale: float = 0.02) -> dict[str, Tensor]:
    tensors = encode_all(model, random_weights(model, seed))
    return tensors | {name: torch.tensor(input_scale) for name in tensors if name.endswith("input_scale")}


def tokens(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# ---------------------------------------------------------------- choice


def test_every_gemm_is_named_by_layouts_of_its_devices_and_the_table_says_what_is_untested() -> None:
    assert {row.gemm for row in LAYOUTS.values()} - {""} == GEMMS.keys()
    for layout in LAYOUTS.values():
        if layout.gemm:
            assert layout.archs == GEMMS[layout.gemm].archs
            assert ("UNTESTED" in layout.kernel) != GEMMS[layout.gemm].tested


@pytest.mark.parametrize(
    ("layout", "sizes", "arch", "name", "why"),
    [
        ("cutlass_linear_fp8", LINEAR, 90, "scaled_mm", "scaled_mm on sm_90$"),
        ("cutlass_linear_fp8", LINEAR, 80, "", "does not run on sm_80"),
        ("cutlass_linear_fp8", LINEAR, None, "", "does not run on a device of no compute capability"),
        ("cutlass_linear_fp8", {"rows": 40, "elements": 72}, 90, "", "rows 40 .* of 16; elements 72 .* of 16"),
        ("plain", LINEAR, 90, "", "layout plain has no kernel"),
        ("trtllm_linear", LINEAR, 100, "mm_fp4_trtllm", "never run"),
        ("cutlass_dit_swapped", LINEAR, 120, "mm_fp4_cutlass", "never run"),
        ("trtllm_linear", LINEAR, 120, "", "does not run on sm_120"),
        ("trtllm_moe", EXPERTS, 103, "trtllm_fp4_moe", "never run"),
        ("trtllm_moe", EXPERTS | {"experts": 6, "hidden": 192}, 103, "", "experts 6 .* of 4; hidden 192 .* of 128"),
        ("trtllm_moe", EXPERTS, 90, "", "does not run on sm_90"),
    ],
)
def test_a_gemm_is_chosen_by_device_and_sizes_and_says_why(
    on: Say, layout: str, sizes: dict[str, int], arch: int | None, name: str, why: str
) -> None:
    on(arch)
    row, said = choose_gemm(LAYOUTS[layout], sizes, torch.device("cpu"), nn.SiLU())
    assert (row.name if row else "") == name and re.search(why, said), said


def test_what_is_not_installed_and_another_activation_are_reasons_too(on: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    on(100)
    row, said = choose_gemm(LAYOUTS["trtllm_moe"], EXPERTS, torch.device("cpu"), nn.GELU())
    assert row is None and "its activation is SiLU, not GELU" in said
    monkeypatch.setattr(gemms, "is_installed", lambda package: False)
    row, said = choose_gemm(LAYOUTS["trtllm_linear"], LINEAR, torch.device("cpu"))
    assert row is None and "flashinfer is not installed" in said


def test_what_was_never_run_is_warned_of(on: Say, caplog: pytest.LogCaptureFixture) -> None:
    on(100)
    loaded(linear("cutlass_dit", "nvfp4", (48, 64)))
    assert "layout cutlass_dit: forward calls mm_fp4_cutlass on sm_100, which was never run" in caplog.text


# ---------------------------------------------------------------- FP8


def by_hand(x: Tensor, tensors: dict[str, Tensor], fmt: str) -> Tensor:
    """The product of the same operands in FP64, from the checkpoint: x in E4M3 over its scale."""
    values = x.float()
    if fmt == "fp8":
        scale = tensors["block.input_scale"].view(1)
        codes = values * (1 / scale)
    else:
        largest = values.abs().amax(-1, keepdim=True)
        scale, codes = largest / 448, values * (torch.full_like(largest, 448) / largest)
    weight = tensors["block.weight"].view(torch.float8_e4m3fn).double()
    weight_scale = tensors["block.weight_scale"].view(-1).view(torch.float32).double()
    return codes.clamp(-448, 448).to(torch.float8_e4m3fn).double() @ weight.t() * scale.double() * weight_scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fmt", FP8)
def test_an_fp8_linear_is_the_scaled_product_of_its_own_memory(
    on: Say, monkeypatch: pytest.MonkeyPatch, fmt: str, bias: bool
) -> None:
    on(90)
    model = linear("cutlass_linear_fp8", fmt, (208, 160), bias)
    tensors = loaded(model)
    module: Any = model["block"]
    called: list[tuple[Tensor, ...]] = []
    product = torch._scaled_mm

    def scaled_mm(*args: Tensor, **kwargs: Any) -> Tensor:
        called.append(args)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x = tokens(2, 9, 160)
    y = module(x)
    expected = by_hand(x.view(18, 160), tensors, fmt).view(2, 9, 208) + (tensors["block.bias"].double() if bias else 0)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.double(), expected, rtol=2**-8, atol=1e-6)
    ((a, b, scale_a, scale_b),) = called
    assert (a.shape, a.dtype, a.is_contiguous()) == ((18, 160), torch.float8_e4m3fn, True)
    assert (b.shape, b.stride(), b.dtype) == ((160, 208), (1, 160), torch.float8_e4m3fn)
    assert b.data_ptr() == module.weight.data_ptr() and scale_b.data_ptr() == module.weight_scale.data_ptr()
    assert (scale_a.shape, scale_b.shape) == (((1,), (1,)) if fmt == "fp8" else ((18, 1), (1, 208)))
    assert module.decoded is None and module.decoded_bytes == 0
    assert module(x.float()).dtype == torch.float32 and module(x[:0]).shape == (0, 9, 208)
    assert torch.equal(module(x[0, :1]), y[0, :1])  # few tokens are filled up, and cut again
    assert len(called[-1][0]) == gemms_fp8.MIN_TOKENS


@pytest.mark.parametrize("fmt", FP8)
def test_new_bytes_are_in_the_next_product_and_sizes_that_it_cannot_do_are_decoded(on: Say, fmt: str) -> None:
    on(90)
    model, other = (linear("cutlass_linear_fp8", fmt, (48, 64)) for _ in range(2))
    loaded(model, seed=0)
    pointers = {name: each.data_ptr() for name, each in model.named_parameters()}
    first = model["block"](tokens(3, 64))
    loaded(model, seed=1)
    loaded(other, seed=1)
    assert {name: each.data_ptr() for name, each in model.named_parameters()} == pointers
    second = model["block"](tokens(3, 64))
    assert torch.equal(second, other["block"](tokens(3, 64))) and not torch.equal(second, first)
    replaced: Any = model["block"]
    replaced.weight = nn.Parameter(torch.zeros_like(replaced.weight), requires_grad=False)
    assert torch.equal(replaced(tokens(3, 64)), replaced.bias.expand(3, 48))
    odd = linear("cutlass_linear_fp8", fmt, (40, 64))
    loaded(odd)
    module: Any = odd["block"]
    assert module.gemm is None and module.decoded is not None and module(tokens(3, 64)).shape == (3, 40)


def test_a_device_with_the_kernel_drops_what_was_decoded_on_one_without(on: Say) -> None:
    model = linear("cutlass_linear_fp8", "fp8", (48, 64))
    loaded(model)
    module: Any = model["block"]
    x, decoded = tokens(5, 64), module(tokens(5, 64))
    assert module.gemm is None and module.decoded is not None
    on(90)
    decode_all(model)
    assert module.gemm is GEMMS["scaled_mm"] and module.decoded is None
    # Only the activations are rounded: E4M3 has a half-step of 1/16, and 64 products average it out.
    assert (module(x) - decoded).float().norm() < 2**-4 * decoded.float().norm()


@pytest.mark.parametrize("fmt", FP8)
def test_a_sharded_linear_multiplies_what_was_gathered_last(on: Say, fmt: str) -> None:
    on(90)
    whole, sharded = (linear("cutlass_linear_fp8", fmt, (272, 64)) for _ in range(2))
    x = tokens(20, 64)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard_model(sharded, init_device_mesh("cpu", (1,)), quantized=quantized_modules(sharded))
        for seed in range(3):
            loaded(whole, seed=seed)
            reshard_all(sharded)
            install(sharded, encode(whole, seed))
            unshard_all(sharded)
            decode_all(sharded)
            for _ in range(2):
                assert torch.equal(sharded["block"](x), whole["block"](x)), seed
    finally:
        dist.destroy_process_group()


gpu = pytest.mark.gpu
needs_fp8 = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a CUDA device with FP8"
)


@gpu
@needs_fp8
@pytest.mark.parametrize("shape", [(16, 16), (208, 160), (3072, 3072), (512, 12288)], ids=str)
@pytest.mark.parametrize("fmt", FP8)
def test_the_device_s_product_is_that_of_the_same_operands_in_fp64(fmt: str, shape: tuple[int, int]) -> None:
    for bias in (True, False):
        model = linear("cutlass_linear_fp8", fmt, shape, bias)
        tensors = loaded(model)
        model.cuda()
        decode_all(model)
        module: Any = model["block"]
        assert module.gemm is GEMMS["scaled_mm"] and module.decoded is None
        for count in (0, 1, 7, 16, 300):
            x = tokens(count, shape[1], seed=count)
            expected = by_hand(x, tensors, fmt) + (tensors["block.bias"].double() if bias else 0)
            y = module(x.cuda()).cpu().double()
            # One rounding to BF16 at the end; on the way FP32 sums, or what the tensor cores make of them.
            error = (y - expected).norm() / expected.norm() if count else 0.0
            assert y.shape == expected.shape and error < 2**-8, (fmt, shape, count, bias, float(error))


@gpu
@needs_fp8
@pytest.mark.parametrize("shape", [(2, 16), (5, 48), (33, 3072), (64, 12288)], ids=str)
def test_activations_get_the_codes_that_they_get_on_the_host(shape: tuple[int, int]) -> None:
    x = tokens(*shape)
    x[0] = 0
    x[-1, 0] = 6e4  # beyond 448 / 50
    inverse = torch.tensor([50.0])
    here = gemms_fp8.quantize_tensor(x, inverse), *gemms_fp8.quantize_tokens(x)
    there = gemms_fp8.quantize_tensor(x.cuda(), inverse.cuda()), *gemms_fp8.quantize_tokens(x.cuda())
    for one, other in zip(here, there, strict=True):
        assert one.shape == other.shape and torch.equal(one.view(torch.uint8), other.cpu().view(torch.uint8))


@gpu
@needs_fp8
@pytest.mark.parametrize("fmt", FP8)
def test_a_graph_over_an_fp8_linear_shows_the_new_bytes(fmt: str) -> None:
    model, x = linear("cutlass_linear_fp8", fmt, (256, 192)), tokens(24, 192).cuda()
    loaded(model)
    model.cuda()
    decode_all(model)
    module: Any = model["block"]
    for _ in range(2):
        module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    for seed in range(1, 51):
        other = linear("cutlass_linear_fp8", fmt, (256, 192))
        loaded(other, seed=seed)
        other.cuda()
        decode_all(other)
        with torch.no_grad():
            for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
                parameter.copy_(new)
        graph.replay()
        assert torch.equal(out, other["block"](x)), seed


# ---------------------------------------------------------------- FP4


def e2m1(packed: Tensor) -> Tensor:
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()
    return torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)[codes]


def unswizzled(scales: Tensor, rows: int, columns: int) -> Tensor:
    """E4M3 values [rows, columns] from tiles of 128 x 4, a byte at a time as the layout is stated."""
    flat, wide = scales.contiguous().view(torch.uint8).view(-1), 4 * math.ceil(columns / 4)
    r, c = np.indices((rows, columns))
    at = r // 128 * 128 * wide + c // 4 * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    return flat[torch.from_numpy(at)].view(torch.float8_e4m3fn).double()


def fp4_quantize(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """NVFP4 of x times a global scale: codes, and scales in tiles of 128 x 4."""
    bits = x.contiguous().view(torch.int16).numpy().view(np.uint16)
    codes, scales = reference.nvfp4_encode(bits, np.float32(1 / float(global_scale)))
    swizzled = reference.swizzle_128x4(scales).reshape(-1, 4 * math.ceil(scales.shape[1] / 4))
    return torch.from_numpy(codes), torch.from_numpy(swizzled)


def mm_fp4(
    *, a: Tensor, b: Tensor, a_descale: Tensor, b_descale: Tensor, alpha: Tensor, out_dtype: torch.dtype, backend: str
) -> Tensor:
    """alpha * (a * its scales) @ (b * its scales); with "trtllm" the rows of b lie shuffled."""
    rows, columns = b.t().shape[0], a.shape[1] // 8
    assert a.shape[1] == b.shape[0] and b.stride(0) == 1 and alpha.numel() == 1 and alpha.dtype == torch.float32
    left = e2m1(a) * unswizzled(a_descale, len(a), columns).repeat_interleave(16, 1)
    right = e2m1(b.t()) * unswizzled(b_descale.t(), rows, columns).repeat_interleave(16, 1)
    y = float(alpha) * (left @ right.t())
    if backend == "trtllm":
        back = torch.tensor([reference.shuffle_source(row) for row in range(rows)])
        y = torch.empty_like(y).index_copy_(1, back, y)
    return y.to(out_dtype)


@pytest.mark.parametrize("shape", [(40, 80), (256, 128)])
@pytest.mark.parametrize("layout", FP4)
def test_an_fp4_linear_gives_flashinfer_what_its_contract_makes_y_of(
    on: Say, monkeypatch: pytest.MonkeyPatch, layout: str, shape: tuple[int, int]
) -> None:
    on(100)
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(fp4_quantize=fp4_quantize, mm_fp4=mm_fp4))
    model = linear(layout, "nvfp4", shape)
    tensors = loaded(model, input_scale=0.002)
    x = tokens(2, 3, shape[1])
    codes, scales = fp4_quantize(x.view(6, -1), torch.tensor(1 / 0.002))
    left = e2m1(codes) * unswizzled(scales, 6, shape[1] // 16).repeat_interleave(16, 1) * 0.002
    block = tensors["block.weight_scale"].view(torch.float8_e4m3fn).double().repeat_interleave(16, 1)
    weight = e2m1(tensors["block.weight"]) * block * tensors["block.weight_scale_2"].double()
    expected = (left @ weight.t() + tensors["block.bias"].double()).view(2, 3, shape[0])
    assert torch.allclose(model["block"](x).double(), expected, rtol=2**-7, atol=2e-3)
    assert model["block"](x[:0]).shape == (0, 3, shape[0])


@pytest.mark.parametrize("layout", [*FP4, "trtllm_dit_swapped", "cutlass_dit_swapped"])
@pytest.mark.parametrize("name", goldens.names("dit_nvfp4"))
def test_arguments_of_mm_fp4_are_the_fixture_s_and_the_module_s_own_memory(name: str, layout: str) -> None:
    stored, args = goldens.load(name), goldens.fixtures()[name]["args"]
    module = QuantLinear(args["K"], args["N"], False, FORMATS["nvfp4"], LAYOUTS[layout], "a")
    tensors = {f"a.{name.removeprefix('ckpt.')}": each for name, each in stored.items() if name.startswith("ckpt.")}
    install(nn.ModuleDict({"a": module}), tensors | {"a.input_scale": torch.tensor(0.25)})
    codes = torch.full((3, args["K"] // 2), 0x21, dtype=torch.uint8)
    backend = layout.partition("_")[0]
    made = linear_arguments(codes, torch.zeros(128, 8), module.kernel_operands(), backend)
    prefix = f"out.{backend}{'_swapped' if layout.endswith('swapped') else ''}"
    assert goldens.same(name, f"{prefix}.weight", made["b"].t())
    assert goldens.same(name, f"{prefix}.weight_scale_interleaved", made["b_descale"].t())
    for key, parameter in (("b", module.weight), ("b_descale", module.weight_scale), ("alpha", module.alpha)):
        assert made[key].data_ptr() == parameter.data_ptr(), key
    assert made["b"].stride(0) == made["b_descale"].stride(0) == 1
    assert made["alpha"].item() == np.float32(0.25) * np.float32(stored["ckpt.weight_scale_2"])
    assert made["a"].shape == (3, made["b"].shape[0]) and made["backend"] == backend
    assert torch.equal(made["a"][:, : args["K"] // 2], codes) and not made["a"][:, args["K"] // 2 :].any()
    assert made["a"].shape != codes.shape or made["a"].data_ptr() == codes.data_ptr()


def moe_module(name: str) -> QuantModule:
    """The experts of a fixture, w1 the gate and w3 the up half of a checkpoint."""
    stored, args = goldens.load(name), goldens.fixtures()[name]["args"]
    sizes = (args["experts"], args["hidden"], args["intermediate"])
    module = QuantExperts(*sizes, nn.SiLU(), FORMATS["nvfp4"], LAYOUTS["trtllm_moe"], "m")
    tensors = {}
    for half, w in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        for e in range(sizes[0]):
            stem = f"m.{e}.{half}_proj"
            tensors |= {f"{stem}.{key}": stored[f"ckpt.{key}_{w}"][e] for key in ("weight", "weight_scale")}
            tensors[f"{stem}.weight_scale_2"] = stored[f"ckpt.weight_scale_2_{w}"][e]
            w13, w2 = stored["in.w13_input_scale"][e], stored["in.w2_input_scale"][e]
            tensors[f"{stem}.input_scale"] = {"gate": w13[0], "up": w13[1], "down": w2}[half]
    install(nn.ModuleDict({"m": module}), tensors)
    return module


@pytest.mark.parametrize("name", goldens.names("moe_nvfp4"))
def test_arguments_of_the_moe_are_the_fixture_s_and_the_module_s_own_memory(name: str) -> None:
    module, stored, args = moe_module(name), goldens.load(name), goldens.fixtures()[name]["args"]
    codes = torch.zeros(5, args["hidden"] // 2, dtype=torch.uint8)
    scales = torch.zeros(5, args["hidden"] // 16, dtype=torch.uint8)
    index = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [args["experts"], 1]])
    made = experts_arguments(codes, scales, index, torch.full((5, 2), 0.5).bfloat16(), module.kernel_operands())
    for key in ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale"):
        assert goldens.same(name, f"out.trtllm.{key}", made[key]), key
        assert made[key].is_contiguous() and made[key].dtype == (torch.float8_e4m3fn if "scale" in key else torch.uint8)
        leaf = key.replace("gemm1_weights", "w13_weight").replace("gemm2_weights", "w2_weight")
        assert made[key].data_ptr() == module.get_parameter(leaf).data_ptr()
    scalars = {
        "output1_scale_scalar": ("g1_scale_c", stored["out.trtllm.g1_scale_c"]),
        "output1_scale_gate_scalar": ("g1_alphas", stored["out.trtllm.g1_alphas"]),
        "output2_scale_scalar": ("g2_alphas", stored["in.w2_input_scale"].max() * stored["ckpt.weight_scale_2_w2"]),
    }
    for key, (leaf, expected) in scalars.items():
        assert torch.equal(made[key], expected) and made[key].dtype == torch.float32, key
        assert made[key].data_ptr() == module.get_parameter(leaf).data_ptr()
    ids, weights = made["topk_ids"]
    assert ids.dtype == torch.int32 and ids.tolist() == [[0, 1], [1, 2], [2, 3], [3, 0], [0, 1]]
    assert weights.dtype == torch.float32 and weights.tolist() == [[0.5, 0.5]] * 4 + [[0.0, 0.5]]
    assert made["hidden_states"] is codes and made["hidden_states_scale"].data_ptr() == scales.data_ptr()
    numbers = ("num_experts", "local_num_experts", "local_expert_offset", "top_k", "intermediate_size")
    assert [made[key] for key in numbers] == [args["experts"], args["experts"], 0, 2, args["intermediate"]]
