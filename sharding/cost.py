"""What a push costs: seconds of each phase and the resource that sets them, bytes of memory, from a plan and rates.

    work = full_work(plan, source_bytes)                 # or delta_work(plan, source_bytes, share)
    prediction = predict(work, rates)
    prediction.phases["transfer"].bottleneck

Values in, values out. In a phase the resources work at the same time, so the slowest one sets the seconds; phases
follow one another. Rates are of one rank, in bytes of what the resource handles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

from .plan import RoutePlan

Bytes = npt.NDArray[np.float64]

WINDOW_BYTES = 16 << 20  # in flight on one stream
MIN_GAIN = 1 / 3  # share of a push that passing rows on has to save: a chain of ranks waits for its slowest
SCRATCH_BYTES = 16 << 20  # of a block that is encoded or read back, and of index arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes a second of one rank; of a path that does not exist inf.

    scan: BF16 bytes whose amax is taken. encode: BF16 bytes to checkpoint form, digest included. compare: encoded bytes
    against the base. send, receive: wire bytes through gRPC, host copies included. nic_out, nic_in: wire bytes on the
    link. verify: staged bytes whose digest is taken and whose undo copy is made. install: wire bytes scattered in
    place and read back. gather: the share of nic_out that the gather of a replica's ranks reaches. tensor_s: seconds a
    tensor on the two ranks that have it. listed_s: seconds a tensor of the whole push, on every rank and the
    coordinator. round_trip_s: one call to the coordinator and its ranks.
    """

    scan: float
    encode: float
    compare: float
    send: float
    receive: float
    nic_out: float
    nic_in: float
    verify: float
    install: float
    gather: float
    tensor_s: float
    listed_s: float
    round_trip_s: float


