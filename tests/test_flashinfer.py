"""Layouts against flashinfer itself, installed for the occasion, on random shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from quant import gemms_fp4, kernels
from quant.backends import LAYOUTS
from quant.formats import FORMATS
from quant.layouts import plan_experts, plan_linear
from quant.modules import QuantExperts, QuantLinear
from quant.steps import BlockMajor, GatedInterleave, Order, RowMajor, RowMap, ShuffleRows, locate
from tests.plans import apply_all, random_tensors, rows_of

pytestmark = pytest.mark.slow

# Without its dependencies on CUDA: these are what its CPU functions import.
PACKAGES = (
    *("flashinfer-python==0.7.2.post1", "apache-tvm-ffi", "einops", "tabulate", "click", "requests", "tqdm", "ninja"),
    *("nvidia-ml-py", "packaging", "urllib3", "certifi", "idna", "charset-normalizer"),
)

# Runs where flashinfer is and this project is not. argv: where to write, seed.
SCRIPT = """
import inspect, json, sys
import flashinfer, torch
from flashinfer import reorder_rows_for_gated_act_gemm, shuffle_matrix_a
from flashinfer.fused_moe import convert_to_block_layout
from flashinfer.fused_moe.core import _maybe_get_cached_w3_w1_permute_indices, get_w2_permute_indices_with_cache
from flashinfer.fused_moe.prepare import prepare_trtllm_bf16_weights
from flashinfer.tllm_enums import ActivationType, RoutingMethodType, SfLayout
from safetensors.torch import save_file

random = torch.Generator().manual_seed(int(sys.argv[2]))
draw = lambda low, high: int(torch.randint(low, high, (), generator=random))
found = {}
for case in range(12):
    rows, columns = 64 * draw(1, 9), 16 * draw(1, 9)
    x = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=random)
    found |= {
        f"{case}.in": x,
        f"{case}.shuffle128": shuffle_matrix_a(x, 128),
        f"{case}.shuffle64": shuffle_matrix_a(x, 64),
        f"{case}.gated": reorder_rows_for_gated_act_gemm(x),
        f"{case}.w13": x[_maybe_get_cached_w3_w1_permute_indices({}, x, 128, is_gated_act_gemm=True)],
        f"{case}.w2": x[get_w2_permute_indices_with_cache({}, x, 128)],
        f"{case}.blocks": convert_to_block_layout(x, 16),
    }
    experts, hidden, inter = draw(1, 4), 64 * draw(1, 5), 64 * draw(1, 4)
    w13 = torch.randn(experts, 2 * inter, hidden, generator=random).bfloat16()
    w2 = torch.randn(experts, hidden, inter, generator=random).bfloat16()
    fed = prepare_trtllm_bf16_weights(w13, w2, num_local_experts=experts, hidden_size=hidden, intermediate_size=inter)
    found |= {f"{case}.moe.{name}": tensor for name, tensor in {"in13": w13, "in2": w2, **fed}.items()}
