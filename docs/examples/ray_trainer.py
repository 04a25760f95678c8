"""A trainer that is a Ray actor, beside a Ray-launched service: the driver never sees a weight.

    transfuse serve MODEL --listen 127.0.0.1:7070
    python docs/examples/ray_trainer.py MODEL 127.0.0.1:7070
"""

from __future__ import annotations

import sys
from typing import Any

import ray

NUM_TOKENS = 16
PROMPTS = ((3, 4, 5), (7, 8, 9))


@ray.remote
class PolicyTrainer:
    """Owns the masters and the pusher. One actor here; of several, each makes a Pusher over its process group."""

    def __init__(self, model_dir: str, address: str) -> None:
        import torch

        from launch.trainer import Trainer, load_policy
        from weight_update.client import Pusher

        model = load_policy(model_dir)
        self._address = address
        self._trainer = Trainer(model, (torch.arange(model.config.vocab_size) % 2).float())
        self._pusher = Pusher(address)

    def step(self, number: int) -> dict[str, Any]:
        """Sample, learn, push."""
        learned = self._trainer.step(self._samples(number))
        report = self._pusher.push(self._trainer.model, step=number)
        return {"reward": learned.reward, "version": report.version, "mode": report.mode}

    def _samples(self, seed: int) -> list[Any]:
        from launch.rpc import generate
        from launch.trainer import Sample
        from protos import transfuse_pb2 as pb

        request = pb.GenerateRequest(
            prompts=[pb.Prompt(token_ids=prompt) for prompt in PROMPTS],
            max_new_tokens=NUM_TOKENS,
            temperature=1.0,
            seed=seed,
            ignore_eos=True,
        )
        drawn: list[list[Any]] = [[] for _ in PROMPTS]
        for token in generate(self._address, request):
            drawn[token.sequence].append(token)
        return [
            Sample(
                prompt_ids=prompt,
                token_ids=tuple(token.token_id for token in tokens),
                logprobs=tuple(token.logprob for token in tokens),
            )
            for prompt, tokens in zip(PROMPTS, drawn, strict=True)
        ]

    def close(self) -> None:
        self._pusher.close()


def main(model_dir: str, address: str, num_steps: int = 2) -> None:
    trainer = PolicyTrainer.remote(model_dir, address)
    for number in range(num_steps):
        print("step", number, ray.get(trainer.step.remote(number)), flush=True)
    ray.get(trainer.close.remote())
    ray.kill(trainer)


if __name__ == "__main__":
    ray.init(include_dashboard=False, log_to_driver=False)
    main(*sys.argv[1:3])
    ray.shutdown()
