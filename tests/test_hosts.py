"""Engines of others as members: their parameters byte for byte as their own processing leaves them; their pauses."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quant.models import build_model, parameters_of
from quant.parameters import ParameterRow
from service.control_server import ControlServer
from service.coordinator import CoordinatorShell
from service.hosts import plugins, sglang
from service.hosts.boundary import Foreign
from service.hosts.plan import plan_holdings
from service.rank import RankServer
from tests.goldens import DIRECTORY
from tests.local import local_service
from tests.rig import chunk_of
from tests.test_push import current_version
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.errors import MemberError, PlanError, WeightUpdateError
from weight_update.receiver import Receiver

QKV = ("q_proj", "k_proj", "v_proj")


# ---------------------------------------------------------------- bytes


def put(root: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Add a module under a dotted name."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root._modules[name]  # type: ignore[assignment]
    root.add_module(last, module)
    return module


def stored(case: str) -> dict[str, Tensor]:
    prefix = f"{case}."
    tensors = load_file(DIRECTORY / "engines.safetensors")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def processed(found: dict[str, Tensor], engine: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model whose one fused linear has the parameters that an engine made, all zero, and what they should be."""
    wanted = {key.removeprefix(f"{engine}."): value for key, value in found.items() if key.startswith(f"{engine}.")}
    model = nn.Module()
    layer = put(model, "layers.0.self_attn.qkv_proj", nn.Module())
    layer.output_sizes = [len(found[f"in.{i}.weight"]) for i in range(3)]  # type: ignore[assignment]
    for name, value in wanted.items():
        zero = torch.zeros_like(value.view(torch.uint8) if value.ndim else value).view(value.dtype)
        layer.register_parameter(name, nn.Parameter(zero, requires_grad=False))
    return model, wanted


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("case", ["even", "ragged", "scales"])
def test_a_fused_nvfp4_linear_holds_what_the_engine_s_own_processing_leaves(case: str, engine: str) -> None:
    found = stored(case)
    model, wanted = processed(found, engine)
    rows = [
        ParameterRow(
            name=f"layers.0.self_attn.{part}.weight",
            shape=(len(found[f"in.{i}.weight"]), found[f"in.{i}.weight"].shape[1] * 2),
            format="nvfp4",
            group="qkv",
        )
        for i, part in enumerate(QKV)
    ]
    receiver = Receiver.of(plan_holdings(model, rows, f"{engine} cutlass"))
    addresses = receiver.storage_addresses()
    fill(receiver, found)
    held = dict(model.get_submodule("layers.0.self_attn.qkv_proj").named_parameters())
    for name, value in wanted.items():
        assert held[name].shape == value.shape
        assert bytes_of(held[name]) == bytes_of(value), name
    assert receiver.storage_addresses() == addresses


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def fill(receiver: Receiver, found: dict[str, Tensor]) -> None:
    """One push of the golden checkpoint."""
    tensors = receiver.manifest.tensors
    receiver.begin(1, 1, 0, range(len(tensors)))
    for at, spec in enumerate(tensors):
        module, _, leaf = spec.name.rpartition(".")
        value = found[f"in.{QKV.index(module.rpartition('.')[2])}.{leaf}"]
        receiver.stage(chunk_of([(at, 0, bytes_of(value))]))
    assert np.array_equal(receiver.prepare(), receiver.install())
    receiver.publish()


def test_a_model_that_does_not_fit_the_checkpoint_is_refused_with_everything_that_is_wrong(tmp_path: Path) -> None:
    folder = save(tiny_llama(0), tmp_path)
    rows = parameters_of(build_model(folder, "bf16", "plain", device="meta"))
    model = fused(tiny_llama(0))
    put(model, "stray", nn.Linear(4, 4, bias=False))
    del model.model.norm  # type: ignore[union-attr]
    with pytest.raises(PlanError) as refused:
        plan_holdings(model, rows, "vllm cutlass")
    assert "model.norm.weight: the engine's model has no module model.norm" in str(refused.value)
    assert "stray.weight: no checkpoint tensor fills it" in str(refused.value)
    with pytest.raises(PlanError, match=r"row-parallel layers split columns"):
        sglang.load(model, sglang.order(world=2, control_url="", checkpoint=str(folder)))
    with pytest.raises(PlanError, match=r"w: expected transfuse\.order"):
        sglang.load(model, [("w", torch.zeros(1))])


def quantized(method: str, **fields: str) -> nn.Module:
    """A model of one linear with this class of SGLang's for its quant_method."""
    model = nn.Module()
    linear = put(model, "layers.0.mlp.down_proj", nn.Linear(4, 4, bias=False))
    linear.quant_method = type(method, (), fields)()  # type: ignore[assignment]
    return model


