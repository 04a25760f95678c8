"""How a push and a rollback begin: what is refused, who takes part, and what the transaction is to bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .delta import DeltaPlan
from .digest import Digests, total, unlike
from .errors import BusyError, ManifestError, MemberError, VersionError, raise_all
from .manifest import Manifest, check_push
from .membership import Standing, shared
from .messages import Action, Kept, Reply, Request
from .transaction import Kind, Phase, Transaction

if TYPE_CHECKING:
    from .protocol import Coordinator

PATIENCE_S = 15.0  # how long a request waits for replicas that are being let in


def begin(coordinator: Coordinator, request: Request) -> list[Action]:
    """Open a push, or renew the lease of the one with this push id."""
    args, open_ = request.args, coordinator.transaction
    push_id = str(args["push_id"])
    if push_id in coordinator.committed:
        return [Reply(id=request.id, result=_known(coordinator, push_id))]
    if open_ is not None and open_.push_id == push_id and coordinator.phase not in (Phase.UNDOING, Phase.ABORTING):
        if coordinator.phase is Phase.OPENING:  # answered with the first caller
            open_.callers.append(request.id)
            return []
        return [coordinator.lease(), Reply(id=request.id, result=begun(coordinator))]
    if _must_wait(coordinator, request):
        return []
    _check_begin(coordinator, args)
    replicas = participants(coordinator, request)
    if not replicas:
        return []
    _check_ranks(coordinator, replicas, args)
    tensors = _checked(coordinator, args["tensors"])
    base = _base(coordinator, replicas, tensors)
    open_ = _opened(coordinator, request, Kind.PUSH, replicas, tensors, base)
    open_.lease_s = float(args["lease_s"])  # type: ignore[arg-type]
    open_.logical_bytes = int(args["logical_bytes"])  # type: ignore[call-overload]
    open_.num_streams = int(args.get("num_streams", 1))  # type: ignore[call-overload]
    open_.source = args.get("delta")  # type: ignore[assignment]
    open_.step = int(args.get("step", 0))  # type: ignore[call-overload]
    text = f"{open_.pushed_by}: {len(tensors)} tensors"
    return [coordinator.notify("begin", text), *coordinator.start("open")]


def _checked(coordinator: Coordinator, specs: Any) -> npt.NDArray[np.int64]:
    """Where the tensors of a push are in the manifest; they are checked once for pushes that bring the very same."""
    if coordinator.asked is None or coordinator.asked[0] is not specs:
        coordinator.asked = specs, check_push(coordinator.manifest, specs)
    return coordinator.asked[1]


def rollback(coordinator: Coordinator, request: Request) -> list[Action]:
    """Make the bytes of an older version the next version; `reset` does so where the current bytes are lost."""
    args = request.args
    push_id, version = str(args["push_id"]), int(args["version"])  # type: ignore[call-overload]
    if push_id in coordinator.committed:
        return [Reply(id=request.id, result=_known(coordinator, push_id))]
    open_ = coordinator.transaction
    if open_ is not None and open_.push_id == push_id:
        open_.callers.append(request.id)
        return []
    if _must_wait(coordinator, request):
        return []
    replicas = participants(coordinator, request)
    if not replicas:
        return []
    is_lost = lost(coordinator)
    _check_rollback(coordinator, request.op, version, is_lost)
    target: Digests = args["digests"]  # type: ignore[assignment]
    everything = np.arange(len(target))
    tensors = everything if is_lost else np.flatnonzero(unlike(target, coordinator.digests))
    if not len(tensors):
        raise VersionError(f"{request.op}: version {coordinator.version} holds the bytes of version {version} already")
    base = _base(coordinator, replicas, tensors)
    open_ = _opened(coordinator, request, Kind.ROLLBACK, replicas, tensors, base)
    open_.source, open_.digests, open_.decide = Kept(version=version), target[tensors], True
    text = f"{open_.pushed_by}: to version {version}, {len(tensors)} tensors"
    return [coordinator.notify(request.op, text), *coordinator.start("reach")]


def reached(coordinator: Coordinator) -> list[Action]:
    """Every member said which versions it keeps: go on where all keep the wanted one."""
    open_ = coordinator.open()
    kept: Mapping[Any, Any] = open_.results["reach"]
    assert isinstance(open_.source, Kept)
    common = shared(kept)
    if open_.source.version in common:
        return coordinator.start("open")
    listed = ", ".join(map(str, common)) or "none"
    refusal = VersionError(f"version {open_.source.version} is not kept by every rank; reachable: {listed}")
    return coordinator.abort(refusal)


def begun(coordinator: Coordinator) -> dict[str, object]:
    """The answer to a begin."""
    open_ = coordinator.open()
    planned = [int(value) for value in open_.results["open"].values()]  # type: ignore[call-overload]
    return {
        "transaction": open_.id,
        "version": open_.version,
        "planned_bytes": max(planned, default=0),
        "already_committed": False,
    }


def lost(coordinator: Coordinator) -> bool:
    """Whether nobody who answers holds the committed version, and enough replicas wait for another one."""
    membership = coordinator.membership
    return not membership.serving() and len(membership.stocked()) >= _needed(coordinator)


def loss(coordinator: Coordinator, durable: int) -> str:
    """The same in words, "" while nothing is lost; durable: the newest version in the store, 0 for none."""
    if not lost(coordinator):
        return ""
    back = f"'transfuse reset --to durable' goes back to version {durable}" if durable else "none is durable"
    return f"version {coordinator.version} is held by no replica; push in full, or: {back}"


def participants(coordinator: Coordinator, request: Request) -> list[int]:
    """The replicas of a new transaction; none where the request was put aside until more of them serve."""
    membership = coordinator.membership
    serving = membership.serving()
    if len(serving) >= _needed(coordinator):
        return serving
    if lost(coordinator):
        return membership.stocked()
    if coordinator.now_s < request.now_s + PATIENCE_S:
        coordinator.waiting.append(request)
        return []
    reasons = "; ".join(f"replica {replica}: {reason}" for replica, reason in sorted(coordinator.fenced.items()))
    raise MemberError(
        f"{len(serving)} of the {_needed(coordinator)} replicas that a push needs can take one: {reasons};"
        " wait until it is rebuilt, or set min_replicas lower"
    )


def _needed(coordinator: Coordinator) -> int:
    count = sum(not each.leaving for each in coordinator.membership.replicas.values())
    return max(1, min(coordinator.min_replicas or count, count))


def _known(coordinator: Coordinator, push_id: str) -> dict[str, object]:
    return {"already_committed": True, "version": coordinator.committed[push_id]}


def _must_wait(coordinator: Coordinator, request: Request) -> bool:
    """Whether the request was put aside until a join is over; raises where another transaction holds the slot."""
    open_ = coordinator.transaction
    if open_ is None:
        return False
    if open_.kind is Kind.JOIN:
        coordinator.waiting.append(request)
        return True
    age_s = request.now_s - open_.since_s
    raise BusyError(
        f"a {open_.kind.value} of {open_.pushed_by} is {coordinator.phase.value} since {age_s:.1f} s (transaction"
        f" {open_.id}); wait for it, or abort it with 'transfuse abort'"
    )


def _check_begin(coordinator: Coordinator, args: Mapping[str, object]) -> None:
    if args["fingerprint"] != coordinator.manifest.fingerprint:
        raise ManifestError("the push was planned for another manifest than this service holds; describe again")
    base = int(args["base_version"])  # type: ignore[call-overload]
    if base not in (0, coordinator.version):
        raise VersionError(f"base version: current is {coordinator.version}, the push names {base}; push in full")
    delta, held = args.get("delta"), (coordinator.version, total(coordinator.digests))
    if isinstance(delta, DeltaPlan) and (lost(coordinator) or (delta.base_version, delta.base_digest) != held):
        raise VersionError(
            f"delta: it builds on version {delta.base_version} of digest {delta.base_digest}, current is {held[0]} of"
            f" {held[1]}{', which no replica holds' if lost(coordinator) else ''}; push in full"
        )


def _check_ranks(coordinator: Coordinator, replicas: list[int], args: Mapping[str, object]) -> None:
    """The trainer opens streams to the ranks that were described to it: these, or bytes would never arrive."""
    planned: Sequence[str] = args.get("keys", ())  # type: ignore[assignment]
    described, taking = set(planned), {coordinator.membership.replicas[replica].key for replica in replicas}
    if described and described != taking:
        came, gone = (", ".join(sorted(each)) or "none" for each in (taking - described, described - taking))
        raise MemberError(f"replicas came or went since they were described: new {came}, gone {gone}; describe again")


def _check_rollback(coordinator: Coordinator, op: str, version: int, is_lost: bool) -> None:
    held = coordinator.version
    if is_lost and op == "rollback":
        raise VersionError(f"rollback: no replica holds version {held} any more; 'transfuse reset' says so aloud")
    if not is_lost and op == "reset":
        raise VersionError(f"reset: version {held} is served, nothing is lost; use 'transfuse rollback {version}'")
    if version >= held and not is_lost:
        raise VersionError(f"rollback to version {version}: current is {held}; name an older one")


def _base(coordinator: Coordinator, replicas: list[int], tensors: np.ndarray) -> Digests:
    """Digests of what the members hold; where the committed version is lost, all but calibration must be brought."""
    if not lost(coordinator):
        return coordinator.digests
    manifest = coordinator.manifest
    brought = {manifest.tensors[i].name for i in tensors}
    raise_all(
        VersionError,
        f"no replica holds version {coordinator.version} any more; only a full push, or 'transfuse reset', goes on",
        [f"{name}: not in this push" for name in _required(manifest) if name not in brought],
    )
    if coordinator.manifest.formats:
        told = f"version {coordinator.version} is lost, and the replicas have several formats"
        raise VersionError(f"{told}; that is not mended while they run: start the service anew")
    first, *others = [coordinator.membership.replicas[replica].stock for replica in replicas]
    assert first is not None
    carried = np.setdiff1d(np.arange(len(first)), tensors)
    problems = [
        f"{manifest.tensors[i].name}: the replicas hold different bytes, and this push does not bring it"
        for other in others
        if other is not None
        for i in carried[unlike(other[carried], first[carried])]
    ]
    raise_all(VersionError, "begin refused", problems)
    return first


def _required(manifest: Manifest) -> list[str]:
    """Tensors without which a push is not a full one: all but calibration."""
    if not manifest.parameters:
        return [spec.name for spec in manifest.tensors]
    return [name for row in manifest.parameters for name in manifest.required_of(row)]


def _opened(
    coordinator: Coordinator, request: Request, kind: Kind, replicas: list[int], tensors: np.ndarray, base: Digests
) -> Transaction:
    membership = coordinator.membership
    is_lost = lost(coordinator)
    coordinator.transaction = open_ = Transaction(
        id=coordinator.next_id(),
        kind=kind,
        members=membership.ranks(replicas),
        version=coordinator.version + 1,
        base_version=0 if is_lost else coordinator.version,
        push_id=str(request.args["push_id"]),
        pushed_by=str(request.args["pushed_by"]),
        since_s=request.now_s,
        tensors=tensors,
        base=base,
        callers=[request.id],
    )
    for replica in replicas if is_lost else ():
        membership.replicas[replica].standing = Standing.JOINING
    return open_
