"""The demo's trainer: REINFORCE on samples that the actors drew, FP32 masters on the CPU. It knows nothing of gRPC.

    trainer = Trainer(load_policy(config_dir), short_words(tokenizer))
    report = trainer.step(samples)             # then push trainer.model

The reward of a token is 1 where it is a short word: a space and at most four letters. A 135M model holds it at about
0.45 and four steps move it visibly; a rarer property (a letter, a comma, a capital: 0.05 to 0.2 of the tokens) does not
move within 256 sampled tokens a step. Text made of short words is still text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Two passes at 6e-5 over each set of samples take the reward from 0.47 to 0.6 in four steps, well above the noise of
# 256 sampled tokens (0.03), and text stays text. One pass at 1e-4 gets as far, and begins to repeat itself.
LEARNING_RATE = 6e-5
NUM_PASSES = 2
SHORT_LETTERS = 4
# The actors sample from quantized weights, so their probabilities differ from the masters'. Above this a token's
# importance ratio is cut: one unlucky token must not own the step.
MAX_RATIO = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence as an actor generated it: log-probabilities are the actor's, at temperature 1."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What the first pass of one step saw. ratio: mean probability of a token under the masters over the actors'."""

    reward: float
    loss: float
    ratio: float
    seconds: float


class Trainer:
    """Owns the FP32 masters and the optimizer. rewards: [vocabulary], what each token earns."""

    def __init__(self, model: nn.Module, rewards: Tensor, *, learning_rate: float = LEARNING_RATE) -> None:
        self.model = model
        self.rewards = rewards
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def step(self, samples: Sequence[Sample]) -> StepReport:
        """Learn from these samples; the weights it leaves are what to push."""
        start_s = time.perf_counter()
        tokens = torch.tensor([sample.token_ids for sample in samples])
        logprobs = torch.tensor([sample.logprobs for sample in samples])
        seen = [self._pass(samples, tokens, logprobs) for _ in range(NUM_PASSES)]
        return StepReport(
            reward=reward_of(samples, self.rewards),
            loss=seen[0][0],
            ratio=seen[0][1],
            seconds=time.perf_counter() - start_s,
        )

    def _pass(self, samples: Sequence[Sample], tokens: Tensor, logprobs: Tensor) -> tuple[float, float]:
        """One gradient step; the importance ratios account for how far the masters have moved since the samples."""
        loss, ratio = policy_loss(sampled_logits(self.model, samples), tokens, logprobs, self.rewards)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        return loss.item(), ratio.item()


def policy_loss(logits: Tensor, tokens: Tensor, actor_logprobs: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """REINFORCE: (loss, mean importance ratio).

    logits: [sequences, tokens, vocabulary]. A token is judged by its own reward, less what the policy expects at that
    position. This baseline knows the state but not the token drawn, so the gradient stays unbiased, and it takes out
    what the position alone decides: most of the variance.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        advantage = rewards[tokens] - logprobs.exp() @ rewards
        advantage /= advantage.std() + 1e-6
        ratio = (chosen - actor_logprobs).exp()
    return -(ratio.clamp(max=MAX_RATIO) * advantage * chosen).mean(), ratio.mean()


def sampled_logits(model: nn.Module, samples: Sequence[Sample]) -> Tensor:
    """The logits that chose each sampled token, [sequences, tokens, vocabulary]; padding on the right is never read."""
    sequences = [sample.prompt_ids + sample.token_ids for sample in samples]
    longest = max(map(len, sequences))
    ids = torch.tensor([(*sequence, *[0] * (longest - len(sequence))) for sequence in sequences])
    policy: Any = model
    hidden = policy.model(input_ids=ids).last_hidden_state
    # Only these positions go through the head: logits of the prompts would be the largest tensor of the step.
    drawn = [
        hidden[row, len(sample.prompt_ids) - 1 : len(sample.prompt_ids) - 1 + len(sample.token_ids)]
        for row, sample in enumerate(samples)
    ]
    logits: Tensor = policy.lm_head(torch.stack(drawn))
    return logits.float()


def reward_of(samples: Sequence[Sample], rewards: Tensor) -> float:
    """Mean over all sampled tokens."""
    return rewards[torch.tensor([sample.token_ids for sample in samples])].mean().item()


def short_words(tokenizer: Any) -> Tensor:
    """The reward of every token of a vocabulary: 1.0 for a space and one to four letters, else 0.0."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return torch.tensor([float(is_short_word(text)) for text in texts])


def is_short_word(text: str) -> bool:
    """' the' is one; 'the' (the end of a longer word), ' there' and ' 12' are not."""
    return text[:1] == " " and text[1:].isalpha() and len(text) <= 1 + SHORT_LETTERS


def load_policy(config_dir: Path) -> nn.Module:
    """The model of a checkpoint directory as FP32 masters."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: nn.Module = AutoModelForCausalLM.from_pretrained(config_dir, dtype=torch.float32)
    return model.train()
