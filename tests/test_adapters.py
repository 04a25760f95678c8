"""LoRA: adapters are merged into what is sent, as PEFT would merge them, and the trainer keeps both apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.local import LocalService, local_service
from tests.test_push import cold_bytes
from tests.tiny import save, tiny_llama
from tests.tiny_dit import tiny_transformer, write_tiny_pipeline
from weight_update import encoder
from weight_update.client import Pusher
from weight_update.errors import ManifestError

peft = pytest.importorskip("peft")
# peft asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LAYOUTS = ("trtllm",)
NUM_LAYERS = 2
TARGETS = ["q_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    folder = save(tiny_llama(seed=0, num_layers=NUM_LAYERS), tmp_path_factory.mktemp("model"))
    with local_service(folder, tmp_path_factory.mktemp("state"), LAYOUTS) as running:
        yield running


def lora(model: nn.Module, **options: Any) -> Any:
    """A PEFT model over it whose adapters do something."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})
    wrapped = peft.get_peft_model(model, config)
    randomize(wrapped, seed=1)
    return wrapped


def randomize(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_lands_is_what_peft_s_own_merge_would_have_saved_and_the_next_push_is_a_delta(
    service: LocalService, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = lora(tiny_llama(seed=2, num_layers=NUM_LAYERS, dtype=dtype))
    with closing(Pusher(service.address)) as pusher:
        for seed, mode in ((1, "full"), (3, "delta")):
            randomize(model, seed)
            before = held(model)
            report = pusher.push(model)
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
            merged = copy.deepcopy(model).merge_and_unload().to(torch.bfloat16)
            assert service.bytes() == cold_bytes(merged, tmp_path / f"{seed}", LAYOUTS)
            assert (report.mode, report.merged_adapters) == (mode, NUM_LAYERS * len(TARGETS))
            assert report.digest_verified
        assert report.changed_tensors < 5 * NUM_LAYERS * len(TARGETS)


def test_only_one_merged_weight_is_held_at_a_time(service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
    model, alive, most = lora(tiny_llama(seed=4, num_layers=NUM_LAYERS)), [0], [0]
    real: Callable[..., Tensor] = encoder.merged

    def counted(rows: Tensor, updates: Any) -> Tensor:
        out = real(rows, updates)
        if out is not rows:
            import weakref

            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(out.untyped_storage(), lambda: alive.__setitem__(0, alive[0] - 1))
        return out

    monkeypatch.setattr(encoder, "merged", counted)
    with closing(Pusher(service.address, mode="full")) as pusher:
        pusher.push(model)
    assert 1 <= most[0] <= 2  # the last one lives until the next is made


def test_a_transformer_of_wan_with_adapters_of_its_own(tmp_path: Path) -> None:
    folder = write_tiny_pipeline(tmp_path / "wan", "wan", seed=0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "ffn.net.2"])
    trained: Any = tiny_transformer("wan", 20)
    trained.add_adapter(config)  # diffusers' own way: no wrapper around the model
    randomize(trained, seed=5)
    plain, merged = tiny_transformer("wan", 21), copy.deepcopy(trained)
    merged.fuse_lora()
    merged.unload_lora()
    with local_service(folder, tmp_path, ("auto",), "nvfp4") as service, closing(Pusher(service.address)) as pusher:
        before = held(trained)
        report = pusher.push({"transformer": trained, "transformer_2": plain})
        assert report.merged_adapters == 5  # two attentions and one feed-forward
        assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
        landed = service.bytes()
        again = pusher.push({"transformer": merged, "transformer_2": plain})
        assert (again.digest, again.wire_bytes < report.wire_bytes) == (report.digest, True)
        assert landed == service.bytes()


def test_adapters_that_would_not_be_merged_are_an_error(service: LocalService) -> None:
    model = lora(tiny_llama(seed=6, num_layers=NUM_LAYERS))
    with closing(Pusher(service.address)) as pusher:
        before = service.bytes()
        with model.disable_adapter(), pytest.raises(ManifestError, match="none of them would be merged: they are disa"):
            pusher.push(model)
        with pytest.raises(ManifestError, match="outside the scope"):
            pusher.push(model, scope=["model.norm.weight"])
        model.merge_adapter()
        with pytest.raises(ManifestError, match="merged already"):
            pusher.push(model)
        assert service.bytes() == before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"use_dora": True}, r"q_proj: default: DoRA, or another variant"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens: adapters of Embedding are no LoRA of a matrix"),
    ],
)
def test_adapters_that_cannot_be_merged_exactly_are_refused(
    service: LocalService, options: dict[str, Any], match: str
) -> None:
    with closing(Pusher(service.address)) as pusher, pytest.raises(ManifestError, match=match):
        pusher.push(lora(tiny_llama(seed=7, tied=False, num_layers=NUM_LAYERS), **options))


def test_a_scope_of_what_is_trainable_takes_the_adapted_weights(service: LocalService) -> None:
    model = lora(tiny_llama(seed=8, num_layers=NUM_LAYERS))
    with closing(Pusher(service.address)) as pusher:
        report = pusher.push(model, scope="trainable")
    assert report.merged_adapters == NUM_LAYERS * len(TARGETS)
    assert report.carried_over == len(list(tiny_llama(0, num_layers=NUM_LAYERS).parameters())) - NUM_LAYERS * 4
