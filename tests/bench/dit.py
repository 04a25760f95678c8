"""A denoise step of a FLUX transformer on a GPU: BF16 against FP8, and the linears that make the difference.

    python -m tests.bench.gpu --only flux --only linears

The class is diffusers' own, the step that of `service.denoising`: one sample, the forward and the scheduler, launches
from Python included; and the forward alone in a CUDA graph. Weights are random. Two sizes: the tests' tiny one, which
is all launches, and the width of FLUX.1 (hidden 3072) with 2 of its 19 double and 4 of its 38 single blocks, at 1024 x
1024 pixels and 512 tokens of text.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from quant import gemms_fp8
from quant.formats import FORMATS, encode
from quant.layouts import LAYOUTS, device_arch
from quant.models import quantize_model
from quant.modules import QuantLinear, QuantModule, decode_all, mark_all_applied
from quant.pipelines import Pipeline
from service.denoising import Denoiser, conditioning_of
from service.samples import SampleStart
from service.styles import STYLES
from tests.bench.gpu_table import Measured, milliseconds
from tests.tiny_dit import CONFIGS

TOKENS = {"flux, hidden 64": (16, 8), "flux, hidden 3072, 2 + 4 blocks": (128, 512)}  # latents' edge, text
SIZES: dict[str, dict[str, Any]] = {
    "flux, hidden 64": CONFIGS["flux"][1],
    "flux, hidden 3072, 2 + 4 blocks": {"num_layers": 2, "num_single_layers": 4, "guidance_embeds": True},
}
# What is served -> format, layout; decoded: FP8 in memory, BF16 products.
KINDS = {
    "BF16": ("", ""),
    "FP8, a scale a tensor": ("fp8", "cutlass_linear_fp8"),
    "FP8, a scale a row and a token": ("fp8_channel", "cutlass_linear_fp8"),
    "FP8, decoded": ("fp8", "plain"),
}
# Of FLUX.1: rows, elements, tokens. The last makes a block's modulation out of the time.
LINEARS = ((3072, 3072, 4608), (12288, 3072, 4608), (3072, 12288, 4608), (18432, 3072, 1))
STEPS = 1000  # of the schedule, more than are taken


def transformer(size: str, fmt: str, layout: str, device: torch.device) -> nn.Module:
    """Random weights of the class, quantized on the device."""
    with torch.device("meta"):
        model: nn.Module = nn.Module.to(diffusers.FluxTransformer2DModel(**SIZES[size]), torch.bfloat16)
    if fmt:
        quantize_model(model, fmt, layout, arch=device_arch(device))
    model.to_empty(device=device).requires_grad_(False)
    random = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QuantLinear):
                fill(module, random)
            elif not isinstance(module, QuantModule):
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(std=0.02, generator=random)
    mark_all_applied(model)
    return model.eval()


def fill(module: QuantLinear, random: torch.Generator) -> None:
    """Weights of the same numbers in every format: as a push would leave them."""
    rows = torch.empty(module.out_features, module.in_features, device=random.device)
    rows.normal_(std=0.02, generator=random)
    operands = module.kernel_operands()
    if module.bias is not None:
        module.bias.normal_(std=0.02, generator=random)
    if module.fmt.has_global_scale:
        scale = rows.bfloat16().abs().amax().float().cpu() / 448
        parts = encode(module.fmt, rows.bfloat16(), scale) | {"weight_scale": scale}
        module.get_parameter("input_scale").fill_(0.02)
        module.get_parameter("input_scale_inv").fill_(50.0)
        module.get_parameter("alpha").fill_(0.02 * float(scale))
    else:
        parts = encode(module.fmt, rows.bfloat16())
    weight = operands["weight"].t() if operands["weight"].stride(0) == 1 else operands["weight"]
    weight.view(torch.uint8).copy_(parts["weight"])
    scales = parts["weight_scale"].view(torch.float32)
    operands["weight_scale"].copy_(scales.view(operands["weight_scale"].shape))


@contextmanager
def denoiser(model: nn.Module, device: torch.device) -> Iterator[Denoiser]:
    """As a rank of the service makes it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(Path(folder) / "scheduler")
        made = Denoiser(Pipeline({"transformer": model}), Path(folder), device=device)
        made.warm_up()
        yield made


