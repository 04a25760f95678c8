"""Keeps the replicas of a fleet alive: starts their ranks, sees them end, builds them anew, tells the coordinator.

    with Supervisor(rank_configs, on_progress) as supervisor:      # every replica is built, none is watched
        supervisor.watch(coordinator_address)                      # a thread: from now on what ends is rebuilt

    STARTING -all ranks built-> WARMING -> READY -the coordinator knows their addresses-> RUNNING
       ^---- pause <---- a rank died, its engine ended, or it answers nobody -----------------v

It is a thread of the process that started the fleet, because Ray ends an actor with the process that owns it: whoever
supervises the ranks must be what created them. An actor of its own would take the whole service down when it died, the
very thing it is there to prevent, and detached ranks would outlive a killed `transfuse serve` with nobody to stop them.
So the ranks live exactly as long as this thread; there is nothing for a restarted driver to attach to, it starts again
from the version store. The coordinator is restarted by Ray, its addresses stay in its state file.

A replica is rebuilt whole: a process group does not survive a member. Its new ranks load nothing while another replica
serves: the coordinator lets a live donor fill them. Otherwise they load what `stored` names.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from weight_update.channels import PLAINTEXT, Channels
from weight_update.errors import MemberError, WeightUpdateError
from weight_update.security import Security
from weight_update.transport import call

from .actor import REMOTE_RANK, RankConfig

log = logging.getLogger(__name__)

TURN_S = 0.5
CONTROL_TIMEOUT_S = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 60.0  # before a replica whose build failed is built again
DYING_S = 10.0  # for a killed rank to leave its port
LONELY_S = 5.0  # an empty replica that no donor has filled for so long, and none serves, loads by itself

SERVING = ("serving", "draining")  # of a status: it holds the current version

RankConfigs = Callable[[int], Sequence[RankConfig]]  # of the ranks of a replica, by its number
Progress = Callable[[str, int, int], None]


class Processes:
    """The ranks of one replica in one placement group, over all their lives.

    state: starting, warming (built; kernels compile), ready (not announced), running, pausing (until `since_s`).
    addresses: of all ranks, once built. source: what the last build loaded, None for nothing. served: since the last
    build.
    """

    def __init__(self, number: int, configs: Sequence[RankConfig], share: float) -> None:
        self.number = number
        self.state = "pausing"
        self.actors: list[Any] = []
        self.addresses: dict[int, str] = {}
        self.source: str | None = None
        self.served = False
        self.announced = False  # the coordinator knows it, by these addresses or by earlier ones
        self.fenced_s = float("inf")  # since when the coordinator calls it fenced
        self.since_s = float("-inf")
        self.former: list[str] = []  # addresses before the rebuild
        self._failures = 0
        self._configs = configs
        self._share = share
        self._group = placement_group([{"CPU": share}] * len(configs), strategy="PACK")
        self._waiting: dict[Any, int] = {}  # Ray's references -> rank

    def start(self, source: str | None) -> None:
        """New processes: actors, process group, mesh and modules, hence new addresses."""
        self.source, self.served, self.state = source, False, "starting"
        self.fenced_s = float("inf")
        self.actors = [
            REMOTE_RANK.options(
                num_cpus=self._share,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank),
            ).remote(config)
            for rank, config in enumerate(self._configs)
        ]
        self._waiting = {self.actors[0].rendezvous.remote(): -1}

    def references(self) -> list[Any]:
        """What to wait for: each resolves when something happened to a rank."""
        return list(self._waiting)

    def happened(self, reference: Any) -> None:
        """Take up what a reference brought. MemberError: this replica must be built anew."""
        rank = self._waiting.pop(reference, None)
        if rank is None:
            return
        value = value_of(reference, f"replica {self.number} rank {max(rank, 0)}")
        if self.state == "running" or self.state == "ready":
            raise MemberError(f"replica {self.number} rank {rank}: its engine is {value}")
        if rank < 0:
            self._waiting = {actor.build.remote(value, self.source): i for i, actor in enumerate(self.actors)}
            return
        if self.state == "starting":
            self.addresses[rank] = value
            if len(self.addresses) == len(self.actors):
                self.state = "warming"
                self._waiting = {actor.warm_up.remote(): i for i, actor in enumerate(self.actors)}
        elif not self._waiting:
            self.state, self._failures = "ready", 0
            self._waiting = {actor.ended.remote(): i for i, actor in enumerate(self.actors)}

    def pause(self) -> None:
        """Kill what is left of it; it is started again after a while, longer from failure to failure."""
        if self.addresses:
            self.former = [address for _, address in sorted(self.addresses.items())]
        self.kill()
        delay_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**self._failures)
        self._failures += 1
        self.state, self.since_s = "pausing", time.monotonic() + delay_s

    @property
    def num_warm(self) -> int:
        """Ranks whose first request will wait for no compiler."""
        behind = {"starting": len(self.actors), "warming": len(self._waiting)}
        return len(self.actors) - behind.get(self.state, 0)

    def kill(self) -> None:
        """End every process of it."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        self.actors, self.addresses, self._waiting = [], {}, {}

    def remove(self) -> None:
        """End it for good."""
        self.kill()
        ray.util.remove_placement_group(self._group)

    def former_is_dead(self) -> bool:
        """Whether nobody listens where the earlier ranks did, so that none of them serves."""
        deadline_s = time.monotonic() + DYING_S
        while any(_listens(address) for address in self.former):
            if time.monotonic() > deadline_s:
                return False
            time.sleep(0.1)
        self.former = []
        return True


