"""Generation engine of one replica: one Engine and one engine thread a rank, all in lock-step.

    leader's callers      submit, request_pause, resume     state under one lock
    leader's thread       decides the next command          _decide
    every rank's thread   command -> action -> report       service.lockstep carries both

A replica runs one command after another on all its ranks, so whatever the leader names holds for all of them: every
rank pauses after the same step, and ranks whose forward is collective run as many forwards as each other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal

import torch
import torch.distributed as dist

from weight_update.errors import BusyError, MemberError

from .lockstep import Command, Kind, Link, Report, describe
from .work import Entry, Out, P, Request, Running, Start, Stream, Worker

CommitBetween = Literal["steps", "samples"]


class Engine(Generic[P, Out]):
    """Generates on one rank; rank 0 of the replica leads and is the only one that takes requests.

    worker          what is generated; its refresh is called in the engine thread of every rank while the replica
                    stands at a step boundary
    group           carries CPU tensors, belongs to this engine alone (see Link); its timeout is how long a hung
                    peer goes unnoticed, and must exceed the slowest step and refresh; a dead one is seen at once
    commit_between  "steps": a pause stops running sequences after a step; "samples": it first lets them end, and
                    requests that came later wait
    keepalive_s     an idle or paused leader gives a sign this often; well below the group's timeout
    """

    def __init__(
        self,
        worker: Worker[P, Out],
        *,
        group: dist.ProcessGroup | None,
        rank: int,
        world: int,
        version: int,
        commit_between: CommitBetween = "steps",
        keepalive_s: float = 5.0,
    ) -> None:
        self.rank, self.world, self.commit_between = rank, world, commit_between
        self._worker = worker
        self._link = Link(group, rank=rank, world=world, max_batch=worker.max_batch)
        self._keepalive_s = keepalive_s
        self._version, self._step, self._state = version, 0, "stopped"
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # guards all below, and the three above
        self._stopping = self._pausing = False  # asked for
        self._standing = False  # paused, and no refresh runs
        self._held = False  # the last resume was told to stay paused
        self._resume: Command | None = None
        self._failure = ""
        self._waiting: deque[Request[Out]] = deque()
        self._running: dict[int, Running[Out]] = {}  # by key
        self._next_key = 0

    # ------------------------------------------------------------ what callers see, on every rank

    @property
    def version(self) -> int:
        """Version of the weights that forward uses."""
        return self._version

    @property
    def state(self) -> str:
        """serving, paused, stopped, or "failed: reason"."""
        return self._state

    @property
    def step(self) -> int:
        """Number of the step that runs, or ran last; the same on all ranks when paused."""
        return self._step

    @property
    def num_sequences(self) -> int:
        """Unfinished sequences: of the replica, waiting ones included, on the leader; of this rank elsewhere."""
        if self.rank:
            return self._worker.num_sequences
        with self._changed:
            return len(self._running) + sum(len(request.work) for request in self._waiting)

    @property
    def pausing(self) -> bool:
        """Whether a pause was asked for, on the leader; running sequences may still be on their way to it."""
        return self._pausing

    @property
    def rpc(self) -> str:
        """The call of the Generation service that this engine answers."""
        return self._worker.rpc

    def warm_up(self) -> None:
        """Compile what the first request would wait for. On every rank at once, before any weights are published."""
        self._worker.warm_up()

    def start(self) -> None:
        """Start the engine thread."""
        with self._changed:
            if self._thread is not None:
                raise RuntimeError("engine start: already started once; make a new Engine")
            self._state = "serving"
            self._thread = threading.Thread(target=self._run, name=f"engine-{self.rank}", daemon=True)
            self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the engine thread: the leader stops all ranks, a follower waits for that. Returns in any case."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        hung = thread is not None and thread.is_alive()
        self._end(f"failed: engine thread of rank {self.rank} ran on {timeout_s} s after stop" if hung else "stopped")

    def wait_paused(self, timeout: float | None = None) -> bool:
        """True once this rank stands at the boundary and touches no weights; False when time ran out."""
        with self._changed:
            return self._wait(lambda: self._standing, timeout)

    def wait_resumed(self, version: int, timeout: float | None = None) -> bool:
        """True once this rank has taken up `version` after a resume (told to stay paused or not); False out of time."""
        with self._changed:
            return self._wait(lambda: self._version == version and (self._held or self._state == "serving"), timeout)

    # ------------------------------------------------------------ what callers see, on the leader

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Stream[Out]:
        """Generate what the worker's `request` makes of the arguments; all of it arrives in one stream, step by step.

        Dropping or cancelling the stream frees its sequences.
        """
        self._require_leader("submit")
        request = Request(work=self._worker.request(*args, **kwargs))
        with self._changed:
            self._require_alive()
            self._waiting.append(request)
            self._changed.notify_all()
        return Stream(request)

    def request_pause(self) -> int:
        """Ask for a pause; returns the step that runs now, or ran last. Idempotent."""
        self._require_leader("request_pause")
        with self._changed:
            self._require_alive()
            self._pausing = True
            self._changed.notify_all()
            return self._step

    def resume(
        self, version: int, *, refresh: bool = True, stay_paused: bool = False, timeout: float | None = None
    ) -> None:
        """At the step boundary every rank refreshes (unless told not to), takes `version`, and goes on.

        Returns when all ranks have. Needs no pause before it where nobody else touched the weights. With `stay_paused`
        all of this but going on.
        """
        self._require_leader("resume")
        with self._changed:
            self._require_alive()
            if self._resume is not None:
                raise BusyError(f"resume to version {version}: a resume to version {self._resume.version} is under way")
            self._resume = Command(
                kind=Kind.RESUME, step=self._step, version=version, refresh=refresh, stay_paused=stay_paused
            )
            self._changed.notify_all()
            if not self._wait(lambda: self._resume is None, timeout):
                raise MemberError(f"resume to version {version}: not all ranks refreshed within {timeout} s")

    # ------------------------------------------------------------ callers' side, under the lock

    def _require_leader(self, what: str) -> None:
        if self.rank:
            raise ValueError(f"engine {what}: expected rank 0 of the replica, got rank {self.rank}; ask the leader")

    def _require_alive(self) -> None:
        if self._state not in _ALIVE or self._stopping:
            raise MemberError(f"engine of rank {self.rank} is {'stopping' if self._stopping else self._state}")

    def _wait(self, reached: Callable[[], bool], timeout: float | None) -> bool:
        self._changed.wait_for(lambda: self._state not in _ALIVE or reached(), timeout)
        if self._state not in _ALIVE:
            raise MemberError(f"engine of rank {self.rank} is {self._state}")
        return reached()

    def _end(self, state: str) -> None:
        """Last state of this rank; whoever waits is told. A failure is not overwritten."""
        with self._changed:
            if not self._state.startswith("failed"):
                self._state = state
            requests = [*self._waiting, *{id(r.request): r.request for r in self._running.values()}.values()]
            self._waiting.clear()
            self._running.clear()
            for request in requests:
                request.outbox.put(MemberError(f"generation ended early: engine of rank {self.rank} is {self._state}"))
            self._changed.notify_all()

    # ------------------------------------------------------------ leader's thread: what comes next

    def _next_command(self) -> Command:
        with self._changed:
            command = self._decide()
            if command is None:
                self._changed.wait(self._keepalive_s)
                command = self._decide()
            return command or Command(kind=Kind.IDLE, step=self._step)

    def _decide(self) -> Command | None:
        if self._failure:
            return Command(kind=Kind.FAIL, step=self._step, reason=self._failure)
        if self._stopping:
            return Command(kind=Kind.STOP, step=self._step)
        if self._resume is not None:
            self._pausing = self._resume.stay_paused
            return replace(self._resume, step=self._step)
        if self._standing:
            return None
        if self._pausing and not (self._running and self.commit_between == "samples"):
            return Command(kind=Kind.PAUSE, step=self._step)
        return self._step_command() if self._waiting or self._running else None

    def _step_command(self) -> Command:
        self._step += 1
        cancels = tuple(key for key, running in self._running.items() if running.request.cancelled)
        for key in cancels:
            del self._running[key]
        starts = tuple(start for request in self._admit() for start in self._assign(request))
        plan = self._worker.plan(self._running.values())
        return Command(kind=Kind.STEP, step=self._step, starts=starts, cancels=cancels, plan=plan)

    def _admit(self) -> list[Request[Out]]:
        """Requests that fit now, in order of arrival; none overtakes, and none joins those that a pause waits for."""
        self._waiting = deque(request for request in self._waiting if not request.cancelled)
        room = 0 if self._pausing else self._worker.max_batch - len(self._running)
        admitted: list[Request[Out]] = []
        while self._waiting and len(self._waiting[0].work) <= room:
            admitted.append(self._waiting.popleft())
            room -= len(admitted[-1].work)
        return admitted

    def _assign(self, request: Request[Out]) -> list[Start]:
        """Sequences round-robin over the ranks, going on where the last request ended: keys count up, too."""
        first, size = self._next_key, len(request.work)
        self._next_key += size
        for index in range(size):
            rank = (first + index) % self.world
            self._running[first + index] = Running(request=request, index=index, rank=rank)
        shares = [range((rank - first) % self.world, size, self.world) for rank in range(self.world)]
        return [request.work.share(rank, first, indices) for rank, indices in enumerate(shares) if indices]

    # ------------------------------------------------------------ every rank's thread

    def _run(self) -> None:
        try:
            # Not inference_mode: what a refresh allocates must stay writable for others.
            with torch.no_grad():
                while self._turn():
                    pass
        except BaseException as error:
            reason = f"rank {self.rank}, step {self._step}: {describe(error)}"
            self._end(f"failed: {reason}")
            if self.rank == 0:
                self._link.exchange(Command(kind=Kind.FAIL, step=self._step, reason=reason))

    def _turn(self) -> bool:
        """One command on this rank; False after the last."""
        command = self._link.exchange(self._next_command() if self.rank == 0 else None)
        if self.rank:
            self._follow(command)
        goes_on = _ACTIONS[command.kind](self, command)
        if self._link.lost and not self._failure:  # in a turn without reports
            self._failure = "; ".join(f"rank {rank} is {why}" for rank, why in self._link.lost.items())
        return goes_on

    def _follow(self, command: Command) -> None:
        self._step += command.kind is Kind.STEP
        if command.step != self._step and command.kind is not Kind.FAIL:
            raise MemberError(f"out of step: the leader named step {command.step}, this rank is at {self._step}")

    def _idle(self, command: Command) -> bool:
        return True

    def _advance(self, command: Command) -> bool:
        starts = [start for start in command.starts if start.rank == self.rank]
        report = self._attempt(lambda: self._worker.step(starts, command.cancels, command.plan))
        reports = self._link.collect(report)
        with self._changed:
            if self.rank == 0 and self._agree(reports):
                self._deliver(reports)
        return True

    def _stand(self, command: Command) -> bool:
        with self._changed:
            self._state, self._standing, self._held = "paused", True, False
            self._changed.notify_all()
        return True

    def _refresh(self, command: Command) -> bool:
        with self._changed:
            self._standing = False
        renewed = command.version != self._version
        report = self._attempt(lambda: self._renew(command.refresh, renewed))
        with self._changed:
            if not report.error:
                self._version, self._held, self._standing = command.version, command.stay_paused, command.stay_paused
                self._state = "paused" if command.stay_paused else "serving"
                self._changed.notify_all()
        # Only now, so that when the leader's resume returns every rank shows the new version.
        reports = self._link.collect(report)
        with self._changed:
            if self.rank == 0 and self._agree(reports):
                for running in self._running.values() if renewed else ():
                    running.renew(self._worker.on_commit)
                self._resume = None
                self._changed.notify_all()
        return True

    def _renew(self, refresh: bool, renewed: bool) -> None:
        if refresh:
            self._worker.refresh()
        if renewed:
            self._worker.renew()

    def _finish(self, command: Command) -> bool:
        self._end(f"failed: {command.reason}" if command.kind is Kind.FAIL else "stopped")
        return False

    def _attempt(self, work: Callable[[], Sequence[Entry] | None]) -> Report:
        """Report of `work`. An exception travels as text, so that no rank leaves the lock-step by itself."""
        try:
            return Report(step=self._step, entries=tuple(work() or ()))
        except Exception as error:
            return Report(step=self._step, error=describe(error))

    # ------------------------------------------------------------ leader's thread: what came back

    def _agree(self, reports: Sequence[Report]) -> bool:
        """Whether all ranks did this step without error; if not, the next command is FAIL."""
        errors = [(rank, report.error) for rank, report in enumerate(reports) if report.error]
        strays = [(rank, f"reports step {r.step}") for rank, r in enumerate(reports) if r.step != self._step]
        problems = "; ".join(f"rank {rank}: {text}" for rank, text in errors + strays)
        self._failure = f"step {self._step}: {problems}" if problems else ""
        return not problems

    def _deliver(self, reports: Sequence[Report]) -> None:
        entries = [entry for report in reports for entry in report.entries]
        if {entry.key for entry in entries} != self._running.keys():
            self._failure = f"step {self._step}: expected {len(self._running)} sequences to go on, got {len(entries)}"
            return
        for entry in entries:
            running = self._running[entry.key]
            running.emit(entry, self._version)
            if entry.last:
                del self._running[entry.key]


_ALIVE = frozenset({"serving", "paused"})

_ACTIONS: dict[Kind, Callable[[Engine[..., Any], Command], bool]] = {
    Kind.IDLE: Engine._idle,
    Kind.STEP: Engine._advance,
    Kind.PAUSE: Engine._stand,
    Kind.RESUME: Engine._refresh,
    Kind.STOP: Engine._finish,
    Kind.FAIL: Engine._finish,
}
