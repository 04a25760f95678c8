"""`transfuse replica`: how many copies of the model a running service has."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from .confirming import Yes, confirm
from .options import DEFAULT_TARGET, Json, Target, emit

POLL_S = 0.5

app = typer.Typer(
    help="Add or remove a replica of a running service.",
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
)

Wait = Annotated[float, typer.Option("--timeout", metavar="S", min=1.0, help="Seconds to wait for it.")]


@app.command()
def add(target: Target = DEFAULT_TARGET, timeout_s: Wait = 600.0, as_json: Json = False) -> None:
    """Start one more replica.

    It is filled by one that serves, and takes part from the next push on. Returns once it serves.
    """
    from protos import transfuse_pb2 as pb
    from weight_update.errors import MemberError

    from .progress import Bars
    from .rpc import ask

    with Bars().show("start replica"):
        number = ask(target, "ReplicaAdd", pb.ReplicaAddRequest()).replica
        deadline_s, state = time.monotonic() + timeout_s, "starting"
        while state != "serving":
            if time.monotonic() > deadline_s:
                why = "the cluster may have no room for its ranks" if state == "starting" else "see its ranks' logs"
                told = f"replica {number} is {state} after {timeout_s:.0f} s, {why}; 'transfuse status' shows it"
                raise MemberError(told)
            time.sleep(POLL_S)
            replicas = ask(target, "Status", pb.StatusRequest()).replicas
            state = next((each.state for each in replicas if each.replica == number), "unknown")
    emit({"replica": number, "state": state}, f"replica {number} serves", as_json)


@app.command()
def remove(
    replica: Annotated[int, typer.Argument(min=0, help="Its number in 'transfuse status'.")],
    target: Target = DEFAULT_TARGET,
    timeout_s: Wait = 120.0,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Take a replica out and end its processes.

    Its running requests end early; the last replica cannot be removed.
    """
    from protos import transfuse_pb2 as pb

    from .progress import Bars
    from .rpc import ask

    confirm(f"remove replica {replica} of {target}: its processes end, and what they generate ends early", yes=yes)
    with Bars().show("remove replica"):
        ask(target, "ReplicaRemove", pb.ReplicaRemoveRequest(replica=replica), timeout_s=timeout_s)
    emit({"replica": replica, "state": "removed"}, f"replica {replica} is removed", as_json)
