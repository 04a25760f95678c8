"""Diffusion transformers of diffusers, quantized: their outputs, and that a push leaves what a cold load would."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from quant.checkpoint import open_checkpoint
from quant.formats import FORMATS, NON_FINITE, decode
from quant.models import build_model, parameters_of, storage_parameters
from quant.modules import QuantModule, decode_all, layouts_of, quantized_modules
from quant.pipelines import PipelineError, components_of, meta_pipeline
from sharding.fsdp import layers_of, local_bytes, reshard_all, roots_of, shard_model, unshard_all
from tests.cold import encode_all, install, storage_bytes
from tests.local import cold
from tests.tiny_dit import COMPONENTS, CONFIGS, tiny_inputs, tiny_transformer, write_tiny_pipeline
from weight_update.chunks import Chunk, decode_request, encode_chunk
from weight_update.encoder import encoded, global_scales, largest_bits, nonfinite_index
from weight_update.receiver import Receiver
from weight_update.sharing import plan_push
from weight_update.source import Scope

FAMILIES = tuple(CONFIGS)
# W8A8 with scales by row: ModelOpt's and ModelSlim's. FP8 of square weights too: every attention projection is one.
LAYOUTS = [
    ("nvfp4", "trtllm", "trtllm_linear"),
    ("nvfp4", "trtllm_dit", "trtllm_dit"),
    ("nvfp4", "cutlass", "cutlass_linear"),
    ("fp8", "cutlass", "cutlass_linear_fp8"),
    ("fp8", "plain", "plain"),
    ("int8", "plain", "plain"),
    ("int8_dynamic", "plain", "plain"),
    ("int8_dynamic", "npu", "npu_linear"),
]


def denoised(model: nn.Module, family: str) -> list[Tensor]:
    """One call of every component."""
    with torch.inference_mode():
        return [child(**tiny_inputs(family)).sample.clone() for child in model.children()]


def trainer_model(family: str, seed: int) -> nn.ModuleDict:
    """All components in FP32, as a trainer holds them."""
    named = {name: tiny_transformer(family, seed + i, fp32=True) for i, name in enumerate(COMPONENTS[family])}
    return nn.ModuleDict(named).requires_grad_(True)


def push(receiver: Receiver, model: Any, scope: Scope = "all") -> None:
    """What a Pusher sends and a rank does, without the network between."""
    plan, problems = plan_push(receiver.manifest, model, scope)
    assert plan is not None, problems
    scales = global_scales((source.parameter, largest_bits(source)) for source in plan.sources)
    version = receiver.version + 1
    position = {spec.name: i for i, spec in enumerate(plan.specs)}
    pushed = np.array([receiver.manifest.index[name] for name in position])
    receiver.begin(version, version, receiver.version, pushed)
    for source in plan.sources:
        for spec, first, data in encoded(source, scales.get(source.name)):
            payload = data.reshape(-1).numpy().data
            offset = np.array([first * spec.row_bytes], np.uint64)
            numbers = np.array([position[spec.name]], np.uint32), offset, np.array([len(payload)], np.uint32)
            chunk = decode_request(encode_chunk(0, *numbers, [payload]))
            assert isinstance(chunk, Chunk)
            receiver.stage(chunk, transaction=version)
    receiver.prepare()
    receiver.install()
    receiver.publish()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """Pipelines of every family with two sets of weights: (family, seed)."""
    made = {}
    for family in FAMILIES:
        for seed in (0, 10):
            made[family, seed] = write_tiny_pipeline(tmp_path_factory.mktemp(family), family, seed)
    return made


Folders = Mapping[tuple[str, int], Path]


# ---------------------------------------------------------------- how they are built


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_in_bf16_are_those_of_diffusers_bit_by_bit(folders: Folders, family: str) -> None:
    model, _ = cold(folders[family, 0], "auto", "bf16")
    expected = [tiny_transformer(family, seed)(**tiny_inputs(family)).sample for seed in range(len(COMPONENTS[family]))]
    actual = denoised(model, family)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert all(output.isfinite().all() and output.std() > 0.1 for output in expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_classes_compute_is_byte_for_byte_that_of_a_normal_instance(
    folders: Folders, family: str, device: str
) -> None:
    model = build_model(folders[family, 0], "nvfp4", "cutlass", device=device).get_submodule("transformer")
    reference = tiny_transformer(family, 0)
    expected = dict(computed(reference))
    assert dict(computed(model)).keys() == expected.keys()
    for name, tensor in computed(model):
        assert (tensor.dtype, tensor.device) == (expected[name].dtype, expected[name].device), name
        assert as_bytes(tensor) == as_bytes(expected[name]), name
    assert bool(expected) == (family in ("wan", "qwen_image"))
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def computed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors of diffusers' modules that are no parameters: buffers, and attributes hidden from torch."""
    for path, module in model.named_modules():
        if isinstance(module, QuantModule):
            continue
        held = (*module.named_buffers(recurse=False), *vars(module).items())
        yield from ((f"{path}.{name}", value) for name, value in held if isinstance(value, Tensor))


