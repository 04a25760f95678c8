"""The `transfuse denoise` command: latents of a running service, with the versions that made them, as files."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DEFAULT_TARGET, Json, Target


def denoise(
    conditioning: Annotated[
        Path, typer.Argument(help="safetensors with encoder_hidden_states and what else the pipeline takes.")
    ],
    height: Annotated[int, typer.Option(min=1, help="Of the VAE's latents: pixels / 8 for most.")],
    width: Annotated[int, typer.Option(min=1, help="Of the VAE's latents.")],
    num_frames: Annotated[int, typer.Option("--frames", min=1, help="Of the VAE's latents; 1 for images.")] = 1,
    num_steps: Annotated[int, typer.Option("--steps", min=1)] = 28,
    seed: Annotated[list[int], typer.Option(min=0, help="One sample each; repeatable.")] = [0],  # noqa: B006
    guidance: Annotated[float, typer.Option(min=0.0, help="Input of guidance-distilled models.")] = 0.0,
    cfg_scale: Annotated[float, typer.Option(min=0.0, help="Above 1 with negative_ tensors.")] = 0.0,
    cfg_scale_2: Annotated[float, typer.Option(min=0.0, help="Of transformer_2; 0: as --cfg-scale.")] = 0.0,
    out: Annotated[Path, typer.Option(help="Folder of seed-N.safetensors, each with 'latents'.")] = Path("samples"),
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Denoise samples and say which version of the weights did each step.

    Text encoders and VAEs are not served: bring embeddings, decode latents. With --json one object a sample.
    """
    from protos import transfuse_pb2 as pb
    from weight_update.errors import PlanError

    from .progress import Bars
    from .rpc import denoise as call

    if not conditioning.is_file():
        raise PlanError(f"{conditioning}: not there; write it with safetensors.torch.save_file")
    request = pb.DenoiseRequest(
        seeds=seed,
        num_steps=num_steps,
        num_frames=num_frames,
        height=height,
        width=width,
        guidance=guidance,
        cfg_scale=cfg_scale,
        cfg_scale_2=cfg_scale_2,
        conditioning=conditioning.read_bytes(),
    )
    out.mkdir(parents=True, exist_ok=True)
    bars = Bars()
    with bars.show("denoise"):
        for done, step in enumerate(call(target, request), 1):
            bars.update("denoise", done, num_steps * len(seed))
            if step.last:
                _keep(step, seed[step.sample], out, as_json)


def _keep(step: Any, seed: int, out: Path, as_json: bool) -> None:
    """Write one finished sample, and say so."""
    path = out / f"seed-{seed}.safetensors"
    path.write_bytes(step.latents)
    told = {"seed": seed, "file": str(path), "replica": step.replica, "versions": list(step.versions)}
    counts = ", ".join(f"{n} steps of version {version}" for version, n in Counter(step.versions).items())
    sys.stdout.write((json.dumps(told) if as_json else f"{path}: {counts}") + "\n")
    sys.stdout.flush()
