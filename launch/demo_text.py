"""The demo's usual subject: SmolLM2-135M writes, and learns to use short words."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import AutoTokenizer

from protos import transfuse_pb2 as pb
from quant.checkpoint import open_checkpoint
from weight_update.client import Pusher

from .demo import Prepared, Shown, Step, Subject
from .progress import Bars
from .rpc import generate
from .trainer import SHORT_LETTERS, Sample, Trainer, load_policy, reward_of, short_words

MODEL = "smollm2"
NUM_TOKENS = 32
PROMPTS = (
    "Once upon a time",
    "My grandmother used to say that",
    "In the small town by the river,",
    "When the train arrived,",
    "The morning after the storm,",
    "The old scientist opened the door and",
    "Deep in the forest,",
    "On the last day of summer,",
)
NUM_SHOWN = 3  # prompts whose text is shown before and after
SHOWN_TEMPERATURE, SHOWN_SEED = 0.7, 7


class TextSession:
    """One trainer and the service that it feeds."""

    def __init__(self, address: str, bars: Bars) -> None:
        config_dir = open_checkpoint(MODEL).config_dir
        tokenizer: Any = AutoTokenizer.from_pretrained(config_dir)
        self._address = address
        self._bars = bars
        self._prompts = [tuple(tokenizer(prompt).input_ids) for prompt in PROMPTS]
        self._trainer = Trainer(load_policy(config_dir), short_words(tokenizer))
        self._pusher = Pusher(address, on_progress=lambda phase, done, total: bars.update("push", done, total))

    def step(self, number: int) -> Step:
        """Sample from the actors, learn, push."""
        start_s = time.perf_counter()
        samples = self.sample(seed=number)
        sampled_s = time.perf_counter()
        with self._bars.show("train"):
            learned = self._trainer.step(samples)
        with self._bars.show("push"):
            pushed = self._pusher.push(self._trainer.model)
        return {
            "step": number,
            **asdict(pushed),
            "reward": learned.reward,
            "loss": learned.loss,
            "ratio": learned.ratio,
            "sample_s": sampled_s - start_s,
            "train_s": learned.seconds,
        }

    def sample(self, seed: int) -> list[Sample]:
        """One sequence a prompt, with the actors' log-probabilities."""
        tokens = self._tokens(self._prompts, temperature=1.0, seed=seed)
        return [
            Sample(
                prompt_ids=prompt,
                token_ids=tuple(token.token_id for token in drawn),
                logprobs=tuple(token.logprob for token in drawn),
            )
            for prompt, drawn in zip(self._prompts, tokens, strict=True)
        ]

    def reward(self, seed: int) -> float:
        """Of fresh samples from the current version."""
        return reward_of(self.sample(seed), self._trainer.rewards)

    def show(self) -> list[Shown]:
        """What the actors write after the first prompts, for people to read."""
        shown = self._prompts[:NUM_SHOWN]
        drawn = self._tokens(shown, temperature=SHOWN_TEMPERATURE, seed=SHOWN_SEED)
        texts = ["".join(token.text for token in tokens) for tokens in drawn]
        return [
            Shown(line=f"{prompt}{' '.join(text.splitlines())}", html=text_html(prompt, text))
            for prompt, text in zip(PROMPTS, texts, strict=False)
        ]

    def _tokens(self, prompts: Sequence[Sequence[int]], *, temperature: float, seed: int) -> list[list[pb.Token]]:
        request = pb.GenerateRequest(
            prompts=[pb.Prompt(token_ids=prompt) for prompt in prompts],
            max_new_tokens=NUM_TOKENS,
            temperature=temperature,
            seed=seed,
            ignore_eos=True,
        )
        drawn: list[list[pb.Token]] = [[] for _ in prompts]
        with self._bars.show("sample"):
            for done, token in enumerate(generate(self._address, request), 1):
                del drawn[token.sequence][token.position :]  # of a sequence that begins again
                drawn[token.sequence].append(token)
                self._bars.update("sample", done, NUM_TOKENS * len(prompts))
        return drawn


def text_html(prompt: str, text: str) -> str:
    """A prompt and what follows it."""
    return f'<p><span class="prompt">{html.escape(prompt)}</span>{html.escape(text)}</p>'


TEXT = Subject(
    title=MODEL,
    reward_means=f"Reward: the share of sampled tokens that are a word of at most {SHORT_LETTERS} letters.",
    shown="Text",
    note="By the quantized actors, with the same seed and temperature.",
    prepare=lambda scratch, bars: Prepared(model=MODEL, session=lambda address: TextSession(address, bars)),
)
