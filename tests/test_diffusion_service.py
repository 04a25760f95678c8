"""Pipelines in a running service: pushed weights against cold-loaded ones, and samples that run across a commit."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
import torch
from safetensors.torch import load, save
from torch import nn

from launch.denoise import denoise as command
from launch.serve import check_names, configured
from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from service.fleet import Fleet, FleetConfig
from service.workers import Serving, check_serving
from tests import processes
from tests.local import local_service
from tests.test_denoising import asked, conditioning
from tests.tiny_dit import COMPONENTS, CONFIGS, tiny_transformer, write_tiny_pipeline
from weight_update.client import Pusher
from weight_update.errors import ManifestError, PlanError
from weight_update.transport import connect

# A layout of each that moves bytes: FP8 and INT8 lie transposed, square weights too.
LAYOUTS = {"nvfp4": "trtllm", "fp8": "cutlass", "int8_dynamic": "npu"}
STEPS = 3


def components(family: str, seed: int) -> dict[str, nn.Module]:
    """What a trainer pushes: the transformers of write_tiny_pipeline(..., seed)."""
    return {name: tiny_transformer(family, seed + i) for i, name in enumerate(COMPONENTS[family])}


def request(family: str, *seeds: int, **options: Any) -> pb.DenoiseRequest:
    blob = save(conditioning(family))
    return pb.DenoiseRequest(**{"seeds": seeds, "num_steps": STEPS, "conditioning": blob, **asked(family), **options})


def denoise(address: str, asked_for: pb.DenoiseRequest) -> list[pb.Denoised]:
    with connect(address) as channel:
        return list(pb_grpc.GenerationStub(channel).Denoise(asked_for, timeout=60))


def latents(address: str, asked_for: pb.DenoiseRequest) -> list[bytes]:
    """Finished latents in the order of the seeds."""
    last = {step.sample: step.latents for step in denoise(address, asked_for) if step.last}
    return [last[sample] for sample in range(len(asked_for.seeds))]


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_pushed_weights_denoise_bit_for_bit_as_a_service_loaded_with_them(
    family: str, format: str, tmp_path: Path
) -> None:
    old, new = (write_tiny_pipeline(tmp_path / str(seed), family, seed=seed) for seed in (0, 10))
    with local_service(old, tmp_path, ("auto",), format) as service, closing(Pusher(service.address)) as pusher:
        addresses = service.addresses()
        before = latents(service.address, request(family, 1, 2))
        report = pusher.push(components(family, 10))
        assert report.digest_verified
        assert service.addresses() == addresses
        hot, stored = latents(service.address, request(family, 1, 2)), service.bytes()
    (tmp_path / "cold").mkdir()
    with local_service(new, tmp_path / "cold", ("auto",), format) as loaded:
        assert stored == loaded.bytes()
        assert hot == latents(loaded.address, request(family, 1, 2))
    assert hot != before
    assert hot[0] != hot[1]


def test_what_a_service_of_transformers_does_not_hold_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    with (
        local_service(write_tiny_pipeline(tmp_path / "flux", "flux", seed=0), tmp_path) as service,
        closing(Pusher(service.address)) as pusher,
    ):
        before, model = service.bytes(), tiny_transformer("flux", 1)
        named = [(f"transformer.{name}", value) for name, value in model.named_parameters()]
        for stray in ("text_encoder.encoder.block.0.layer.0.SelfAttention.q.weight", "vae.decoder.conv_in.weight"):
            with pytest.raises(ManifestError, match=f"{stray}: unknown to the service"):
                pusher.push([*named, (stray, torch.zeros(4, 4))])
        with pytest.raises(ManifestError, match=r'service holds transformer; .*\{"transformer": model\}'):
            pusher.push(model)
        with pytest.raises(ManifestError, match=r"transformer_2\.x_embedder\.weight: unknown to the service"):
            pusher.push({"transformer": model, "transformer_2": model})
        with pytest.raises(ManifestError, match="missing, and the scope is 'all'"):
            pusher.push(named[1:])
        assert service.bytes() == before


# ---------------------------------------------------------------- commits and traffic


def crossing(address: str, pusher: Pusher, num_steps: int) -> tuple[pb.Denoised, int, int]:
    """A sample during which a push begins: its last step, and the versions before and after the push."""
    with connect(address) as channel:
        running = pb_grpc.GenerationStub(channel).Denoise(request("flux", 5, num_steps=num_steps), timeout=120)
        assert next(running).step == 0
        report = pusher.push(components("flux", 20))
        *_, last = running
    return last, report.base_version, report.version


def test_a_sample_crosses_a_commit_between_two_of_its_steps_and_says_which_version_did_each(tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / "flux", "flux", seed=0)
    with local_service(folder, tmp_path) as service, closing(Pusher(service.address)) as pusher:
        last, old, new = crossing(service.address, pusher, 100)
        versions = list(last.versions)
        assert set(versions) == {old, new}
        assert versions == sorted(versions)
        assert (len(versions), last.step, last.last, last.version) == (100, 99, True, new)
        assert last.latents != latents(service.address, request("flux", 5, num_steps=100))[0]


def test_between_samples_a_commit_waits_for_running_ones_and_later_ones_wait_for_it(tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / "flux", "flux", seed=0)
    serving = Serving(commit_between="samples")
    with local_service(folder, tmp_path, serving=serving) as service, closing(Pusher(service.address)) as pusher:
        expected = latents(service.address, request("flux", 5, num_steps=100))[0]
        later: list[pb.Denoised] = []

        def ask_while_draining() -> None:
            while not service.ranks[0].engine.pausing:
                time.sleep(0.002)
            later.extend(denoise(service.address, request("flux", 6, num_steps=2)))

        thread = threading.Thread(target=ask_while_draining)
        thread.start()
        last, old, new = crossing(service.address, pusher, 100)
        thread.join()
        assert set(last.versions) == {old}
        assert last.latents == expected
        assert list(later[-1].versions) == [new, new]


@pytest.mark.parametrize("family", CONFIGS)
def test_latents_do_not_depend_on_the_traffic_around_them_nor_on_the_replica(family: str, tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / family, family, seed=0)
    with local_service(folder, tmp_path, ("plain", "trtllm")) as service:
        alone = [latents(service.address, request(family, seed))[0] for seed in (3, 4)]
        assert alone == [latents(service.address, request(family, seed))[0] for seed in (3, 4)]
        with ThreadPoolExecutor(4) as pool:
            others = [
                pool.submit(latents, service.address, request(family, 3, 9 + i, height=4 + 4 * i, num_steps=5))
                for i in range(3)
            ]
            among = latents(service.address, request(family, 8, 3, 4))
            assert all(call.result() for call in others)
        assert among[1:] == alone
        replicas = {step.replica for step in denoise(service.address, request(family, 1, 2))}
        assert replicas == {0, 1}


def test_a_trajectory_has_the_latents_of_every_step(tmp_path: Path) -> None:
    with local_service(write_tiny_pipeline(tmp_path / "wan", "wan", seed=0), tmp_path) as service:
        steps = denoise(service.address, request("wan", 1, trajectory=True))
        assert [step.step for step in steps] == list(range(STEPS))
        assert len({step.latents for step in steps}) == STEPS
        assert load(steps[0].latents)["latents"].shape == (1, 4, 2, 8, 4)
        assert steps[-1].latents == latents(service.address, request("wan", 1))[0]


def test_the_denoise_command_writes_latents_and_says_their_versions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "prompt.safetensors"
    given.write_bytes(save(conditioning("flux")))
    with local_service(write_tiny_pipeline(tmp_path / "flux", "flux", seed=0), tmp_path) as service:
        options: dict[str, Any] = {"height": 8, "width": 4, "num_steps": STEPS, "guidance": 3.5}
        command(given, **options, seed=[1, 2], out=tmp_path / "out", target=service.address, as_json=True)
        expected = latents(service.address, request("flux", 1, 2))
        with pytest.raises(PlanError, match="not there"):
            command(tmp_path / "none", **options, target=service.address)
    told = sorted((json.loads(line) for line in capsys.readouterr().out.splitlines()), key=lambda each: each["seed"])
    assert [(each["seed"], each["versions"]) for each in told] == [(1, [1] * STEPS), (2, [1] * STEPS)]
    assert [Path(each["file"]).read_bytes() for each in told] == expected


def test_requests_that_cannot_be_done_are_refused_with_all_that_is_wrong_and_serving_goes_on(tmp_path: Path) -> None:
    with local_service(write_tiny_pipeline(tmp_path / "flux", "flux", seed=0), tmp_path) as service:
        good = conditioning("flux")
        cases: list[tuple[dict[str, Any], list[str]]] = [
            ({"seeds": [], "num_steps": 0, "guidance": -1.0}, ["3 problem", "no seeds", "num_steps", "guidance"]),
            ({"seeds": [1 << 32]}, ["seeds: expected 0 to 4294967295, got 4294967296"]),
            ({"seeds": range(33)}, ["too many seeds: expected at most 32, got 33"]),
            ({"height": 3, "num_frames": 2}, ["height: expected a multiple of 2", "num_frames: expected 1 for images"]),
            ({"height": 200, "width": 200}, ["size: 10005 tokens of latents and text, at most 512"]),
            ({"height": 1 << 20}, ["height: expected a multiple of 2 up to 2048"]),
            ({"conditioning": b"no tensors"}, ["not a safetensors file"]),
            ({"conditioning": b""}, ["encoder_hidden_states: missing", "pooled_projections: missing"]),
            ({"conditioning": save({**good, "prompt": torch.zeros(1)})}, ["conditioning prompt: unknown"]),
            ({"conditioning": save({**good, "pooled_projections": torch.zeros(2, 32)})}, ["got [2, 32]"]),
            ({"conditioning": save({**good, "pooled_projections": torch.full((1, 32), torch.nan)})}, ["NaN or Inf"]),
            ({"cfg_scale": 4.0}, ["needs negative_ conditioning"]),
            ({"cfg_scale_2": 1.0}, ["this pipeline has one transformer"]),
        ]
        for changed, texts in cases:
            with pytest.raises(grpc.RpcError) as caught:
                denoise(service.address, request("flux", **{"seeds": [1], **changed}))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            details = caught.value.details()
            assert all(text in details for text in texts), details
        with connect(service.address) as channel, pytest.raises(grpc.RpcError, match="holds a diffusion pipeline"):
            prompt = pb.GenerateRequest(prompts=[pb.Prompt(token_ids=[1])], max_new_tokens=1)
            list(pb_grpc.GenerationStub(channel).Generate(prompt, timeout=60))
        assert latents(service.address, request("flux", 1))


def held(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Where every parameter lies, and how."""
    return {name: (each.data_ptr(), each.shape, each.stride(), each.dtype) for name, each in model.named_parameters()}


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_components_that_take_turns_denoise_the_same_bytes_across_a_push(format: str, tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / "wan", "wan", seed=0)
    found = []
    for offload in ("none", "component"):
        (tmp_path / offload).mkdir()
        with (
            local_service(folder, tmp_path / offload, (LAYOUTS[format],), format, Serving(offload=offload)) as service,
            closing(Pusher(service.address)) as pusher,
        ):
            places = held(service.models[0])
            before = latents(service.address, request("wan", 1, 2))
            pusher.push(components("wan", 30))
            found.append([*before, *latents(service.address, request("wan", 1, 2))])
            assert held(service.models[0]) == places
            decoded = {
                name: any(leaf.endswith("decoded") for leaf, _ in module.named_buffers())
                for name, module in service.models[0].named_children()
            }
    assert found[0] == found[1]
    assert len(set(found[0])) == 4
    assert decoded == {"transformer": False, "transformer_2": True}


