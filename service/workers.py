"""Which worker serves a model: tokens of a language model, or latents of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quant.pipelines import Pipeline
from weight_update.errors import PlanError

from .denoising import Denoiser
from .engine import CommitBetween
from .refresh import Refresher
from .residence import Offload, choose_offload
from .sampling import Decoder
from .text import eos_ids
from .work import OnCommit, Worker

COMMIT_BETWEEN: tuple[CommitBetween, ...] = ("steps", "samples")
ON_COMMIT: tuple[OnCommit, ...] = ("continue", "recompute", "restart")


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """How a replica generates.

    max_batch: sequences that run at once on it. max_tokens: of one sequence, or of one forward of a sample; None: what
    the worker takes by default. commit_between: "steps", or "samples" to let running ones end before a commit.
    on_commit: what running sequences of a language model do at a commit. offload: see service.residence. compile:
    torch.compile of the blocks of a pipeline.
    """

    max_batch: int = 32
    max_tokens: int | None = None
    commit_between: CommitBetween = "steps"
    on_commit: OnCommit = "continue"
    offload: str = "none"
    compile: bool = False


def check_serving(serving: Serving, num_components: int, say: Callable[[str], None]) -> None:
    """Refuse what cannot be served, before any process starts; num_components: 0 for a language model."""
    if serving.commit_between not in COMMIT_BETWEEN:
        raise PlanError(f"commit_between {serving.commit_between!r}: expected one of {', '.join(COMMIT_BETWEEN)}")
    if serving.on_commit not in ON_COMMIT:
        raise PlanError(f"on_commit {serving.on_commit!r}: expected one of {', '.join(ON_COMMIT)}")
    if serving.on_commit != "continue" and num_components:
        raise PlanError(
            f"on_commit {serving.on_commit}: for language models; a sample keeps no KV, see --commit-between samples"
        )
    if serving.compile and not num_components:
        raise PlanError("compile: for the blocks of diffusion pipelines only; leave --compile out")
    choose_offload(serving.offload, num_components, say)


def offload_of(model: nn.Module, serving: Serving) -> Offload:
    """The mode that is used for this model."""
    return (
        choose_offload(serving.offload, len(model.components), lambda text: None)
        if isinstance(model, Pipeline)
        else "none"
    )


def make_worker(
    model: nn.Module,
    config_dir: Path,
    serving: Serving,
    refresher: Refresher,
    *,
    device: torch.device | str = "cpu",
) -> Worker[..., Any]:
    """The worker of one rank over a loaded model, sharded or not."""
    sizes: dict[str, Any] = {} if serving.max_tokens is None else {"max_tokens": serving.max_tokens}
    if isinstance(model, Pipeline):
        backend = "inductor" if serving.compile else ""
        return Denoiser(
            model,
            config_dir,
            max_batch=serving.max_batch,
            device=device,
            offload=offload_of(model, serving),
            on_refresh=refresher,
            compile_with=backend,
            **sizes,
        )
    return Decoder(
        model,
        eos_ids=eos_ids(config_dir),
        on_refresh=refresher,
        on_commit=serving.on_commit,
        max_batch=serving.max_batch,
        device=device,
        **sizes,
    )