# One rank on one core: rounded from README.md's ratios, measured on an AMD EPYC (Zen 4) with a memcpy of about
# 10 GB/s; how the seconds a tensor divide is an estimate. A scenario, or a trainer's last full push, replaces them.
HOST = Rates(
    scan=4.0e9,
    encode=1.2e9,
    compare=2.0e9,
    send=0.9e9,
    receive=0.9e9,
    nic_out=float("inf"),
    nic_in=float("inf"),
    verify=2.0e9,
    install=0.8e9,
    gather=0.7,  # gloo between two ranks whose links tc holds to 40 Mb/s
    tensor_s=130e-6,
    listed_s=30e-6,
    round_trip_s=0.01,
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """What each rank has to do, in bytes.

    source: BF16 bytes by trainer rank. kept: encoded bytes by trainer rank, once. sent, received: wire bytes by rank.
    resident: encoded bytes that each actor rank holds of what is pushed. gathered: bytes that it sends to the other
    ranks of its replica once a version, where forwards need all rows. copies: how often a row is sent. mode: full or
    delta. tensors: of the push. own_tensors: the most that a trainer rank and an actor rank have of them, together / 2.
    """

    mode: str
    source: Bytes
    kept: Bytes
    sent: Bytes
    received: Bytes
    resident: Bytes
    gathered: Bytes
    copies: float
    tensors: int
    own_tensors: float

    @property
    def wire_bytes(self) -> int:
        return int(self.sent.sum())


def full_work(plan: RoutePlan, source_bytes: npt.ArrayLike, copies: float, gathers: bool = True) -> Work:
    """All rows. source_bytes: BF16 bytes that each trainer rank encodes. copies: replicas. gathers: the ranks of a
    replica gather what they have sharded; not where each computes with its own rows, as with experts on their owner."""
    links = plan.link_bytes().astype(np.float64)
    sent, received = links.sum(axis=1), links.sum(axis=0)
    return Work(
        mode="full",
        source=np.asarray(source_bytes, np.float64),
        kept=sent / max(copies, 1.0),
        sent=sent,
        received=received,
        resident=received,
        gathered=received * (len(received) / max(copies, 1.0) - 1.0 if gathers else 0.0),
        copies=copies,
        tensors=sum(len(kind.tensors) for kind in plan.kinds),
        own_tensors=sum(float(each.max(initial=0)) for each in plan.rank_tensors()) / 2,
    )


def delta_work(full: Work, share: float) -> Work:
    """Of the bytes of every rank the given share goes over the wire, packed positions and new bytes together."""
    return replace(full, mode="delta", sent=full.sent * share, received=full.received * share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Seconds of one phase. resources: seconds that each would take alone; the bottleneck sets the phase."""

    seconds: float
    bottleneck: str
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A push as the model sees it.

    pause_s: part of the commit in which actors serve nothing. trainer_bytes, actor_bytes: the largest peak above idle
    of any rank. fan_out_s: the same push if each row travelled to one replica and was passed on from there.
    """

    mode: str
    phases: Mapping[str, Phase]
    wire_bytes: int
    pause_s: float
    trainer_bytes: int
    actor_bytes: int
    fan_out_s: float

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def bottleneck(self) -> str:
        """Of the longest phase."""
        return max(self.phases.values(), key=lambda phase: phase.seconds).bottleneck

    @property
    def fan_out_gain(self) -> float:
        """The share of the seconds that passing rows on would save."""
        return 1.0 - self.fan_out_s / self.seconds


def predict(work: Work, rates: Rates) -> Prediction:
    """Seconds, bottlenecks and memory of one push."""
    phases = _phases(work, rates, fan_out=False)
    staged = work.received.max(initial=0.0)
    undo = work.resident.max(initial=0.0) if work.mode == "full" else staged
    fan_out = _phases(work, rates, fan_out=True) if work.copies > 1 else phases
    return Prediction(
        mode=work.mode,
        phases=phases,
        wire_bytes=work.wire_bytes,
        pause_s=phases["commit"].seconds,
        trainer_bytes=int(work.kept.max(initial=0.0) + WINDOW_BYTES * len(work.received) + SCRATCH_BYTES),
        actor_bytes=int(staged + undo + WINDOW_BYTES + SCRATCH_BYTES),
        fan_out_s=min(sum(phase.seconds for phase in each.values()) for each in (phases, fan_out)),
    )


def _phases(work: Work, rates: Rates, *, fan_out: bool) -> dict[str, Phase]:
    is_delta = work.mode == "delta"
    most = {name: float(getattr(work, name).max(initial=0.0)) for name in ("source", "kept", "sent", "received")}
    sent = most["sent"] / (work.copies if fan_out else 1.0)
    passed_on = most["received"] if fan_out else 0.0
    turn, tensors_s = rates.round_trip_s, rates.tensor_s * work.own_tensors + rates.listed_s * work.tensors
    plan = {"trainer host: amax": most["source"] / rates.scan, "names and tensors": tensors_s}
    if is_delta:  # everything is encoded and compared before it is known what there is to send
        plan["trainer host: encode and compare"] = most["source"] / rates.encode + most["kept"] / rates.compare
    return {
        "plan": _summed(plan, turn),
        "begin": _phase({"coordinator": turn}),
        "transfer": _phase(
            {
                "trainer host: encode and send": (0.0 if is_delta else most["source"] / rates.encode)
                + sent / rates.send,
                "trainer NIC": sent / rates.nic_out,
                "actor NIC in": most["received"] / rates.nic_in,
                "actor NIC out": passed_on / rates.nic_out,
                "actor host: receive": most["received"] / rates.receive + passed_on / rates.send,
                "coordinator": turn,
            }
        ),
        "prepare": _summed({"actor host: digest and undo": most["received"] / rates.verify}, turn),
        "commit": _summed(
            {
                "actor host: install and read back": most["received"] / rates.install,
                "actor NIC: gather": float(work.gathered.max(initial=0.0)) / (rates.gather * rates.nic_out),
            },
            2 * turn,
        ),
    }


def _phase(resources: Mapping[str, float]) -> Phase:
    slowest = max(resources, key=lambda name: resources[name])
    return Phase(seconds=resources[slowest], bottleneck=slowest, resources=dict(resources))


def _summed(resources: Mapping[str, float], turn: float) -> Phase:
    """One after the other."""
    whole = {**resources, "coordinator": turn}
    return replace(_phase(whole), seconds=sum(whole.values()))


def calibrated(rates: Rates, work: Work, measured: Mapping[str, float]) -> Rates:
    """The rates with which the model would have said what a full push measured, by phase in seconds.

    What no phase tells apart keeps its proportions: encode and send share the transfer. Links stay as they are, so let
    it be a push that they do not hold back.
    """
    spare = {name: max(seconds, 1e-6) for name, seconds in measured.items()}
    phases = predict(work, rates).phases
    factor = {name: phases[name].seconds / spare[name] for name in phases if name in spare}
    scaled = {
        "scan": factor.get("plan", 1.0),
        "encode": factor.get("transfer", 1.0),
        "send": factor.get("transfer", 1.0),
        "receive": factor.get("transfer", 1.0),
        "verify": factor.get("prepare", 1.0),
        "install": factor.get("commit", 1.0),
    }
    values = {field.name: getattr(rates, field.name) * scaled.get(field.name, 1.0) for field in fields(Rates)}
    for name in ("tensor_s", "listed_s"):
        values[name] = getattr(rates, name) / factor.get("plan", 1.0)
    return Rates(**values)
