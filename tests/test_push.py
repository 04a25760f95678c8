"""Pushes over real gRPC into a service in this process: what lands, what is refused with nothing changed."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from tests.local import LocalService, cold, local_service
from tests.tiny import save, tiny_llama, tiny_qwen3_moe
from weight_update.chunks import Packet, encode_chunk
from weight_update.client import Pusher
from weight_update.digest import total
from weight_update.errors import (
    BusyError,
    DigestError,
    ManifestError,
    MemberError,
    TransferError,
    VersionError,
    WeightUpdateError,
)
from weight_update.stream import StageStream
from weight_update.transport import STAGE, ControlClient, connect
from weight_update.values import Specs, from_manifest_proto

LAYOUTS = ("trtllm", "cutlass")
GOLDEN = Path(__file__).parent / "golden"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    with local_service(checkpoint, tmp_path_factory.mktemp("state"), LAYOUTS) as running:
        yield running


@pytest.fixture
def pusher(service: LocalService) -> Iterator[Pusher]:
    each = Pusher(service.address, lease_s=5.0)
    yield each
    each.close()


def cold_bytes(model: nn.Module, directory: Path, layouts: tuple[str, ...] = LAYOUTS) -> list[dict[str, bytes]]:
    """The storages of a service that loads these weights from a checkpoint."""
    save(model, directory)
    return [cold(directory, layout)[1].storage_bytes() for layout in layouts]


def generate(address: str, num_tokens: int = 4) -> list[pb.Token]:
    """Greedy tokens of two prompts, one for each replica."""
    with connect(address) as channel:
        request = pb.GenerateRequest(
            prompts=[pb.Prompt(token_ids=[3, 4, 5]), pb.Prompt(token_ids=[9, 8])],
            max_new_tokens=num_tokens,
            ignore_eos=True,
        )
        return list(pb_grpc.GenerationStub(channel).Generate(request, timeout=60))


def test_a_language_model_denoises_nothing(service: LocalService) -> None:
    with connect(service.address) as channel, pytest.raises(grpc.RpcError, match="holds a language model"):
        list(pb_grpc.GenerationStub(channel).Denoise(pb.DenoiseRequest(seeds=[1]), timeout=60))


def current_version(address: str) -> int:
    client = ControlClient(address)
    try:
        return int(client.describe().version)
    finally:
        client.close()


# ---------------------------------------------------------------- what lands


def test_a_full_push_leaves_every_byte_as_a_cold_load_would_and_no_address_moved(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=1)
    addresses = service.addresses()
    report = pusher.push(model)
    assert service.bytes() == cold_bytes(model, tmp_path)
    assert service.addresses() == addresses
    assert report.digest_verified
    assert report.version == current_version(service.address)
    assert report.replicas == [f"0: version {report.version}", f"1: version {report.version}"]
    assert report.carried_over == 0
    assert 0 < report.wire_bytes < report.logical_bytes * len(LAYOUTS)
    assert {token.version for token in generate(service.address)} == {report.version}


def test_the_reported_digest_is_that_of_the_cold_loaded_bytes(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=2)
    report = pusher.push(model)
    _, receiver = cold(save(model, tmp_path), "plain")
    assert report.digest == total(receiver.digests())


def test_fp32_masters_are_cast_to_bf16_ties_to_even(service: LocalService, pusher: Pusher, tmp_path: Path) -> None:
    masters = tiny_llama(seed=3, dtype=torch.float32)
    with torch.no_grad():
        masters.model.norm.weight[:4] = torch.tensor([1.00390625, 1.01171875, 1.0, 1.003906251])  # type: ignore[union-attr, index]
    pusher.push(masters)
    assert service.bytes() == cold_bytes(copy.deepcopy(masters).to(torch.bfloat16), tmp_path)


def test_a_partial_push_is_widened_to_its_fused_groups_and_carries_the_rest_over(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    base = tiny_llama(seed=4)
    pusher.push(base)
    changed = tiny_llama(seed=5)
    report = pusher.push(changed, scope=[GATE, "model.norm.weight"])
    assert report.widened == ["model.layers.0.mlp.up_proj.weight"]
    assert report.carried_over == len(list(base.parameters())) - 3
    expected = copy.deepcopy(base)
    state = expected.state_dict()
    for name in (GATE, "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        state[name].copy_(changed.state_dict()[name])
    assert service.bytes() == cold_bytes(expected, tmp_path)


def test_scope_trainable_pushes_what_requires_grad(service: LocalService, pusher: Pusher, tmp_path: Path) -> None:
    model = tiny_llama(seed=6)
    pusher.push(model)
    model.requires_grad_(False)
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)  # type: ignore[index, union-attr]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    report = pusher.push(model, scope="trainable")
    assert report.carried_over == len(list(model.parameters())) - 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 if parameter.requires_grad else -1)
    assert service.bytes() == cold_bytes(model, tmp_path)


def test_names_of_wrapper_modules_are_stripped_and_an_iterable_is_as_good_as_a_module(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=7)
    wrapped = [
        (f"module._orig_mod.{name.replace('layers.0.', 'layers.0._checkpoint_wrapped_module.')}", tensor)
        for name, tensor in model.named_parameters()
    ]
    pusher.push(iter(wrapped))
    assert service.bytes() == cold_bytes(model, tmp_path)


def test_an_untied_trainer_may_push_a_tied_service_when_both_names_agree(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=8)
    items = [*model.named_parameters(), ("lm_head.weight", model.get_parameter("model.embed_tokens.weight").clone())]
    pusher.push(items)
    assert service.bytes() == cold_bytes(model, tmp_path)


def test_the_same_push_id_commits_once(service: LocalService, pusher: Pusher) -> None:
    model = tiny_llama(seed=9)
    first = pusher.push(model, push_id="only-once")
    again = pusher.push(tiny_llama(seed=10), push_id="only-once")
    assert (again.version, again.digest) == (first.version, first.digest)
    assert current_version(service.address) == first.version


def test_logits_after_a_push_equal_those_of_a_cold_load_bit_for_bit(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=11)
    pusher.push(model)
    tokens = torch.tensor([[5, 6, 7, 8]])
    for live, layout in zip(service.models, LAYOUTS, strict=True):
        loaded, _ = cold(save(model, tmp_path / layout), layout)
        from quant.modules import decode_all

        decode_all(loaded)
        with torch.no_grad():
            assert torch.equal(live(tokens).logits, loaded(tokens).logits)


@pytest.mark.parametrize("make", [tiny_qwen3_moe], ids=["qwen3_moe"])
def test_stacked_experts_of_a_moe_land_as_a_cold_load(make: Callable[[int], nn.Module], tmp_path: Path) -> None:
    layouts = ("trtllm", "cutlass", "plain")
    with local_service(save(make(0), tmp_path / "a"), tmp_path / "state", layouts) as running:
        pusher = Pusher(running.address)
        model = make(1)
        report = pusher.push(model)
        assert report.digest_verified
        assert running.bytes() == cold_bytes(model, tmp_path / "b", layouts)
        changed = make(2)
        report = pusher.push(changed, scope=["model.layers.0.mlp.experts.2.gate_proj.weight"])
        assert report.widened == ["model.layers.0.mlp.experts.2.up_proj.weight"]
        with torch.no_grad():
            name = "model.layers.0.mlp.experts.gate_up_proj"
            model.get_parameter(name)[2].copy_(changed.get_parameter(name)[2])
        assert running.bytes() == cold_bytes(model, tmp_path / "c", layouts)
        pusher.close()


@pytest.mark.parametrize("family", ["llama", "qwen3moe"])
def test_a_full_push_of_the_weights_that_modelopt_exported_changes_no_byte(family: str, tmp_path: Path) -> None:
    exported = {
        name.removeprefix("out."): tensor
        for name, tensor in load_file(GOLDEN / f"export_{family}_nvfp4_default.safetensors").items()
    }
    inputs = {
        name.removeprefix("in."): tensor
        for name, tensor in load_file(GOLDEN / f"export_{family}_inputs.safetensors").items()
    }
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    same = {
        fixture["file"]: {name: entry["same_as"] for name, entry in fixture["tensors"].items() if entry.get("same_as")}
        for fixture in manifest["fixtures"]
    }
    for tensors, prefix, file in (
        (exported, "out.", f"export_{family}_nvfp4_default.safetensors"),
        (inputs, "in.", f"export_{family}_inputs.safetensors"),
    ):
        for name, source in same[file].items():
            tensors[name.removeprefix(prefix)] = tensors[source.removeprefix(prefix)].clone()
    # The fixture holds the quantized tensors; an export copies all others from the model unchanged.
    plain = {name: tensor for name, tensor in inputs.items() if name not in exported and "experts" not in name}
    directory = export_directory(family, exported | plain, tmp_path / "export")
    with local_service(directory, tmp_path / "state", ("trtllm", "cutlass")) as running:
        before = running.bytes()
        scales = [value for name, value in before[0].items() if name.endswith("input_scale")]
        assert any(np.frombuffer(value, np.float32).any() for value in scales)
        pusher = Pusher(running.address)
        report = pusher.push(inputs.items())
        assert report.digest_verified
        assert running.bytes() == before
        pusher.close()


def export_directory(family: str, tensors: dict[str, torch.Tensor], directory: Path) -> Path:
    """A checkpoint directory like the one that the exporter wrote."""
    from transformers import LlamaConfig, Qwen3MoeConfig

    shared = {"vocab_size": 32, "hidden_size": 128, "num_hidden_layers": 1, "tie_word_embeddings": False}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    configs = {
        "llama": lambda: LlamaConfig(**shared, **heads, intermediate_size=256, architectures=["LlamaForCausalLM"]),
        "qwen3moe": lambda: Qwen3MoeConfig(
            **shared, **heads, **moe, intermediate_size=64, architectures=["Qwen3MoeForCausalLM"]
        ),
    }
    configs[family]().save_pretrained(directory)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    quantization = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}
    (directory / "hf_quant_config.json").write_text(json.dumps(quantization))
    return directory


def test_a_checkpoint_that_does_not_fit_is_refused_with_everything_that_one_needs_to_know(tmp_path: Path) -> None:
    directory = save(tiny_llama(seed=0), tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors[GATE] = torch.ones(320, 64)
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ManifestError) as caught:
        cold(directory, "trtllm")
    for word in (GATE, str(directory), "[320, 64] F32", "[320, 128] BF16", "rows 0:320", "QuantLinear", "nvfp4"):
        assert word in str(caught.value)
    assert "model.norm.weight" in str(caught.value)


# ---------------------------------------------------------------- what is refused


def changed_items(model: nn.Module, **changes: object) -> list[tuple[str, torch.Tensor]]:
    items = dict(model.named_parameters())
    for name, value in changes.items():
        if value is None:
            del items[name]
        else:
            items[name] = value  # type: ignore[assignment]
    return list(items.items())


def nan_weight() -> torch.Tensor:
    weight = torch.randn(320, 128)
    weight[17, 5] = float("nan")
    return weight


REFUSED: dict[str, tuple[Callable[[nn.Module], object], str, list[str]]] = {
    "unknown": (
        lambda m: changed_items(m, **{"model.layers.0.mlp.gate.weight": torch.ones(2)}),
        "all",
        ["unknown", GATE],
    ),
    "missing": (
        lambda m: changed_items(m, **{GATE: None, "model.norm.weight": None}),
        "all",
        [GATE, "model.norm.weight"],
    ),
    "duplicate": (lambda m: [*m.named_parameters(), (GATE, m.get_parameter(GATE))], "all", [GATE, "twice"]),
    "tied names that differ": (
        lambda m: [*m.named_parameters(), ("lm_head.weight", torch.ones(256, 128))],
        "all",
        ["tied", "embed_tokens"],
    ),
    "wrong shape": (
        lambda m: changed_items(m, **{GATE: torch.ones(128, 320)}),
        "all",
        [GATE, "[128, 320]", "[320, 128]"],
    ),
    "wrong dtype": (
        lambda m: changed_items(m, **{GATE: torch.ones(320, 128, dtype=torch.int32)}),
        "all",
        [GATE, "I32"],
    ),
    "float into packed": (lambda m: changed_items(m, **{GATE: torch.ones(320, 64)}), "all", ["float-to-packed", GATE]),
    "nan": (lambda m: changed_items(m, **{GATE: nan_weight()}), "all", [GATE, "[17, 5]"]),
    "infinity in a plain tensor": (
        lambda m: changed_items(m, **{"model.norm.weight": torch.full((128,), float("inf"))}),
        "all",
        ["model.norm.weight", "[0]"],
    ),
    "empty": (lambda m: [], "all", ["no tensor"]),
    "empty scope": (lambda m: m, ["nothing.like.this"], ["selects none"]),
    "packed without its scales": (
        lambda m: [(GATE, torch.ones(320, 64, dtype=torch.uint8)), *changed_items(m, **{GATE: None})],
        "all",
        ["weight_scale", GATE],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_a_clear_error_and_changes_nothing(
    case: str, service: LocalService, pusher: Pusher
) -> None:
    make, scope, words = REFUSED[case]
    before, version = service.bytes(), current_version(service.address)
    with pytest.raises(ManifestError) as caught:
        pusher.push(make(tiny_llama(seed=20)), scope=scope)  # type: ignore[arg-type]
    for word in words:
        assert word in str(caught.value)
    unharmed(service, before, version)


def unharmed(service: LocalService, before: list[dict[str, bytes]], version: int) -> None:
    """Every rank holds the bytes of before, serves, and takes a push again."""
    assert service.bytes() == before
    assert current_version(service.address) == version
    assert {token.version for token in generate(service.address)} == {version}
    assert all(rank.member.state == "idle" for rank in service.ranks)


def test_all_mismatches_of_a_push_come_in_one_message(service: LocalService, pusher: Pusher) -> None:
    items = changed_items(
        tiny_llama(seed=21), **{GATE: torch.ones(2, 2), "model.norm.weight": None, "stranger": torch.ones(1)}
    )
    with pytest.raises(ManifestError) as caught:
        pusher.push(items)
    for name in (GATE, "model.norm.weight", "stranger"):
        assert name in str(caught.value)


def test_a_base_version_that_is_not_current_is_refused(service: LocalService, pusher: Pusher) -> None:
    before, version = service.bytes(), current_version(service.address)
    with pytest.raises(VersionError, match=f"current is {version}"):
        pusher.push(tiny_llama(seed=22), base_version=version + 5)
    unharmed(service, before, version)


class Open:
    """A transaction opened by hand, for what a well-behaved client never sends."""

    def __init__(self, service: LocalService, push_id: str, lease_s: float = 5.0) -> None:
        self.client = ControlClient(service.address)
        self.described = self.client.describe()
        manifest = from_manifest_proto(self.described.manifest)
        self.begun = self.client.begin(
            push_id=push_id,
            base_version=0,
            fingerprint=manifest.fingerprint,
            tensors=[spec for spec in manifest.tensors if spec.name == "model.norm.weight"],
            pushed_by="a test",
            logical_bytes=256,
            lease_s=lease_s,
        )
        self.opening = pb.StageOpen(transaction=self.begun.transaction, epoch=self.described.epoch)

    def stage(self, *messages: bytes) -> list[pb.StageReply]:
        """Send raw messages to the first rank; raises its error."""
        with connect(self.described.ranks[0].address) as channel:
            call = channel.stream_stream(STAGE, response_deserializer=pb.StageReply.FromString)
            opening = pb.StageRequest(open=self.opening).SerializeToString()
            return list(call(iter([opening, *messages]), timeout=30))

    def __enter__(self) -> Open:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.abort(self.begun.transaction, "the test is over")
        self.client.close()


def chunk(offset: int, data: bytes, tensor: int = 0) -> bytes:
    lengths = np.array([len(data)], np.uint32)
    return encode_chunk(1, np.array([tensor], np.uint32), np.array([offset], np.uint64), lengths, [memoryview(data)])


def flipped(message: bytes) -> bytes:
    return message[:-1] + bytes([message[-1] ^ 1])


BAD_CHUNKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a corrupted payload": (lambda: flipped(chunk(0, bytes(256))), "checksum"),
    "past the end of its tensor": (lambda: chunk(200, bytes(100)), "model.norm.weight"),
    "a tensor that is not pushed": (lambda: chunk(0, bytes(8), tensor=7), "tensor"),
    "no protobuf": (lambda: b"\xff\xff\xff\xff", ""),
    "truncated": (lambda: chunk(0, bytes(256))[:-10], ""),
    "above the size limit": (
        lambda: pb.StageRequest(chunk=pb.Chunk(sequence=1, payload=bytes(20 << 20))).SerializeToString(),
        "larger than max",
    ),
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
def test_a_bad_chunk_is_refused_and_changes_nothing(case: str, service: LocalService) -> None:
    make, word = BAD_CHUNKS[case]
    before, version = service.bytes(), current_version(service.address)
    with Open(service, push_id=f"bad chunk {case}") as opened, pytest.raises(grpc.RpcError) as caught:
        opened.stage(make())
    assert caught.value.code() in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.RESOURCE_EXHAUSTED)  # type: ignore[attr-defined]
    assert word in caught.value.details()  # type: ignore[attr-defined]
    unharmed(service, before, version)


def test_chunks_may_come_twice_and_an_incomplete_push_is_refused(service: LocalService) -> None:
    before, version = service.bytes(), current_version(service.address)
    with Open(service, push_id="twice") as opened:
        replies = opened.stage(chunk(0, bytes(100)), chunk(0, bytes(100)), chunk(150, bytes(10)))
        assert [reply.staged_bytes for reply in replies] == [0, 100, 100, 110]
        with pytest.raises(TransferError, match=r"model\.norm\.weight"):
            opened.client.prepare(opened.begun.transaction, np.zeros((1, 2), np.uint64), 210)
    unharmed(service, before, version)


def test_a_push_whose_digest_is_not_that_of_its_bytes_is_refused(service: LocalService) -> None:
    before, version = service.bytes(), current_version(service.address)
    with Open(service, push_id="digest") as opened:
        transaction = opened.begun.transaction
        for rank in opened.described.ranks:
            with connect(rank.address) as channel:
                stream = StageStream(
                    channel, target=rank.address, transaction=transaction, epoch=1, trainer_rank=0, retry_s=1
                )
                numbers = np.zeros(1, np.uint32), np.zeros(1, np.uint64), np.array([256], np.uint32)
                stream.send(Packet(1, *numbers, [memoryview(bytes(256))]))
                stream.finish()
        with pytest.raises(DigestError, match=r"model\.norm\.weight"):
            opened.client.prepare(transaction, np.ones((1, 2), np.uint64), 256)
    unharmed(service, before, version)


def test_tensors_are_said_once_and_again_to_whoever_does_not_know_them(
    service: LocalService, pusher: Pusher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes of a model with experts are megabytes; a push of the same tensors brings a hash of them."""
    said: list[int] = []
    of = Specs.of

    def heard(self: Specs, request: pb.BeginRequest) -> Any:
        said.append(len(request.tensors) if request.tensors or request.tensors_hash else -1)
        return of(self, request)

    monkeypatch.setattr(Specs, "of", heard)
    first = pusher.push(tiny_llama(seed=51)).version
    with pytest.raises(ManifestError):  # as a lease is renewed, of a push that is over: it names none
        pusher._control.begin(push_id="nobody's", tensors=())
    pusher.push(tiny_llama(seed=52))
    with Open(service, push_id="others"):  # of one tensor: the last ones are others now
        pass
    assert pusher.push(tiny_llama(seed=53)).version == first + 2
    numbers = [each for each in said if each >= 0]  # less the renewals, which name none
    assert numbers == [0, numbers[1], 0, 0, 1, 0, numbers[1]] and numbers[1] > 30


