"""Decoding on one rank: batches of sequences with their KV, and seeded sampling. No communication, no threads.

The log-probability of a token is that under the distribution it was drawn from: log-softmax of logits / temperature.
At temperature 0 the token is the argmax, and its log-probability is taken at temperature 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .requests import Limits, Prompts, Sampled, Start, check_request
from .work import OnCommit, Running

# A transformers causal LM, or anything that takes and gives the same: input_ids, attention_mask, position_ids,
# past_key_values, use_cache, logits_to_keep -> an object with logits and past_key_values.
Model = Callable[..., Any]


def draw(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """Token of each row by inversion: the first whose cumulative probability exceeds that row's uniform in [0, 1)."""
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Stay below the total when the product rounds up to it: a token of probability 0 is then never taken.
    target = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def pick(logits: Tensor, temperature: float, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Next token of each row of `logits` [B, V] and its log-probability. One draw a sequence and token."""
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        # On the CPU whatever the model's device: a seed then means the same everywhere.
        uniforms = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
        tokens = draw(logprobs, uniforms.to(logits.device))
    chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    if not bool(chosen.isfinite().all()):
        raise FloatingPointError("the model gave logits that are not finite; expected finite ones; verify its weights")
    return tokens, chosen


class Batch:
    """Sequences of one request on one rank, decoded together, alone with their KV.

    A request is never merged with another: its tokens do not depend, in any bit, on the traffic around it. Prompts are
    padded on the left, so that the last column holds the newest token of every sequence.
    """

    def __init__(self, start: Start, *, eos_ids: Collection[int], device: torch.device) -> None:
        self.keys = list(start.keys)
        self._start, self._device = start, device
        self._remaining = start.max_new_tokens
        self._temperature = start.temperature
        self._eos_ids = frozenset[int]() if start.ignore_eos else frozenset(eos_ids)
        self._generators = [torch.Generator().manual_seed(seed) for seed in start.seeds]
        width = max(map(len, start.prompts))
        pads = torch.tensor([width - len(prompt) for prompt in start.prompts], device=device)[:, None]
        columns = torch.arange(width, device=device)
        self._tokens = torch.tensor([(0,) * (width - len(p)) + p for p in start.prompts], device=device)
        self._input = self._tokens
        self._positions = (columns - pads).clamp_min(0)
        # None where nothing is padded: attention then takes its fast causal path.
        self._mask = columns >= pads if bool(pads.any()) else None
        self._cache: Any = None

    def step(self, model: Model) -> list[Sampled]:
        """One forward and one new token for every sequence; sequences that end leave the batch."""
        output = model(
            input_ids=self._input,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens, logprobs = pick(output.logits[:, -1], self._temperature, self._generators)
        self._cache = output.past_key_values
        self._advance(tokens)
        sampled = [
            Sampled(key, token, logprob, self._remaining == 0 or token in self._eos_ids)
            for key, token, logprob in zip(self.keys, tokens.tolist(), logprobs.tolist(), strict=True)
        ]
        self.drop(entry.key for entry in sampled if entry.last)
        return sampled

    def _advance(self, tokens: Tensor) -> None:
        self._remaining -= 1
        self._input = tokens[:, None]
        self._tokens = torch.cat([self._tokens, self._input], dim=-1)
        self._positions = self._positions[:, -1:] + 1
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=-1)

    def drop(self, keys: Iterable[int]) -> None:
        """Free the sequences `keys`, as far as they are here."""
        gone = set(keys)
        kept = [row for row, key in enumerate(self.keys) if key not in gone]
        if len(kept) == len(self.keys):
            return
        self.keys = [self.keys[row] for row in kept]
        self._generators = [self._generators[row] for row in kept]
        if not kept:
            self._cache = None
            return
        rows = torch.tensor(kept, device=self._input.device)
        self._tokens, self._input, self._positions = self._tokens[rows], self._input[rows], self._positions[rows]
        self._mask = self._mask if self._mask is None else self._mask[rows]
        if self._cache is not None:
            self._cache.batch_select_indices(rows)

    def recomputed(self) -> Batch:
        """The same, its KV forgotten: the next forward takes all tokens so far."""
        first = self._positions[:, -1:] - (self._tokens.shape[1] - 1)  # below 0 where a prompt is padded
        columns = torch.arange(self._tokens.shape[1], device=self._device)
        self._input, self._positions, self._cache = self._tokens, (columns + first).clamp_min(0), None
        return self

    def restarted(self) -> Batch:
        """From its prompts again, with the same seeds; sequences that ended or were freed stay away."""
        kept = [self._start.keys.index(key) for key in self.keys]
        prompts, seeds = self._start.prompts, self._start.seeds
        start = replace(
            self._start,
            keys=tuple(self.keys),
            prompts=tuple(prompts[i] for i in kept),
            seeds=tuple(seeds[i] for i in kept),
        )
        return Batch(start, eos_ids=self._eos_ids, device=self._device)


RENEW: Mapping[OnCommit, Callable[[Batch], Batch]] = {
    "continue": lambda batch: batch,
    "recompute": Batch.recomputed,
    "restart": Batch.restarted,
}


class Decoder:
    """All batches of one rank; a step is one forward of each (see service.work.Worker).

    model               a transformers causal LM on `device`
    on_refresh          makes new weights visible to forward (reshard, unshard, decode)
    max_tokens          of a sequence, prompt included
    vocab_size          default: that of the model's config
    on_commit           what running sequences do when the weights change
    collective_forward  forward needs every rank (FSDP-sharded): a rank without sequences runs dummy forwards
    """

    rpc = "Generate"

    def __init__(
        self,
        model: Model,
        *,
        eos_ids: Collection[int],
        on_refresh: Callable[[], None],
        max_batch: int = 32,
        max_tokens: int = 2048,
        vocab_size: int | None = None,
        device: torch.device | str = "cpu",
        on_commit: OnCommit = "continue",
        collective_forward: bool = False,
    ) -> None:
        vocab_size = vocab_size or model.config.vocab_size  # type: ignore[attr-defined]
        self.max_batch, self.on_commit = max_batch, on_commit
        self.refresh = on_refresh
        self._limits = Limits(max_batch=max_batch, max_tokens=max_tokens, vocab_size=vocab_size)
        self._model = model
        self._eos_ids = frozenset(eos_ids)
        self._device = torch.device(device)
        self._collective_forward = collective_forward
        self._batches: list[Batch] = []

    @property
    def num_sequences(self) -> int:
        return sum(len(batch.keys) for batch in self._batches)

    def request(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Prompts:
        """Tokens from every prompt, a function of weights, prompts and seed."""
        check_request(self._limits, prompts, max_new_tokens, temperature)
        return Prompts(
            prompts=tuple(tuple(map(int, prompt)) for prompt in prompts),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            ignore_eos=ignore_eos,
        )

    def plan(self, running: Collection[Running[Any]]) -> int:
        """Forwards that every rank runs at least, dummies included: peers may need this rank's."""
        if not self._collective_forward:
            return 0
        loads = Counter(rank for rank, _ in {(each.rank, id(each.request)) for each in running})
        return max(loads.values(), default=0)

    def step(self, starts: Sequence[Start], cancels: Collection[int], plan: int) -> list[Sampled]:
        """Take in, free, decode; at least `plan` forwards."""
        self._batches += [Batch(start, eos_ids=self._eos_ids, device=self._device) for start in starts]
        for batch in self._batches:
            batch.drop(cancels)
        self._prune()
        num_dummies = plan - len(self._batches)
        sampled = [entry for batch in self._batches for entry in batch.step(self._model)]
        for _ in range(num_dummies):
            self._dummy()
        self._prune()
        return sampled

    def renew(self) -> None:
        """Go on with old KV, compute it anew, or begin again."""
        self._batches = [RENEW[self.on_commit](batch) for batch in self._batches]

    def warm_up(self) -> None:
        """One forward of one token."""
        self.refresh()
        with torch.no_grad():
            self._dummy()

    def _dummy(self) -> None:
        self._model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device), use_cache=False)

    def _prune(self) -> None:
        self._batches = [batch for batch in self._batches if batch.keys]
