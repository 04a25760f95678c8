"""A policy-gradient loop over FSDP2: every rank samples from the actors, learns, and pushes its own rows.

    transfuse serve MODEL --listen 127.0.0.1:7070
    torchrun --nproc-per-node 2 docs/examples/fsdp2_policy_gradient.py MODEL 127.0.0.1:7070
"""

from __future__ import annotations

import sys
from contextlib import closing

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from launch.rpc import generate
from launch.trainer import Sample, load_policy, policy_loss
from protos import transfuse_pb2 as pb
from weight_update.client import Pusher

NUM_TOKENS, LEARNING_RATE = 16, 1e-4
PROMPTS = ((3, 4, 5), (7, 8, 9), (11, 12, 13), (15, 16, 17))


def sample(address: str, seed: int) -> list[Sample]:
    """One sequence a prompt, drawn by the actors from the version that they serve."""
    request = pb.GenerateRequest(
        prompts=[pb.Prompt(token_ids=prompt) for prompt in PROMPTS],
        max_new_tokens=NUM_TOKENS,
        temperature=1.0,
        seed=seed,
        ignore_eos=True,
    )
    drawn: list[list[pb.Token]] = [[] for _ in PROMPTS]
    for token in generate(address, request):
        drawn[token.sequence].append(token)
    return [
        Sample(
            prompt_ids=prompt,
            token_ids=tuple(token.token_id for token in tokens),
            logprobs=tuple(token.logprob for token in tokens),
        )
        for prompt, tokens in zip(PROMPTS, drawn, strict=True)
    ]


def main(model_dir: str, address: str, num_steps: int = 2) -> None:
    dist.init_process_group("gloo")
    model = load_policy(model_dir)  # FP32 masters
    rewards = (torch.arange(model.config.vocab_size) % 2).float()  # odd tokens are good
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    with closing(Pusher(address)) as pusher:
        for step in range(num_steps):
            samples = sample(address, seed=step * dist.get_world_size() + dist.get_rank())
            ids = torch.tensor([each.prompt_ids + each.token_ids for each in samples])
            logits = model(input_ids=ids).logits[:, len(PROMPTS[0]) - 1 : -1].float()
            tokens = torch.tensor([each.token_ids for each in samples])
            logprobs = torch.tensor([each.logprobs for each in samples])
            loss, ratio = policy_loss(logits, tokens, logprobs, rewards)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            for module in (*model.model.layers, model):
                module.reshard()  # what is pushed are the shards
            report = pusher.push(model, step=step)  # collective
            if dist.get_rank() == 0:
                told = f"loss {loss:.3f} ratio {ratio:.3f} version {report.version} {report.mode}"
                print(f"step {step} {told}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