def test_the_service_checks_a_manifest_by_itself(service: LocalService) -> None:
    client = ControlClient(service.address)
    manifest = from_manifest_proto(client.describe().manifest)
    wrong = [spec for spec in manifest.tensors if spec.name == GATE]
    fields = {"base_version": 0, "fingerprint": manifest.fingerprint, "pushed_by": "", "logical_bytes": 1, "lease_s": 1}
    with pytest.raises(ManifestError, match="weight_scale"):
        client.begin(push_id="cut parameter", tensors=wrong, **fields)
    with pytest.raises(ManifestError, match="no tensor"):
        client.begin(push_id="nothing", tensors=[], **fields)
    client.close()


def test_a_second_push_is_refused_with_who_holds_the_first_and_since_when(
    service: LocalService, pusher: Pusher
) -> None:
    before, version = service.bytes(), current_version(service.address)
    with Open(service, push_id="first"), pytest.raises(BusyError, match="a test is open since"):
        pusher.push(tiny_llama(seed=23))
    unharmed(service, before, version)


def test_a_trainer_that_went_silent_is_aborted_when_its_lease_lapses(service: LocalService, pusher: Pusher) -> None:
    before, version = service.bytes(), current_version(service.address)
    with Open(service, push_id="silent", lease_s=0.5) as opened:
        opened.stage(chunk(0, bytes(100)))
        deadline = time.monotonic() + 10
        while service.ranks[0].member.state != "idle" and time.monotonic() < deadline:
            time.sleep(0.05)
    unharmed(service, before, version)
    assert pusher.push(tiny_llama(seed=24)).version == version + 1


