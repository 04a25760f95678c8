"""Prometheus metrics of a coordinator and of a rank, under the project's words. One table names them all.

What can be looked up is looked up when somebody scrapes; only what would be gone by then is counted as it happens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from protos import transfuse_pb2 as pb
from weight_update.errors import DigestError, VersionError

from .wire import REFUSALS

if TYPE_CHECKING:
    from .coordinator import CoordinatorShell
    from .rank import RankServer

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
STATES = ("serving", "paused", "draining", "joining", "starting", "fenced")
SAMPLED = 64  # global scales that a rank looks at for the drift

Samples = Iterator[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row. of: coordinator or rank. kind: gauge, counter or histogram; a counter's name ends with _total."""

    name: str
    of: str
    kind: str
    means: str
    labels: tuple[str, ...] = ()


METRICS = (
    Metric(name="transfuse_version", of="coordinator", kind="gauge", means="committed version"),
    Metric(name="transfuse_durable_version", of="coordinator", kind="gauge", means="newest version in the store"),
    Metric(name="transfuse_lost", of="coordinator", kind="gauge", means="1 while no replica holds the version"),
    Metric(name="transfuse_store_failing", of="coordinator", kind="gauge", means="1 while the store cannot write"),
    Metric(name="transfuse_uptime_s", of="coordinator", kind="gauge", means="seconds since the coordinator started"),
    Metric(name="transfuse_transaction_s", of="coordinator", kind="gauge", means="age of the open push, 0 for none"),
    Metric(name="transfuse_replica_version", of="coordinator", kind="gauge", means="its version", labels=("replica",)),
    Metric(
        name="transfuse_replica_state", of="coordinator", kind="gauge", means="1 for its state",
        labels=("replica", "state"),
    ),
    Metric(
        name="transfuse_num_sequences", of="coordinator", kind="gauge", means="running sequences", labels=("replica",)
    ),
    Metric(
        name="transfuse_events_total", of="coordinator", kind="counter", means="events by kind", labels=("kind",)
    ),
    Metric(
        name="transfuse_digests_total", of="coordinator", kind="counter",
        means="versions whose installed digests were the trainer's (verified) or not (failed)", labels=("outcome",),
    ),
    Metric(name="transfuse_wire_bytes_total", of="coordinator", kind="counter", means="wire bytes of commits"),
    Metric(name="transfuse_logical_bytes_total", of="coordinator", kind="counter", means="logical bytes of commits"),
    Metric(name="transfuse_commit_s", of="coordinator", kind="histogram", means="seconds from begin to decide"),
    Metric(name="transfuse_pause_s", of="rank", kind="histogram", means="seconds in which it did not serve"),
    Metric(name="transfuse_phase_s", of="rank", kind="histogram", means="seconds of a phase", labels=("phase",)),
    Metric(name="transfuse_received_bytes_total", of="rank", kind="counter", means="payload of chunks"),
    Metric(name="transfuse_passed_bytes_total", of="rank", kind="counter", means="sent on to the next rank of a chain"),
    Metric(name="transfuse_staged_bytes", of="rank", kind="gauge", means="staged of the open push"),
    Metric(name="transfuse_planned_bytes", of="rank", kind="gauge", means="planned peak of the open push"),
    Metric(name="transfuse_reserved_bytes", of="rank", kind="gauge", means="kept between pushes"),
    Metric(name="transfuse_streams", of="rank", kind="gauge", means="open streams"),
    Metric(
        name="transfuse_credit_bytes", of="rank", kind="gauge", means="payload that may come now",
        labels=("trainer_rank",),
    ),
    Metric(name="transfuse_damaged", of="rank", kind="gauge", means="1 while the scrub's find is not replaced"),
    Metric(
        name="transfuse_scale_drift", of="rank", kind="gauge",
        means=f"largest relative change of {SAMPLED} global scales since the version before",
    ),
    Metric(name="transfuse_errors_total", of="both", kind="counter", means="refused calls by code", labels=("code",)),
)  # fmt: skip
ROWS: Mapping[str, Metric] = {row.name: row for row in METRICS}


class Exposition:
    """The metrics of one process. looked: name -> samples of a gauge, as (label values, value), asked at a scrape."""

    def __init__(self, of: str, looked: Mapping[str, Callable[[], Samples]]) -> None:
        self._looked = looked
        self._registry = CollectorRegistry()
        self._counted: dict[str, Any] = {}
        self._refused: dict[str, int] = {}
        for row in METRICS:
            if row.of not in (of, "both") or row.kind == "gauge":
                continue
            make: Any = {"counter": Counter, "histogram": Histogram}[row.kind]
            more = {"buckets": SECONDS} if row.kind == "histogram" else {}
            self._counted[row.name] = make(row.name, row.means, row.labels, registry=self._registry, **more)
        self._registry.register(self)

    def add(self, name: str, value: float, *labels: str) -> None:
        """Count."""
        metric = self._counted[name]
        (metric.labels(*labels) if labels else metric).inc(value)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """One more of a histogram."""
        metric = self._counted[name]
        (metric.labels(*labels) if labels else metric).observe(value)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """For the registry: what is looked up now."""
        for name, samples in self._looked.items():
            family = GaugeMetricFamily(name, ROWS[name].means, labels=ROWS[name].labels)
            for labels, value in samples():
                family.add_metric(labels, value)
            yield family

    def text(self) -> tuple[str, bytes]:
        """Content type and body of a scrape."""
        for code, count in list(REFUSALS.items()):
            self.add("transfuse_errors_total", count - self._refused.get(code, 0), code)
            self._refused[code] = count
        return CONTENT_TYPE_LATEST, generate_latest(self._registry)