def as_bytes(tensor: Tensor) -> bytes:
    return torch.view_as_real(tensor).numpy().tobytes() if tensor.is_complex() else tensor.numpy().tobytes()


def test_a_class_that_computes_what_no_row_says_is_refused(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(__import__("quant.pipelines", fromlist=["COMPUTED"]).COMPUTED, "QwenEmbedRope")
    with pytest.raises(PipelineError, match=r"2 tensor\(s\) that its class computes[\s\S]*pos_embed.pos_freqs"):
        meta_pipeline(components_of(folders["qwen_image", 0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_the_dtypes_that_diffusers_gives_them(folders: Folders, family: str) -> None:
    dtypes = {name: parameter.dtype for name, parameter in tiny_transformer(family, 0).named_parameters()}
    rows = {row.name: row for row in parameters_of(build_model(folders[family, 0], "bf16", "auto", device="meta"))}
    assert {name for name in rows if name.startswith("transformer.")} == {f"transformer.{name}" for name in dtypes}
    for name, dtype in dtypes.items():
        assert FORMATS[rows[f"transformer.{name}"].format].rows_dtype == dtype, name
    assert ({row.format for row in rows.values()} == {"bf16", "fp32"}) == (family == "wan")


# ---------------------------------------------------------------- hot equals cold


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("fmt", "layout", "row"), LAYOUTS, ids=[f"{fmt}-{row}" for fmt, _, row in LAYOUTS])
def test_a_push_leaves_the_bytes_and_the_outputs_of_a_cold_load(
    folders: Folders, family: str, fmt: str, layout: str, row: str
) -> None:
    hot, receiver = cold(folders[family, 0], layout, fmt)
    assert layouts_of(hot) == (row,)
    addresses = receiver.storage_addresses()
    decode_all(hot)
    before = denoised(hot, family)
    push(receiver, trainer_model(family, 10))
    decode_all(hot)
    fresh, expected = cold(folders[family, 10], layout, fmt)
    decode_all(fresh)
    assert receiver.storage_bytes() == expected.storage_bytes() and receiver.storage_addresses() == addresses
    pairs = list(zip(denoised(hot, family), denoised(fresh, family), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(torch.equal(a, b) for a, (b, _) in zip(before, pairs, strict=True))


def test_square_weights_are_among_the_shapes(folders: Folders) -> None:
    for family in FAMILIES:
        rows = parameters_of(build_model(folders[family, 0], "fp8", "cutlass", device="meta"))
        shapes = [row.shape for row in rows if row.format == "fp8"]
        assert any(n == k for n, k in shapes) and any(n > k for n, k in shapes) and any(n < k for n, k in shapes)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", ["nvfp4", "fp8", "int8_dynamic"])
def test_a_quantized_model_computes_what_diffusers_does_with_the_decoded_weights(
    folders: Folders, family: str, fmt: str
) -> None:
    model = build_model(folders[family, 0], fmt, "auto", arch=100)
    rows = {row.name: row for row in parameters_of(model)}
    with open_checkpoint(folders[family, 0]) as checkpoint:
        tensors = encode_all(model, {name: checkpoint.rows(name).bfloat16() for name in rows})
    install(model, tensors)
    decode_all(model)
    reference = tiny_transformer(family, 0)
    for name, parameter in reference.named_parameters():
        row = rows[f"transformer.{name}"]
        parts = FORMATS[fmt].components if row.format == fmt else ()
        stem = row.name.removesuffix(".weight")
        held = {part.suffix: tensors[f"{stem}.{part.suffix}"] for part in parts}
        parameter.data = decode(FORMATS[fmt], held) if held else tensors[row.name]
    with torch.inference_mode():
        expected = reference.float()(**tiny_inputs(family, dtype=torch.float32)).sample
        actual = model.float().get_submodule("transformer")(**tiny_inputs(family, dtype=torch.float32)).sample
    # Only the decoded weight's rounding to BF16 lies between them.
    assert (actual - expected).norm() <= 0.01 * expected.norm()


def test_fp32_parameters_keep_every_bit_of_what_a_trainer_pushes(folders: Folders) -> None:
    _, receiver = cold(folders["wan", 0], "auto", "nvfp4")
    trainer = trainer_model("wan", 3)
    push(receiver, trainer)
    storages = receiver.storage_bytes()
    for name in ("transformer_2.scale_shift_table", "transformer.condition_embedder.time_embedder.linear_1.weight"):
        pushed = trainer.get_parameter(name).detach()
        assert not torch.equal(pushed, pushed.bfloat16().float())
        assert storages[name] == pushed.contiguous().numpy().tobytes()


def test_fp32_parameters_are_refused_where_they_are_not_finite_and_only_there(folders: Folders) -> None:
    _, receiver = cold(folders["wan", 0], "auto", "nvfp4")
    trainer = trainer_model("wan", 3)
    table = trainer.get_parameter("transformer.scale_shift_table")
    with torch.no_grad():
        table[0, 1, 5] = torch.finfo(torch.float32).max  # rounds to infinity in BF16
    plan, _ = plan_push(receiver.manifest, trainer, "all")
    assert plan is not None
    source = next(each for each in plan.sources if each.name == "transformer.scale_shift_table")
    assert largest_bits(source) == 0x7F7F
    for bits in (0x7F800001, 0x7F800000):  # a NaN whose bits are all in the half that BF16 has not, and infinity
        table.data.view(torch.int32)[0, 1, 7] = bits
        assert largest_bits(source) >= NON_FINITE and nonfinite_index(source) == (0, 64 + 7)


def test_pushing_one_component_carries_the_other_over(folders: Folders) -> None:
    _, receiver = cold(folders["wan", 0], "trtllm", "nvfp4")
    before = receiver.storage_bytes()
    push(receiver, trainer_model("wan", 10), scope="transformer_2.*")
    after = receiver.storage_bytes()
    changed = {name.partition(".")[0] for name in before if before[name] != after[name]}
    assert changed == {"transformer_2"}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_of_components_that_are_not_served_are_refused(folders: Folders, family: str) -> None:
    _, receiver = cold(folders[family, 0], "auto", "bf16")
    extra = [
        ("text_encoder.shared.weight", torch.zeros(4, 4)),
        ("vae.decoder.conv_in.weight", torch.zeros(4, 4, 3, 3)),
        ("transformer_9.proj_out.weight", torch.zeros(16, 64)),
    ]
    plan, problems = plan_push(
        receiver.manifest, [*trainer_model(family, 0).named_parameters(), *extra], "all"
    )
    assert plan is None and len(problems) == 3
    for name, _ in extra:
        assert any(problem.startswith(f"{name}: unknown to the service") for problem in problems)


# ---------------------------------------------------------------- sharded

WORLD = 2
SHARDED = ("wan", "qwen_image")


def test_roots_are_the_components_and_layers_their_blocks(folders: Folders) -> None:
    model = build_model(folders["flux", 0], "nvfp4", "auto", device="meta")
    transformer = model.get_submodule("transformer")
    assert roots_of(model) == [transformer] and roots_of(transformer) == [transformer]
    assert layers_of(model) == [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def serve_and_update(folder: Path, family: str) -> dict[str, Any]:
    """Load, forward with one component gathered at a time, load again in place, forward with all gathered."""
    whole = build_model(folder, "nvfp4", "trtllm")
    names = [row.name for row in parameters_of(whole)]
    trainers = [dict(trainer_model(family, seed).named_parameters()) for seed in (0, 10)]
    versions = [encode_all(whole, {name: each[name].detach().bfloat16() for name in names}) for each in trainers]
    expected = []
    for tensors in versions:
        install(whole, tensors)
        decode_all(whole)
        expected.append(denoised(whole, family))
    model = build_model(folder, "nvfp4", "trtllm", device="meta")
    shard_model(model, init_device_mesh("cpu", (WORLD,)), quantized=quantized_modules(model))
    parameters = storage_parameters(model)
    pointers = {name: local_bytes(parameter).data_ptr() for name, parameter in parameters.items()}
    seen: dict[str, Any] = {
        "sharded": all(isinstance(parameter, DTensor) for parameter in parameters.values()),
        "not_zero": [name for name, data in storage_bytes(model).items() if any(data)],
        "differ": [torch.equal(a, b) for a, b in zip(*expected, strict=True)],
        "computed": [
            as_bytes(a) == as_bytes(b) for (_, a), (_, b) in zip(computed(whole), computed(model), strict=False)
        ],
    }
    install(model, versions[0])
    seen["apart"] = []
    for child, output in zip(model.children(), expected[0], strict=True):
        unshard_all(child)
        decode_all(child)
        others = [other for other in model.children() if other is not child]
        still = all(isinstance(each, DTensor) for other in others for each in other.parameters())
        with torch.inference_mode():
            seen["apart"].append(still and torch.equal(child(**tiny_inputs(family)).sample, output))
        reshard_all(child)
    install(model, versions[1])
    unshard_all(model)
    decode_all(model)
    seen["together"] = [torch.equal(a, b) for a, b in zip(denoised(model, family), expected[1], strict=True)]
    reshard_all(model)
    seen["moved"] = [
        name for name, each in storage_parameters(model).items() if local_bytes(each).data_ptr() != pointers[name]
    ]
    return seen


def entry(rank: int, rendezvous: Path, folders: Mapping[str, Path], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}/rendezvous", rank=rank, world_size=WORLD)
    try:
        results.put((rank, {family: serve_and_update(folder, family) for family, folder in folders.items()}))
    except BaseException:
        results.put((rank, traceback.format_exc()))
        raise
    finally:
        dist.destroy_process_group()


def test_two_ranks_hold_shards_of_both_transformers_and_compute_what_one_does(folders: Folders, tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    served = {family: folders[family, 0] for family in SHARDED}
    other = context.Process(target=entry, args=(1, tmp_path, served, results))
    other.start()
    entry(0, tmp_path, served, results)
    found = dict(results.get() for _ in range(WORLD))
    other.join()
    for rank, each in found.items():
        assert isinstance(each, dict), each
        for family, seen in each.items():
            num = len(COMPONENTS[family])
            assert seen["sharded"] and seen["not_zero"] == [] and seen["moved"] == [], (rank, family)
            assert seen["differ"] == [False] * num and all(seen["computed"])
            assert seen["apart"] == seen["together"] == [True] * num
