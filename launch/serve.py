"""A service in the foreground: started with progress, stopped by the first interrupt."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from protos import transfuse_pb2 as pb
from quant.formats import FORMATS
from quant.layouts import LAYOUTS
from service.fleet import FleetConfig
from service.keeper import StoreConfig
from service.logs import FORMATS as FORMATS_OF_LOGS
from service.logs import PLACES, Seeing
from weight_update.errors import PlanError, WeightUpdateError, raise_all

from .interrupts import ForegroundFleet, hold_interrupts, raise_interrupts
from .progress import Bars
from .rpc import ask

ANSWER_S = 10.0


def configured(components: Sequence[str], **options: Any) -> FleetConfig:
    """A config from the command line; components: NAME=PATH each."""
    pairs = [each.partition("=") for each in components]
    problems = [f"--component {name}: expected NAME=PATH" for name, equals, path in pairs if not (name and path)]
    raise_all(PlanError, "serve refused", problems)
    return FleetConfig(components={name: path for name, _, path in pairs}, **options)


def kept(store: Path | None, keep: int, keep_bytes: int | None) -> StoreConfig | None:
    """Which versions are kept where, from the command line."""
    return None if store is None else StoreConfig(directory=store.resolve(), keep=keep, keep_bytes=keep_bytes)


def seen(metrics_port: int, metrics_at: str, log_format: str, record: Path | None) -> Seeing:
    """What the processes show of themselves, from the command line."""
    given = (("--log-format", log_format, FORMATS_OF_LOGS), ("--metrics-at", metrics_at, PLACES))
    problems = [
        f"{option} {value}: expected one of {', '.join(known)}" for option, value, known in given if value not in known
    ]
    raise_all(PlanError, "serve refused", problems)
    where: Any = {"metrics_at": metrics_at, "log_format": log_format}
    return Seeing(metrics_port=metrics_port, record_dir=None if record is None else record.resolve(), **where)


def run(config: FleetConfig, ready: Callable[[str], None], grace_s: float) -> None:
    """Serve until interrupted; `ready` gets the address once the service answers. grace_s: for what runs then."""
    raise_interrupts()
    check_names(config.format, config.layout)
    bars = Bars()
    fleet = ForegroundFleet(config, lambda what, done, total: bars.update(f"start {what}", done, total), bars.note)
    try:
        with bars.show():
            fleet.__enter__()
        raise_interrupts()
        ready(fleet.address)
        fleet.wait()
    except KeyboardInterrupt:  # how a service is meant to end
        if fleet.address and grace_s:
            hold_interrupts()
            drain(fleet.address, grace_s)
    finally:
        with bars.show("stop"):
            fleet.stop()


def drain(address: str, grace_s: float, replicas: Sequence[int] = ()) -> None:
    """Let replicas (none named: all) take no new requests, and the running ones end."""
    request = pb.DrainRequest(replicas=replicas, timeout_s=grace_s)
    try:
        with Bars().show("drain"):
            left = ask(address, "Drain", request, timeout_s=grace_s + ANSWER_S).num_sequences
    except WeightUpdateError as error:  # it has to stop all the same
        sys.stderr.write(f"not drained: {error}\n")
    else:
        if left:
            sys.stderr.write(f"{left} running sequences did not end within {grace_s:.0f} s\n")


def check_names(fmt: str, layouts: str) -> None:
    """Refuse unknown names before any process starts."""
    known = {"auto", *LAYOUTS, *(layout.family for layout in LAYOUTS.values())}
    # Of a pipeline: one for each component, and "auto" for what its checkpoint says.
    rows = [part.rpartition("=")[2] for part in fmt.split(",")]
    problems = [
        f"format {row!r}: expected one of {', '.join(FORMATS)}" for row in rows if row not in {"auto", *FORMATS}
    ]
    problems += [
        f"layout {name!r}: expected one of {', '.join(sorted(known))}"
        for name in layouts.split(",")
        if name not in known
    ]
    raise_all(PlanError, "serve refused; 'transfuse formats' lists what there is", problems)
