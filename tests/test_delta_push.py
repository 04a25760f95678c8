"""Pushes of what changed, over real gRPC: what lands, when it goes full and says why, and pushes in the background."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.local import LocalService, cold, local_service
from tests.test_push import cold_bytes, current_version
from tests.tiny import save, tiny_llama
from weight_update import attempt as attempts
from weight_update.client import Pusher
from weight_update.delta import Patch, is_relative, is_sparse, pack
from weight_update.errors import BusyError, TransferError, VersionError
from weight_update.transport import ControlClient

LAYOUTS = ("trtllm", "cutlass")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    checkpoint = save(tiny_llama(seed=0), tmp_path_factory.mktemp("model"))
    with local_service(checkpoint, tmp_path_factory.mktemp("state"), LAYOUTS) as running:
        yield running


@pytest.fixture
def pusher(service: LocalService) -> Iterator[Pusher]:
    each = Pusher(service.address, lease_s=5.0, retry_s=5.0)
    yield each
    each.close()


def nudge(model: nn.Module, seed: int, share: float = 0.002) -> None:
    """Change a few weights of every parameter by a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < share
            parameter.copy_(torch.where(chosen, parameter * 1.0625, parameter))


def decoded(service: LocalService) -> list[torch.Tensor]:
    return [buffer.clone() for model in service.models for name, buffer in model.named_buffers() if "decoded" in name]


# ---------------------------------------------------------------- what lands


def test_pushes_of_what_changed_leave_every_byte_as_a_cold_load_would(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=1)
    addresses = service.addresses()
    full = pusher.push(model)
    assert (full.mode, full.reason) == ("full", "this trainer has pushed nothing yet")
    assert full.kept_bytes == sum(
        spec.num_bytes for spec in service.shell.manifest.tensors if not spec.name.endswith(".input_scale")
    )
    for seed, scope in ((1, "all"), (2, ["model.layers.0.*"]), (3, "all"), (4, "all")):
        nudge(model, seed, share=0.0 if seed == 4 else 0.002)
        report = pusher.push(model, scope=scope, step=100 + seed)
        assert report.mode == "delta" and report.digest_verified and report.step == 100 + seed
        assert report.wire_bytes < full.wire_bytes / 20
        if scope != "all":  # the rest goes along with the next push
            continue
        assert service.bytes() == cold_bytes(model, tmp_path / f"{seed}")
        assert service.addresses() == addresses


