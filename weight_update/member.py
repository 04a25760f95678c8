"""One rank's side of the protocol, without I/O."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import BusyError, VersionError

SERVING_LEASE_S = 15.0  # how long a rank serves on without a word from its coordinator

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
    ("adopt", "idle"): "idle",
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
    """One rank's side of the protocol: which step may be done now, whether it was done before, and who may serve.

    A member never aborts by itself: an open one waits for its coordinator, which a new epoch replaces. Version 0 is
    what was loaded and not yet numbered; `adopt` numbers it.

    The right to serve is a lease. Every answer carries this rank's clock, the coordinator's next message brings that
    token back, and the lease runs from the token: however late a message arrives, the lease ends at most
    SERVING_LEASE_S after the coordinator last heard from this rank.
    """

    def __init__(self, *, version: int, epoch: int = 0) -> None:
        self.version = version
        self.epoch = epoch
        self.state = "idle"
        self.transaction = 0
        self._ended = 0  # the last transaction that is over; ids only grow
        self._results: dict[str, object] = {}
        self._round = 0  # of the message that the next two came with
        self._expected = 0  # version that the coordinator wants served
        self._token = float("-inf")

    def hello(self, *, epoch: int, round: int, version: int, token: float) -> None:
        """The coordinator's greeting: this version may be served, 0 for none."""
        self.follow("hello", epoch)
        self._grant(round, version, token)

    def serves(self, now_s: float) -> bool:
        """Whether this rank may answer requests, by its own clock."""
        return self.state != "installed" and self.grants(self.version, now_s)

    def grants(self, version: int, now_s: float) -> bool:
        """Whether the lease is for this version, and still runs."""
        return version == self._expected != 0 and now_s < self._token + SERVING_LEASE_S

    def check(
        self, step: str, *, epoch: int, transaction: int, version: int, round: int = 0, token: float = float("-inf")
    ) -> bool:
        """Whether `step` is to be done now (False: it was done before, `result` has the answer). Errors are
        refusals."""
        self.follow(step, epoch)
        if step in ("undo", "abort"):
            # Remembered even where nothing is open: a step that this one overtook on the network must not start
            # anything.
            self._ended = max(self._ended, transaction)
        elif step not in ("publish", "adopt") and transaction <= self._ended:
            raise BusyError(f"{step}: transaction {transaction} is over on this rank; begin a new push")
        foreign = self.state != "idle" and transaction != self.transaction
        if foreign or (step, self.state) not in MEMBER_STEPS:
            raise BusyError(f"{step} of transaction {transaction}: this rank is {self.state} in {self.transaction}")
        renames = step in ("publish", "adopt") and self.state == "idle" and version != self.version
        if renames and (step == "publish" or self.version):
            raise VersionError(f"{step}: this rank holds {self.version} and never installed {version}; rebuild it")
        if step in ("publish", "adopt"):
            self._grant(round, version, token)
        return renames or step in ("confirm", "undo") or MEMBER_STEPS[step, self.state] != self.state

    def done(self, step: str, *, transaction: int, version: int, result: object = None) -> object:
        """Record that `step` was done, and its answer."""
        self.state = MEMBER_STEPS[step, self.state]
        if self.state == "idle":
            self._ended = max(self._ended, transaction)
        self.transaction = transaction if self.state != "idle" else 0
        self.version = version if step in ("publish", "adopt") else self.version
        self._results = {} if self.state == "idle" else self._results | {step: result}
        return result

    def result(self, step: str) -> object:
        """The answer given when `step` was done; None for steps that answer nothing."""
        return self._results.get(step)

    def follow(self, step: str, epoch: int) -> None:
        """Refuse a coordinator that another one replaced."""
        if epoch < self.epoch:
            raise VersionError(f"{step}: epoch {epoch} is over, this rank follows {self.epoch}; stop that coordinator")
        self.epoch = epoch

    def _grant(self, round: int, version: int, token: float) -> None:
        if round >= self._round:
            self._round, self._expected, self._token = round, version, token