@pytest.mark.parametrize("point", ["open", "stage", "prepare", "install", "installed"])
@pytest.mark.parametrize("replica", [0, 1])
def test_a_rank_that_fails_before_the_decision_leaves_every_rank_as_it_was(
    point: str, replica: int, service: LocalService, pusher: Pusher
) -> None:
    before, version = service.bytes(), current_version(service.address)
    addresses = service.addresses()
    service.ranks[replica].faults.arm(point, "raise")
    with pytest.raises(WeightUpdateError, match="planned failure"):
        pusher.push(tiny_llama(seed=25))
    unharmed(service, before, version)
    assert service.addresses() == addresses
    assert pusher.push(tiny_llama(seed=26)).version == version + 1


def test_a_rank_that_fails_between_install_and_decision_leaves_every_rank_as_it_was(service: LocalService) -> None:
    before, version = service.bytes(), current_version(service.address)
    pusher = Pusher(service.address)
    decide = pusher._control.decide

    def install_then_decide(transaction: int, **options: bool) -> pb.DecideReply:
        pusher._control.install(transaction)
        assert service.bytes() != before  # installed everywhere, undo held
        service.ranks[1].faults.arm("confirm", "raise")
        return decide(transaction, **options)

    pusher._control.decide = install_then_decide  # type: ignore[method-assign]
    with pytest.raises(MemberError, match="planned failure"):
        pusher.push(tiny_llama(seed=27))
    pusher.close()
    unharmed(service, before, version)


