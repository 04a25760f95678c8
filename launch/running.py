"""What runs models, and what uses them: `transfuse demo | demo-diffusion | serve | push | probe`.

Each loads torch, transformers or ray when it runs: `--help` loads none of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from weight_update.errors import PlanError

from . import access
from .options import (
    DEFAULT_TARGET,
    CommitBetween,
    Compile,
    Components,
    ExpertMapFile,
    Format,
    Grace,
    Json,
    Keep,
    KeepBytes,
    Layout,
    Listen,
    LogFormat,
    MetricsAt,
    MetricsPort,
    MinReplicas,
    Offload,
    OnCommit,
    Record,
    RedundantExperts,
    Scrub,
    StateFolder,
    StoreFolder,
    Target,
    emit,
    placed,
)

if TYPE_CHECKING:
    from weight_update.client import PushReport

CHECKPOINT = "A directory with safetensors, a .gguf file, or 'smollm2' (a packaged model)."


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Policy-gradient steps, each with a push.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder of report.html.")] = Path("transfuse-demo"),
    as_json: Json = False,
) -> None:
    """Run the main job on this machine.

    2 replicas of 2 ranks serve SmolLM2-135M in NVFP4; a trainer learns from their samples and pushes its weights after
    each step. With --json one object a step: version, reward, logical_bytes, wire_bytes, seconds, pause_s,
    digest_verified (true only if every rank's installed digest equals the trainer's), phases, timings and more.
    """
    with _loading():
        from .demo import run, to_people, to_scripts
        from .demo_text import TEXT

    run(TEXT, steps, out, to_scripts() if as_json else to_people())


def demo_diffusion(
    steps: Annotated[int, typer.Option(min=1, help="Reward-weighted steps, each with a push.")] = 4,
    out: Annotated[Path, typer.Option(help="Folder of report.html.")] = Path("transfuse-demo-diffusion"),
    as_json: Json = False,
) -> None:
    """Run the main job with a diffusion transformer.

    A tiny FLUX.1 transformer is taught to paint discs; 2 replicas of 2 ranks serve it in NVFP4, a trainer learns from
    their pictures which colour is liked, and pushes after each step.
    """
    with _loading():
        from .demo import run, to_people, to_scripts
        from .demo_pictures import PICTURES

    run(PICTURES, steps, out, to_scripts() if as_json else to_people())


def serve(
    model: Annotated[str, typer.Option(help=CHECKPOINT)],
    format: Format = "nvfp4",
    layout: Layout = "auto",
    replicas: Annotated[int, typer.Option(min=1, help="Full copies of the model.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share one copy.")] = 1,
    redundant_experts: RedundantExperts = None,
    listen: Listen = DEFAULT_TARGET,
    min_replicas: MinReplicas = 0,
    state: StateFolder = None,
    store: StoreFolder = None,
    keep: Keep = 4,
    keep_bytes: KeepBytes = None,
    scrub: Scrub = 600.0,
    component: Components = [],  # noqa: B006 - typer copies it
    commit_between: CommitBetween = "steps",
    on_commit: OnCommit = "continue",
    offload: Offload = "none",
    compile: Compile = False,
    grace: Grace = 30.0,
    metrics_port: MetricsPort = 0,
    metrics_at: MetricsAt = "loopback",
    log_format: LogFormat = "text",
    record: Record = None,
    as_json: Json = False,
) -> None:
    """Serve a model or a diffusion pipeline until Ctrl-C or SIGTERM.

    Prints the address once it serves, with --json as an object. A stop lets running requests end, for --grace seconds.
    """
    with _loading():
        from .serve import configured, kept, run, seen

    how = {"commit_between": commit_between, "on_commit": on_commit, "offload": offload, "compile": compile}
    how |= {"replicas": replicas, "ranks": ranks, "listen": listen, "layout": layout, "format": format}
    with _reading_checkpoints(), TemporaryDirectory(prefix="transfuse-serve-") as scratch:
        config = configured(
            component,
            model=model,
            redundant_experts=redundant_experts,
            state_dir=Path(scratch) if state is None else state,
            min_replicas=min_replicas,
            store=kept(store, keep, keep_bytes),
            scrub_s=scrub,
            security=access.security(),
            seeing=seen(metrics_port, metrics_at, log_format, record),
            **how,
        )
        run(config, lambda at: emit({"address": at}, f"serving {model} at {at}; Ctrl-C stops it", as_json), grace)


def push(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT)],
    target: Target = DEFAULT_TARGET,
    scope: Annotated[
        list[str], typer.Option(help="'all', or a name pattern, repeatable; the rest is carried over.")
    ] = ["all"],  # noqa: B006 - typer copies it
    base_version: Annotated[int | None, typer.Option(help="Refuse unless this version is current.")] = None,
    push_id: Annotated[str | None, typer.Option(help="Pushing an id again returns its first outcome.")] = None,
    durable: Annotated[bool, typer.Option("--durable", help="Return once the version is stored, too.")] = False,
    transport: Annotated[
        str, typer.Option(help="What the bytes go through: auto, cuda-ipc, nccl, shared-memory (on one host) or grpc.")
    ] = "auto",
    fan_out: Annotated[
        str, typer.Option(help="Rows to one replica, from whose rank to the others: auto, always or never.")
    ] = "auto",
    expert_map: ExpertMapFile = None,
    as_json: Json = False,
) -> None:
    """Push a checkpoint as the next version."""
    from dataclasses import asdict

    with _loading():
        from quant.checkpoint import open_checkpoint
        from weight_update.client import Pusher

    from .progress import Bars

    bars = Bars()

    def on_progress(phase: str, done: int, total: int) -> None:
        bars.update("push", done, total)

    pusher = Pusher(
        target,
        mode="full",
        transport=transport,
        fan_out=fan_out,
        on_progress=on_progress,
        security=access.security(),
    )
    with _reading_checkpoints(), bars.show("push"), closing(pusher), open_checkpoint(checkpoint) as opened:
        items = ((name, opened.rows(name)) for name in opened.names())
        one = scope[0] if len(scope) == 1 else scope
        maps = placed(expert_map)
        report = pusher.push(
            items, one, base_version=base_version, push_id=push_id, durable=durable, expert_map=maps
        )
    emit(asdict(report), _told(report), as_json)


def _told(report: PushReport) -> str:
    from .tables import mebibytes

    verified = "digest verified" if report.digest_verified else "digest not verified"
    passed = f", {mebibytes(report.passed_bytes)} passed on" if report.passed_bytes else ""
    return (
        f"version {report.version} on {len(report.replicas)} replicas, {verified}: {mebibytes(report.logical_bytes)}"
        f" logical, {mebibytes(report.wire_bytes)} wire{passed}, {report.seconds:.2f} s (predicted"
        f" {sum(report.predicted.values()):.2f} s, {report.bottleneck}), pause {1e3 * report.pause_s:.0f} ms,"
        f" {report.carried_over} parameters carried over, {', '.join(report.transports)}"
    )


def probe(
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 48,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Stream text with the version of its tokens.

    [v3] marks where version 3 of the weights takes over. With --json one object a token.
    """
    from collections import Counter

    from protos import transfuse_pb2 as pb

    from .rpc import generate, values

    request = pb.GenerateRequest(
        prompts=[pb.Prompt(text=prompt)], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    counts: Counter[int] = Counter()
    previous, printed = None, 0
    for token in generate(target, request):
        mark = f"[v{token.version}]" if token.version != previous else ""
        previous = token.version
        counts[token.version] += 1
        mark = f"\n[begins again]{mark}" if token.position < printed else mark
        printed = token.position + 1
        sys.stdout.write(json.dumps(values(token)) + "\n" if as_json else mark + token.text)
        sys.stdout.flush()
    if not as_json:
        sys.stdout.write("\n" + ", ".join(f"{n} tokens of version {version}" for version, n in counts.items()) + "\n")


# ---------------------------------------------------------------- around a command


def _loading() -> AbstractContextManager[None]:
    """Progress of imports: torch, transformers and ray take seconds."""
    from .progress import Bars

    return Bars().show("load libraries")


@contextmanager
def _reading_checkpoints() -> Iterator[None]:
    """A checkpoint that cannot be read is bad input, like any other plan that does not fit."""
    from quant.checkpoint import CheckpointError
    from quant.families import FamilyError
    from quant.pipelines import PipelineError

    try:
        yield
    except (CheckpointError, FamilyError, PipelineError) as error:
        raise PlanError(str(error)) from error
