"""The demo's trainer: the gradient is REINFORCE's, padding is never read, and a step raises the expected reward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from launch.trainer import MAX_RATIO, Sample, Trainer, is_short_word, policy_loss, reward_of, sampled_logits
from tests.tiny import tiny_llama

EVEN = torch.tensor([float(token % 2 == 0) for token in range(256)])


def draw(model: nn.Module, prompt: tuple[int, ...], num_samples: int, num_tokens: int, seed: int) -> list[Sample]:
    """Draw one token after the other, each from a full forward."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt] * num_samples)
    logprobs = []
    for _ in range(num_tokens):
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids).logits[:, -1]
        rows = logits.log_softmax(-1)
        drawn = torch.multinomial(rows.exp(), 1, generator=generator)
        logprobs.append(rows.gather(-1, drawn))
        ids = torch.cat([ids, drawn], 1)
    return [
        Sample(prompt_ids=prompt, token_ids=tuple(tokens[len(prompt) :]), logprobs=tuple(chosen))
        for tokens, chosen in zip(ids.tolist(), torch.cat(logprobs, 1).tolist(), strict=True)
    ]


def test_gradient_is_reinforce_with_a_baseline() -> None:
    """For a softmax the gradient of log p(token) is onehot - p; everything else is a factor of its row."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 1, 4], [2, 2, 3]])
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    actor = torch.log(torch.rand(2, 3, dtype=torch.float64))
    loss, _ = policy_loss(logits, tokens, actor, rewards)
    (gradient,) = torch.autograd.grad(loss, logits)

    advantages, factors, directions = [], [], []
    for b in range(2):
        for t in range(3):
            weights = logits[b, t].detach().exp().tolist()
            p = [weight / sum(weights) for weight in weights]
            token = int(tokens[b, t])
            advantages.append(float(rewards[token]) - sum(q * float(r) for q, r in zip(p, rewards, strict=True)))
            factors.append(min(p[token] / float(actor[b, t].exp()), MAX_RATIO))
            directions.append([float(i == token) - q for i, q in enumerate(p)])
    mean = sum(advantages) / 6
    spread = (sum((each - mean) ** 2 for each in advantages) / 5) ** 0.5
    rows = [
        [-factor * advantage / (spread + 1e-6) / 6 * each for each in direction]
        for factor, advantage, direction in zip(factors, advantages, directions, strict=True)
    ]
    expected = torch.tensor(rows, dtype=torch.float64).view(2, 3, 5)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_logits_are_those_that_chose_the_tokens_whatever_the_lengths() -> None:
    model = tiny_llama(seed=0, dtype=torch.float32)
    samples = [*draw(model, (5, 6, 7, 8), 1, 4, seed=1), *draw(model, (9,), 1, 4, seed=2)]
    with torch.no_grad():
        logits = sampled_logits(model, samples)
    chosen = logits.log_softmax(-1).gather(-1, torch.tensor([each.token_ids for each in samples])[..., None])
    torch.testing.assert_close(chosen[..., 0], torch.tensor([each.logprobs for each in samples]), rtol=1e-4, atol=1e-4)


def test_steps_raise_the_reward() -> None:
    model = tiny_llama(seed=0, dtype=torch.float32)
    trainer = Trainer(model, EVEN, learning_rate=2e-3)
    reports = [trainer.step(draw(model, (3, 4), 32, 8, seed=step)) for step in range(6)]
    assert abs(reports[0].ratio - 1.0) < 1e-3  # drawn from the masters themselves
    after = reward_of(draw(model, (3, 4), 32, 8, seed=1000), EVEN)
    assert after > reports[0].reward + 0.2


def test_short_words_are_a_space_and_up_to_four_letters() -> None:
    texts = (" the", " a", " they", " there", "the", " 12", " ", "", " it's", "\n")
    assert [text for text in texts if is_short_word(text)] == [" the", " a", " they"]