# ---------------------------------------------------------------- what is visible


def test_tokens_name_the_version_that_made_them_while_a_generation_runs_across_a_commit(
    service: LocalService, pusher: Pusher
) -> None:
    version = current_version(service.address)
    tokens: list[pb.Token] = []

    def read() -> None:
        tokens.extend(generate(service.address, num_tokens=300))

    reader = threading.Thread(target=read)
    reader.start()
    while not any(rank.engine.num_sequences for rank in service.ranks):
        time.sleep(0.005)
    time.sleep(0.2)
    report = pusher.push(tiny_llama(seed=28))
    reader.join()
    for sequence in (0, 1):
        versions = [token.version for token in tokens if token.sequence == sequence]
        assert len(versions) == 300
        assert versions == sorted(versions)
        assert set(versions) == {version, report.version}
        last = next(token for token in tokens if token.sequence == sequence and token.last)
        assert list(last.kv_versions) == [version, report.version]


def test_verify_finds_a_flipped_byte_and_names_its_tensor(service: LocalService, pusher: Pusher) -> None:
    pusher.push(tiny_llama(seed=29))
    with connect(service.address) as channel:
        stub = pb_grpc.ControlStub(channel)
        assert stub.Verify(pb.VerifyRequest()).ok
        parameter = service.models[1].get_parameter("model.layers.1.self_attn.o_proj.weight")
        parameter.view(-1)[1234] ^= 1
        reply = stub.Verify(pb.VerifyRequest())
        assert list(reply.mismatches) == ["replica 1: model.layers.1.self_attn.o_proj.weight"]
        parameter.view(-1)[1234] ^= 1
        assert stub.Verify(pb.VerifyRequest()).ok


