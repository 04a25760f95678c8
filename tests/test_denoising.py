"""Denoising on one rank: against diffusers' own pipelines, alone and among others, before and after new weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from quant.modules import decode_all
from quant.pipelines import Pipeline
from service.denoising import Denoiser
from service.lockstep import (
    Command,
    Kind,
    Report,
    pack_command,
    pack_report,
    payload_bytes,
    unpack_command,
    unpack_report,
)
from service.requests import Start
from service.residence import choose_offload
from service.samples import Denoised, SampleStart
from service.work import Request, Running
from tests.cold import encode_all, install
from tests.local import cold
from tests.tiny_dit import COMPONENTS, CONFIGS, tiny_transformer, write_tiny_pipeline
from weight_update.errors import PlanError

FAMILIES = tuple(CONFIGS)
STEPS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pipelines")
    return {family: write_tiny_pipeline(root / family, family, seed=0) for family in FAMILIES}


def plain(family: str, seed: int = 0) -> Pipeline:
    """The transformers of a tiny pipeline as diffusers makes them."""
    return Pipeline({name: tiny_transformer(family, seed + i) for i, name in enumerate(COMPONENTS[family])})


def conditioning(family: str, seed: int = 0) -> dict[str, Tensor]:
    """What a client sends for 5 tokens of text; of the classes that are guided without a guidance input also the
    negative."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    tensors = {"encoder_hidden_states": noise(1, 5, 48)}
    if family == "flux":
        tensors["pooled_projections"] = noise(1, 32)
    if family == "qwen_image":
        tensors["encoder_hidden_states_mask"] = torch.tensor([[1, 1, 1, 0, 0]])
        tensors["negative_encoder_hidden_states_mask"] = torch.ones(1, 4, dtype=torch.int64)
    if family in ("qwen_image", "wan"):
        tensors["negative_encoder_hidden_states"] = noise(1, 4, 48)
    return tensors


def asked(family: str) -> dict[str, Any]:
    """Sizes and guidance of a request: latents of 8 x 4, for Wan 2 frames of them."""
    scales: dict[str, dict[str, float]] = {
        "wan": {"cfg_scale": 4.0, "cfg_scale_2": 3.0},
        "qwen_image": {"cfg_scale": 4.0},
    }
    guided = scales.get(family, {"guidance": 3.5})
    return {"height": 8, "width": 4, "num_frames": 2 if family == "wan" else 1, **guided}


