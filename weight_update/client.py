"""The trainer's side: one call that puts a model's weights into every running actor.

    from weight_update.client import Pusher

    pusher = Pusher("host:port")
    report = pusher.push(model)                  # the first time all of it, then what changed
    handle = pusher.push_async(model, step=7)    # the optimizer may step as soon as this returns

On several trainer ranks (torch.distributed) every rank calls the same with its own shards; each streams its rows
straight to the ranks that own them, and all return the same report. Nothing is gathered. What is kept for the next
push are the checkpoint-form bytes of the last confirmed one (`mode="full"` keeps nothing).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from protos import transfuse_pb2 as pb
from quant.names import IDENTITY, NameMap
from sharding.cost import MIN_GAIN, Work

from .attempt import Attempt, Lease, Progress
from .base import Whole
from .channels import PLAINTEXT
from .confirmed import Confirmed
from .encoder import Scales
from .errors import (
    BusyError,
    DigestError,
    PlanError,
    StoreError,
    TransferError,
    VersionError,
    WeightUpdateError,
)
from .foresight import Foresight
from .groups import Groups
from .handle import PushHandle
from .links import AUTO, allowed_of
from .manifest import Manifest
from .ranks import Ranks, this_process
from .report import Clock, PushReport, report_of
from .retained import Keep, Retained
from .security import Security
from .source import Items, PushPlan, Scope
from .transport import Channels, ControlClient
from .values import from_manifest_proto
from .wishes import GivenMaps, OnBusy, Wish, places_of

__all__ = ["PushHandle", "PushReport", "Pusher"]

log = logging.getLogger(__name__)

Mode = Literal["auto", "full", "delta"]

# A delta of more than this share of all bytes is pushed in full: that needs no memory beyond the rows themselves.
MAX_DELTA_SHARE = 0.5

FANS_OUT: Mapping[str, Callable[[float], bool]] = {
    "auto": lambda gain: gain >= MIN_GAIN,
    "always": lambda gain: True,
    "never": lambda gain: False,
}


class Pusher:
    """Pushes weights to a Transfuse service.

    target: host:port of the coordinator. group: the trainer's process group (default: the default group, when there is
    one). names: from the trainer's names to the service's (quant.name_maps), for tensors that are named or packed
    otherwise, such as q, k and v in one. mode: "auto" sends what changed wherever the service holds the last confirmed
    push of this trainer, and everything elsewhere; "full" always everything; "delta" refuses where it cannot. keep:
    device whose memory holds the bytes of the last confirmed push; "auto": the model's own, where nothing has to be
    copied; "cpu" pins memory where the model is on a GPU. lease_s: how long the service keeps an open push whose
    trainer went silent. retry_s: how long lost connections are retried. transport: the one that payloads take to
    every rank ("grpc", "shared-memory": see links), or the ones that they may take; "auto": the best that both ends
    have. fan_out: whether a row goes over the network to one replica only, whose rank passes it on to those of the
    others: "auto" where that is to save a third of a push. on_progress: called with (phase, bytes done, bytes in all).
    security: certificates and token. Errors: see weight_update.errors; whatever is raised, the service serves the old
    version unchanged, unless the message says that the outcome is not known; the next push then finds out.
    """

    def __init__(
        self,
        target: str,
        *,
        group: dist.ProcessGroup | None = None,
        names: NameMap = IDENTITY,
        mode: Mode = "auto",
        keep: torch.device | str = "auto",
        lease_s: float = 60.0,
        retry_s: float = 45.0,
        pushed_by: str | None = None,
        transport: str | Sequence[str] = AUTO,
        fan_out: str = "auto",
        on_progress: Progress | None = None,
        security: Security = PLAINTEXT,
    ) -> None:
        self.mode = mode
        self.run_id = uuid.uuid4().hex
        self._control = ControlClient(target, security)
        self._ranks = Ranks(group)
        self._apart: Ranks | None = None
        self._confirmed = Confirmed()
        keeps: Keep = None if mode == "full" else "auto" if keep == "auto" else torch.device(keep)
        self._retained = Retained(self._ranks, names, keeps, self._confirmed)
        self._lease_s = lease_s
        self._retry_s = retry_s
        self._pushed_by = pushed_by or this_process()
        self._transports = allowed_of(transport, encrypted=security.tls_dir is not None)
        self._groups = Groups()
        if fan_out not in FANS_OUT:
            raise PlanError(f"fan_out {fan_out!r}: expected one of {', '.join(FANS_OUT)}")
        self._fan_out = fan_out
        self._on_progress = on_progress or (lambda phase, done, total: None)
        self._channels = Channels(security)
        self._manifest: Manifest | None = None
        self._foresight = Foresight()
        self._unsettled: Attempt | None = None  # its outcome is not known
        self._running: PushHandle | None = None

    def push(
        self,
        model: Items,
        scope: Scope = "all",
        *,
        base_version: int | None = None,
        push_id: str | None = None,
        step: int = 0,
        durable: bool = False,
        on_busy: OnBusy = "error",
        expert_map: GivenMaps | None = None,
    ) -> PushReport:
        """Push a model's weights as the next version; returns once every replica serves it, or raises with nothing
        changed.

        model: nn.Module (FSDP2-sharded or not, on any device), for a pipeline a mapping from component to module, or an
        iterable of (name, tensor or DTensor). FP32 and FP16 weights are cast to BF16, ties to even. scope: "all" (every
        parameter of the service must be there), "trainable", or name patterns; widened to whole fused groups, the rest
        is carried over. base_version: refuse unless it is current. push_id: pushing the same id again returns the first
        outcome instead of a second version. step: the trainer's own count, stored beside the version. durable: return
        once the version is in the version store, too; StoreError where it is served and cannot be stored. on_busy:
        where another push is open, raise BusyError, wait until it is over, or abort it. expert_map: experts by slot,
        for modules whose experts may be moved (see quant.expert_maps): a mapping from module, or one row a module;
        what it moves comes along. It holds from this version on, by default the one that held.
        """
        wish = Wish(model, scope, base_version, push_id, step, durable, on_busy, expert_map)
        self._give_way(on_busy)
        return self._run(self._planned(self._ranks, wish))

    def push_async(
        self,
        model: Items,
        scope: Scope = "all",
        *,
        base_version: int | None = None,
        push_id: str | None = None,
        step: int = 0,
        durable: bool = False,
        on_busy: OnBusy = "error",
        expert_map: GivenMaps | None = None,
    ) -> PushHandle:
        """The same, but returns as soon as everything to be sent is encoded: the optimizer may step during the
        transfer. on_busy also says what becomes of a push of this trainer that still runs."""
        wish = Wish(model, scope, base_version, push_id, step, durable, on_busy, expert_map)
        self._give_way(on_busy)
        self._apart = self._apart or self._ranks.apart()
        attempt = self._planned(self._apart, wish)
        if isinstance(attempt.content, Whole):
            attempt.content.take()
        self._running = PushHandle(lambda: self._run(attempt), attempt.cancel)
        return self._running

    def state_dict(self) -> dict[str, Any]:
        """What a resumed trainer needs to say who it is and what it pushed last; no weights."""
        return {"run_id": self.run_id, **self._confirmed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the run that this state was saved in. The next push is a full one: the bytes of the last confirmed
        push are not part of the state."""
        self.run_id = str(state["run_id"])
        self._confirmed.load_state_dict(state)

    @property
    def kept_bytes(self) -> int:
        """Memory that the last confirmed push takes here."""
        return self._confirmed.num_bytes

    def close(self) -> None:
        """Wait for a running push, then close all connections."""
        if self._running is not None:
            self._running.wait()
        self._control.close()
        self._channels.close()
        self._groups.close()

    # -- before anything is sent

    def _give_way(self, on_busy: OnBusy) -> None:
        """One push of this trainer at a time."""
        running = self._running
        busy = running is not None and not running.done()
        if not any(self._ranks.gather(busy)) or running is None:  # it may be over on some trainer ranks only
            return
        if on_busy == "error":
            raise BusyError("a push of this trainer is under way; wait for its handle, or say on_busy")
        if on_busy == "replace":
            running.cancel()
        running.wait()

    def _planned(self, ranks: Ranks, wish: Wish) -> Attempt:
        clock = Clock()
        self._settle()
        described = self._describe(self._ranks, self._patience_s)
        if wish.durable and not described.stores:
            raise StoreError("durable push: the service has no version store; start it with --store DIR")
        manifest = self._manifest_of(described)
        clock.stop("describe")
        places = places_of(manifest, described, wish)
        plan = self._retained.plan(manifest, wish, places)
        scales = self._retained.scales(plan)
        content, reason = self._content(plan, scales, described)
        delta = None if isinstance(content, Whole) else content.num_bytes
        work = self._foresight.work(plan, described.ranks, self._ranks, delta)
        chosen_id, fans_out = self._ranks.from_first(lambda: self._chosen(wish, work))
        clock.stop("plan")
        kept = f"{self.kept_bytes} bytes of version {self._confirmed.version} kept"
        log.info("push %s: %s, %s; %s", chosen_id, content.mode, reason, kept)
        return Attempt(
            control=self._control,
            ranks=ranks,
            described=described,
            manifest=manifest,
            plan=plan,
            content=content,
            work=work,
            reason=reason,
            clock=clock,
            push_id=chosen_id,
            base_version=places.base_version(wish, described.version),
            step=wish.step,
            durable=wish.durable,
            on_busy=wish.on_busy,
            fans_out=fans_out,
            lease_s=self._lease_s,
            retry_s=self._retry_s,
            pushed_by=self._pushed_by,
            transports=self._transports,
            channel=self._channel,
            groups=self._groups,
            on_progress=self._on_progress,
        )

    def _chosen(self, wish: Wish, work: Work) -> tuple[str, bool]:
        """The id of a push, and whether ranks are to pass rows on."""
        gain = self._foresight.predict(work).fan_out_gain
        return wish.push_id or f"{self.run_id}-{uuid.uuid4().hex[:12]}", FANS_OUT[self._fan_out](gain)

    @property
    def _patience_s(self) -> float:
        """A coordinator that was there once is being restarted; a first one may be a wrong address."""
        return 0.0 if self._manifest is None else self._retry_s

    def _describe(self, ranks: Ranks, retry_s: float) -> pb.DescribeReply:
        known = self._manifest.fingerprint if self._manifest else 0
        data = ranks.from_first(lambda: self._control.describe(known, retry_s=retry_s).SerializeToString())
        return pb.DescribeReply.FromString(data)

    def _manifest_of(self, described: pb.DescribeReply) -> Manifest:
        if self._manifest is None or self._manifest.fingerprint != described.fingerprint:
            self._manifest = from_manifest_proto(described.manifest)
        return self._manifest

    def _content(self, plan: PushPlan, scales: Scales, described: pb.DescribeReply) -> tuple[Any, str]:
        """What to send, and why; the same kind on every trainer rank."""
        why_full = "asked for" if self.mode == "full" else self._confirmed.differs(described)
        reasons = [reason for reason in self._ranks.gather(why_full) if reason]
        if reasons and self.mode == "delta":
            raise VersionError(f"delta push: {reasons[0]}; push once with mode='auto'")
        if reasons:
            return self._retained.whole(plan, scales), str(reasons[0])
        changes = self._retained.compared(plan, scales)
        total = plan.columns.num_bytes
        changed = int(self._ranks.reduce(np.array([changes.num_bytes], np.int64), dist.ReduceOp.SUM)[0])
        if self.mode == "auto" and changed > MAX_DELTA_SHARE * total:
            return self._retained.whole_of(changes), f"{changed} of {total} bytes changed"
        return changes, f"changes of version {described.version}"

    # -- on the way

    def _run(self, attempt: Attempt) -> PushReport:
        report = self._committed(attempt)
        if attempt.durable:
            attempt.wait_durable(report.version)
        return report

    def _committed(self, attempt: Attempt) -> PushReport:
        """Carry it out; anew, where the service has changed so that this has a chance."""
        while True:
            try:
                return self._carried_out(attempt)
            except WeightUpdateError as error:
                self._revise(attempt, error)

    def _revise(self, attempt: Attempt, error: WeightUpdateError) -> None:
        """Fit the attempt to the service as it is now, or raise the error. A coordinator that came after the one it
        began with knows nothing of it; one that holds other bytes than a delta builds on is sent all of them."""
        described = self._described_after(attempt, error)
        refused = isinstance(error, DigestError) or (isinstance(error, VersionError) and not attempt.base_version)
        content = attempt.content
        if attempt.meets_another_service(described):
            log.warning("push %s: begun anew, the service has changed: %s", attempt.push_id, error)
        elif attempt.fans_out and isinstance(error, TransferError):
            log.warning("push %s: begun anew, from here to every rank: %s", attempt.push_id, error)
            attempt.fans_out, self._fan_out = False, "never"
        elif refused and self.mode == "auto" and not isinstance(content, Whole):
            log.warning("push %s: the delta was refused (%s), pushing in full", attempt.push_id, error)
            attempt.content = self._retained.whole_of(content)
            attempt.reason = f"the delta was refused: {error}".splitlines()[0]
        else:
            raise error
        attempt.described = described

    def _described_after(self, attempt: Attempt, error: WeightUpdateError) -> pb.DescribeReply:
        """What the service is after an error; raises that error where it cannot be asked, or the outcome is open."""
        if attempt.unknown:
            raise error
        waited = type(error) is TransferError  # for a connection that did not come back
        try:
            return self._describe(attempt.ranks, 0.0 if waited else self._retry_s)
        except WeightUpdateError as unheard:
            log.info("push %s: not begun anew: %s", attempt.push_id, unheard)
            raise error from None

    def _carried_out(self, attempt: Attempt) -> PushReport:
        begun = attempt.begin()
        if begun.already_committed:
            info = attempt.info()
            assert info is not None
            return self._report(attempt, begun, pb.DecideReply(version=info, digest_verified=True), info.wire_bytes)
        with Lease(attempt):
            try:
                wire_bytes = attempt.transfer(begun)
                decided = attempt.decide(begun)
            except BaseException as error:
                self._unsettled = attempt if attempt.unknown else None
                attempt.abort(begun.transaction, error)
                raise
        self._confirmed.commit(attempt, decided.version)
        return self._report(attempt, begun, decided, wire_bytes)

    def _settle(self) -> None:
        """Find out how a push ended whose outcome got lost."""
        attempt, self._unsettled = self._unsettled, None
        if attempt is None:
            return
        info = attempt.info()
        if info is not None:
            log.info("push %s: had been committed as version %d", attempt.push_id, info.version)
            self._confirmed.commit(attempt, info)

    def _report(self, attempt: Attempt, begun: pb.BeginReply, decided: pb.DecideReply, wire_bytes: int) -> PushReport:
        predicted = self._foresight.predict(attempt.work)
        if not begun.already_committed:
            self._foresight.learn(attempt.work, attempt.clock.phases)
        return report_of(
            attempt, begun, decided, wire_bytes=wire_bytes, kept_bytes=self.kept_bytes, predicted=predicted
        )

    def _channel(self, address: str) -> Any:
        return self._channels(address)
