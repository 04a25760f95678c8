"""TRL's GRPO trainer on our actors: rollout_func samples from them, a callback pushes after every optimizer step.

    pip install 'transfuse[trl]'
    transfuse serve MODEL --listen 127.0.0.1:7070
    python docs/examples/trl_grpo.py MODEL 127.0.0.1:7070
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from launch.rpc import generate
from protos import transfuse_pb2 as pb
from weight_update.client import Pusher

NUM_TOKENS, NUM_GENERATIONS = 16, 4
PROMPTS = ("Once upon a time", "The train arrived")


def letters(completions: list[str], **kwargs: Any) -> list[float]:
    """The reward: the share of letters in a completion."""
    return [sum(map(str.isalpha, text)) / max(1, len(text)) for text in completions]


def rollouts(address: str) -> Any:
    """A rollout_func over the service: one completion for every prompt that it is given."""

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = [trainer.processing_class(prompt).input_ids for prompt in prompts]
        request = pb.GenerateRequest(
            prompts=[pb.Prompt(token_ids=each) for each in ids],
            max_new_tokens=NUM_TOKENS,
            temperature=1.0,
            seed=trainer.state.global_step,
        )
        drawn: list[list[pb.Token]] = [[] for _ in ids]
        for token in generate(address, request):
            del drawn[token.sequence][token.position :]  # of a sequence that begins again
            drawn[token.sequence].append(token)
        return {
            "prompt_ids": ids,
            "completion_ids": [[token.token_id for token in tokens] for tokens in drawn],
            "logprobs": [[token.logprob for token in tokens] for tokens in drawn],
        }

    return rollout


class Push(TrainerCallback):
    """Pushes what the optimizer left, before the next rollout. A PEFT model is merged on the way."""

    def __init__(self, address: str) -> None:
        self._pusher = Pusher(address)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report = self._pusher.push(kwargs["model"], step=state.global_step)
        print(f"step {state.global_step} version {report.version} {report.mode}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pusher.close()


def main(model_dir: str, address: str, num_steps: int = 2, peft_config: Any = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            max_steps=num_steps,
            per_device_train_batch_size=NUM_GENERATIONS,
            num_generations=NUM_GENERATIONS,
            max_completion_length=NUM_TOKENS,
            learning_rate=1e-4,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32"),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            reward_funcs=letters,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": list(PROMPTS)}),
            rollout_func=rollouts(address),
            callbacks=[Push(address)],
            peft_config=peft_config,
        )
        trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:3])
