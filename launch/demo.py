"""The main job on one machine: actors sample, a trainer learns from the samples and pushes, actors switch together."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from protos import transfuse_pb2 as pb
from quant.checkpoint import open_checkpoint
from service.fleet import FleetConfig
from weight_update.client import Pusher

from .interrupts import ForegroundFleet, raise_interrupts
from .progress import Bars
from .report import COLUMNS, Results, write_report
from .rpc import generate
from .trainer import SHORT_LETTERS, Sample, Trainer, load_policy, reward_of, short_words

MODEL, FORMAT, REPLICAS, RANKS = "smollm2", "nvfp4", 2, 2
LAYOUT = "trtllm,cutlass"  # one a replica: a push is in checkpoint form and serves both
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
REWARD_MEANS = f"Reward: the share of sampled tokens that are a word of at most {SHORT_LETTERS} letters."

Step = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Audience:
    """Who is told: each step as it ends, and lines of text."""

    step: Callable[[Step], None]
    say: Callable[[str], None]


class Session:
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

    def write(self) -> list[str]:
        """What the actors write after the first prompts, for people to read."""
        shown = self._prompts[:NUM_SHOWN]
        tokens = self._tokens(shown, temperature=SHOWN_TEMPERATURE, seed=SHOWN_SEED)
        return ["".join(token.text for token in drawn) for drawn in tokens]

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
                drawn[token.sequence].append(token)
                self._bars.update("sample", done, NUM_TOKENS * len(prompts))
        return drawn


def run(num_steps: int, out_dir: Path, audience: Audience) -> Path:
    """Run the whole demo; returns where the report is. Whatever it started is stopped when this returns or raises."""
    raise_interrupts()
    bars = Bars()
    with ExitStack() as stack:
        state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="transfuse-demo-")))
        config = FleetConfig(
            model=MODEL, format=FORMAT, layout=LAYOUT, replicas=REPLICAS, ranks=RANKS, state_dir=state_dir
        )
        with bars.show():
            fleet = ForegroundFleet(config, lambda what, done, total: bars.update(f"start {what}", done, total))
            stack.enter_context(fleet)
            raise_interrupts()
            bars.update("load the trainer", 0, 0)
            session = Session(fleet.address, bars)
        results = _train(session, num_steps, audience)
        with bars.show("stop"):
            stack.close()
    path = out_dir / "report.html"
    write_report(path, results)
    audience.say(f"reward {results.steps[0]['reward']:.3f} -> {results.reward_after:.3f}; report: {path}")
    return path


def _train(session: Session, num_steps: int, audience: Audience) -> Results:
    before = session.write()
    audience.say(_shown("before", before))
    steps = []
    for number in range(1, num_steps + 1):
        steps.append(session.step(number))
        audience.step(steps[-1])
    reward_after = session.reward(seed=num_steps + 1)
    after = session.write()
    audience.say(_shown("after", after))
    return Results(
        title=f"{MODEL} in {FORMAT}: {REPLICAS} replicas of {RANKS} ranks, {num_steps} policy-gradient steps",
        steps=steps,
        reward_after=reward_after,
        reward_means=REWARD_MEANS,
        texts=list(zip(PROMPTS, before, after, strict=False)),
    )


def _shown(when: str, texts: Sequence[str]) -> str:
    """The first prompts with their texts, one line each."""
    lines = [f"  {prompt}{' '.join(text.splitlines())}" for prompt, text in zip(PROMPTS, texts, strict=False)]
    return "\n".join([f"text {when}:", *lines])


def to_people() -> Audience:
    """A line a step under one header."""
    width = 11
    header = ["".join(name.rjust(width) for name in COLUMNS)]

    def step(step: Step) -> None:
        while header:
            print(header.pop())
        print("".join(show(step).rjust(width) for show in COLUMNS.values()), flush=True)

    return Audience(step=step, say=lambda text: print(text, flush=True))


def to_scripts() -> Audience:
    """One JSON object a step, and nothing else."""
    return Audience(step=lambda step: print(json.dumps(step), flush=True), say=lambda text: None)
