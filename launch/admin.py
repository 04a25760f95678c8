"""Commands for the person on call: what a running service is asked, and what it is told to do. None of them loads
torch."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from .confirming import Yes, confirm
from .options import DEFAULT_TARGET, Json, Target, emit

DRAIN_MARGIN_S = 30.0  # beside the time that running sequences are given

Last = Annotated[int, typer.Option("--last", min=0, metavar="N", help="Only the newest N; 0 is all of them.")]


# ---------------------------------------------------------------- what is


def status(target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Version, replicas and the open push."""
    from protos import transfuse_pb2 as pb

    from .rpc import ask, values
    from .tables import status_text

    reply = values(ask(target, "Status", pb.StatusRequest()))
    emit(reply, status_text(reply), as_json)


def describe(target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Parameters that a push brings, and the ranks.

    With --json also every tensor, and which of its rows each rank holds.
    """
    from protos import transfuse_pb2 as pb

    from .rpc import ask, values
    from .tables import describe_text

    reply = values(ask(target, "Describe", pb.DescribeRequest(), timeout_s=60.0))
    emit(reply, describe_text(reply), as_json)


def versions(last: Last = 0, target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Committed versions, oldest first."""
    from protos import transfuse_pb2 as pb

    from .rpc import ask, values
    from .tables import aligned, version_row

    rows = values(ask(target, "Versions", pb.VersionsRequest(last=last), timeout_s=60.0))["versions"]
    emit(rows, aligned([version_row(row) for row in rows]), as_json)


def verify(
    share: Annotated[
        float, typer.Option(min=0.01, max=1.0, metavar="S", help="Of every rank's time that may be spent on it.")
    ] = 0.2,
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Read back and compare all that is served.

    Every installed byte of every rank is read and compared with the trainer's digest, beside serving. Exit code 1 where
    a digest is not the committed one, naming the tensor and the replica; 5 where a commit came in between.
    """
    from protos import transfuse_pb2 as pb

    from .progress import Bars
    from .rpc import listen, values
    from .tables import mebibytes

    bars, outcome = Bars(), None
    with bars.show("verify"):
        for told in listen(target, "Reread", pb.RereadRequest(share=share)):
            bars.update("verify", told.done_bytes, told.total_bytes)
            outcome = values(told.outcome) if told.HasField("outcome") else None
    assert outcome is not None
    found = f"version {outcome['version']}: {mebibytes(outcome['bytes'])} read back in {outcome['seconds']:.2f} s"
    said = "all as committed" if outcome["ok"] else "MISMATCH"
    emit(outcome, "\n".join([f"{found}, {said}", *outcome["mismatches"]]), as_json)
    if not outcome["ok"]:
        raise typer.Exit(1)


def events(
    last: Annotated[int, typer.Option("--last", min=1, max=10_000, metavar="N", help="How many of the newest.")] = 100,
    after: Annotated[int, typer.Option(min=0, metavar="NUMBER", help="Only events with a larger number.")] = 0,
    kind: Annotated[list[str], typer.Option(metavar="KIND", help="Only of this kind; repeatable.")] = [],  # noqa: B006
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """What happened, and who asked for it.

    The service's record, which nothing can change or delete: steps of the protocol, and every call that changes
    something, with who made it from where. Oldest first.
    """
    from protos import transfuse_pb2 as pb

    from .rpc import ask, values
    from .tables import aligned, event_row

    found = values(ask(target, "Events", pb.EventsRequest(limit=last, after=after, kinds=kind)))["events"]
    emit(found, aligned([event_row(each) for each in found]), as_json)


def watch(
    count: Annotated[int, typer.Option(min=0, metavar="N", help="End after N events; 0 is never.")] = 0,
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Stream what happens from now on.

    With --json one object a line. 'transfuse events' shows what happened before.
    """
    from protos import transfuse_pb2 as pb

    from .rpc import listen, values
    from .tables import event_line

    seen = 0
    try:
        for event in listen(target, "Watch", pb.WatchRequest()):
            told = values(event)
            sys.stdout.write((json.dumps(told) if as_json else event_line(told)) + "\n")
            sys.stdout.flush()
            seen += 1
            if seen == count:
                return
    except KeyboardInterrupt:
        return  # how a watch is meant to end


# ---------------------------------------------------------------- what is to be


def pause(
    reason: Annotated[str, typer.Option(help="Kept in the service's record.")] = "",
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Stop generation; running sequences wait."""
    from protos import transfuse_pb2 as pb

    from .rpc import ask

    ask(target, "Pause", pb.PauseRequest(reason=reason), timeout_s=60.0)
    emit({"paused": True}, "paused; 'transfuse resume' goes on", as_json)


def resume(target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Go on after a pause or a drain."""
    from protos import transfuse_pb2 as pb

    from .rpc import ask

    ask(target, "Resume", pb.ResumeRequest(), timeout_s=60.0)
    emit({"paused": False}, "serving", as_json)


def drain(
    replica: Annotated[
        list[int], typer.Option(min=0, metavar="R", help="Only this one; repeatable. Default: all of them.")
    ] = [],  # noqa: B006 - typer copies it
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1.0, metavar="S", help="How long running sequences may take.")
    ] = 300.0,
    yes: Yes = False,
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Let running sequences end and take no new ones.

    Returns once they have ended. Pushes go on; 'transfuse resume' takes requests again. Exit code 1 where some still
    run when the time is over: they go on running.
    """
    from protos import transfuse_pb2 as pb

    from .progress import Bars
    from .rpc import ask, values

    which = f"replica {', '.join(map(str, replica))} takes" if replica else "all replicas take"
    confirm(f"drain {target}: {which} no new request until 'transfuse resume'; what runs may end", yes=yes)
    with Bars().show("drain"):
        request = pb.DrainRequest(replicas=replica, timeout_s=timeout_s)
        reply = values(ask(target, "Drain", request, timeout_s=timeout_s + DRAIN_MARGIN_S))
    left, drained = reply["num_sequences"], ", ".join(map(str, reply["replicas"]))
    said = f"{left} sequences still run" if left else "drained"
    emit(reply, f"replica {drained}: {said}; 'transfuse resume' takes requests again", as_json)
    if left:
        raise typer.Exit(1)


def abort(
    reason: Annotated[str, typer.Option(help="Told to the trainer, and kept in the service's record.")] = "",
    yes: Yes = False,
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Give the open push up.

    Every rank goes back to what it serves; what was sent is dropped. A push that is decided cannot be given up.
    """
    from protos import transfuse_pb2 as pb

    from .rpc import ask

    open_ = ask(target, "Status", pb.StatusRequest())
    if open_.transaction_state:
        confirm(_abort_text(open_), yes=yes)
    request = pb.AbortRequest(transaction=open_.transaction, reason=reason or "no reason given")
    aborted = bool(open_.transaction) and ask(target, "Abort", request, timeout_s=120.0).aborted
    told = f"push {open_.transaction} is given up; version {open_.version} is served"
    emit(
        {"aborted": aborted, "transaction": open_.transaction},
        told if aborted else "no push was open, or it was decided already; nothing was done",
        as_json,
    )


def _abort_text(open_: Any) -> str:
    by = f"by {open_.transaction_by or 'unnamed'}"
    return (
        f"abort push {open_.transaction} {by}, {open_.transaction_state}: what it sent is dropped, its trainer gets an"
        f" error, version {open_.version} stays"
    )