def test_an_operators_pause_outlives_a_commit_and_generates_nothing(service: LocalService, pusher: Pusher) -> None:
    with connect(service.address) as channel:
        stub = pb_grpc.ControlStub(channel)
        stub.Pause(pb.PauseRequest(reason="a test"))
        report = pusher.push(tiny_llama(seed=30))
        with pytest.raises(grpc.RpcError, match="paused by an operator"):
            generate(service.address)
        stub.Resume(pb.ResumeRequest())
        assert {token.version for token in generate(service.address)} == {report.version}


def test_versions_are_listed_with_their_digests_and_events_are_watched(service: LocalService, pusher: Pusher) -> None:
    with connect(service.address) as channel:
        stub = pb_grpc.ControlStub(channel)
        events = stub.Watch(pb.WatchRequest())
        seen: list[str] = []
        reader = threading.Thread(target=lambda: seen.extend(_until_decided(events)))
        reader.start()
        time.sleep(0.3)
        report = pusher.push(tiny_llama(seed=31))
        reader.join(10)
        assert seen == ["push", "begin", "prepare", "decide"]
        last = stub.Versions(pb.VersionsRequest()).versions[-1]
        assert (last.version, last.digest) == (report.version, report.digest)


def _until_decided(events: Iterator[pb.Event]) -> Iterator[str]:
    for event in events:
        yield event.kind
        if event.kind == "decide":
            return


def test_health_and_reflection_answer_on_the_coordinator_and_on_every_rank(service: LocalService) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    for address, name in ((service.address, "Control"), (service.ranks[0].address, "Data")):
        with connect(address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert check.status == health_pb2.HealthCheckResponse.SERVING
            assert f"transfuse.v1.{name}" in ProtoReflectionDescriptorDatabase(channel).get_services()
