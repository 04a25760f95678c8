"""The first push says whether an NVFP4 checkpoint was read as it was written; files that lie are made here."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from cold import encode_all
from local import LocalService, cold, local_service
from rig import chunk_of
from safetensors.torch import load_file, save_file
from test_families import WEIGHTS, quantize_folder
from test_views import comfy_scales
from tiny import save
from tiny_dit import CONFIGS, tiny_transformer, write_tiny_pipeline
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from quant.checkpoint import CheckpointError, open_checkpoint
from quant.formats import DTYPES
from quant.models import build_model, derived_of, parameters_of, placements_of, storage_parameters
from service.witness import Witness, of_replica
from sharding.fsdp import shard_range
from weight_update.client import Pusher
from weight_update.receiver import Receiver
from weight_update.transport import connect


def swapped(codes: Tensor) -> Tensor:
    """Every byte's two codes in the other order."""
    return codes % 16 * 16 + codes // 16


def swizzled(scales: Tensor) -> Tensor:
    """cuBLAS' tiles of 128 x 4: row r of a tile lies at (r % 32) * 16 + (r // 32) * 4."""
    rows, columns = scales.shape
    tiles = scales.view(torch.uint8).view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns).view(scales.dtype)


def is_tiled(tensor: Tensor) -> bool:
    return tensor.shape[0] % 128 == 0 and tensor.shape[1] % 4 == 0