def published(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The module in which SGLang keeps its backend, as its worker has it."""
    module = SimpleNamespace(get_fp4_gemm_runner_backend=lambda: SimpleNamespace(value=backend))
    monkeypatch.setitem(sys.modules, sglang.FP4_UTILS, module)


@pytest.mark.parametrize("backend", ["flashinfer_cutlass", "flashinfer_cudnn", "flashinfer_cutedsl"])
def test_the_scheme_of_sglang_is_what_its_own_module_says(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    published(monkeypatch, backend)
    assert sglang.scheme_of(quantized("ModelOptFp4LinearMethod", quant_mode="w4a4")) == "sglang cutlass"
    assert sglang.scheme_of(fused(tiny_llama(0))) == "sglang cutlass"  # no NVFP4 in it: any


@pytest.mark.parametrize(
    ("method", "fields", "backend", "message"),
    [
        ("ModelOptFp4LinearMethod", {}, "flashinfer_trtllm", "flashinfer_trtllm: its layout has no scheme; start"),
        ("ModelOptFp4LinearMethod", {}, "marlin", "marlin: its layout has no scheme"),
        ("ModelOptFp4LinearMethod", {}, "auto", "auto: its layout has no scheme"),
        ("ModelOptFp4LinearMethod", {}, None, "does not say which FP4 backend"),
        ("ModelOptFp4LinearMethod", {"quant_mode": "w4a16"}, "flashinfer_cutlass", "in w4a16, it has no scheme"),
        ("ModelOptFp8LinearMethod", {}, "flashinfer_cutlass", "down_proj: ModelOptFp8LinearMethod, FP8 has no scheme"),
        ("ModelOptNvFp4FusedMoEMethod", {}, "flashinfer_cutlass", "FusedMoEMethod, experts have no scheme"),
        ("GPTQMarlinLinearMethod", {}, "flashinfer_cutlass", "GPTQMarlinLinearMethod, it has no scheme"),
    ],
)
def test_what_sglang_lays_out_otherwise_is_refused_by_name(
    method: str, fields: dict[str, str], backend: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend is not None:
        published(monkeypatch, backend)
    with pytest.raises(PlanError, match=message):
        sglang.scheme_of(quantized(method, **fields))


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("layers.0.mlp.experts.3.up_proj.weight", "bf16", "experts have no scheme in this engine"),
        ("layers.0.mlp.down_proj.weight", "fp8", "fp8 has no scheme in this engine; known: nvfp4"),
    ],
)
def test_experts_and_other_formats_are_refused_when_the_model_is_planned(name: str, format: str, message: str) -> None:
    rows = [ParameterRow(name=name, shape=(4, 4), format=format)]
    with pytest.raises(PlanError, match=message):
        plan_holdings(quantized("UnquantizedLinearMethod"), rows, "vllm cutlass")


# ---------------------------------------------------------------- a running engine


def fused(source: nn.Module) -> nn.Module:
    """A Llama as both engines keep it: q, k, v and gate, up are rows of one matrix; embeddings of whole 64 rows."""
    model, state, groups = nn.Module(), source.state_dict(), {"self_attn": ("qkv_proj", QKV)}
    groups["mlp"] = ("gate_up_proj", ("gate_proj", "up_proj"))
    of_part = {part: (name, parts) for name, parts in groups.values() for part in parts}
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        parent, _, own = path.rpartition(".")
        if own in of_part:
            whole, parts = of_part[own]
            if own != parts[0]:
                continue
            values = [state[f"{parent}.{part}.{leaf}"] for part in parts]
            layer = put(model, f"{parent}.{whole}", nn.Module())
            layer.output_sizes = [len(each) for each in values]  # type: ignore[assignment]
            value = torch.cat(values)
        elif name == "lm_head.weight":
            continue  # tied
        else:
            layer = put(model, path, nn.Module())
        layer.register_parameter(leaf, nn.Parameter(value.clone(), requires_grad=False))
    return model


def holds(model: nn.Module, seed: int) -> bool:
    """Whether every parameter of an engine's model is that of this Llama."""
    wanted = dict(fused(tiny_llama(seed)).named_parameters())
    return all(torch.equal(wanted[name], value) for name, value in model.named_parameters())


class ControlPlane(ThreadingHTTPServer):
    """An engine's HTTP server, as far as a member calls it: it says yes, or no, and remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refused: set[str] = set()
        plane = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                plane.calls.append((self.path, body))
                self.send_response(500 if self.path in plane.refused else 200)
                self.end_headers()
                self.wfile.write(b'{"success": true}')

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def plane() -> Iterator[ControlPlane]:
    server = ControlPlane()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def join(folder: Path, plane: ControlPlane, model: nn.Module, **fields: Any) -> RankServer:
    sglang.load(model, sglang.order(checkpoint=str(folder), control_url=plane.url, **fields))
    return sglang._members[id(model)]


@contextmanager
def coordinator(folder: Path, state_dir: Path, rank: RankServer) -> Iterator[str]:
    """A service of engines alone."""
    shell = CoordinatorShell(addresses=[rank.address], state_file=state_dir / "s.sqlite", source=str(folder))
    server = ControlServer(shell, listen="127.0.0.1:0", tokenizer_dir=folder, keeper=None)
    try:
        yield server.address
    finally:
        server.stop()
        shell.stop()


def await_serving(rank: RankServer, timeout_s: float = 30.0) -> None:
    """Until it holds a version, and the right to serve it."""
    deadline_s = time.monotonic() + timeout_s
    while not (rank.member.version and rank.member.serves(time.monotonic()) and rank.engine.state == "serving"):
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_running_engine_takes_pushes_in_place_and_is_paused_for_the_install_alone(
    tmp_path: Path, plane: ControlPlane
) -> None:
    folder = save(tiny_llama(0), tmp_path / "model")
    model = fused(tiny_llama(0))
    rank = join(folder, plane, model)
    held = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    try:
        with coordinator(folder, tmp_path, rank) as address, closing(Pusher(address)) as pusher:
            await_serving(rank)  # without a version that is its own to serve it stood still
            for seed, mode in ((1, "full"), (2, "full"), (2, "delta")):
                plane.calls.clear()
                report = pusher.push(tiny_llama(seed))
                assert (report.digest_verified, report.mode) == (True, mode)
                paths = [path for path, _ in plane.calls]
                assert paths == ["/pause_generation", "/flush_cache", "/update_weight_version", "/continue_generation"]
                assert plane.calls[2][1]["new_version"] == str(report.version)
                assert holds(model, seed)
                assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == held
            version = current_version(address)
            plane.refused.add("/pause_generation")
            with pytest.raises(WeightUpdateError, match="sglang did not pause"):
                pusher.push(tiny_llama(3))
            assert current_version(address) == version
            assert holds(model, 2)
            plane.refused.clear()
            assert pusher.push(tiny_llama(3)).version > version
        with pytest.raises(PlanError, match="has joined already"):
            join(folder, plane, model)
    finally:
        sglang.leave(model)


def test_an_engine_joins_a_running_service_of_our_own_actors_and_is_filled_by_one(
    tmp_path: Path, plane: ControlPlane
) -> None:
    folder = save(tiny_llama(0), tmp_path / "model")
    with local_service(folder, tmp_path, ("plain",), "bf16") as service, closing(Pusher(service.address)) as pusher:
        pusher.push(tiny_llama(4))
        model = fused(tiny_llama(5))
        rank = join(folder, plane, model, coordinator=service.address, replica=1)
        try:
            await_serving(rank)
            assert holds(model, 4)
            assert len(pusher.push(tiny_llama(6)).replicas) == 2
            assert holds(model, 6)
        finally:
            sglang.leave(model)


def test_a_boundary_that_is_refused_can_be_asked_for_again() -> None:
    answers = [RuntimeError("busy"), None]

    def pause() -> None:
        if (answer := answers.pop(0)) is not None:
            raise answer

    boundary = Foreign(SimpleNamespace(name="x", pause=pause, renew=lambda version: None, resume=lambda: None))
    boundary.request_pause()
    with pytest.raises(MemberError, match="x did not pause: busy"):
        while not boundary.wait_paused(0.05):
            pass
    boundary.request_pause()
    assert boundary.wait_paused(5) and boundary.state == "paused"
    boundary.resume(3)
    assert boundary.wait_resumed(3, 1) and boundary.state == "serving"
    boundary.stop()


# ---------------------------------------------------------------- vLLM's own registry


@pytest.mark.slow
def test_vllm_s_own_factory_makes_an_engine_that_takes_pushes(tmp_path: Path, plane: ControlPlane) -> None:
    """With vLLM's own classes, where it is installed; its wheel is too large for CI."""
    factory = pytest.importorskip(
        "vllm.distributed.weight_transfer.factory", reason="vllm is not installed: hundreds of MB, see docs/engines.md"
    ).WeightTransferEngineFactory
    plugins.register_vllm()
    plugins.register_vllm()  # vLLM may load plugins again
    folder, model = save(tiny_llama(0), tmp_path / "model"), fused(tiny_llama(0))
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1), model_config=SimpleNamespace(model=str(folder))
    )
    made = factory.create_engine(SimpleNamespace(backend="transfuse"), config, torch.device("cpu"), model)
    made.init_transfer_engine(made.parse_init_info({"control_url": plane.url}))
    try:
        with coordinator(folder, tmp_path, made._server) as address, closing(Pusher(address)) as pusher:
            await_serving(made._server)
            plane.calls.clear()
            report = pusher.push(tiny_llama(1))
            assert holds(model, 1)
        assert plane.calls[:4] == [
            ("/pause?mode=keep&clear_cache=false", {}),
            ("/reset_prefix_cache", {}),
            ("/update_weight_version", {"new_version": str(report.version)}),
            ("/resume", {}),
        ]
        with pytest.raises(RuntimeError, match="come through a Transfuse service"):
            made.start_weight_update()
        with pytest.raises(ValueError, match="Invalid init_info"):
            made.parse_init_info({"nothing": 1})
    finally:
        made.shutdown()
