"""Pushes of what changed, of pipelines, of parameters kept in FP32, and of tensors named and packed otherwise."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from service.workers import Serving
from tests.local import cold, local_service
from tests.test_diffusion_service import components, latents, request
from tests.test_names import PACKED, packed
from tests.tiny import save, tiny_llama
from tests.tiny_dit import write_tiny_pipeline
from weight_update.client import Pusher

TABLE = "transformer.scale_shift_table"


def nudge(models: Iterable[nn.Module], seed: int) -> None:
    """Change a few weights of every parameter by a little."""
    generator = torch.Generator().manual_seed(seed)
    for model in models:
        for parameter in model.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < 0.004
            parameter.data.copy_(torch.where(chosen, parameter.data * 1.0625, parameter.data))


def written(folder: Path, family: str, trained: dict[str, Any]) -> Path:
    """A pipeline folder with these transformers."""
    write_tiny_pipeline(folder, family, seed=0)
    for name, model in trained.items():
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("family", "format", "offload"),
    [
        ("flux", "nvfp4", "none"),
        ("qwen_image", "int8_dynamic", "none"),
        ("wan", "fp8", "none"),
        ("wan", "nvfp4", "component"),
    ],
)
def test_changes_pushed_into_a_pipeline_denoise_as_a_cold_load_of_them(
    family: str, format: str, offload: str, tmp_path: Path
) -> None:
    trained, asked_for = components(family, 10), request(family, 1)
    serving = Serving(max_tokens=512, offload=offload)
    folder = write_tiny_pipeline(tmp_path / "old", family, seed=0)
    with (
        local_service(folder, tmp_path, ("auto",), format, serving) as service,
        closing(Pusher(service.address)) as pusher,
    ):
        addresses, full = service.addresses(), pusher.push(trained)
        before = latents(service.address, asked_for)
        for seed in (1, 2):
            nudge(trained.values(), seed)
            report = pusher.push(trained, step=seed)
            assert (report.mode, report.digest_verified) == ("delta", True)
            assert report.wire_bytes < full.wire_bytes / 4
        assert service.addresses() == addresses
        hot, stored = latents(service.address, asked_for), service.bytes()
    (tmp_path / "cold").mkdir()
    with local_service(written(tmp_path / "new", family, trained), tmp_path / "cold", ("auto",), format) as loaded:
        assert stored == loaded.bytes()
        assert hot == latents(loaded.address, asked_for)
    assert hot != before


def test_the_last_bit_of_a_parameter_kept_in_fp32_is_a_change_of_one_byte(tmp_path: Path) -> None:
    trained = components("wan", 10)
    with (
        local_service(write_tiny_pipeline(tmp_path / "old", "wan", seed=0), tmp_path) as service,
        closing(Pusher(service.address)) as pusher,
    ):
        pusher.push(trained)
        table: torch.Tensor = trained["transformer"].scale_shift_table  # type: ignore[assignment]
        table.data.view(torch.int32)[0, 1, 5] ^= 1
        assert table.dtype == torch.float32
        before = service.bytes()[0]
        report = pusher.push(trained)
        assert (report.mode, report.changed_tensors) == ("delta", 1)
        after = service.bytes()[0]
        assert {name for name in after if after[name] != before[name]} == {TABLE}
        assert after[TABLE] == table.detach().numpy().tobytes()
        assert sum(a != b for a, b in zip(after[TABLE], before[TABLE], strict=True)) == 1


def test_one_component_of_a_mapping_may_be_pushed_as_changes(tmp_path: Path) -> None:
    trained = components("wan", 10)
    with (
        local_service(write_tiny_pipeline(tmp_path / "old", "wan", seed=0), tmp_path) as service,
        closing(Pusher(service.address)) as pusher,
    ):
        pusher.push(trained)
        before = service.bytes()[0]
        nudge(trained.values(), 1)
        assert pusher.push(trained, scope="transformer_2.*").mode == "delta"
        after = service.bytes()[0]
        assert {name.partition(".")[0] for name in after if after[name] != before[name]} == {"transformer_2"}
        assert pusher.push(trained).mode == "delta"
        _, expected = cold(written(tmp_path / "new", "wan", trained), "trtllm")
        assert service.bytes() == [expected.storage_bytes()]


def test_changes_of_packed_and_renamed_tensors_land_as_a_cold_load(tmp_path: Path) -> None:
    """The map splits one tensor into several parameters, and makes one parameter of several tensors."""
    layouts, model = ("trtllm", "plain"), tiny_llama(seed=1)
    with local_service(save(tiny_llama(seed=0), tmp_path / "old"), tmp_path, layouts) as service:
        pusher = Pusher(service.address, names=PACKED, keep="cpu")
        full = pusher.push(packed(model).items())
        once = [spec for spec in service.shell.manifest.tensors if not spec.name.endswith(".input_scale")]
        assert full.kept_bytes == sum(spec.num_bytes for spec in once)
        for seed, scope in ((1, "all"), (2, ["blocks.1.*"]), (3, "all")):
            nudge([model], seed)
            report = pusher.push(packed(model).items(), scope=scope)
            assert (report.mode, report.kept_bytes) == ("delta", full.kept_bytes)
            if scope == "all":
                expected = [cold(save(model, tmp_path / f"{seed}"), layout)[1].storage_bytes() for layout in layouts]
                assert service.bytes() == expected
        # All of one of the tensors that make up a parameter: dense rows beside rows that did not change.
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.chunk(2)[0].mul_(-1)  # type: ignore[union-attr]
        assert pusher.push(packed(model).items()).mode == "delta"
        expected = [cold(save(model, tmp_path / "half"), layout)[1].storage_bytes() for layout in layouts]
        assert service.bytes() == expected
        # Packed otherwise: what is held of the old parts is not taken for the new ones.
        pusher.close()
        plain = Pusher(service.address)
        plain._confirmed = plain._retained._confirmed = pusher._confirmed
        nudge([model], 4)
        assert plain.push(model).mode == "delta"
        expected = [cold(save(model, tmp_path / "plain"), layout)[1].storage_bytes() for layout in layouts]
        assert service.bytes() == expected
        plain.close()


def test_more_changes_than_a_delta_is_good_for_go_whole_part_by_part(tmp_path: Path) -> None:
    model, other = tiny_llama(seed=1), tiny_llama(seed=2)
    with local_service(save(tiny_llama(seed=0), tmp_path / "old"), tmp_path) as service:
        pusher = Pusher(service.address, names=PACKED)
        pusher.push(packed(model).items())
        assert pusher.push(packed(other).items()).mode == "full"
        nudge([other], 1)
        assert pusher.push(packed(other).items()).mode == "delta"
        _, expected = cold(save(other, tmp_path / "other"), "trtllm")
        assert service.bytes() == [expected.storage_bytes()]
        pusher.close()


@pytest.mark.parametrize("format", ["nvfp4", "bf16"])
def test_a_pipeline_starts_again_from_what_was_stored_of_a_push_of_changes(format: str, tmp_path: Path) -> None:
    trained, store = components("wan", 10), tmp_path / "store"
    folder = write_tiny_pipeline(tmp_path / "old", "wan", seed=0)
    with (
        local_service(folder, tmp_path, format=format, store_dir=store) as service,
        closing(Pusher(service.address)) as pusher,
    ):
        pusher.push(trained, durable=True)
        nudge(trained.values(), 1)
        report = pusher.push(trained, durable=True)
        assert report.mode == "delta"
        expected, answer = service.bytes(), latents(service.address, request("wan", 1))
    (tmp_path / "again").mkdir()
    with local_service(folder, tmp_path / "again", format=format, store_dir=store) as service:
        assert service.shell.protocol.version == report.version
        assert service.bytes() == expected
        assert latents(service.address, request("wan", 1)) == answer