def rewrite(file: Path, *, codes: bool = False, scales: bool = False, **said: Any) -> None:
    """Other bytes in a file, and what the config beside it says of them."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if codes and tensor.dtype == torch.uint8:
            tensors[name] = swapped(tensor)
        if scales and name.endswith(".weight_scale") and is_tiled(tensor):
            tensors[name] = swizzled(tensor)
    save_file(tensors, file)
    rewrite_config(file.parent, **said)


def rewrite_config(folder: Path, **said: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= said
    (folder / "config.json").write_text(json.dumps(config))


def pipeline(directory: Path, **lies: Any) -> Path:
    folder = write_tiny_pipeline(directory, "flux", 0)
    quantize_folder(folder / "transformer", "nvfp4", [])
    rewrite(folder / "transformer" / WEIGHTS, **lies)
    return folder


def llama(seed: int = 0) -> nn.Module:
    """Whose weights are whole tiles of 128 rows, which a file may hold swizzled without saying so."""
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=False))
    return nn.Module.eval(model.bfloat16())


def pushed(built: nn.Module) -> dict[str, Tensor]:
    """What llama() is in checkpoint form."""
    weights = dict(llama().named_parameters())
    return encode_all(built, {row.name: weights[row.name].detach() for row in parameters_of(built)})


def language_model(directory: Path, **lies: Any) -> Path:
    save(llama(), directory)
    built = build_model(directory, "nvfp4", "plain")
    tensors = pushed(built)
    stored = {
        spec.name: tensors[spec.name]
        .reshape(-1)
        .contiguous()
        .view(torch.uint8)
        .view(DTYPES[spec.dtype])
        .view(spec.shape)
        for spec in (placement.tensor for placement in placements_of(built))
    }
    save_file(stored, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    rewrite(directory / "model.safetensors", **lies)
    return directory


def said(service: LocalService) -> str:
    return service.ranks[0].witness.status


def shown(service: LocalService) -> str:
    """The status of the only replica, once the coordinator has asked the rank."""
    deadline = time.monotonic() + 20
    while True:
        with connect(service.address) as channel:
            (replica,) = pb_grpc.ControlStub(channel).Status(pb.StatusRequest(), timeout=5).replicas
        if replica.checkpoint == said(service) or time.monotonic() > deadline:
            return str(replica.checkpoint)
        time.sleep(0.1)


def trainer(seed: int = 0) -> dict[str, nn.Module]:
    return {"transformer": tiny_transformer("flux", seed)}


SWAPPED, SWIZZLED = {"swap_weight_nibbles": True}, {"checkpoint_weight_scale_layout": "swizzled"}
HONEST: list[dict[str, Any]] = [{}, {"codes": True, **SWAPPED}]
HONEST_TILES: list[dict[str, Any]] = [
    {"scales": True, **SWIZZLED},
    {"codes": True, "scales": True, **SWAPPED, **SWIZZLED},
]
LOW, HIGH = "low nibble first", "high nibble first"
LIES: list[tuple[dict[str, Any], str]] = [
    ({"codes": True}, f"declared is {LOW}, linear scales, but {HIGH}, linear scales fits"),
    (SWAPPED, f"declared is {HIGH}, linear scales, but {LOW}, linear scales fits"),
    ({"scales": True}, f"declared is {LOW}, linear scales, but {LOW}, swizzled scales fits"),
]
LIES_OF_TILES: list[tuple[dict[str, Any], str]] = [
    (SWIZZLED, f"declared is {LOW}, swizzled scales, but {LOW}, linear scales fits"),
    ({"codes": True, "scales": True}, f"declared is {LOW}, linear scales, but {HIGH}, swizzled scales fits"),
]


@pytest.mark.parametrize("honest", HONEST, ids=str)
def test_the_first_push_verifies_a_pipeline_that_is_as_it_says(honest: dict[str, Any], tmp_path: Path) -> None:
    folder = pipeline(tmp_path, **honest)
    with local_service(folder, tmp_path, ("auto",), "auto") as service, closing(Pusher(service.address)) as pusher:
        assert shown(service).startswith("transformer: unverified (no BF16 rows to compare with")
        assert pusher.push(trainer()).digest_verified
        assert said(service) == shown(service) == "verified"


@pytest.mark.parametrize("honest", HONEST_TILES, ids=str)
def test_the_first_push_verifies_a_language_model_that_is_as_it_says(honest: dict[str, Any], tmp_path: Path) -> None:
    folder = language_model(tmp_path / "model", **honest)
    with local_service(folder, tmp_path, ("trtllm",)) as service, closing(Pusher(service.address)) as pusher:
        assert said(service).startswith("unverified (no BF16 rows to compare with")
        before = service.bytes()
        assert pusher.push(llama()).digest_verified
        assert said(service) == "verified"
        assert service.bytes() == before  # it was read in the order that it says, and encoded alike


@pytest.mark.parametrize(("lies", "expected"), LIES, ids=str)
def test_the_first_push_finds_a_pipeline_that_lies_and_goes_on(
    lies: dict[str, Any], expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pipeline(tmp_path, **lies)
    with local_service(folder, tmp_path, ("auto",), "auto") as service, closing(Pusher(service.address)) as pusher:
        report = pusher.push(trainer())
        assert report.digest_verified and (report.base_version, report.version) == (1, 2)
        found = said(service)
        assert found.startswith(f"transformer: misread ({expected}")
        assert all(f"{nibble}, {layout} scales" in found for nibble in (LOW, HIGH) for layout in ("linear", "swizzled"))
        (warning,) = [each.getMessage() for each in caplog.records if "misread when it was loaded" in each.getMessage()]
        assert warning.startswith("transformer was misread") and "Versions up to 1 were served" in warning
        # Nothing of the file is left: a second push has nothing to compare with.
        pusher.push(trainer(1))
        assert said(service) == found


@pytest.mark.parametrize(("lies", "expected"), LIES_OF_TILES, ids=str)
def test_the_first_push_finds_a_language_model_that_lies(lies: dict[str, Any], expected: str, tmp_path: Path) -> None:
    folder = language_model(tmp_path / "model", **lies)
    with local_service(folder, tmp_path, ("cutlass",)) as service, closing(Pusher(service.address)) as pusher:
        assert pusher.push(llama()).digest_verified
        assert said(service).startswith(f"misread ({expected}")


def test_a_push_of_what_was_not_in_nvfp4_leaves_the_question_open(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "model", codes=True)
    model = dict(llama().named_parameters())
    with local_service(folder, tmp_path, ("trtllm",)) as service, closing(Pusher(service.address)) as pusher:
        pusher.push([("model.norm.weight", model["model.norm.weight"].detach())], scope=["model.norm.weight"])
        assert said(service).startswith("unverified (no BF16 rows")
        name = "model.layers.1.mlp.down_proj.weight"
        pusher.push([(name, model[name].detach())], scope=[name])
        assert said(service).startswith("misread (")


def test_what_pushes_have_brought_is_not_taken_for_what_was_loaded(tmp_path: Path) -> None:
    """Zeros tell nothing, and the file is gone after them."""
    folder = language_model(tmp_path / "model", codes=True)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(llama().named_parameters())[name].detach()
    with local_service(folder, tmp_path, ("trtllm",)) as service, closing(Pusher(service.address)) as pusher:
        for value in (torch.zeros_like(weight), weight, weight):
            pusher.push([(name, value)], scope=[name])
            assert said(service).startswith("unverified (no BF16 rows")


@pytest.mark.parametrize(("lies", "expected"), [({}, "verified"), LIES_OF_TILES[1]], ids=["honest", "lies"])
def test_a_rank_that_holds_half_of_the_rows_knows_as_much(lies: dict[str, Any], expected: str, tmp_path: Path) -> None:
    model, _ = cold(language_model(tmp_path, **lies), "cutlass")
    tensors = pushed(model)
    statuses = []
    for rank in range(2):
        whole = storage_parameters(model)
        shards = {name: shard_range(len(tensor), rank, 2) for name, tensor in whole.items()}
        held = {name: whole[name].detach()[start:stop].clone() for name, (start, stop) in shards.items()}
        rows = parameters_of(model)
        receiver = Receiver(held, placements_of(model), derived_of(model), shards=shards, parameters=rows)
        with open_checkpoint(tmp_path) as checkpoint:
            witness = Witness(receiver, checkpoint)
        specs = receiver.manifest.tensors
        receiver.begin(1, 1, 0, range(len(specs)))
        for i, spec in enumerate(specs):
            start, stop = (int(at[i]) * spec.row_bytes for at in (receiver.row_start, receiver.row_stop))
            data = tensors[spec.name].reshape(-1).contiguous().view(torch.uint8)[start:stop].numpy().tobytes()
            if data:
                receiver.stage(chunk_of([(i, start, data)]))
        receiver.prepare()
        witness.hear()
        statuses.append(witness.status)
    # The scales of whole tensors lie on the first rank.
    assert statuses[1].startswith("unverified (no BF16 rows")
    assert of_replica(statuses).startswith(expected if expected == "verified" else f"misread ({expected}")


def test_a_push_of_another_model_verifies_nothing(tmp_path: Path) -> None:
    folder = language_model(tmp_path / "model")
    with local_service(folder, tmp_path, ("trtllm",)) as service, closing(Pusher(service.address)) as pusher:
        pusher.push(llama(7))
        assert said(service).startswith("unverified (the BF16 rows are of another model: relative error 1.")


def test_a_bf16_checkpoint_has_nothing_to_verify(tmp_path: Path) -> None:
    save(llama(), tmp_path / "model")
    with local_service(tmp_path / "model", tmp_path, ("trtllm",)) as service:
        assert said(service) == ""


def test_a_language_model_whose_metadata_contradicts_its_config_is_refused(tmp_path: Path) -> None:
    file = language_model(tmp_path) / "model.safetensors"
    with open_checkpoint(tmp_path) as checkpoint:
        (reading,) = checkpoint.readings
        assert (reading.component, reading.verdict.status) == ("", "unverified")
    stated = {"quant_algo": "NVFP4", "swap_weight_nibbles": False}
    save_file(load_file(file), file, metadata={"quantization_config": json.dumps(stated)})
    rewrite_config(tmp_path, **SWAPPED)
    with pytest.raises(CheckpointError, match=r"declared is high nibble first, .* metadata: swap_nibbles False"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["unverified (a)", "verified"], "verified"),
        (["verified", "a: misread (b)"], "a: misread (b)"),
        (["unverified (a)", ""], "unverified (a)"),
        (["", ""], ""),
    ],
)
def test_a_replica_knows_what_the_best_placed_of_its_ranks_knows(statuses: list[str], expected: str) -> None:
    assert of_replica(statuses) == expected


# ---------------------------------------------------------------- padding


def comfy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As ComfyUI's export has them: rows and columns padded to 16, high nibble first, scales in tiles."""
    stored = dict(tensors)
    for name, codes in tensors.items():
        if codes.dtype == torch.uint8:
            rows, columns = (-size % 16 for size in codes.shape)
            stored[name] = swapped(torch.nn.functional.pad(codes, (0, columns, 0, rows)))
            stored[f"{name}_scale"] = comfy_scales(tensors[f"{name}_scale"], 16)
            stored[f"{name.removesuffix('.weight')}.comfy_quant"] = torch.tensor([123, 125], dtype=torch.uint8)
    return stored


def test_a_pipeline_whose_columns_comfyui_has_padded_is_read_as_the_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden size 48: 24 bytes of codes become 32."""
    class_name, sizes = CONFIGS["flux"]
    monkeypatch.setitem(CONFIGS, "flux", (class_name, sizes | {"attention_head_dim": 24, "axes_dims_rope": [8, 8, 8]}))
    folder = write_tiny_pipeline(tmp_path, "flux", 0) / "transformer"
    canonical = quantize_folder(folder, "nvfp4", [])
    stored = comfy(canonical)
    name = "transformer_blocks.0.attn.to_q.weight"
    assert (canonical[name].shape, stored[name].shape) == ((48, 24), (48, 32))
    save_file(stored, folder / WEIGHTS)
    rewrite_config(folder, **SWAPPED, **SWIZZLED)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {each.removeprefix("transformer.") for each in checkpoint.names()} == set(canonical)
        for each, expected in canonical.items():
            got = checkpoint.rows(f"transformer.{each}")
            assert checkpoint.spec(f"transformer.{each}").shape == tuple(expected.shape), each
            assert torch.equal(*(rows.reshape(-1).contiguous().view(torch.uint8) for rows in (got, expected))), each
    assert build_model(tmp_path, "auto", "plain", device="meta")