# ---------------------------------------------------------------- the coordinator


class CoordinatorMetrics(Exposition):
    """status: what Control.Status answers."""

    def __init__(self, shell: CoordinatorShell, status: Callable[[], pb.StatusReply]) -> None:
        self._shell, self._status, self._seen = shell, status, pb.StatusReply()
        values: Mapping[str, Callable[[pb.StatusReply], float]] = {
            "transfuse_version": lambda status: status.version,
            "transfuse_durable_version": lambda status: status.durable_version,
            "transfuse_lost": lambda status: bool(status.lost),
            "transfuse_store_failing": lambda status: bool(status.store),
            "transfuse_uptime_s": lambda status: status.uptime_s,
            "transfuse_transaction_s": lambda status: (
                max(0.0, time.time() - status.transaction_since_s) if status.transaction_since_s else 0.0
            ),
        }
        looked = {name: self._one(value) for name, value in values.items()}
        replicas: Mapping[str, Callable[[pb.ReplicaStatus], Samples]] = {
            "transfuse_replica_version": lambda each: iter([((str(each.replica),), each.version)]),
            "transfuse_num_sequences": lambda each: iter([((str(each.replica),), each.num_sequences)]),
            "transfuse_replica_state": lambda each: (
                ((str(each.replica), state), float(each.state == state)) for state in STATES
            ),
        }
        looked |= {name: self._each(samples) for name, samples in replicas.items()}
        super().__init__("coordinator", looked)
        shell.listen(self._saw)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One status for all gauges of a scrape."""
        self._seen = self._status()
        yield from super().collect()

    def _one(self, value: Callable[[pb.StatusReply], float]) -> Callable[[], Samples]:
        return lambda: iter([((), float(value(self._seen)))])

    def _each(self, samples: Callable[[pb.ReplicaStatus], Samples]) -> Callable[[], Samples]:
        return lambda: (sample for each in self._seen.replicas for sample in samples(each))

    def _saw(self, event: pb.Event) -> None:
        self.add("transfuse_events_total", 1, event.kind)
        if event.kind == "abort" and event.text.startswith(f"[{DigestError.code}]"):
            self.add("transfuse_digests_total", 1, "failed")
        if event.kind == "decide":
            decision = self._shell.index.decision(event.version)
            self.add("transfuse_digests_total", 1, "verified")
            self.add("transfuse_wire_bytes_total", decision.wire_bytes)
            self.add("transfuse_logical_bytes_total", decision.logical_bytes)
            self.observe("transfuse_commit_s", decision.seconds)


# ---------------------------------------------------------------- a rank


class RankMetrics(Exposition):
    """Of one rank."""

    def __init__(self, rank: RankServer) -> None:
        self._rank = rank
        self._drift = Drift(rank)
        values: Mapping[str, Callable[[], float]] = {
            "transfuse_staged_bytes": lambda: rank.receiver.staged_bytes,
            "transfuse_planned_bytes": lambda: rank.timing.planned_bytes if rank.member.state != "idle" else 0,
            "transfuse_reserved_bytes": lambda: rank.receiver.reserved_bytes,
            "transfuse_streams": lambda: len(rank.gauges.streams()),
            "transfuse_damaged": lambda: bool(rank.damage),
            "transfuse_scale_drift": self._drift.look,
        }
        looked = {name: self._one(value) for name, value in values.items()}
        looked["transfuse_credit_bytes"] = lambda: (
            ((str(each.trainer_rank),), each.credit_bytes - each.received_bytes) for each in rank.gauges.streams()
        )
        super().__init__("rank", looked)

    @staticmethod
    def _one(value: Callable[[], float]) -> Callable[[], Samples]:
        return lambda: iter([((), float(value()))])


class Drift:
    """How far global scales moved from one version to the next; looked at when somebody scrapes."""

    def __init__(self, rank: RankServer) -> None:
        self._rank = rank
        self._version = 0
        self._scales: dict[int, float] = {}
        self._last = 0.0

    def look(self) -> float:
        """The largest relative change between the last two versions that were looked at; 0 before there are two."""
        version = self._rank.member.version
        if version in (0, self._version):
            return self._last
        try:
            found = {index: self._scale(version, index) for index in self._sample()}
        except VersionError:
            return self._last  # a commit is in progress: the next look sees it
        pairs = [(found[i], old) for i, old in self._scales.items() if old]
        self._last = max((abs(new / old - 1.0) for new, old in pairs), default=0.0)
        self._version, self._scales = version, found
        return self._last

    def _scale(self, version: int, index: int) -> float:
        row = int(self._rank.receiver.row_start[index])
        return float(self._rank.receiver.rows(version, index, row, row + 1).view(torch.float32).flatten()[0])

    def _sample(self) -> list[int]:
        receiver = self._rank.receiver
        all_of_them = [
            index
            for index, spec in enumerate(receiver.manifest.tensors)
            if spec.dtype == "F32" and spec.num_bytes == 4 and "scale" in spec.name.rpartition(".")[2]
            and receiver.row_stop[index] > receiver.row_start[index] and "input" not in spec.name.rpartition(".")[2]
        ]
        return all_of_them[:: max(1, len(all_of_them) // SAMPLED)][:SAMPLED]