# ---------------------------------------------------------------- options of a service


def test_options_that_cannot_be_served_are_refused_before_any_process_starts(tmp_path: Path) -> None:
    folder = str(write_tiny_pipeline(tmp_path / "flux", "flux", seed=0))
    for options, text in (
        ({"offload": "layerwise"}, "it moves the layers' storages at every step"),
        ({"commit_between": "tokens"}, "commit_between 'tokens': expected one of steps, samples"),
    ):
        with pytest.raises(PlanError, match=text), Fleet(FleetConfig(model=folder, **options)):  # type: ignore[arg-type]
            pass
    with pytest.raises(PlanError, match="for the blocks of diffusion pipelines only"):
        check_serving(Serving(compile=True), 0, print)
    with pytest.raises(PlanError, match="--component transformer: expected NAME=PATH"):
        configured(["transformer"], model=folder)
    assert configured(["transformer=a=b"], model=folder).components == {"transformer": "a=b"}
    check_names("transformer=nvfp4,transformer_2=auto", "auto")
    with pytest.raises(PlanError, match="format 'nvfp5'"):
        check_names("transformer=nvfp4,transformer_2=nvfp5", "auto")
    assert not ray.is_initialized()


# ---------------------------------------------------------------- sharded, in processes of their own


# Every family and every format; each cell unsharded is above, and sharded the two do not meet.
SHARDED = [
    ("flux", "nvfp4"),
    ("flux2", "fp8"),
    ("qwen_image", "int8_dynamic"),
    ("wan", "fp8"),
]


