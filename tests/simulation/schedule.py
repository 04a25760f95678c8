"""One seed: who pushes, rolls back, joins and leaves when, while faults happen; and that all is well in the end."""

from __future__ import annotations

import random
from collections.abc import Callable

from weight_update.messages import MemberId
from weight_update.opening import lost

from . import checks
from .clients import Operator, Trainer, everything
from .faults import Faults
from .world import OUTSIDE, Bugs, World

HEAL_S = 200.0
SIZES = ((1, 1), (1, 1), (1, 2), (2, 1), (2, 2), (3, 1))


class Schedule:
    """The work of one seed."""

    def __init__(self, seed: int, bugs: Bugs | None = None, *, keeps_log: bool = False) -> None:
        draw = self.draw = random.Random(seed)
        replicas, ranks = draw.choice(SIZES)
        self.world = World(
            seed=seed,
            replicas=replicas,
            num_ranks=ranks,
            faults=Faults.drawn(seed, replicas),
            bugs=Bugs() if bugs is None else bugs,
            min_replicas=draw.choice((0, 1)),
            keeps_log=keeps_log,
        )
        self.trainers: list[Trainer] = []
        world, end_s = self.world, self.world.faults.end_s
        for _ in range(draw.choice((2, 3, 4))):
            world.after(draw.uniform(0.0, end_s), OUTSIDE, self.push, name="push", is_event=False)
        for _ in range(draw.choice((0, 1, 1))):
            world.after(draw.uniform(3.0, end_s), OUTSIDE, self.roll_back, name="roll back", is_event=False)
        if draw.random() < 0.3:
            world.after(draw.uniform(3.0, end_s), OUTSIDE, self.scale, name="scale", is_event=False)
        if draw.random() < 0.5:
            world.after(draw.uniform(1.0, end_s), OUTSIDE, self.store, name="store", is_event=False)

    def push(self) -> Trainer:
        # A trainer that was told that a version is lost pushes all of the next one.
        full = self.draw.random() < 0.4 or self.world.now_s >= self.world.faults.end_s
        tensors = everything() if full else sorted(self.draw.sample(everything(), self.draw.choice((1, 2))))
        trainer = Trainer(self.world, f"p{len(self.trainers)}", tensors)
        self.trainers.append(trainer)
        trainer.begin()
        return trainer

    @property
    def is_pushing(self) -> bool:
        return any(trainer.alive and not trainer.ended for trainer in self.trainers)

    def roll_back(self) -> None:
        version = self.draw.randint(1, self.world.disk.decisions[-1].version)
        op = "reset" if version in self.world.disk.stored and self.draw.random() < 0.5 else "rollback"
        push_id = f"r{self.world.next_number()}"
        self.world.pushed[push_id] = {}
        Operator(self.world, op, push_id=push_id, pushed_by="operator", version=version).go()

    def scale(self) -> None:
        world = self.world
        numbers = {member.replica for member in world.disk.members}
        if self.draw.random() < 0.5 and len(numbers) > 1:
            Operator(world, "remove", replica=max(numbers)).go()
            return
        number = max(numbers | world.disk.dismissed) + 1
        members = [MemberId(replica=number, rank=i) for i in range(world.num_ranks)]
        for member in members:
            world.ranks[member] = world.new_rank(member)
        world.announce(members)

    def store(self) -> None:
        """The committed version becomes durable, where somebody serves it."""
        world = self.world
        version = world.disk.decisions[-1].version
        if any(rank.serves(world.now_s) and rank.member.version == version for rank in world.ranks.values()):
            world.disk.stored[version] = world.disk.contents[version]

    def run(self) -> World:
        """Faults, then their end, then health; a push that follows commits."""
        world = self.world
        world.run(lambda: world.now_s >= world.faults.end_s)
        world.disk.failing_writes = 0
        if not world.num_crashes:
            world.kill(self.draw.choice([world.host, *world.ranks.values()]))
        if not self._until(lambda: not self.is_pushing and (world.is_healthy or self.is_lost())):
            raise checks.Broken(f"not healthy {HEAL_S:.0f} s after the last fault: {world.host.protocol.fenced}")
        # Where the committed version is lost nothing goes on silently: it takes this full push.
        trainer = self.push()
        if not self._until(lambda: trainer.ended and world.is_healthy) or trainer.version is None:
            raise checks.Broken(f"a push to a healthy service failed: {trainer.error}")
        version = world.disk.decisions[-1].version
        for rank in world.ranks.values():
            if rank.rows != world.expected(rank, version):
                raise checks.Broken(f"{rank}: not the bytes of version {version}")
        return world

    def _until(self, reached: Callable[[], bool]) -> bool:
        world = self.world
        deadline_s = max(world.now_s, world.faults.end_s) + HEAL_S
        world.run(lambda: reached() or world.now_s > deadline_s)
        return reached()

    def is_lost(self) -> bool:
        """Nobody holds the committed version any more, and status says so."""
        return lost(self.world.host.protocol) and self.world.is_whole
