"""The `transfuse` command. Each command imports what it needs when it runs: `--help` loads neither torch nor ray."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from weight_update.errors import PlanError, WeightUpdateError

from . import exits, proofs, replicas, tools
from . import store as stores
from .compare import compare
from .denoise import denoise
from .options import (
    DEFAULT_TARGET,
    CommitBetween,
    Compile,
    Components,
    Format,
    Json,
    Keep,
    KeepBytes,
    Layout,
    Listen,
    MinReplicas,
    Offload,
    OnCommit,
    Scrub,
    StateFolder,
    StoreFolder,
    Target,
    emit,
)

CHECKPOINT = "A directory with safetensors, a .gguf file, or 'smollm2' (a packaged model)."

app = typer.Typer(
    name="transfuse",
    help="Puts new weights into running, quantized, FSDP-sharded models.",
    epilog="\b\nExit codes:\n" + exits.as_text(),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


# ---------------------------------------------------------------- what runs processes


@app.command()
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


@app.command("demo-diffusion")
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


@app.command()
def serve(
    model: Annotated[str, typer.Option(help=CHECKPOINT)],
    format: Format = "nvfp4",
    layout: Layout = "auto",
    replicas: Annotated[int, typer.Option(min=1, help="Full copies of the model.")] = 1,
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share one copy.")] = 1,
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
    as_json: Json = False,
) -> None:
    """Serve a model or a diffusion pipeline until Ctrl-C or SIGTERM.

    Prints the address once it serves, with --json as an object.
    """
    from tempfile import TemporaryDirectory

    with _loading():
        from service.keeper import StoreConfig

        from .serve import configured, run

    how = {"commit_between": commit_between, "on_commit": on_commit, "offload": offload, "compile": compile}
    with _reading_checkpoints(), TemporaryDirectory(prefix="transfuse-serve-") as scratch:
        config = configured(
            component,
            model=model,
            format=format,
            layout=layout,
            replicas=replicas,
            ranks=ranks,
            listen=listen,
            state_dir=Path(scratch) if state is None else state,
            min_replicas=min_replicas,
            store=None if store is None else StoreConfig(directory=store.resolve(), keep=keep, keep_bytes=keep_bytes),
            scrub_s=scrub,
            **how,
        )
        run(config, lambda at: emit({"address": at}, f"serving {model} at {at}; Ctrl-C stops it", as_json))


@app.command()
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
        str, typer.Option(help="What the bytes go through: auto, shared-memory (on one host) or grpc.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Push a checkpoint as the next version."""
    from dataclasses import asdict

    with _loading():
        from quant.checkpoint import open_checkpoint
        from weight_update.client import Pusher

    from .progress import Bars
    from .tables import mebibytes

    bars = Bars()

    def on_progress(phase: str, done: int, total: int) -> None:
        bars.update("push", done, total)

    pusher = Pusher(target, mode="full", transport=transport, on_progress=on_progress)
    with _reading_checkpoints(), bars.show("push"), closing(pusher), open_checkpoint(checkpoint) as opened:
        items = ((name, opened.rows(name)) for name in opened.names())
        one = scope[0] if len(scope) == 1 else scope
        report = pusher.push(items, one, base_version=base_version, push_id=push_id, durable=durable)
    verified = "digest verified" if report.digest_verified else "digest not verified"
    emit(
        asdict(report),
        f"version {report.version} on {len(report.replicas)} replicas, {verified}: {mebibytes(report.logical_bytes)}"
        f" logical, {mebibytes(report.wire_bytes)} wire, {report.seconds:.2f} s, pause {1e3 * report.pause_s:.0f} ms,"
        f" {report.carried_over} parameters carried over, {', '.join(report.transports)}",
        as_json,
    )


# ---------------------------------------------------------------- what asks a running service


@app.command()
def status(target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Version, replicas and the open push."""
    from protos import transfuse_pb2 as pb

    from .rpc import ask, values
    from .tables import status_text

    reply = values(ask(target, "Status", pb.StatusRequest()))
    emit(reply, status_text(reply), as_json)


@app.command()
def versions(target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Committed versions, oldest first."""
    from protos import transfuse_pb2 as pb

    from .rpc import ask, values
    from .tables import aligned, version_row

    rows = values(ask(target, "Versions", pb.VersionsRequest()))["versions"]
    emit(rows, aligned([version_row(row) for row in rows]), as_json)


@app.command()
def verify(target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Read back and compare all that is served.

    Exit code 1 where a digest is not the committed one, naming the tensor and the rank.
    """
    from protos import transfuse_pb2 as pb

    from .progress import Bars
    from .rpc import ask, values
    from .tables import mebibytes

    with Bars().show("verify"):
        reply = values(ask(target, "Verify", pb.VerifyRequest(), timeout_s=600.0))
    found = f"version {reply['version']}: {mebibytes(reply['bytes'])} read back in {reply['seconds']:.2f} s"
    outcome = "all as committed" if reply["ok"] else "MISMATCH"
    emit(reply, "\n".join([f"{found}, {outcome}", *reply["mismatches"]]), as_json)
    if not reply["ok"]:
        raise typer.Exit(1)


@app.command()
def pause(
    reason: Annotated[str, typer.Option(help="Kept in the service's log.")] = "",
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Stop generation; running sequences wait."""
    from protos import transfuse_pb2 as pb

    from .rpc import ask

    ask(target, "Pause", pb.PauseRequest(reason=reason), timeout_s=60.0)
    emit({"paused": True}, "paused; 'transfuse resume' goes on", as_json)


@app.command()
def resume(target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Go on after a pause."""
    from protos import transfuse_pb2 as pb

    from .rpc import ask

    ask(target, "Resume", pb.ResumeRequest(), timeout_s=60.0)
    emit({"paused": False}, "serving", as_json)


@app.command()
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


@app.command()
def describe(target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Parameters that a push brings, and the ranks.

    With --json also every tensor, and which of its rows each rank holds.
    """
    from protos import transfuse_pb2 as pb

    from .rpc import ask, values
    from .tables import describe_text

    reply = values(ask(target, "Describe", pb.DescribeRequest(), timeout_s=60.0))
    emit(reply, describe_text(reply), as_json)


@app.command()
def formats(
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    as_json: Json = False,
) -> None:
    """Formats and layouts that this release knows."""
    from . import tables

    rows = {"formats": tables.formats(), "layouts": tables.layouts()}
    render = tables.markdown if as_markdown else tables.aligned
    emit(rows, "\n\n".join(render(table) for table in rows.values()), as_json)


# ---------------------------------------------------------------- what has a module of its own


for command in (
    stores.rollback,
    stores.reset,
    stores.export,
    denoise,
    compare,
    tools.calibrate,
    tools.build_mixed,
    tools.convert_fp8,
    proofs.conformance,
    proofs.chaos,
):
    app.command()(command)
app.add_typer(replicas.app, name="replica")


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


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; an error of weight_update.errors becomes one message on stderr and its exit code."""
    # It warns that a local cluster is protected. Its parent will not do: importing ray sets that level again.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    given = list(sys.argv[1:] if args is None else args)
    try:
        app(args=given, prog_name="transfuse")
    except WeightUpdateError as error:
        code = exits.exit_code(error)
        told = {"error": error.code, "message": str(error), "exit_code": code}
        sys.stderr.write((json.dumps(told) if "--json" in given else f"transfuse: {error}") + "\n")
        sys.exit(code)
