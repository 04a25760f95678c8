"""One rank's side of the protocol, without I/O."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import BusyError, VersionError

# step, state before -> state after; a pair that is missing is refused, one whose states are equal was done before
MEMBER_STEPS: Mapping[tuple[str, str], str] = {
    ("open", "idle"): "open",
    ("prepare", "open"): "prepared",
    ("prepare", "prepared"): "prepared",
    ("install", "prepared"): "installed",
    ("install", "installed"): "installed",
    ("confirm", "installed"): "installed",
    ("publish", "installed"): "idle",
    ("publish", "idle"): "idle",
    ("undo", "open"): "open",
    ("undo", "prepared"): "prepared",
    ("undo", "installed"): "prepared",
    ("undo", "idle"): "idle",
    ("abort", "open"): "idle",
    ("abort", "prepared"): "idle",
    ("abort", "installed"): "idle",
    ("abort", "idle"): "idle",
}


class Member:
    """One rank's side of the protocol: which step may be done now, and whether it was done before.

    A member never times out by itself: an open one waits for its coordinator, which a new epoch replaces. Version 0 is
    what was loaded and not yet numbered; the first publish numbers it.
    """

    def __init__(self, *, version: int, epoch: int = 0) -> None:
        self.version = version
        self.epoch = epoch
        self.state = "idle"
        self.transaction = 0
        self._ended = 0  # the last transaction that is over; ids only grow
        self._results: dict[str, object] = {}

    def check(self, step: str, *, epoch: int, transaction: int, version: int) -> bool:
        """Whether `step` is to be done now (False: it was done before, `result` has the answer). Errors are
        refusals."""
        if epoch < self.epoch:
            raise VersionError(f"{step}: epoch {epoch} is over, this rank follows {self.epoch}; stop that coordinator")
        self.epoch = epoch
        if step in ("undo", "abort"):
            # Remembered even where nothing is open: a step that this one overtook on the network must not start
            # anything.
            self._ended = max(self._ended, transaction)
        elif step != "publish" and transaction <= self._ended:
            raise BusyError(f"{step}: transaction {transaction} is over on this rank; begin a new push")
        foreign = self.state != "idle" and transaction != self.transaction
        if foreign or (step, self.state) not in MEMBER_STEPS:
            raise BusyError(f"{step} of transaction {transaction}: this rank is {self.state} in {self.transaction}")
        adopts = step == "publish" and self.state == "idle" and version != self.version
        if adopts and self.version != 0:
            raise VersionError(f"publish: this rank holds {self.version} and never installed {version}; rebuild it")
        return adopts or step in ("confirm", "undo") or MEMBER_STEPS[step, self.state] != self.state

    def done(self, step: str, *, transaction: int, version: int, result: object = None) -> object:
        """Record that `step` was done, and its answer."""
        self.state = MEMBER_STEPS[step, self.state]
        self.transaction = transaction if self.state != "idle" else 0
        self.version = version if step == "publish" else self.version
        self._results = {} if self.state == "idle" else self._results | {step: result}
        return result

    def result(self, step: str) -> object:
        """The answer given when `step` was done; None for steps that answer nothing."""
        return self._results.get(step)
