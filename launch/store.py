"""`transfuse export`, `rollback` and `reset`: what a version store and older versions are good for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .confirming import Yes, confirm
from .options import DEFAULT_TARGET, Json, Target, address_of, emit

TIMEOUT_S = 3600.0
DURABLE = "durable"

Version = Annotated[int, typer.Argument(min=1, metavar="VERSION", help="As 'transfuse versions' lists them.")]


def export(
    version: Version,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    store: Annotated[
        Path | None, typer.Option(help="Folder of a version store; without it, that of the running service.")
    ] = None,
    target: Target = DEFAULT_TARGET,
    as_json: Json = False,
) -> None:
    """Write a stored version as a checkpoint.

    Every byte is compared with the committed digests before the folder appears; other engines load it: ModelOpt's
    names, hf_quant_config.json, safetensors with an index. A running service is asked where its store lies, which is
    then read from here. With --json version, directory, digest, num_bytes.
    """
    from weight_update.store import Store

    from .progress import Bars
    from .tables import mebibytes

    folder = _store_of(target) if store is None else store
    with Bars().show("export"):
        opened = Store.existing(folder, version)
        opened.export(version, directory)
    record = opened.record(version)
    num_bytes = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    value = {"version": version, "directory": str(directory), "digest": record.digest, "num_bytes": num_bytes}
    emit(value, f"version {version} in {directory}: {mebibytes(num_bytes)}, digests as committed", as_json)


def rollback(version: Version, yes: Yes = False, target: Target = DEFAULT_TARGET, as_json: Json = False) -> None:
    """Bring an older version back.

    Its bytes become the next version, on all ranks or on none; 'transfuse versions' shows which can be reached.
    """
    from protos import transfuse_pb2 as pb

    from .progress import Bars
    from .rpc import ask, values

    if not yes:  # what is said costs two calls
        confirm(_rollback_text(target, version), yes=yes)
    with Bars().show("roll back"):
        reply = ask(target, "Rollback", pb.RollbackRequest(version=version), timeout_s=TIMEOUT_S)
    emit(values(reply)["version"], _told(reply.version), as_json)


def reset(
    to: Annotated[str, typer.Option(metavar="durable|VERSION", help="'durable' is the newest one in the store.")],
    target: Annotated[
        str,
        typer.Option(
            "--service",
            envvar="TRANSFUSE_SERVICE",
            metavar="HOST:PORT",
            callback=address_of,
            help="The service's coordinator.",
        ),
    ] = DEFAULT_TARGET,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Go on with an older version where the current one is lost.

    For the case that 'transfuse status' names: a version was committed, and no replica holds it any more. A full push
    is the other way out.
    """
    from protos import transfuse_pb2 as pb

    from .progress import Bars
    from .rpc import ask, values

    if to != DURABLE and not (to.isdigit() and int(to)):
        raise typer.BadParameter(f"{to!r}: expected {DURABLE!r} or a version")
    which = "the newest durable version" if to == DURABLE else f"version {to}"
    confirm(f"reset {target}: the current version is given up as lost, {which} is served as the next one", yes=yes)
    request = pb.ResetRequest(version=0 if to == DURABLE else int(to))
    with Bars().show("reset"):
        reply = ask(target, "Reset", request, timeout_s=TIMEOUT_S)
    emit(values(reply)["version"], _told(reply.version), as_json)


def _store_of(target: str) -> Path:
    from protos import transfuse_pb2 as pb
    from weight_update.errors import StoreError

    from .rpc import ask

    folder = ask(target, "Status", pb.StatusRequest()).store_dir
    if not folder:
        raise StoreError(f"{target}: this service has no version store; start it with --store DIR")
    if not Path(folder).is_dir():
        raise StoreError(f"{target}: its store {folder} is not on this machine; run this there, or name one by --store")
    return Path(folder)


def _rollback_text(target: str, version: int) -> str:
    from protos import transfuse_pb2 as pb

    from .rpc import ask
    from .tables import moment

    status = ask(target, "Status", pb.StatusRequest())
    listed = ask(target, "Versions", pb.VersionsRequest(), timeout_s=60.0).versions
    meant = next((each for each in listed if each.version == version), None)
    of = f" (of {moment(meant.created_s)}, step {meant.step}, digest {meant.digest})" if meant else ", which is unknown"
    serving = ", ".join(str(each.replica) for each in status.replicas if each.state == "serving")
    return (
        f"roll back {target}: replica {serving or '(none)'} leaves version {status.version} and serves the bytes of"
        f" version {version}{of} as the next version"
    )


def _told(info: Any) -> str:
    return f"version {info.version} holds the bytes of version {info.restores}, digest {info.digest}"
