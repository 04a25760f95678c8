"""Comparing outputs: metrics against numpy, limits that hold and break, and the command on models, pipelines and a
live service."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor

from launch import similarity
from launch.compare import compare as command
from launch.compare_report import PLOTS
from launch.comparison import LIMITS, MEASURED, TENSORS, Comparison, compare, judge
from launch.records import Record, load, save
from quant.checkpoint import open_checkpoint
from tests.local import LocalService, local_service
from tests.test_architecture import import_without
from tests.test_cli import byte_tokenizer
from tests.test_frames import tiny_vae
from tests.tiny import save as save_model
from tests.tiny import tiny_llama
from tests.tiny_dit import write_tiny_pipeline
from weight_update.client import Pusher
from weight_update.errors import PlanError, VersionError

F64 = NDArray[np.float64]
N, V = 37, 97  # more rows than are taken at a time, and no multiple of them


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numpy_logprobs(logits: Tensor) -> F64:
    values = logits.double().numpy()
    shifted = values - values.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def numpy_kl(p: F64, q: F64) -> F64:
    return np.asarray(sum(np.exp(p[:, i]) * (p[:, i] - q[:, i]) for i in range(p.shape[1])))


# ---------------------------------------------------------------- metrics


def test_kl_top1_and_perplexity_equal_numpy() -> None:
    a, b = 3 * drawn(0, N, V), 3 * drawn(1, N, V)
    tokens = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    p, q = numpy_logprobs(a), numpy_logprobs(b)
    np.testing.assert_allclose(similarity.token_kl(a, b).numpy(), numpy_kl(p, q), rtol=1e-12)
    assert similarity.same_top1(a, b).tolist() == [
        int(x.argmax()) == int(y.argmax()) for x, y in zip(p, q, strict=True)
    ]
    lost = similarity.surprisal(a, tokens)
    np.testing.assert_allclose(lost.numpy(), [-p[i, t] for i, t in enumerate(tokens.tolist())], rtol=1e-12)
    assert similarity.perplexity(lost) == pytest.approx(math.exp(-sum(p[i, t] for i, t in enumerate(tokens)) / N))


def test_equal_inputs_are_exactly_equal_wherever_they_lie_in_memory() -> None:
    logits = 5 * drawn(0, N, V)
    logits[3, 7] = -math.inf
    latents = drawn(1, 4, 3, 5)
    # One element further: another alignment, where a vectorized sum could round differently.
    elsewhere = {
        each.shape: torch.cat([torch.zeros(1), each.flatten()])[1:].view(each.shape) for each in (logits, latents)
    }
    other = elsewhere[logits.shape]
    assert similarity.token_kl(logits, other).tolist() == [0.0] * N
    assert similarity.same_top1(logits, other).all()
    top, ids = logits.log_softmax(-1).max(-1)
    assert similarity.least_kl(ids, top, ids.clone(), top.clone()).tolist() == [0.0] * N
    same = elsewhere[latents.shape]
    assert similarity.cosine(latents, same) == 1.0
    assert similarity.cosine(torch.zeros(3), torch.zeros(3)) == 1.0
    assert [error(latents, same) for error in (similarity.mae, similarity.rmse, similarity.max_abs)] == [0.0, 0.0, 0.0]
    assert similarity.psnr(latents, same, 1.0) == math.inf


def test_errors_of_latents_equal_numpy() -> None:
    a, b = drawn(0, 4, 3, 5), drawn(0, 4, 3, 5) + 0.1 * drawn(1, 4, 3, 5)
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    assert similarity.cosine(a, b) == pytest.approx(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert similarity.cosine(a, -a) == -1.0 and similarity.cosine(a, torch.zeros_like(a)) == 0.0
    assert similarity.mae(a, b) == pytest.approx(np.abs(x - y).mean(), rel=1e-12)
    assert similarity.rmse(a, b) == pytest.approx(np.sqrt(((x - y) ** 2).mean()), rel=1e-12)
    assert similarity.max_abs(a, b) == np.abs(x - y).max()
    assert similarity.psnr(a, b, 2.5) == pytest.approx(10 * np.log10(2.5**2 / ((x - y) ** 2).mean()), rel=1e-12)


def test_what_is_known_of_likeliest_tokens_bounds_the_divergence_from_below() -> None:
    for scale in (0.5, 3.0, 20.0):
        a, b = scale * drawn(0, 400, 5), scale * drawn(1, 400, 5)
        p, q = numpy_logprobs(a), numpy_logprobs(b)
        tops = [(torch.from_numpy(x.argmax(1)), torch.from_numpy(x.max(1))) for x in (p, q)]
        bound = similarity.least_kl(*tops[0], *tops[1]).numpy()
        assert (bound <= numpy_kl(p, q) + 1e-5).all() and (bound > 0).any()
    # Of two tokens the likeliest says all, and the bound is the divergence itself.
    p, q = numpy_logprobs(drawn(2, 400, 2)), numpy_logprobs(drawn(3, 400, 2))
    tops = [(torch.from_numpy(x.argmax(1)), torch.from_numpy(x.max(1))) for x in (p, q)]
    np.testing.assert_allclose(similarity.least_kl(*tops[0], *tops[1]).numpy(), numpy_kl(p, q), atol=1e-12)


def test_certainty_counts_as_far_as_fp32_can_tell_it() -> None:
    ids, other = torch.tensor([1]), torch.tensor([2])
    certain, fair = torch.tensor([0.0]), torch.tensor([0.5]).log()
    assert similarity.least_kl(ids, certain, other, certain).item() == pytest.approx(23 * math.log(2), rel=1e-5)
    assert similarity.least_kl(ids, certain, ids, fair).item() == pytest.approx(math.log(2), rel=1e-5)
    assert similarity.least_kl(ids, certain, ids, certain).item() == 0.0


# ---------------------------------------------------------------- limits


def text_record(logits: Tensor, label: str = "a", **asked: Any) -> Record:
    top, ids = logits.log_softmax(-1).max(-1)
    tensors = {"targets": torch.arange(len(logits)), "logits": logits, "top_ids": ids, "top_logprobs": top}
    return Record(kind="text", label=label, asked={"text": "x"} | asked, tensors=tensors)


def latents_record(latents: Tensor) -> Record:
    return Record(kind="latents", label="d", asked={"seed": 0}, tensors={"latents": latents})


def without_logits(record: Record) -> Record:
    tensors = {name: record.tensors[name] for name in TENSORS["tops"]}
    return Record(kind=record.kind, label=record.label, asked=record.asked, tensors=tensors)


def some(how: str) -> Comparison:
    a, b = drawn(0, N, V), drawn(1, N, V)
    if how == "latents":
        a, b = drawn(0, 3, 2, 4, 6, 5, 5), drawn(1, 3, 2, 4, 6, 5, 5)
        return compare(latents_record(a), latents_record(b))
    reference, candidate = text_record(a), text_record(b)
    return compare(reference, candidate if how == "logits" else without_logits(candidate))


@pytest.mark.parametrize("how", TENSORS)
def test_every_limit_breaks_just_beyond_what_is_measured_and_says_where(how: str) -> None:
    found = some(how)
    assert found.how == how and tuple(found.measures) == MEASURED[how]
    checked = 0
    for option, limit in LIMITS.items():
        for name in set(limit.measures) & set(found.measures):
            value = found.measures[name].value
            beyond = math.nextafter(value, math.inf if limit.least else -math.inf)
            kept, broken = (judge(found, {option: allowed})[0] for allowed in (value, beyond))
            assert (kept.ok, broken.ok) == (True, False)
            assert (broken.option, broken.measure, broken.measured, broken.allowed) == (option, name, value, beyond)
            assert any(unit in broken.where for unit in ("token", "probe", "step", "frame"))
            checked += 1
    assert checked == {"logits": 3, "tops": 2, "latents": 2}[how]


def test_the_worst_place_is_the_one_that_is_named() -> None:
    logits = drawn(0, N, V)
    other = logits.clone()
    other[20] = -other[20]
    found = compare(text_record(logits), text_record(other))
    assert "at token 21" in found.measures["kl"].where and "at token 21" in found.measures["top1"].where
    assert [row["token"] for row in found.rows if row["kl"] > 0] == [21]
    latents = drawn(0, 3, 2, 4, 6, 5, 5)  # steps, samples, channels, frames, height, width
    wrong = latents.clone()
    wrong[2, 1, :, 4] += 1
    found = compare(latents_record(latents), latents_record(wrong))
    assert {name: each.where for name, each in found.measures.items()} == {
        "cosine": "least, at step 2 of sample 1",
        **dict.fromkeys(("mae", "rmse", "max_abs"), "largest, at step 2 of sample 1"),
        "psnr": "least, at frame 4 of sample 1",
    }
    sample = latents[2, 1]
    assert found.measures["psnr"].value == pytest.approx(
        20 * math.log10((sample.max() - sample.min()).item()), rel=1e-6
    )
    assert [row["psnr"] for row in found.rows if "psnr" in row].count(math.inf) == 11


@pytest.mark.parametrize("how", TENSORS)
def test_nan_in_a_candidate_breaks_every_limit(how: str) -> None:
    reference = {"latents": latents_record(drawn(0, 2, 1, 3, 4))}.get(how) or text_record(drawn(0, N, V))
    tensors = {name: tensor.clone() for name, tensor in reference.tensors.items()}
    for name in ("logits", "latents", "top_logprobs"):
        if name in tensors:
            tensors[name].view(-1)[-5] = math.nan
    broken = Record(kind=reference.kind, label="nan", asked=reference.asked, tensors=tensors)
    found = compare(reference, without_logits(broken) if how == "tops" else broken)
    easy = {option: -math.inf if limit.least else math.inf for option, limit in LIMITS.items()}
    given = {option: easy[option] for option in easy if set(LIMITS[option].measures) & set(found.measures)}
    outcomes = {verdict.option: verdict.ok for verdict in judge(found, given)}
    # A row of NaN has no likeliest token; where only likeliest tokens are known, these may still be the same.
    assert outcomes == {option: option == "min_top1" for option in given}


def test_steps_and_frames_are_counted_in_whole_numbers() -> None:
    for name in ("cosine", "psnr"):
        figure = PLOTS["latents"][name](some("latents"))
        figure.draw_without_rendering()
        ticks = figure.axes[0].get_xticks()
        assert len(ticks) > 0 and all(tick == round(tick) for tick in ticks), (name, ticks)


def test_a_limit_on_what_is_not_measured_is_refused() -> None:
    with pytest.raises(PlanError, match=r"2 problems[\s\S]*--max-ppl-ratio[\s\S]*--min-psnr needs psnr"):
        judge(some("tops"), {"max_ppl_ratio": 2.0, "min_psnr": 1.0, "max_kl": 1.0})


def test_records_of_different_questions_are_not_compared() -> None:
    logits = drawn(0, N, V)
    with pytest.raises(PlanError, match=r"2 problems[\s\S]*text: the candidate was asked 'y'[\s\S]*logits: shape"):
        compare(text_record(logits), text_record(logits[:, :-1], text="y"))
    with pytest.raises(PlanError, match="other tokens"):
        other = text_record(logits)
        compare(
            text_record(logits),
            Record(
                kind="text",
                label="b",
                asked=other.asked,
                tensors={**other.tensors, "targets": torch.ones(N, dtype=torch.int64).cumsum(0)},
            ),
        )
    with pytest.raises(PlanError, match="same models"):
        compare(text_record(logits), latents_record(logits))


def test_a_saved_record_is_read_back_whole_and_other_files_are_refused(tmp_path: Path) -> None:
    record = text_record(drawn(0, N, V), label="x", max_tokens=7)
    save(record, tmp_path / "deep" / "a.safetensors")
    back = load(tmp_path / "deep" / "a.safetensors")
    assert (back.kind, back.label, back.asked, back.versions) == ("text", "x", {"text": "x", "max_tokens": 7}, ())
    assert back.tensors.keys() == record.tensors.keys()
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in record.tensors.items())
    weights = save_model(tiny_llama(0, num_layers=1), tmp_path / "model") / "model.safetensors"
    with pytest.raises(PlanError, match="not written by this release's 'transfuse compare --save'"):
        load(weights)


# ---------------------------------------------------------------- the command

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command as the console does: exit code and stdout."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)

    def call(*args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as exit:
            app(list(map(str, args)))
        return int(exit.value.code or 0), capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.set_num_threads(1)
    folders = [save_model(tiny_llama(seed), tmp_path_factory.mktemp("llama")) for seed in (0, 1)]
    for folder in folders:
        byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folders


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    torch.set_num_threads(1)
    made = {
        family: [write_tiny_pipeline(tmp_path_factory.mktemp(family), family, seed) for seed in (0, 10)]
        for family in ("flux", "wan")
    }
    tiny_vae("wan").save_pretrained(made["wan"][0] / "vae")
    return made


@pytest.fixture(scope="module")
def service(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    with local_service(models[0], tmp_path_factory.mktemp("state")) as running:
        yield running


def test_the_command_starts_without_loading_torch() -> None:
    assert (
        import_without(("torch", "numpy", "grpc", "matplotlib", "transformers", "safetensors"), ["launch.compare"])
        == ""
    )


def test_a_dry_run_says_what_would_be_compared_and_builds_nothing(run: Run) -> None:
    code, out = run("nowhere", "127.0.0.1:9", "--format", "nvfp4", "--max-kl", 0.5, "--dry-run", "--json")
    told = json.loads(out)
    assert code == 0 and told["limits"] == {"max_kl": 0.5}
    assert [side["kind"] for side in told["sides"]] == ["checkpoint", "service"]


@pytest.mark.parametrize(
    "args",
    [
        ("a",),
        ("a", "--save", "f", "--max-kl", "1"),
        ("a", "b", "--size", "64"),
        ("a", "b", "--component", "x"),
        ("a", "b", "--cfg-scale", "x"),
        ("a", "b", "--cfg-scale", "1,2,3"),
        ("a", "b", "--cfg-scale", "1,"),
    ],
)
def test_wrong_usage_exits_with_2(run: Run, args: tuple[str, ...]) -> None:
    assert run(*args)[0] == 2


def test_weights_put_over_others_answer_exactly_as_a_cold_load(models: list[Path], run: Run) -> None:
    nvfp4 = ("--format", "nvfp4", "--layout", "trtllm", "--reference-format", "nvfp4", "--reference-layout", "cutlass")
    exact = ("--max-kl", 0, "--min-top1", 1, "--max-ppl-ratio", 1)
    code, out = run(models[0], models[0], *nvfp4, "--over", models[1], *exact, "--max-tokens", 40, "--json")
    found = json.loads(out)
    assert code == 0 and found["ok"] and len(found["limits"]) == 3
    assert found["measures"]["kl"]["value"] == 0.0 and found["measures"]["perplexity_ratio"]["value"] == 1.0
    assert len(found["rows"]) == 39


def test_quantized_against_bf16_breaks_a_limit_with_exit_code_1_and_a_report(
    models: list[Path], run: Run, tmp_path: Path
) -> None:
    out_dir = tmp_path / "report"
    limits = ("--max-kl", 1e-9, "--min-top1", 0.5)
    code, out = run(models[0], models[0], "--format", "nvfp4", "--max-tokens", 40, *limits, "--out", out_dir)
    assert code == 1
    assert out.splitlines()[-1].startswith("BROKEN --max-kl: kl 0.000") and "limit 1e-09 (mean of 39 tokens" in out
    assert "kept   --min-top1" in out
    page = (out_dir / "report.html").read_text()
    assert "BROKEN" in page and 'src="data:image/png;base64,' in page
    assert not [word for word in ("http://", "https://", "<script", 'src="/', "file:") if word in page]
    plots = sorted(path.name for path in out_dir.glob("*.png"))
    assert plots == ["kl.png", "likeliest_tokens.png", "surprisal.png"]
    assert all((out_dir / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_a_language_model_is_not_compared_with_a_pipeline(
    models: list[Path], pipelines: dict[str, list[Path]], run: Run
) -> None:
    with pytest.raises(PlanError, match="a language and a diffusion model"):
        run(models[0], pipelines["flux"][0])


def test_what_cannot_be_compared_is_refused_before_a_model_is_built(
    pipelines: dict[str, list[Path]], run: Run
) -> None:
    flux, wan = (str(pipelines[family][0]) for family in ("flux", "wan"))
    cases: list[tuple[tuple[str, ...], str]] = [
        ((flux, wan), "transformers of different classes: .*FluxTransformer2DModel.*WanTransformer3DModel"),
        ((flux, "nowhere"), "nowhere: not there; expected a checkpoint, HOST:PORT of a service, or a file of --save"),
        ((flux, flux, "--component", f"transformer_2={flux}"), "no such component; it has transformer"),
        ((flux, flux, "--component", "transformer=nowhere"), "override transformer=nowhere: not there"),
    ]
    for args, said in cases:
        with pytest.raises(PlanError, match=said):
            run(*args, "--reference-format", "no-such-format")  # which building it would refuse first


DIFFUSION: dict[str, tuple[object, ...]] = {
    "flux": ("--size", "8x4", "--steps", 3, "--guidance", 3.5),
    "wan": ("--size", "2x8x4", "--steps", 4, "--cfg-scale", "4,3", "--samples", 2, "--seed", 5),
}


@pytest.mark.parametrize("family", DIFFUSION)
def test_pipelines_compare_step_by_step(
    family: str, pipelines: dict[str, list[Path]], run: Run, tmp_path: Path
) -> None:
    first, other = pipelines[family]
    asked = (*DIFFUSION[family], "--json")
    saved = tmp_path / "first.safetensors"
    assert run(first, "--reference-format", "nvfp4", "--save", saved, *asked)[0] == 0
    code, out = run(saved, first, "--format", "nvfp4", "--over", other, "--min-cosine", 1, "--min-psnr", 200, *asked)
    hot = json.loads(out)
    assert code == 0 and hot["measures"]["cosine"]["value"] == 1.0 and hot["measures"]["psnr"]["value"] == "inf"
    code, out = run(saved, first, "--min-cosine", 0.9, "--min-psnr", 90, "--out", tmp_path, *asked)
    plain = json.loads(out)
    assert code == 1 and [limit["ok"] for limit in plain["limits"]] == [True, False], plain["limits"]
    assert 0.9 < plain["measures"]["cosine"]["value"] < 1 and 10 < plain["measures"]["psnr"]["value"] < 90
    # Wan's folder has a VAE, which makes 5 frames of 2; without one the latents are the frames.
    num_samples, num_steps, num_frames = (1, 3, 1) if family == "flux" else (2, 4, 5)
    assert len(plain["rows"]) == num_samples * (num_steps + num_frames)
    assert {path.stem for path in tmp_path.glob("*.png")} >= {"pictures", "cosine", "rmse", "max_abs", "psnr"}
    noise = load(saved).tensors["latents"]
    assert noise.shape[:2] == (num_steps, num_samples) and (num_samples == 1 or not noise[0, 0].equal(noise[0, 1]))


def test_a_live_pipeline_denoises_as_its_checkpoint(pipelines: dict[str, list[Path]], run: Run, tmp_path: Path) -> None:
    first, other = pipelines["flux"]
    with local_service(first, tmp_path) as service:
        asked = (*DIFFUSION["flux"], "--json", "--min-cosine", 1)
        code, out = run(first, service.address, "--reference-format", "nvfp4", *asked)
        assert code == 0 and json.loads(out)["candidate"]["versions"] == [1]
        code, out = run(other, service.address, "--reference-format", "nvfp4", *asked)
        assert code == 1 and json.loads(out)["measures"]["cosine"]["value"] < 1


def test_a_live_service_answers_as_its_checkpoint_and_its_next_version_does_not(
    service: LocalService, models: list[Path], run: Run, tmp_path: Path
) -> None:
    saved, few = tmp_path / "v1.safetensors", ("--max-tokens", 20, "--json")
    assert run(service.address, "--save", saved, *few)[0] == 0
    (version,) = load(saved).versions
    exact = ("--max-kl", 0, "--min-top1", 1)
    code, out = run(saved, models[0], "--format", "nvfp4", "--layout", "trtllm", *exact, *few)
    found = json.loads(out)
    assert code == 0 and found["how"] == "tops" and found["measures"]["kl_at_least"]["value"] == 0.0
    assert found["reference"]["versions"] == [version] and len(found["rows"]) == 20
    with open_checkpoint(models[1]) as checkpoint:
        pusher = Pusher(service.address)
        report = pusher.push((name, checkpoint.rows(name)) for name in checkpoint.names())
        pusher.close()
    code, out = run(saved, service.address, *exact, *few)
    found = json.loads(out)
    assert code == 1 and found["candidate"]["versions"] == [report.version] and report.version > version
    assert found["measures"]["kl_at_least"]["value"] > 0
    with pytest.raises(PlanError, match="likeliest token only"):
        run(saved, service.address, "--max-ppl-ratio", 1.1)


def test_a_push_in_between_is_noticed() -> None:
    from launch.recording import service_label

    with pytest.raises(VersionError, match="versions 3, 4: a push came in between"):
        service_label("127.0.0.1:1", {3, 4})
