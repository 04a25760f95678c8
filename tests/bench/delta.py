"""What a push of changes costs: SmolLM2-135M, real policy-gradient steps on samples of the service itself.

    python -m tests.bench.delta [--json] [--steps N]

AdamW at learning rate 1e-6 over FP32 masters, one update a step, a push after each. Prints the bytes on the wire over
the BF16 bytes of what was pushed (the quantized linears alone, and the whole model with BF16 embedding and norms), the
pause over that of a full push of the same weights right after, and what weights without any likeness cost.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoTokenizer

from launch import trainer as learning
from launch.demo_text import NUM_TOKENS, PROMPTS
from launch.rpc import generate
from launch.trainer import Sample, Trainer, load_policy, short_words
from protos import transfuse_pb2 as pb
from quant.checkpoint import open_checkpoint
from tests.bench.push import actor_process, peak_bytes, reset_peak
from weight_update.client import Pusher

LEARNING_RATE = 1e-6
LINEARS = ["*_proj.weight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One push of the whole model, the same of its linears alone, and a full push of the same weights."""

    wire_bytes: int
    wire_share: float
    linear_wire_bytes: int
    linear_wire_share: float
    pause_ms: float
    full_pause_ms: float
    memory_over_planned: float
    kept_bytes: int


class Run:
    """A trainer and two services: one takes the whole model, one only the linears of every step."""

    def __init__(self, config_dir: Path, whole: str, linears: str, actor: psutil.Process) -> None:
        self._actor = actor
        tokenizer: Any = AutoTokenizer.from_pretrained(config_dir)
        self._prompts = [tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS]
        self._address = whole
        self.model = load_policy(config_dir)
        self._trainer = Trainer(self.model, short_words(tokenizer), learning_rate=LEARNING_RATE)
        self.whole, self.full, self._linears = Pusher(whole), Pusher(whole, mode="full"), Pusher(linears)
        for pusher in (self.whole, self._linears):
            pusher.push(self.model)
            pusher.mode = "delta"  # from here on nothing else would be measured

    def step(self, number: int) -> Step:
        """Sample, learn, push."""
        self._trainer.step(self._samples(number))
        linear = self._linears.push(self.model, scope=LINEARS)
        idle = self._actor.memory_info().rss
        reset_peak(self._actor)
        pushed = self.whole.push(self.model)
        above = peak_bytes(self._actor) - idle
        full = self.full.push(self.model)
        assert full.digest == pushed.digest
        return Step(
            wire_bytes=pushed.wire_bytes,
            wire_share=pushed.wire_bytes / pushed.logical_bytes,
            linear_wire_bytes=linear.wire_bytes,
            linear_wire_share=linear.wire_bytes / linear.logical_bytes,
            pause_ms=pushed.pause_s * 1e3,
            full_pause_ms=full.pause_s * 1e3,
            memory_over_planned=above / pushed.planned_bytes,
            kept_bytes=pushed.kept_bytes,
        )

    def _samples(self, seed: int) -> list[Sample]:
        request = pb.GenerateRequest(
            prompts=[pb.Prompt(token_ids=prompt) for prompt in self._prompts],
            max_new_tokens=NUM_TOKENS,
            temperature=1.0,
            seed=seed,
            ignore_eos=True,
        )
        drawn: list[list[pb.Token]] = [[] for _ in self._prompts]
        for token in generate(self._address, request):
            drawn[token.sequence].append(token)
        return [
            Sample(
                prompt_ids=prompt,
                token_ids=tuple(token.token_id for token in tokens),
                logprobs=tuple(token.logprob for token in tokens),
            )
            for prompt, tokens in zip(self._prompts, drawn, strict=True)
        ]

    def close(self) -> None:
        for pusher in (self.whole, self.full, self._linears):
            pusher.close()


def redraw(model: nn.Module) -> None:
    """Weights of the same spread, drawn anew."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.std(correction=0).clamp(min=1e-3))


def median(steps: Sequence[Step], field: str) -> float:
    return statistics.median(getattr(step, field) for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    learning.NUM_PASSES = 1  # one update of the optimizer between two pushes
    with open_checkpoint("smollm2") as checkpoint:
        config_dir = checkpoint.config_dir
    with (
        actor_process(config_dir, "nvfp4", "trtllm") as (whole, actor, _),
        actor_process(config_dir, "nvfp4", "trtllm") as (linears, _, _),
    ):
        run = Run(config_dir, whole, linears, actor)
        steps = []
        for number in range(1, options.steps + 1):
            steps.append(run.step(number))
            print(f"step {number}: {steps[-1]}", file=sys.stderr)
        full = run.full.push(run.model)
        redraw(run.model)
        worst = run.whole.push(run.model)
        run.close()
    result = {
        "steps": [asdict(step) for step in steps],
        "linear_wire_percent": 100 * median(steps, "linear_wire_share"),
        "wire_percent": 100 * median(steps, "wire_share"),
        "pause_over_full": median(steps, "pause_ms") / median(steps, "full_pause_ms"),
        "memory_over_planned": max(step.memory_over_planned for step in steps),
        "worst_over_full": worst.wire_bytes / full.wire_bytes,
    }
    if options.json:
        print(json.dumps(result))
        return
    print(f"{options.steps} steps of SmolLM2-135M, AdamW at {LEARNING_RATE}; medians")
    print(f"  wire, quantized linears: {result['linear_wire_percent']:.4f} % of their BF16 bytes (at most 0.05)")
    print(f"  wire, whole model:       {result['wire_percent']:.4f} % of its BF16 bytes (at most 0.35)")
    print(f"  pause: {median(steps, 'pause_ms'):.1f} ms, full {median(steps, 'full_pause_ms'):.1f} ms", end="")
    print(f" = {result['pause_over_full']:.3f} (at most 0.1)")
    print(f"  actor memory above idle: {result['memory_over_planned']:.2f} of what was planned, at most")
    print(f"  weights without likeness: {result['worst_over_full']:.4f} of a full push's bytes (at most 1.02)")


if __name__ == "__main__":
    main()