def require_one_version(
    address: str, ask: Callable[[str], list[Any]], family: str, format: str, tmp_path: Path
) -> None:
    """What is pushed denoises on every rank as a cold load of it. ask: the ranks, for what a method of theirs returns;
    they hold the pipeline of seed 0."""
    asked_for = request(family, 1, 2, 3)
    addresses, before = ask("addresses"), latents(address, asked_for)
    with closing(Pusher(address)) as pusher:
        report = pusher.push(components(family, 10))
    steps = denoise(address, asked_for)
    assert report.digest_verified
    assert ask("addresses") == addresses
    assert {version for step in steps if step.last for version in step.versions} == {report.version}
    hot = latents(address, asked_for)
    new = write_tiny_pipeline(tmp_path / "10", family, seed=10)
    (tmp_path / "cold").mkdir()
    with local_service(new, tmp_path / "cold", (LAYOUTS[format],), format) as loaded:
        assert hot == latents(loaded.address, asked_for)
    assert hot != before


@pytest.mark.parametrize("offload", ["none", pytest.param("component", marks=pytest.mark.slow)])
def test_a_fleet_pushes_both_transformers_of_a_pipeline_in_one_transaction(offload: str, tmp_path: Path) -> None:
    old = write_tiny_pipeline(tmp_path / "0", "wan", seed=0)
    said: list[str] = []
    config = FleetConfig(
        model=str(old), ranks=2, layout=LAYOUTS["nvfp4"], state_dir=tmp_path, max_tokens=512, offload=offload
    )
    with Fleet(config, lambda what, done, total: said.append(what), said.append) as fleet:

        def ask(method: str) -> list[Any]:
            found: list[Any] = ray.get([getattr(rank, method).remote() for rank in fleet.ranks])
            return found

        require_one_version(fleet.address, ask, "wan", "nvfp4", tmp_path)
    assert "warm-up" in said
    assert any("--offload none disables it" in line for line in said) == (offload == "component")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "format"), SHARDED)
def test_sharded_transformers_of_one_pipeline_are_pushed_in_one_transaction(
    family: str, format: str, tmp_path: Path
) -> None:
    old = write_tiny_pipeline(tmp_path / "0", family, seed=0)
    with processes.fleet(
        old, replicas=1, ranks=2, format=format, layout=LAYOUTS[format], serving=Serving(max_tokens=512)
    ) as fleet:
        require_one_version(
            fleet.address, lambda method: [rank(method) for rank in fleet.ranks], family, format, tmp_path
        )