def started(size: str, config: Any) -> SampleStart:
    edge, text = TOKENS[size]
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, generator=generator).bfloat16(),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=generator).bfloat16(),
    }
    return SampleStart(
        rank=0,
        keys=(0,),
        seeds=(0,),
        num_steps=STEPS,
        num_frames=1,
        height=edge,
        width=edge,
        guidance=3.5,
        cfg_scale=0.0,
        cfg_scale_2=0.0,
        conditioning=save(tensors),
        trajectory=False,
    )


@torch.no_grad()
def step(size: str, kind: str, device: torch.device) -> float:
    """Milliseconds of a step."""
    model: Any = transformer(size, *KINDS[kind], device)
    with denoiser(model, device) as made:
        made.step([started(size, model.config)], (), 1)
        return milliseconds(lambda: made.step((), (), 1))


def steps(size: str) -> Iterator[Measured]:
    """A step of every kind, over that in BF16."""
    device, found = torch.device("cuda"), {}
    for kind in KINDS:
        found[kind] = step(size, kind, device)
        gc.collect()
        torch.cuda.empty_cache()
        yield f"denoise step, {kind}", found[kind], "BF16", found["BF16"]


@torch.no_grad()
def graphs(size: str) -> Iterator[Measured]:
    """The forward alone, replayed from a CUDA graph: what the GPU needs, whatever Python does."""
    device, found = torch.device("cuda"), {}
    for kind in KINDS:
        model: Any = transformer(size, *KINDS[kind], device)
        decode_all(model)
        inputs = inputs_of(size, model.config, device)
        for _ in range(2):
            model(**inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(**inputs)
        found[kind] = milliseconds(graph.replay)
        del model, graph
        gc.collect()
        torch.cuda.empty_cache()
        yield f"forward in a CUDA graph, {kind}", found[kind], "BF16", found["BF16"]


def inputs_of(size: str, config: Any, device: torch.device) -> dict[str, Any]:
    """What one forward takes."""
    start = started(size, config)
    given = conditioning_of(start.conditioning, device)
    constants = STYLES["FluxTransformer2DModel"].constants(config, start.size, given, start.guidance)
    count = start.height * start.width // 4
    return {
        **given,
        **{name: each.to(device) for name, each in constants.items()},
        "hidden_states": torch.randn(1, count, config.in_channels, device=device).bfloat16(),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16, device=device),
        "return_dict": False,
    }


@torch.no_grad()
def linears() -> Iterator[Measured]:
    """A linear by itself, activations quantized in it; without that; and summed in the tensor cores alone."""
    device = torch.device("cuda")
    random = torch.Generator(device=device).manual_seed(0)
    for rows, elements, count in LINEARS:
        x = torch.randn(count, elements, device=device, generator=random).bfloat16()
        weight = torch.randn(rows, elements, device=device, generator=random).bfloat16()
        plain = milliseconds(partial(F.linear, x, weight))
        for kind, (fmt, layout) in KINDS.items():
            if layout == "cutlass_linear_fp8":
                module = QuantLinear(elements, rows, False, FORMATS[fmt], LAYOUTS[layout], "m", device)
                fill(module, random)
                module.mark_applied()
                module.decode_()
                name = f"{rows} x {elements}, {count} tokens, {kind}"
                yield name, milliseconds(partial(module, x)), "BF16", plain
                yield f"{name}: the product alone", product(x, module, fast=False), "BF16", plain
                yield f"{name}: the same, summed in the tensor cores", product(x, module, fast=True), "BF16", plain


def product(x: Tensor, module: QuantLinear, fast: bool) -> float:
    """Milliseconds of the scaled product of operands that are there."""
    operands = module.kernel_operands()
    if module.fmt.has_global_scale:
        codes, scales = gemms_fp8.quantize_tensor(x, operands["input_scale_inv"]), operands["input_scale"]
    else:
        codes, scales = gemms_fp8.quantize_tokens(x)
    others = operands["weight_scale"] if module.fmt.has_global_scale else operands["weight_scale"].view(1, -1)
    return milliseconds(
        lambda: torch._scaled_mm(
            codes, operands["weight"], scales, others, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
    )


def both(size: str) -> Iterator[Measured]:
    yield from steps(size)
    yield from graphs(size)


SECTIONS: dict[str, Callable[[], Iterator[Measured]]] = {
    "linears of flux": linears,
    **{f"{size}, {edge * edge // 4} + {text} tokens": partial(both, size) for size, (edge, text) in TOKENS.items()},
}
