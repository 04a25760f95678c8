"""A generation request on the leader: its limits, its state while it runs, and the stream that its client reads."""

from __future__ import annotations

import math
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .sampling import Sampled, Start, sequence_seed

# Outside of these a temperature overflows float32 logits, or is a mistake.
_TEMPERATURES = (1e-3, 1e3)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOut:
    """One token of one sequence. `version` is that of the weights that produced it.

    sequence is the index of its prompt in the request; kv_versions, with the last token only, are all versions that
    wrote into the sequence's KV.
    """

    sequence: int
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


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One submitted request. The engine holds this and not the stream, so that an abandoned stream is noticed."""

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    num_open: int = field(init=False)
    cancelled: bool = False  # written by the client, read by the engine before each step
    outbox: queue.SimpleQueue[TokenOut | Exception | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.num_open = len(self.prompts)

    def share(self, rank: int, first_key: int, indices: Sequence[int]) -> Start:
        """What `rank` decodes of this request: the prompts `indices`."""
        return Start(
            rank=rank,
            keys=tuple(first_key + index for index in indices),
            prompts=tuple(self.prompts[index] for index in indices),
            seeds=tuple(sequence_seed(self.seed, index) for index in indices),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            ignore_eos=self.ignore_eos,
        )


@dataclass(slots=True, kw_only=True)
class Running:
    """One sequence that a rank decodes."""

    request: Request
    index: int
    rank: int
    versions: set[int] = field(default_factory=set)

    def emit(self, token: Sampled, version: int) -> None:
        """Hand a token to the client. Each token is one forward, and each forward writes one version's KV."""
        self.versions.add(version)
        self.request.outbox.put(
            TokenOut(
                sequence=self.index,
                token_id=token.token_id,
                logprob=token.logprob,
                version=version,
                last=token.last,
                kv_versions=tuple(sorted(self.versions)) if token.last else (),
            )
        )
        self.request.num_open -= token.last
        if not self.request.num_open:
            self.request.outbox.put(None)


class TokenStream(Iterator[TokenOut]):
    """Tokens of one request as they come; ends after the last, raises MemberError when the engine fails.

    One reader at a time. cancel() may come from any thread; leaving a `with` block and dropping the stream cancel too.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._ended = False

    def __next__(self) -> TokenOut:
        if self._ended:
            raise StopIteration
        item = self._request.outbox.get()
        if isinstance(item, TokenOut):
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def cancel(self) -> None:
        """Free the request's sequences before the next step, and end the stream. Harmless when it ended."""
        self._request.cancelled = True
        self._request.outbox.put(None)

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


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
