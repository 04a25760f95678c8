"""A service in the foreground: started with progress, stopped by the first interrupt."""

from __future__ import annotations

from collections.abc import Callable

from quant.formats import FORMATS
from quant.layouts import LAYOUTS
from service.fleet import FleetConfig
from weight_update.errors import PlanError, raise_all

from .interrupts import ForegroundFleet, raise_interrupts
from .progress import Bars


def run(config: FleetConfig, ready: Callable[[str], None]) -> None:
    """Serve until interrupted; `ready` gets the address once the service answers."""
    raise_interrupts()
    check_names(config.format, config.layout)
    bars = Bars()
    fleet = ForegroundFleet(config, lambda what, done, total: bars.update(f"start {what}", done, total))
    try:
        with bars.show():
            fleet.__enter__()
        raise_interrupts()
        ready(fleet.address)
        fleet.wait()
    except KeyboardInterrupt:
        pass  # how a service is meant to end
    finally:
        with bars.show("stop"):
            fleet.stop()


def check_names(fmt: str, layouts: str) -> None:
    """Refuse unknown names before any process starts."""
    known = {"auto", *LAYOUTS, *(layout.family for layout in LAYOUTS.values())}
    problems = [f"format {fmt!r}: expected one of {', '.join(FORMATS)}"] if fmt not in FORMATS else []
    problems += [
        f"layout {name!r}: expected one of {', '.join(sorted(known))}"
        for name in layouts.split(",")
        if name not in known
    ]
    raise_all(PlanError, "serve refused; 'transfuse formats' lists what there is", problems)
