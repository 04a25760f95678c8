"""The seam between an engine and what it generates: tokens (service.sampling) or latents (service.denoising).

    Worker     one a rank: the state of its sequences; a step goes on with each of them
    Work       one request on the leader: how it is shared out to the ranks, and what its client gets

A sequence is a prompt with its tokens, or a sample with its latents. The engine knows it by its key.
"""

from __future__ import annotations

import queue
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar

Out = TypeVar("Out")
Out_co = TypeVar("Out_co", covariant=True)
P = ParamSpec("P")

# What a running sequence does when the weights change: goes on with what it has, computes its KV anew, or begins again.
OnCommit = Literal["continue", "recompute", "restart"]


class Start(Protocol):
    """The share of one request that one rank does: a dataclass of numbers, texts, bytes, and tuples of them."""

    @property
    def rank(self) -> int: ...
    @property
    def keys(self) -> tuple[int, ...]: ...


class Entry(Protocol):
    """What one step did to one sequence; `last` when the sequence ends with it."""

    @property
    def key(self) -> int: ...
    @property
    def last(self) -> bool: ...


class Work(Protocol[Out_co]):
    """A checked request."""

    def __len__(self) -> int:
        """Number of its sequences."""

    def share(self, rank: int, first_key: int, indices: Sequence[int]) -> Start:
        """What `rank` does of it: the sequences `indices`, whose keys are first_key + index."""

    def output(self, entry: Any, running: Running[Any]) -> Out_co | None:
        """What the client gets for one step of a sequence, if anything; running: with this step's version."""


class Worker(Protocol[P, Out_co]):
    """All sequences of one rank, and what a request may ask for."""

    rpc: str  # of the Generation service
    max_batch: int  # sequences that run at once on the whole replica
    on_commit: OnCommit

    @property
    def num_sequences(self) -> int:
        """Unfinished ones on this rank."""

    def request(self, *args: P.args, **kwargs: P.kwargs) -> Work[Out_co]:
        """Check a request; raises one ValueError with everything that is wrong with it."""

    def plan(self, running: Collection[Running[Any]]) -> int:
        """On the leader, before each step: one number, the worker's own, that the step of every rank is given."""

    def step(self, starts: Sequence[Any], cancels: Collection[int], plan: int) -> Sequence[Entry]:
        """Take in, free, and go on with every sequence by one step; one entry for each."""

    def refresh(self) -> None:
        """Make new weights visible to forward. Between two steps, on every rank at once; may be collective."""

    def renew(self) -> None:
        """After a refresh that brought another version: do with the running sequences what `on_commit` says."""

    def warm_up(self) -> None:
        """Run a forward of everything once, before the first request. On every rank at once; may be collective."""


@dataclass(slots=True, kw_only=True, eq=False)
class Request(Generic[Out]):
    """One submitted request. The engine holds this and not the stream, so that an abandoned stream is noticed."""

    work: Work[Out]
    num_open: int = field(init=False)
    cancelled: bool = False  # written by the client, read by the engine before each step
    outbox: queue.SimpleQueue[Out | Exception | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.num_open = len(self.work)


@dataclass(slots=True, kw_only=True)
class Running(Generic[Out]):
    """One sequence that a rank goes on with. index: in the request.

    versions: those of its steps since it began, or began again. state_from: the first of these steps whose version is
    still in the sequence's state (a KV).
    """

    request: Request[Out]
    index: int
    rank: int
    versions: list[int] = field(default_factory=list)
    state_from: int = 0

    def renew(self, on_commit: OnCommit) -> None:
        """The next step is the first with other weights."""
        if on_commit == "restart":
            self.versions.clear()
        if on_commit == "recompute":
            self.state_from = len(self.versions)

    def emit(self, entry: Entry, version: int) -> None:
        """Hand what one step did to the client."""
        self.versions.append(version)
        output = self.request.work.output(entry, self)
        if output is not None:
            self.request.outbox.put(output)
        self.request.num_open -= entry.last
        if not self.request.num_open:
            self.request.outbox.put(None)


class Stream(Iterator[Out]):
    """What one request gives, as it comes; ends after the last, raises MemberError when the engine fails.

    One reader at a time. cancel() may come from any thread; leaving a `with` block and dropping the stream cancel too.
    """

    def __init__(self, request: Request[Out]) -> None:
        self._request = request
        self._ended = False

    def __next__(self) -> Out:
        if self._ended:
            raise StopIteration
        item = self._request.outbox.get()
        if item is not None and not isinstance(item, Exception):
            return item
        self._ended = True
        if item is None:
            raise StopIteration
        raise item

    def cancel(self) -> None:
        """Free the request's sequences before the next step, and end the stream. Harmless when it ended."""
        self._request.cancelled = True
        self._request.outbox.put(None)

    def __enter__(self) -> Stream[Out]:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()