class Supervisor:
    """All replicas of a fleet.

    stored: the checkpoint to load where no replica serves. share: CPUs that a rank reserves. rebuild_after_s: a replica
    that the coordinator calls fenced for so long, while another one serves, is built anew even though its processes
    live.
    """

    def __init__(
        self,
        configs: RankConfigs,
        stored: Callable[[], str],
        *,
        share: float,
        rebuild_after_s: float,
        on_progress: Progress,
        security: Security = PLAINTEXT,
    ) -> None:
        self._configs, self._stored = configs, stored
        self._share, self._rebuild_after_s = share, rebuild_after_s
        self._on_progress = on_progress
        self._channels = Channels(security.as_service())
        self._replicas: dict[int, Processes] = {}
        self._stopped = threading.Event()
        self.failure: BaseException | None = None  # why nobody watches any more
        self._thread: threading.Thread | None = None

    @property
    def replicas(self) -> dict[int, list[Any]]:
        """Replica -> the actors of its ranks; none while it is being built anew."""
        return {number: list(each.actors) for number, each in sorted(self._replicas.items())}

    def start(self, replicas: int) -> list[str]:
        """Build the first replicas, all at once; returns the addresses of their ranks, or raises what one failed
        with."""
        source = self._stored()
        for number in range(replicas):
            self._replicas[number] = Processes(number, self._configs(number), self._share)
            self._replicas[number].start(source)
        total = sum(map(len, self.replicas.values()))
        self._on_progress("ranks", 0, total)
        while any(each.state != "ready" for each in self._replicas.values()):
            for _, error in self._hear(None):
                raise error
            built = sum(len(each.addresses) for each in self._replicas.values())
            self._on_progress("ranks", built, total)
            if built == total:
                self._on_progress("warm-up", sum(each.num_warm for each in self._replicas.values()), total)
        for each in self._replicas.values():
            each.state, each.announced = "running", True
        return [address for each in self._replicas.values() for _, address in sorted(each.addresses.items())]

    def watch(self, coordinator: str) -> None:
        """Rebuild, from now on, what ends; start and end replicas as operators tell the coordinator."""
        self._thread = threading.Thread(target=self._run, args=(coordinator,), name="supervisor", daemon=True)
        self._thread.start()

    def halt(self) -> None:
        """Rebuild nothing any more."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """End every process."""
        self.halt()
        for each in self._replicas.values():
            each.remove()
        self._replicas = {}

    # -- one turn

    def _run(self, coordinator: str) -> None:
        try:
            self._watch(coordinator)
        except BaseException as error:  # Ray itself is gone
            self.failure = error
            log.exception("nobody watches the replicas any more")

    def _watch(self, coordinator: str) -> None:
        while not self._stopped.is_set():
            try:
                self._turn(self._channels.stub(coordinator, pb_grpc.ControlStub))
            except WeightUpdateError as error:  # the coordinator is being restarted: look again
                log.info("supervisor: %s", error)
                self._stopped.wait(TURN_S)
        self._channels.close()

    def _turn(self, control: Any) -> None:
        for failed, error in self._hear(TURN_S):
            # Of a rank that ran, Ray tells at length that it died; of one that could not start, why.
            why = str(error) if failed.state == "starting" else str(error).splitlines()[0]
            log.warning("%s; replica %d is built anew", why, failed.number)
            failed.pause()
        status: pb.StatusReply = call(
            control.Status, pb.StatusRequest(), timeout_s=CONTROL_TIMEOUT_S, where="coordinator"
        )
        told = {each.replica: each for each in status.replicas}
        self._follow(told)
        # The coordinator learns later than this thread that a rank died.
        donors = [number for number, each in told.items() if each.state in SERVING and self._is_running(number)]
        lonely = not donors
        for number, replica in list(self._replicas.items()):
            try:
                self._care(control, replica, told.get(number), lonely)
            except WeightUpdateError as error:  # the others are not to wait for it
                log.warning("replica %d: %s", number, error)

    def _care(self, control: Any, replica: Processes, told: pb.ReplicaStatus | None, lonely: bool) -> None:
        self._judge(replica, told, lonely)
        if replica.state == "pausing" and replica.since_s <= time.monotonic():
            replica.start(self._stored() if lonely else None)
        if replica.state == "ready":
            self._announce(control, replica)

    def _hear(self, timeout_s: float | None) -> list[tuple[Processes, MemberError]]:
        """Wait until something happened to a rank; replicas that do not survive it, and why."""
        by_reference = {reference: each for each in self._replicas.values() for reference in each.references()}
        if not by_reference:
            self._stopped.wait(timeout_s)
            return []
        done, _ = ray.wait(list(by_reference), num_returns=1, timeout=timeout_s)
        failed = []
        for reference in done:
            try:
                by_reference[reference].happened(reference)
            except MemberError as error:
                failed.append((by_reference[reference], error))
        return failed

    def _follow(self, told: dict[int, pb.ReplicaStatus]) -> None:
        """Replicas that an operator asked for or took away."""
        for number in [number for number, each in told.items() if each.state == "starting"]:
            if number not in self._replicas:
                log.info("replica %d was asked for", number)
                self._replicas[number] = Processes(number, self._configs(number), self._share)
        gone = [number for number, each in self._replicas.items() if each.announced and number not in told]
        for number in gone:
            log.info("replica %d was taken away", number)
            self._replicas.pop(number).remove()

    def _is_running(self, number: int) -> bool:
        replica = self._replicas.get(number)
        return replica is None or replica.state == "running"  # others' ranks are not ours to watch

    def _judge(self, replica: Processes, told: pb.ReplicaStatus | None, lonely: bool) -> None:
        """Rebuild a running replica that does not come back by itself."""
        if replica.state != "running" or told is None or told.state == "joining":
            return
        if told.state != "fenced":
            replica.served, replica.fenced_s = replica.served or told.state in SERVING, float("inf")
            return
        now_s = time.monotonic()
        replica.fenced_s = min(replica.fenced_s, now_s)
        # What an empty replica waits for will not come; one that holds bytes may be all that is left of them.
        unfilled = lonely and replica.source is None and not replica.served
        allowed_s = LONELY_S if unfilled else float("inf") if lonely else self._rebuild_after_s
        if now_s - replica.fenced_s > allowed_s:
            log.warning(
                "replica %d is fenced since %.0f s (%s) and is built anew", replica.number, allowed_s, told.reason
            )
            replica.pause()

    def _announce(self, control: Any, replica: Processes) -> None:
        addresses = [address for _, address in sorted(replica.addresses.items())]
        request = pb.ReplicaAddRequest(addresses=addresses, dead=replica.former_is_dead())
        call(control.ReplicaAdd, request, timeout_s=CONTROL_TIMEOUT_S, where="coordinator")
        replica.state, replica.announced = "running", True


def value_of(reference: Any, who: str) -> Any:
    """The value of a Ray call; a failure names who failed and why, without Ray's own frames."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise MemberError(f"{who}: {error.cause}") from error
    except ray.exceptions.RayActorError as error:
        raise MemberError(f"{who} died: {error}") from error


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=1.0):
            return True
    except OSError:
        return False