calls = {
    "fp4_quantize": flashinfer.fp4_quantize,
    "mm_fp4": flashinfer.mm_fp4,
    **{name: getattr(flashinfer.fused_moe, f"trtllm_fp4_block_scale_{name}") for name in ("moe", "routed_moe")},
}
stated = {
    "calls": {name: list(inspect.signature(call).parameters) for name, call in calls.items()},
    "required": {
        name: [each.name for each in inspect.signature(call).parameters.values() if each.default is each.empty]
        for name, call in calls.items()
    },
    "enums": [ActivationType.Swiglu.value, RoutingMethodType.Renormalize.value, SfLayout.layout_linear.name],
}
tensors = {name: tensor.clone().contiguous() for name, tensor in found.items()}
save_file(tensors, sys.argv[1], metadata={"stated": json.dumps(stated)})
"""

STEPS: dict[str, tuple[tuple[RowMap, ...], Order]] = {
    "shuffle128": ((ShuffleRows(128),), RowMajor()),
    "shuffle64": ((ShuffleRows(64),), RowMajor()),
    "gated": ((GatedInterleave(),), RowMajor()),
    "w13": ((GatedInterleave(), ShuffleRows(128)), RowMajor()),
    "w2": ((ShuffleRows(128),), RowMajor()),
    "blocks": ((), BlockMajor(16)),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """What flashinfer gives, by case, on shapes that no fixture has."""
    site, out = tmp_path_factory.mktemp("flashinfer"), tmp_path_factory.mktemp("out") / "out.safetensors"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), *PACKAGES]
    if subprocess.run(pip, check=False).returncode:
        pytest.skip("flashinfer-python cannot be installed here")
    seed = int(np.random.default_rng().integers(1 << 30))
    print(f"seed {seed}")
    subprocess.run([sys.executable, "-c", SCRIPT, str(out), str(seed)], env=_environment(site), check=True)
    return Theirs(load_file(out), out)


class Theirs(dict[str, Tensor]):
    """Tensors by name, and what the library says of its calls."""

    def __init__(self, tensors: dict[str, Tensor], path: Path) -> None:
        super().__init__(tensors)
        with safe_open(path, "pt") as file:
            self.stated = json.loads(file.metadata()["stated"])


def test_the_calls_are_made_with_the_names_that_the_library_has(theirs: Theirs) -> None:
    """The kernels cannot run here; their signatures are there."""
    calls, required = theirs.stated["calls"], theirs.stated["required"]
    linear = QuantLinear(64, 128, False, FORMATS["nvfp4"], LAYOUTS["trtllm_linear"], "a")
    experts = QuantExperts(4, 128, 128, nn.SiLU(), FORMATS["nvfp4"], LAYOUTS["trtllm_moe"], "m")
    codes, scales = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)
    made = gemms_fp4.linear_arguments(codes, scales, linear.kernel_operands(), "trtllm")
    assert set(required["mm_fp4"]) <= made.keys() <= set(calls["mm_fp4"])
    choice = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2)
    given = (torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.uint8), *choice)
    routed = {*gemms_fp4.experts_arguments(*given, experts.kernel_operands()), "hidden_states_scale_layout"}
    assert set(required["routed_moe"]) <= routed <= set(calls["routed_moe"])
    assert set(required["moe"]) - {"routing_logits"} <= routed - {"topk_ids"} <= set(calls["moe"])
    assert calls["fp4_quantize"][:2] == ["input", "global_scale"] and "is_sf_swizzled_layout" in calls["fp4_quantize"]
    assert theirs.stated["enums"] == [gemms_fp4.SWIGLU, gemms_fp4.RENORMALIZE, "layout_linear"]


def _environment(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "HOME": str(site), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", STEPS)
def test_steps_give_the_bytes_of_flashinfer_on_random_shapes(theirs: dict[str, Tensor], name: str) -> None:
    maps, order = STEPS[name]
    for case in range(12):
        matrix = theirs[f"{case}.in"]
        located = locate(maps, order, *matrix.shape)
        out = torch.zeros(located.num_bytes, dtype=torch.uint8)
        kernels.scatter_rows(matrix, located, 0, 0, out)
        assert torch.equal(out, theirs[f"{case}.{name}"].reshape(-1)), (case, matrix.shape)


def test_bf16_experts_are_those_of_flashinfer_on_random_shapes(theirs: dict[str, Tensor]) -> None:
    """It takes w13 as it comes; up first is what the layout makes of a checkpoint."""
    for case in range(12):
        w13, w2 = theirs[f"{case}.moe.in13"], theirs[f"{case}.moe.in2"]
        experts, hidden, inter = w2.shape
        plan = plan_experts(LAYOUTS["trtllm_moe_bf16"], FORMATS["bf16"], "m", experts, hidden, inter)
        halves = {"up": w13[:, :inter], "gate": w13[:, inter:], "down": w2}
        tensors = {f"m.{e}.{half}_proj.weight": rows_of(w[e]) for half, w in halves.items() for e in range(experts)}
        storages = apply_all(plan, tensors)
        for spec, key in zip(plan.storages, ("gemm1_weights", "gemm2_weights"), strict=True):
            assert torch.equal(spec.kernel_view(storages[spec.name]), theirs[f"{case}.moe.{key}"]), (case, key)


def test_a_low_latency_linear_is_its_shuffle_in_blocks(theirs: dict[str, Tensor]) -> None:
    for case in range(12):
        shuffled = theirs[f"{case}.shuffle128"]
        num_rows, num_elements = shuffled.shape
        if num_elements % 128:
            continue
        plan = plan_linear(LAYOUTS["trtllm_linear_fp8"], FORMATS["fp8"], "a", num_rows, num_elements)
        storages = apply_all(plan, random_tensors(plan, 0) | {"a.weight": theirs[f"{case}.in"]})
        blocks = shuffled.view(num_rows, -1, 128).transpose(0, 1)
        assert torch.equal(plan.storages[0].kernel_view(storages["a.weight"]).view(torch.uint8), blocks)
