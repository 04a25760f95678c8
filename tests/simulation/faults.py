"""What goes wrong, drawn from a seed: on the wire, on disk, to bytes, to processes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from weight_update.errors import WeightUpdateError
from weight_update.messages import Send

from .ranks import Answer, SimRank
from .world import LATENCY_S, Host, Node, World

SLOW = 100  # times slower than the others
CRASHES = ("before", "after", "superseded")
LONG_S = (0.2, 12.0)  # a message that is late


class NoFaults:
    """Everything arrives, in an order drawn from the seed."""

    def route(self, world: World, source: Node, target: Node, name: str) -> list[float]:
        return [world.random.uniform(*LATENCY_S)]

    def strikes(self, world: World, node: Node, name: str) -> str | None:
        return None

    def tears_write(self, world: World, host: Host) -> bool | None:
        return None

    def damages_live(self, world: World, rank: SimRank, send: Send) -> None:
        pass

    def refuses(self, rank: SimRank, send: Send) -> WeightUpdateError | None:
        """Instead of doing a step."""
        return None

    def answers(self, rank: SimRank, answer: Answer | None) -> Answer | None:
        """What becomes of a rank's answer."""
        return answer

    def damages(self, world: World, payload: bytes) -> bytes:
        return payload


@dataclass(slots=True)
class Faults(NoFaults):
    """One schedule's faults. They end at `end_s`: from then on the system must become healthy by itself.

    crashes: event number -> how the process that the event goes to dies; superseded: a coordinator lives on beside the
    next one. cuts: (from, to, one end, other end) in seconds; an end is a replica or -1 for the coordinator.
    """

    end_s: float
    crashes: dict[int, str]
    drop: float
    double: float
    late: float
    flip: float
    tear: float
    cuts: list[tuple[float, float, int]] = field(default_factory=list)
    slow: int | None = None  # replica

    @classmethod
    def drawn(cls, seed: int, replicas: int) -> Faults:
        draw = random.Random(~seed)
        end_s = draw.uniform(8.0, 30.0)
        crashes = {draw.randrange(5, 120): draw.choice(CRASHES) for _ in range(draw.choice((1, 1, 2, 3)))}
        cuts = []
        for _ in range(draw.choice((0, 0, 1, 2))):
            start_s = draw.uniform(0.0, end_s)
            cuts.append((start_s, min(end_s, start_s + draw.uniform(1.0, 20.0)), draw.randrange(replicas)))
        return cls(
            end_s=end_s,
            crashes=crashes,
            drop=draw.choice((0.0, 0.0, 0.01, 0.05)),
            double=draw.choice((0.0, 0.02, 0.1)),
            late=draw.choice((0.0, 0.01, 0.05)),
            flip=draw.choice((0.0, 0.0, 0.05)),
            tear=draw.choice((0.0, 0.0, 0.2)),
            cuts=cuts,
            slow=draw.choice((None, None, None, draw.randrange(replicas))),
        )

    def route(self, world: World, source: Node, target: Node, name: str) -> list[float]:
        draw = world.random
        delay_s = draw.uniform(*LATENCY_S)
        if world.now_s >= self.end_s:
            return [delay_s]
        if self._is_cut(world.now_s, source, target):
            self._note(world, target, name, "partition")
            return []
        if self.slow is not None and self.slow in (_replica(source), _replica(target)):
            delay_s *= SLOW
        chance = draw.random()
        if chance < self.drop:
            self._note(world, target, name, "drop")
            return []
        if chance < self.drop + self.double:
            self._note(world, target, name, "double")
            return [delay_s, delay_s + draw.uniform(0.0, 2.0)]
        if chance < self.drop + self.double + self.late:
            self._note(world, target, name, "late")
            return [draw.uniform(*LONG_S)]
        return [delay_s]

    def _is_cut(self, now_s: float, source: Node, target: Node) -> bool:
        if not self.cuts:
            return False
        ends = {_replica(source), _replica(target)}
        return len(ends) > 1 and any(start <= now_s < stop and end in ends for start, stop, end in self.cuts)

    def strikes(self, world: World, node: Node, name: str) -> str | None:
        how = self.crashes.pop(world.events, None)
        if how is None or world.now_s >= self.end_s or getattr(node, "name", "") == "outside":
            if how is not None and world.now_s < self.end_s:
                self.crashes[world.events + 1] = how  # nobody there that can die: the next one
            return None
        self._note(world, node, name, f"crash {how}")
        if how != "superseded":
            return how
        if isinstance(node, Host) and node is world.host:
            world.start_coordinator()
            return None
        return "before"

    def tears_write(self, world: World, host: Host) -> bool | None:
        if world.now_s >= self.end_s or world.random.random() >= self.tear:
            return None
        torn = world.random.random()
        if torn < 0.3:
            world.disk.failing_writes += 1
            self._note(world, host, "persist", "failed write")
            return None
        self._note(world, host, "persist", "torn write")
        return torn < 0.65

    def damages_live(self, world: World, rank: SimRank, send: Send) -> None:
        """A bit flips between two steps, in bytes that are to be read back."""
        hit = send.step in ("prepare",) and world.now_s < self.end_s and world.random.random() < self.flip
        if hit and rank.staging is not None and rank.member.state == "prepared":
            i = world.random.choice(rank.staging.tensors)
            rank.staging.rows[i] = self._flipped(world, rank.staging.rows[i])
            self._note(world, rank, send.step, "flip")

    def damages(self, world: World, payload: bytes) -> bytes:
        if world.now_s >= self.end_s or world.random.random() >= self.flip:
            return payload
        return self._flipped(world, payload)

    def _flipped(self, world: World, data: bytes) -> bytes:
        if not data:
            return data
        at = world.random.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << world.random.randrange(8)]) + data[at + 1 :]

    def _note(self, world: World, node: Any, name: str, fault: str) -> None:
        world.coverage[f"{_kind(node)} {getattr(node, 'state', '')}".strip(), name, fault] += 1
        world.note(f"fault: {fault} {name} -> {node}")


def _replica(node: Any) -> int:
    return node.id.replica if isinstance(node, SimRank) else -1


def _kind(node: Any) -> str:
    return "rank" if isinstance(node, SimRank) else "coordinator" if isinstance(node, Host) else str(node)