def test_what_forward_reads_is_what_a_cold_load_decodes(service: LocalService, pusher: Pusher, tmp_path: Path) -> None:
    model = tiny_llama(seed=2)
    pusher.push(model)
    nudge(model, 7)
    assert pusher.push(model).mode == "delta"
    for served, layout in zip(service.models, LAYOUTS, strict=True):
        fresh, _ = cold(save(model, tmp_path / layout), layout)
        for module in fresh.modules():
            if hasattr(module, "decode_"):
                module.decode_()
        expected = dict(fresh.named_buffers())
        for name, buffer in served.named_buffers():
            assert torch.equal(buffer.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_fp32_masters_under_an_optimizer_push_deltas(service: LocalService, pusher: Pusher, tmp_path: Path) -> None:
    model = tiny_llama(seed=3, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    pusher.push(model)
    for step in range(2):
        model(torch.randint(0, 250, (2, 16))).logits.square().mean().backward()
        optimizer.step()
        report = pusher.push(model, step=step)
        assert report.mode == "delta"
        assert service.bytes() == cold_bytes(copy.deepcopy(model).to(torch.bfloat16), tmp_path / f"{step}")


def test_a_changed_global_scale_is_no_error_and_its_tensors_come_whole(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=4)
    pusher.push(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 9.0  # type: ignore[union-attr, index]
    report = pusher.push(model)
    assert (report.mode, report.changed_tensors) == ("delta", 3)
    assert service.bytes() == cold_bytes(model, tmp_path)


@pytest.mark.parametrize("mode", ["auto", "delta"])
def test_unrelated_weights_cost_no_more_than_a_full_push(service: LocalService, mode: Any, tmp_path: Path) -> None:
    pusher = Pusher(service.address)
    full = pusher.push(tiny_llama(seed=5))
    pusher.mode = mode
    model = tiny_llama(seed=6)
    report = pusher.push(model)
    assert report.mode == {"auto": "full", "delta": "delta"}[mode]
    assert report.wire_bytes <= 1.02 * full.wire_bytes
    assert service.bytes() == cold_bytes(model, tmp_path)
    nudge(model, 1)
    assert pusher.push(model).mode == "delta"
    assert service.bytes() == cold_bytes(model, tmp_path / "after")
    pusher.close()


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("share", [0.001, 0.03, 0.2, 0.6, 1.0])
def test_what_changed_of_a_tensor_is_said_in_the_fewest_bytes(share: float, alike: bool) -> None:
    """alike: codes move to the next one. An actor has no memory for more positions than one byte in 32."""
    rng = np.random.default_rng(0)
    old = rng.integers(0, 256, 1 << 20).astype(np.uint8)
    at = np.sort(rng.choice(old.size, int(share * old.size), replace=False))
    differences = np.zeros_like(old)
    differences[at] = rng.choice([1, 255], at.size) if alike else rng.integers(1, 256, at.size)
    new = old + differences
    sizes = {
        "sparse": packed_bytes(differences[at], positions=at),
        "relative": packed_bytes(differences, relative=True),
        "dense": packed_bytes(new),
    }
    if is_sparse(at.size, old.size):
        assert sizes["sparse"] == min(sizes.values())
    else:
        chosen = "relative" if is_relative(differences, new) else "dense"
        assert sizes[chosen] == min(sizes["relative"], sizes["dense"])


def packed_bytes(values: np.ndarray, positions: np.ndarray | None = None, relative: bool = False) -> int:
    patch = Patch(tensor=0, first=0, stop=1 << 20, positions=positions, values=values, relative=relative)
    return pack([patch])[1].num_bytes


# ---------------------------------------------------------------- when a delta cannot be


def test_another_trainer_s_push_makes_the_next_one_full_and_it_says_why(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=7)
    mine = pusher.push(model).version
    other = Pusher(service.address, mode="full")
    theirs = other.push(tiny_llama(seed=8)).version
    assert other.kept_bytes == 0
    other.close()
    nudge(model, 1)
    report = pusher.push(model)
    assert report.mode == "full"
    assert report.reason.startswith(f"the service holds version {theirs} of digest ")
    assert report.reason.endswith(f"the last confirmed push of this trainer was version {mine}")
    assert service.bytes() == cold_bytes(model, tmp_path)
    strict = Pusher(service.address, mode="delta")
    with pytest.raises(VersionError, match="this trainer has pushed nothing yet; push once with mode='auto'"):
        strict.push(model)
    strict.close()


def test_a_commit_between_describe_and_begin_makes_the_push_full(
    service: LocalService, pusher: Pusher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(seed=9)
    pusher.push(model)
    nudge(model, 1)
    begin = attempts.Attempt.begin

    def overtaken(self: attempts.Attempt) -> Any:
        monkeypatch.undo()
        other = Pusher(service.address, mode="full")
        other.push(tiny_llama(seed=10))
        other.close()
        return begin(self)

    monkeypatch.setattr(attempts.Attempt, "begin", overtaken)
    report = pusher.push(model)
    assert report.mode == "full" and report.reason.startswith("the delta was refused: ")
    assert service.bytes() == cold_bytes(model, tmp_path)


def test_bytes_that_rotted_under_a_delta_are_found_and_a_full_push_heals_them(
    service: LocalService, pusher: Pusher, tmp_path: Path
) -> None:
    model = tiny_llama(seed=11)
    pusher.push(model)
    nudge(model, 1)
    storage = service.ranks[0].receiver._storages["model.embed_tokens.weight"].detach()
    storage.view(-1).view(torch.uint8)[:] ^= 1
    report = pusher.push(model)
    assert report.mode == "full" and "not what the trainer meant to send" in report.reason
    assert service.bytes() == cold_bytes(model, tmp_path)


def test_a_failed_push_changes_neither_the_service_nor_what_the_next_one_builds_on(
    service: LocalService, pusher: Pusher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(seed=12)
    pusher.push(model)
    before, version = service.bytes(), current_version(service.address)
    nudge(model, 1)

    def cut(*_: object) -> None:
        raise TransferError("cut")

    monkeypatch.setattr(attempts, "send_packed", cut)
    with pytest.raises(TransferError, match="cut"):
        pusher.push(model)
    assert service.bytes() == before and current_version(service.address) == version
    monkeypatch.undo()
    nudge(model, 2)
    assert pusher.push(model).mode == "delta"
    assert service.bytes() == cold_bytes(model, tmp_path)


def test_an_answer_to_a_commit_that_got_lost_is_asked_for_by_id(
    service: LocalService, pusher: Pusher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(seed=13)
    pusher.push(model)
    decide = ControlClient.decide

    def deaf(self: ControlClient, *args: Any, **options: Any) -> Any:
        decide(self, *args, **options)
        raise TransferError("the connection is gone")

    monkeypatch.setattr(ControlClient, "decide", deaf)
    nudge(model, 1)
    assert pusher.push(model).version == current_version(service.address)
    monkeypatch.undo()
    nudge(model, 2)
    assert pusher.push(model).mode == "delta"
    assert service.bytes() == cold_bytes(model, tmp_path)


def test_a_push_whose_outcome_stays_unknown_is_settled_by_the_next_one(
    service: LocalService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pusher = Pusher(service.address, retry_s=0.0)
    model = tiny_llama(seed=14)
    pusher.push(model)
    decide = ControlClient.decide

    def gone(*_: object, **__: object) -> Any:
        raise TransferError("the connection is gone")

    def deaf(self: ControlClient, *args: Any, **options: Any) -> Any:
        decide(self, *args, **options)
        monkeypatch.setattr(ControlClient, "status", gone)
        raise TransferError("the connection is gone")

    monkeypatch.setattr(ControlClient, "decide", deaf)
    nudge(model, 1)
    with pytest.raises(TransferError, match="its outcome is not known"):
        pusher.push(model)
    monkeypatch.undo()
    nudge(model, 2)
    assert pusher.push(model).mode == "delta"
    assert service.bytes() == cold_bytes(model, tmp_path)
    pusher.close()


# ---------------------------------------------------------------- in the background


class Gate:
    """Holds the streams of pushes back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        for name in ("send_packed", "send_whole"):
            monkeypatch.setattr(attempts, name, self._held(getattr(attempts, name)))

    def _held(self, send: Any) -> Any:
        def held(*args: Any) -> None:
            self.reached.set()
            assert self.opened.wait(60)
            send(*args)

        return held


@pytest.mark.parametrize("mode", ["auto", "full"])
def test_the_optimizer_may_step_during_a_transfer_and_no_torn_version_is_ever_committed(
    service: LocalService, mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pusher = Pusher(service.address, mode=mode)
    model = tiny_llama(seed=15)
    pusher.push(model)
    nudge(model, 1)
    expected = cold_bytes(model, tmp_path / "pushed")
    gate = Gate(monkeypatch)
    handle = pusher.push_async(model, step=9)
    assert gate.reached.wait(30) and not handle.done()
    nudge(model, 2, share=0.5)  # the optimizer steps
    gate.opened.set()
    report = handle.result(60)
    assert report.step == 9 and report.mode == {"auto": "delta", "full": "full"}[mode]
    assert service.bytes() == expected
    handle = pusher.push_async(model)
    nudge(model, 3, share=0.9)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # type: ignore[union-attr]
    handle.result(60)
    assert handle.result(0).version == current_version(service.address)
    pusher.close()


def test_a_push_that_meets_a_running_one_refuses_waits_or_replaces_it(
    service: LocalService, pusher: Pusher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(seed=16)
    version = pusher.push(model).version
    nudge(model, 1)
    gate = Gate(monkeypatch)
    running = pusher.push_async(model)
    assert gate.reached.wait(30)
    with pytest.raises(BusyError, match="a push of this trainer is under way"):
        pusher.push(model)
    stranger = Pusher(service.address)
    with pytest.raises(BusyError, match="wait for it, or abort it"):
        stranger.push(model)
    threading.Timer(0.3, gate.opened.set).start()
    nudge(model, 2)
    second = pusher.push_async(model, on_busy="wait").result(60)
    assert running.result(0).version == version + 1 and second.version == version + 2
    gate.opened.clear()
    gate.reached.clear()
    nudge(model, 3)
    dropped = pusher.push_async(model)
    assert gate.reached.wait(30)
    nudge(model, 4)
    threading.Timer(0.3, gate.opened.set).start()
    third = pusher.push(model, on_busy="replace")
    with pytest.raises(TransferError, match="cancelled"):
        dropped.result(0)
    assert third.version == version + 3 and third.mode == "delta"
    assert service.bytes() == cold_bytes(model, tmp_path)
    stranger.close()


def test_a_stranger_s_open_push_is_waited_for_or_replaced(
    service: LocalService, pusher: Pusher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(seed=17)
    gate = Gate(monkeypatch)
    stranger = Pusher(service.address)
    open_ = stranger.push_async(tiny_llama(seed=18))
    assert gate.reached.wait(30)
    monkeypatch.undo()
    threading.Timer(0.3, gate.opened.set).start()
    waited = pusher.push(model, on_busy="wait")
    assert waited.version == open_.result(0).version + 1
    gate = Gate(monkeypatch)
    open_ = stranger.push_async(tiny_llama(seed=19))
    assert gate.reached.wait(30)
    monkeypatch.undo()
    nudge(model, 1)
    pusher.push(model, on_busy="replace")
    gate.opened.set()
    with pytest.raises(Exception, match=r"transaction|aborted|idle"):
        open_.result(30)
    assert service.bytes() == cold_bytes(model, tmp_path)
    stranger.close()


# ---------------------------------------------------------------- the trainer's own state


def test_a_resumed_run_knows_what_it_pushed_and_starts_with_a_full_push(service: LocalService, pusher: Pusher) -> None:
    model = tiny_llama(seed=20)
    report = pusher.push(model, step=3)
    state = pusher.state_dict()
    assert state == {"run_id": pusher.run_id, "version": report.version, "digest": report.digest}
    resumed = Pusher(service.address)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    again = resumed.push(model, step=4)
    assert again.mode == "full" and f"was resumed after version {report.version}" in again.reason
    versions = ControlClient(service.address)
    info = versions.versions()[-1]
    assert info.push_id.startswith(pusher.run_id) and info.step == 4
    versions.close()
    resumed.close()


def test_the_kept_bytes_are_those_that_were_confirmed(service: LocalService, pusher: Pusher) -> None:
    """What the trainer compares with, tensor by tensor, is what the ranks hold."""
    model = tiny_llama(seed=21)
    pusher.push(model)
    nudge(model, 1)
    pusher.push(model)
    base = pusher._confirmed.base
    assert base is not None
    receiver = service.ranks[0].receiver
    digests = receiver.digests()
    for name, (held,) in base.held.items():
        assert held.digest == tuple(int(lane) for lane in digests[receiver.manifest.index[name]]), name
    assert np.array_equal(receiver._known, digests)