def reference(folder: Path, family: str, seed: int, num_steps: int = STEPS) -> Tensor:
    """What diffusers' pipeline returns as latents."""
    scheduler_class: Any = diffusers.FlowMatchEulerDiscreteScheduler
    scheduler = scheduler_class.from_pretrained(folder, subfolder="scheduler")
    parts: dict[str, Any] = {"scheduler": scheduler, "vae": None, "text_encoder": None, "tokenizer": None}
    given = conditioning(family)
    call: dict[str, Any] = {
        "prompt_embeds": given["encoder_hidden_states"],
        "num_inference_steps": num_steps,
        "height": 64,
        "width": 32,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "return_dict": False,
    }
    model = plain(family)
    parts |= model.components
    if family == "flux":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
        call |= {"pooled_prompt_embeds": given["pooled_projections"], "guidance_scale": 3.5}
    if family == "flux2":
        call |= {"guidance_scale": 3.5}
    if family == "wan":
        parts |= {"boundary_ratio": 0.875}
        call |= {"negative_prompt_embeds": given["negative_encoder_hidden_states"], "num_frames": 5}
        call |= {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    if family == "qwen_image":
        call |= {"negative_prompt_embeds": given["negative_encoder_hidden_states"], "true_cfg_scale": 4.0}
        call |= {"prompt_embeds_mask": given["encoder_hidden_states_mask"]}
        call |= {"negative_prompt_embeds_mask": given["negative_encoder_hidden_states_mask"]}
    pipeline = getattr(
        diffusers,
        {"flux": "FluxPipeline", "flux2": "Flux2Pipeline", "wan": "WanPipeline"}.get(family, "QwenImagePipeline"),
    )(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipeline(**call)[0])


def denoise(denoiser: Denoiser, family: str, *seeds: int, **options: Any) -> dict[int, list[Denoised]]:
    """All steps of one request, by seed."""
    work = denoiser.request(seeds, STEPS, save(conditioning(family)), **{**asked(family), **options})
    request = Request(work=work)
    running = {index: Running(request=request, index=index, rank=0) for index in range(len(seeds))}
    found: dict[int, list[Denoised]] = {seed: [] for seed in seeds}
    starts = [work.share(0, 0, range(len(seeds)))]
    with torch.no_grad():
        while running:
            for entry in denoiser.step(starts, (), denoiser.plan(running.values())):
                running[entry.key].emit(entry, 1)
                found[seeds[entry.key]].append(entry)
                if entry.last:
                    del running[entry.key]
            starts = []
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_is_bit_for_bit_what_the_pipeline_of_diffusers_makes(folders: dict[str, Path], family: str) -> None:
    denoiser = Denoiser(plain(family), folders[family])
    steps = denoise(denoiser, family, 7)[7]
    expected = reference(folders[family], family, 7)
    latents = load(steps[-1].latents)["latents"]
    assert latents.dtype == expected.dtype
    assert torch.equal(latents, expected)
    assert bool(latents.float().std() > 0.1) and bool(latents.isfinite().all())
    assert [(each.step, each.last, bool(each.latents)) for each in steps] == [
        (step, step == STEPS - 1, step == STEPS - 1) for step in range(STEPS)
    ]
    assert denoiser.num_sequences == 0


def test_a_sample_of_a_request_and_of_many_is_the_same_bytes(folders: dict[str, Path]) -> None:
    denoiser = Denoiser(plain("wan"), folders["wan"])
    alone = denoise(denoiser, "wan", 7)[7]
    among = denoise(denoiser, "wan", 6, 7, 8, height=8)[7]
    assert [each.latents for each in among] == [each.latents for each in alone]
    assert denoise(denoiser, "wan", 8)[8][-1].latents != alone[-1].latents


def test_conditioning_that_does_not_fit_its_class_is_refused(folders: dict[str, Path]) -> None:
    good = {family: conditioning(family) for family in FAMILIES}
    long_mask = {**good["qwen_image"], "encoder_hidden_states_mask": torch.ones(1, 6)}
    unpaired = {name: value for name, value in good["wan"].items() if not name.startswith("negative_")}
    cases: list[tuple[str, dict[str, Tensor], dict[str, Any], str]] = [
        ("qwen_image", long_mask, {}, r"tensors of \[5, 6\] tokens; expected one number"),
        ("flux2", good["flux2"], {"cfg_scale": 2.0}, "this class has no classifier-free guidance"),
        ("flux2", {**good["flux2"], "negative_encoder_hidden_states": torch.zeros(1, 5, 48)}, {}, "unknown"),
        ("wan", unpaired, {}, "cfg_scale 4.0: above 1 it needs negative_ conditioning"),
        ("wan", unpaired, {"cfg_scale": 0.0}, "cfg_scale_2 3.0: expected 0 where cfg_scale is not above 1"),
        ("wan", good["wan"], {"guidance": 3.5}, "guidance: this model takes none as input"),
        ("wan", good["wan"], {"height": 2050}, "height: expected a multiple of 2 up to .*, got 2050"),
    ]
    for family, tensors, options, text in cases:
        with pytest.raises(ValueError, match=text):
            denoiser = Denoiser(plain(family), folders[family])
            denoiser.request([1], STEPS, save(tensors), **{**asked(family), **options})


def test_the_second_transformer_takes_over_below_the_boundary(folders: dict[str, Path]) -> None:
    model = plain("wan")
    denoiser = Denoiser(model, folders["wan"])
    called: list[str] = []
    for name, component in model.components.items():
        component.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    denoise(denoiser, "wan", 1)
    # Timesteps 1000, 858, 602 and 9; those below 875 are the second one's. Two forwards a step: it is guided.
    assert called == ["transformer"] * 2 + ["transformer_2"] * 6


def test_a_pipeline_that_cannot_be_denoised_with_says_all_that_is_missing(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PlanError) as caught:
        Denoiser(plain("wan"), tmp_path)
    assert all(text in str(caught.value) for text in ("scheduler_config.json", "boundary_ratio"))
    with pytest.raises(PlanError, match="transformers of Linear: expected one of Flux"):
        linear: Any = nn.Linear(1, 1)
        linear.config = None
        Denoiser(Pipeline({"transformer": linear}), folders["flux"])


# ---------------------------------------------------------------- compiled blocks


def served(folder: Path) -> nn.Module:
    """The quantized transformers of a folder, loaded and decoded."""
    model, _ = cold(folder, "trtllm")
    decode_all(model)
    return model


def test_compiled_blocks_see_new_weights_without_being_compiled_again(folders: dict[str, Path], tmp_path: Path) -> None:
    new = write_tiny_pipeline(tmp_path, "flux", seed=5)

    expected = denoise(Denoiser(served(new), new), "flux", 3)[3][-1].latents
    torch._dynamo.reset()
    counters: Any = torch._dynamo.utils.counters["stats"]
    counters.clear()
    model = served(folders["flux"])
    events: list[str] = []
    model.get_submodule("transformer").register_forward_pre_hook(lambda *_: events.append("forward"))

    @torch._dynamo.register_backend(name="as_traced")
    def as_traced(graph: Any, inputs: Any) -> Any:
        events.append("compile")
        return graph.forward

    denoiser = Denoiser(model, folders["flux"], compile_with="as_traced")
    denoiser.warm_up()
    # What a format needs is there before blocks are compiled, and both before the first request.
    assert events[:3] == ["forward", "forward", "compile"]
    before = denoise(denoiser, "flux", 3)[3][-1].latents
    graphs = counters["unique_graphs"]
    named = [(f"transformer.{name}", value) for name, value in tiny_transformer("flux", 5).named_parameters()]
    install(model, encode_all(model, dict(named)))
    denoiser.refresh()
    assert denoise(denoiser, "flux", 3)[3][-1].latents == expected != before
    assert counters["unique_graphs"] == graphs > 0
    torch._dynamo.reset()


# ---------------------------------------------------------------- offload, and what ranks say to each other


def test_an_offload_mode_is_taken_switched_off_with_the_reason_or_refused() -> None:
    said: list[str] = []
    assert choose_offload("none", 2, said.append) == "none"
    assert said == []
    assert choose_offload("component", 2, said.append) == "component"
    assert choose_offload("component", 1, said.append) == "none"
    assert "slows denoising; --offload none disables it" in said[0]
    assert "switched off, this model has one component" in said[1]
    with pytest.raises(PlanError, match="addresses that never move"):
        choose_offload("layerwise", 2, said.append)
    with pytest.raises(PlanError, match="no such mode"):
        choose_offload("disk", 2, said.append)


def test_commands_carry_starts_of_both_kinds_with_any_bytes() -> None:
    tokens = Start(
        rank=1, keys=(4, 6), prompts=((1, 2), (3,)), seeds=(8, 9), max_new_tokens=5, temperature=0.5, ignore_eos=True
    )
    samples = SampleStart(
        rank=0,
        keys=(7,),
        seeds=((1 << 32) - 1,),
        num_steps=3,
        num_frames=1,
        height=4,
        width=2,
        guidance=0.1,
        cfg_scale=0.0,
        cfg_scale_2=0.0,
        conditioning=b'\0{"bytes": [0, 1]}\xff',
        trajectory=True,
    )
    command = Command(
        kind=Kind.STEP, step=9, plan=3, starts=(tokens, samples, samples), cancels=(1, 2), reason="caf\u00e9"
    )
    header, payload = pack_command(command)
    assert unpack_command(header, payload.numpy().tobytes()[: int(header[-1])]) == command
    idle = Command(kind=Kind.IDLE, step=9)
    assert unpack_command(pack_command(idle)[0], b"") == idle


def test_reports_carry_the_latents_of_steps_behind_their_table() -> None:
    steps = (Denoised(3, 0, False, b""), Denoised(5, 9, True, b"\0\1\2"), Denoised(4, 2, True, b"\xff"))
    for report in (Report(step=2, entries=steps), Report(step=2), Report(step=2, error="it broke")):
        table, latents = pack_report(report, 32)
        assert payload_bytes(table) == len(latents)
        assert unpack_report(table, latents) == report
