"""How replicas come and go: greetings, and the transaction that brings the committed version to one that lacks it.

what an earlier transaction left behind   resolved: published where it was decided, undone where not
holds the committed version               serves
holds another one                         filled by a donor, digests compared, published, serves
no donor, nothing loaded                  waits for one
no donor                                  digests compared with the committed ones: it may hold them all the same;
                                          if not, the committed version is lost and an operator must say so
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .errors import BusyError, MemberError
from .member import SERVING_LEASE_S
from .membership import Standing
from .messages import Action, Dismiss, Donor, MemberId, Reply, Request, Send, Tick
from .transaction import Kind, Transaction, of_held, replica_sums

if TYPE_CHECKING:
    from .protocol import Coordinator


def tick(coordinator: Coordinator, event: Tick) -> list[Action]:
    """Greet everyone; fence who is gone. Members of the open transaction are left to its own steps."""
    open_ = coordinator.transaction
    busy = open_.replicas if open_ is not None else set()
    fences = [
        action
        for member in coordinator.membership.gone()
        if member.replica not in busy
        for action in coordinator.fence(member, "does not answer")
    ]
    return [*fences, *coordinator.greet(), *next_turn(coordinator)]


def next_turn(coordinator: Coordinator) -> list[Action]:
    """While no transaction is open: dismiss who leaves, let in who is back, take up requests that were put aside."""
    if coordinator.transaction is not None:
        return []
    actions = _dismissed(coordinator)
    replica = coordinator.membership.joinable(coordinator.now_s)
    if replica is not None:
        return [*actions, *_join(coordinator, replica)]
    waiting, coordinator.waiting = coordinator.waiting, []
    return actions + [action for request in waiting for action in coordinator.handle_request(request)]


def add(coordinator: Coordinator, request: Request) -> list[Action]:
    """A new replica, or a rebuilt one: it is let in once its ranks answer. key: tells its processes from those before
    them; asked twice, nothing changes. dead: its earlier ranks surely are."""
    ranks: Sequence[MemberId] = request.args["members"]  # type: ignore[assignment]
    number, key = ranks[0].replica, str(request.args["key"])
    membership = coordinator.membership
    membership.require_open(number)
    known = membership.replicas.get(number)
    if known is not None and known.key == key:
        return [Reply(id=request.id, result={})]
    if known is None or request.args["dead"]:
        silent_s = float("-inf")
    else:
        silent_s = max(known.silent_s, membership.contacts[known.leader].heard_s + SERVING_LEASE_S)
    format = str(request.args.get("format", ""))
    membership.add(ranks, key=key, format=format, silent_s=silent_s, round=coordinator.next_round)
    told = coordinator.notify("add", f"replica {number}: {len(ranks)} ranks")
    return [told, Reply(id=request.id, result={}), *coordinator.greet()]


def remove(coordinator: Coordinator, request: Request) -> list[Action]:
    """A replica leaves; answered once it surely serves no more."""
    number = int(request.args["replica"])  # type: ignore[call-overload]
    membership, open_ = coordinator.membership, coordinator.transaction
    if number not in membership.replicas:
        raise MemberError(f"replica {number}: no such replica; there are {sorted(membership.replicas)}")
    if len([each for each in membership.replicas.values() if not each.leaving]) < 2:
        raise MemberError(f"replica {number} is the last one; stop the service instead")
    if open_ is not None and number in open_.replicas:
        raise BusyError(f"replica {number} takes part in a {open_.kind.value} ({open_.pushed_by}); ask again")
    leaving = membership.replicas[number]
    leaving.leaving.append(request.id)
    return [*coordinator.fence(leaving.leader, "removed by an operator"), *coordinator.greet()]


def _dismissed(coordinator: Coordinator) -> list[Action]:
    actions: list[Action] = []
    for number, each in list(coordinator.membership.replicas.items()):
        if each.leaving and each.silent_s <= coordinator.now_s:
            calls = coordinator.membership.drop(number)
            actions += [Dismiss(replica=number), coordinator.notify("remove", f"replica {number}")]
            actions += [Reply(id=call, result={}) for call in calls]
    return actions


# ---------------------------------------------------------------- the join


def _join(coordinator: Coordinator, number: int) -> list[Action]:
    replica = coordinator.membership.replicas[number]
    replica.standing, replica.reason = Standing.JOINING, "joining"
    id_ = coordinator.next_id()
    coordinator.transaction = open_ = Transaction(
        id=id_,
        kind=Kind.JOIN,
        members=replica.members,
        version=coordinator.version,
        base_version=0,
        push_id=f"join-{id_}",
        pushed_by=f"replica {number}",
        since_s=coordinator.now_s,
        tensors=np.arange(len(coordinator.digests)),
        base=coordinator.digests,
        digests=coordinator.digests,
    )
    states = {member: coordinator.membership.state(member) for member in open_.members}
    open_.held = {member: coordinator.decided.get(s.transaction, s.version) for member, s in states.items()}
    open_.is_empty = any(state.state == "empty" for state in states.values())
    left = {member: s.transaction for member, s in states.items() if s.transaction}
    open_.undone = {member: id_ for member, id_ in left.items() if id_ not in coordinator.decided}
    return coordinator.ask("resolve", [_resolving(coordinator, *each) for each in left.items()])


def _resolving(coordinator: Coordinator, member: MemberId, transaction: int) -> Send:
    """Publish what was decided, undo what was not. An older version than the committed one is published without the
    right to serve it."""
    decided = coordinator.decided.get(transaction)
    if decided is None:
        return coordinator.send(member, "undo", transaction=transaction, version=0)
    publish = coordinator.send(member, "publish", transaction=transaction, version=decided)
    return publish if decided == coordinator.version else publish._replace(token=float("-inf"))


def resolved(coordinator: Coordinator) -> list[Action]:
    """All ranks hold their old bytes, or a decided version: those that were undone may forget the transaction."""
    undone = coordinator.open().undone.items()
    sends = [coordinator.send(member, "abort", transaction=id_, version=0) for member, id_ in undone]
    return coordinator.ask("settle", sends)


def settled(coordinator: Coordinator) -> list[Action]:
    """Every rank is idle and its version known."""
    open_ = coordinator.open()
    if all(version == coordinator.version for version in open_.held.values()):
        return joined(coordinator)
    replicas, several = coordinator.membership.replicas, coordinator.manifest.formats
    format = replicas[next(iter(open_.replicas))].format
    donors = [each for each in coordinator.membership.serving() if not several or replicas[each].format == format]
    if not donors and open_.is_empty:
        like = f" in {format}" if several else ""
        return coordinator.abort(MemberError(f"built to be filled by another replica{like}, and none serves"))
    if not donors:
        return coordinator.start("digest")
    open_.source = Donor(replica=donors[coordinator.next_round % len(donors)])
    return [
        coordinator.notify("fill", f"{open_.pushed_by} from replica {open_.source.replica}"),
        *coordinator.start("open"),
    ]


def compared(coordinator: Coordinator) -> list[Action]:
    """Nobody serves. Bytes that were loaded may be the committed ones; if not, they are nobody's version."""
    open_ = coordinator.open()
    membership = coordinator.membership
    [(number, stock)] = replica_sums(open_.results["digest"]).items()
    wanted = of_held(coordinator.digests, membership.held(number, coordinator.manifest))
    if (stock == wanted).all() and not any(open_.held.values()):
        return coordinator.start("adopt")
    lost = MemberError(f"no replica that answers holds version {coordinator.version}; push in full, or reset")
    actions = coordinator.abort(lost)
    open_.stock = stock
    return actions


def prepared(coordinator: Coordinator) -> list[Action]:
    """The donor's bytes are here and are the committed version's. Nothing is replaced that anybody serves."""
    return coordinator.checked("prepare", "staged") or coordinator.start("install")


def installed(coordinator: Coordinator) -> list[Action]:
    """They are in place: no decision is needed, the version was decided before."""
    return coordinator.checked("install", "installed") or coordinator.start("publish")


def joined(coordinator: Coordinator) -> list[Action]:
    """The replica serves from now on, and counts from the next begin; not so where a rank did not hear of it."""
    fences = coordinator.let_serve()
    told = [] if fences else [coordinator.notify("join", coordinator.open().pushed_by)]
    return [*fences, *told, *coordinator.close(None), *coordinator.greet()]
