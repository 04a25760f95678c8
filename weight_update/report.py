"""What a push did: the value that `Pusher.push` returns, and the clock that fills it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from protos import transfuse_pb2 as pb
from sharding.cost import Prediction

if TYPE_CHECKING:
    from .attempt import Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """What a push did. Bytes and seconds are over all trainer ranks; `wire_bytes` counts every copy that they send.

    mode: full or delta. reason: why that one. phases: seconds of describe, plan, begin, transfer, prepare, commit.
    predicted: what the cost model expected of them, by the rates of this trainer's last full push; bottleneck: the
    resource that was to set the longest of them.
    carried_over: parameters outside the scope. widened: parameters that were added to the scope because their fused
    group was cut. changed_tensors: tensors of the push with new bytes, all of them in a full one. kept_bytes: what this
    trainer rank keeps of the version, in checkpoint form, so that the next push can be a delta. step: the trainer's own
    count. transports: how the bytes went, from each trainer rank to each rank, and why no better way was taken.
    passed_bytes: what ranks sent on to each other, beside wire_bytes, where they did. attempts: how often
    the push was begun: anew where the coordinator was replaced meanwhile, or replicas came or went.
    digest_verified: every rank's installed digest equalled the trainer's.
    """

    version: int
    base_version: int
    digest: str
    logical_bytes: int
    wire_bytes: int
    seconds: float
    phases: dict[str, float]
    pause_s: float
    planned_bytes: int
    replicas: list[str]
    digest_verified: bool
    carried_over: int
    mode: str = "full"
    reason: str = ""
    changed_tensors: int = 0
    kept_bytes: int = 0
    passed_bytes: int = 0
    attempts: int = 1
    step: int = 0
    merged_adapters: int = 0
    predicted: dict[str, float] = field(default_factory=dict)
    bottleneck: str = ""
    widened: list[str] = field(default_factory=list)
    timings: list[dict[str, float]] = field(default_factory=list)
    transports: list[str] = field(default_factory=list)


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def stop(self, phase: str) -> None:
        now = time.perf_counter()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> float:
        return self._last - self._start


def report_of(
    attempt: Attempt,
    begun: pb.BeginReply,
    decided: pb.DecideReply,
    *,
    wire_bytes: int,
    kept_bytes: int,
    predicted: Prediction,
) -> PushReport:
    """The report of one committed push."""
    info, plan, clock = decided.version, attempt.plan, attempt.clock
    timings = [
        {field.name: getattr(timing, field.name) for field in pb.RankTiming.DESCRIPTOR.fields}
        for timing in decided.timings
    ]
    return PushReport(
        version=info.version,
        base_version=info.base_version,
        digest=info.digest,
        logical_bytes=plan.logical_bytes,
        wire_bytes=wire_bytes,
        seconds=clock.seconds,
        phases=clock.phases,
        pause_s=info.pause_s,
        planned_bytes=begun.planned_bytes,
        replicas=list(decided.replicas),
        digest_verified=decided.digest_verified,
        carried_over=plan.carried_over,
        mode=attempt.content.mode,
        reason=attempt.reason,
        changed_tensors=attempt.num_changed,
        kept_bytes=kept_bytes,
        passed_bytes=sum(timing.passed_bytes for timing in decided.timings),
        attempts=attempt.num_begun,
        step=info.step,
        merged_adapters=plan.merged_adapters,
        predicted={name: phase.seconds for name, phase in predicted.phases.items()},
        bottleneck=predicted.bottleneck,
        widened=list(plan.widened),
        timings=timings,
        transports=attempt.links,
    )
