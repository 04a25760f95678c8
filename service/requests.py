"""A request for tokens: its limits, its shares, and what one step of a sequence is to the rank and to the client."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from .work import Running

# Outside of these a temperature overflows float32 logits, or is a mistake.
_TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOut:
    """One token of one sequence. `version` is that of the weights that produced it.

    sequence is the index of its prompt in the request, position that of the token in the sequence: it falls back to 0
    where a sequence begins again. kv_versions, with the last token only, are all versions in the sequence's KV.
    """

    sequence: int
    position: int
    token_id: int
    logprob: float
    version: int
    last: bool
    kv_versions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one engine can take."""

    max_batch: int
    max_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The share of one request that one rank decodes. `keys` name sequences within the engine, `seeds` are theirs."""

    rank: int
    keys: tuple[int, ...]
    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    ignore_eos: bool


class Sampled(NamedTuple):
    """One new token of the sequence `key`; `last` when the sequence ends with it."""

    key: int
    token_id: int
    logprob: float
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """One checked request for tokens (see service.work.Work)."""

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool

    def __len__(self) -> int:
        return len(self.prompts)

    def share(self, rank: int, first_key: int, indices: Sequence[int]) -> Start:
        """What `rank` decodes: the prompts `indices`."""
        return Start(
            rank=rank,
            keys=tuple(first_key + index for index in indices),
            prompts=tuple(self.prompts[index] for index in indices),
            seeds=tuple(sequence_seed(self.seed, index) for index in indices),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            ignore_eos=self.ignore_eos,
        )

    def output(self, entry: Sampled, running: Running[Any]) -> TokenOut:
        """A token. Each is one forward, and each forward writes one version's KV."""
        versions = running.versions
        return TokenOut(
            sequence=running.index,
            position=len(versions) - 1,
            token_id=entry.token_id,
            logprob=entry.logprob,
            version=versions[-1],
            last=entry.last,
            kv_versions=tuple(sorted(set(versions[running.state_from :]))) if entry.last else (),
        )


def sequence_seed(seed: int, index: int) -> int:
    """Seed of sequence `index` of a request. Hashed, since torch's CPU generator keeps only the low 32 bits."""
    return int.from_bytes(blake2b(f"{seed}:{index}".encode(), digest_size=8).digest(), "little")


def check_request(limits: Limits, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> None:
    """Raise one ValueError with everything that is wrong with a request."""
    room = limits.max_tokens - max_new_tokens
    low, high = _TEMPERATURES
    checks = {
        "no prompts: expected at least one": len(prompts) > 0,
        f"too many prompts: expected at most {limits.max_batch}, got {len(prompts)}; split the request": (
            len(prompts) <= limits.max_batch
        ),
        f"max_new_tokens: expected 1 to {limits.max_tokens - 1}, got {max_new_tokens}": (
            1 <= max_new_tokens < limits.max_tokens
        ),
        f"temperature: expected 0 or {low} to {high}, got {temperature}": (
            temperature == 0 or (math.isfinite(temperature) and low <= temperature <= high)
        ),
    }
    problems = [text for text, passed in checks.items() if not passed]
    for index, prompt in enumerate(prompts):
        problems += prompt_problems(limits, f"prompt {index}", prompt, room)
    if problems:
        raise ValueError("\n  - ".join([f"generation request: {len(problems)} problem(s)", *problems]))


def prompt_problems(limits: Limits, where: str, prompt: Sequence[int], room: int) -> list[str]:
    """What is wrong with one prompt; `room` is what max_new_tokens leaves of max_tokens."""
    strays = [token for token in prompt if not 0 <= token < limits.vocab_size]
    checks = {
        f"{where} is empty: expected at least one token": len(prompt) > 0,
        f"{where} is too long: {len(prompt)} tokens, max_new_tokens leaves {room} of {limits.max_tokens}": (
            len(prompt) <= room or room < 1
        ),
        f"{where}: token ids outside 0..{limits.vocab_size - 1}: {strays[:5]}": not strays,
    }
    return [text for text, passed in checks.items() if not passed]
