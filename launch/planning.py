"""`transfuse plan` and `transfuse simulate`: who would send what to whom, in what time, and what holds it back.

Nothing is sent and nothing is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weight_update.errors import ManifestError, PlanError, raise_all

from .options import DEFAULT_TARGET, Json, Target, emit
from .tables import Row, aligned, decimal_bytes, markdown

if TYPE_CHECKING:
    from sharding.cost import Prediction
    from sharding.plan import RoutePlan

    from .scenario import Planned

MAX_LINKS = 12  # links that a summary names


def plan(
    checkpoint: Annotated[str | None, typer.Argument(help="What a push would bring; not with --scenario.")] = None,
    target: Target = DEFAULT_TARGET,
    scenario: Annotated[
        str | None, typer.Option(metavar="FILE|NAME", help="Plan for what this TOML file describes, no service.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Print every route.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Draw who sends what to whom: .png, .svg or .html.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a push would send.

    The routes, the bytes of every link, peak memory of a rank, and predicted seconds of each phase with the resource
    that sets them, by the rates of one host core unless the scenario says better.
    """
    if (checkpoint is None) == (scenario is None):
        raise PlanError("plan: name a checkpoint (and --to HOST:PORT), or a --scenario")
    title, routes, names, predictions = _of_scenario(scenario) if scenario else _of_service(str(checkpoint), target)
    links = routes.link_bytes()
    if picture is not None:
        from .picture import write_picture

        write_picture(picture, links, title)
    value = {
        "title": title,
        "digest": routes.digest,
        "num_routes": routes.num_routes,
        "links": links.tolist(),
        "predictions": [prediction_row(each) for each in predictions],
    }
    listed = [{**asdict(route), "tensor": names[route.tensor]} for route in routes.routes()] if full else []
    text = _text(title, routes, predictions, listed)
    emit({**value, "routes": listed} if full else value, text, as_json)


def simulate(
    scenarios: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE|NAME]...", help="Default: all that come with this release.")
    ] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/scale.md.")] = False,
    as_json: Json = False,
) -> None:
    """Predict full and delta pushes at sizes that nobody has here."""
    from .scenario import plan_scenario, read_scenario, shipped

    planned = [plan_scenario(read_scenario(name)) for name in scenarios or shipped()]
    rows = [row for each in planned for row in simulated_rows(each)]
    values = [
        {"scenario": each.scenario.name, "predictions": [prediction_row(p) for p in (each.full, each.delta)]}
        for each in planned
    ]
    emit(values, scale_page(planned).rstrip() if as_markdown else aligned(rows), as_json)


# ---------------------------------------------------------------- sources of a plan

Plans = tuple[str, "RoutePlan", Sequence[str], Sequence["Prediction"]]


def _of_scenario(name: str) -> Plans:
    from .scenario import plan_scenario, read_scenario, tensor_names

    planned = plan_scenario(read_scenario(name))
    names = tensor_names(planned.scenario)
    return planned.scenario.title, planned.plan, names, (planned.full, planned.delta)


def _of_service(checkpoint: str, target: str) -> Plans:
    """What a trainer of one rank with this checkpoint would send to the service that runs there."""
    import torch

    from protos import transfuse_pb2 as pb
    from quant.checkpoint import CheckpointError, open_checkpoint
    from quant.formats import DTYPES
    from sharding.cost import HOST, full_work, predict
    from weight_update.routing import push_routes
    from weight_update.sharing import plan_push
    from weight_update.values import from_manifest_proto, from_maps_proto

    from .rpc import ask

    described = ask(target, "Describe", pb.DescribeRequest(), timeout_s=60.0)
    manifest = from_manifest_proto(described.manifest)
    try:
        with open_checkpoint(checkpoint) as opened:
            specs = [(name, opened.spec(name)) for name in opened.names()]
    except CheckpointError as error:
        raise PlanError(str(error)) from error
    items = [(name, torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta")) for name, spec in specs]
    planned, problems = plan_push(manifest, items, "all", experts=from_maps_proto(described.expert_maps))
    raise_all(ManifestError, "push would be refused", problems)
    assert planned is not None
    routes = push_routes(manifest, planned, described.ranks)
    replicas = len({rank.replica for rank in described.ranks})
    work = full_work(routes, [planned.logical_bytes], replicas)
    names = [spec.name for spec in manifest.tensors]
    return f"{checkpoint} to {target}, version {described.version}", routes, names, (predict(work, HOST),)


# ---------------------------------------------------------------- text


def prediction_row(prediction: Prediction) -> dict[str, Any]:
    """A prediction as JSON-ready values."""
    return {
        "mode": prediction.mode,
        "seconds": prediction.seconds,
        "pause_s": prediction.pause_s,
        "bottleneck": prediction.bottleneck,
        "wire_bytes": prediction.wire_bytes,
        "trainer_bytes": prediction.trainer_bytes,
        "actor_bytes": prediction.actor_bytes,
        "fan_out_gain": prediction.fan_out_gain,
        "phases": {
            name: {"seconds": phase.seconds, "bottleneck": phase.bottleneck, "resources": dict(phase.resources)}
            for name, phase in prediction.phases.items()
        },
    }


def _text(title: str, routes: RoutePlan, predictions: Sequence[Prediction], listed: Sequence[Row]) -> str:
    links = routes.link_bytes()
    used = int((links > 0).sum())
    head = [
        title,
        f"{routes.num_routes} routes of {len(routes.kinds)} kinds over {used} of {links.size} links, plan digest"
        f" {routes.digest}",
    ]
    order = sorted(((int(n), at) for at, n in enumerate(links.ravel()) if n), key=lambda pair: (-pair[0], pair[1]))
    largest = [
        {"trainer rank": at // links.shape[1], "actor rank": at % links.shape[1], "bytes": decimal_bytes(n)}
        for n, at in order[:MAX_LINKS]
    ]
    more = [f"and {used - MAX_LINKS} more links, none larger"] if used > MAX_LINKS else []
    parts = ["\n".join(head), "\n".join([aligned(largest), *more])]
    for each in predictions:
        memory = f"memory above idle: trainer {decimal_bytes(each.trainer_bytes)}, actor"
        parts.append(
            f"predicted, {each.mode}: {each.seconds:.2f} s, {decimal_bytes(each.wire_bytes)} on the wire, pause"
            f" {each.pause_s:.2f} s; {memory} {decimal_bytes(each.actor_bytes)}\n" + aligned(_phase_rows(each))
        )
    return "\n\n".join([*parts, *([aligned(listed)] if listed else [])])


def _phase_rows(prediction: Prediction) -> list[Row]:
    return [
        {"phase": name, "seconds": f"{phase.seconds:.3f}", "bottleneck": phase.bottleneck}
        for name, phase in prediction.phases.items()
    ]


def simulated_rows(planned: Planned) -> list[Row]:
    """One row a mode."""
    return [
        {
            "scenario": planned.scenario.name,
            "push": each.mode,
            "wire": decimal_bytes(each.wire_bytes),
            "seconds": f"{each.seconds:.2f}",
            "transfer s": f"{each.phases['transfer'].seconds:.2f}",
            "pause s": f"{each.pause_s:.2f}",
            "bottleneck": each.bottleneck,
            "links alone, s": f"{_links_s(each):.3f}",
            "with fan-out, s": f"{each.fan_out_s:.2f}" if each.fan_out_gain > 0.0 else "no gain",
        }
        for each in (planned.full, planned.delta)
    ]


def _links_s(prediction: Prediction) -> float:
    resources: Mapping[str, float] = prediction.phases["transfer"].resources
    return max(seconds for name, seconds in resources.items() if "NIC" in name)


def scale_page(planned: Sequence[Planned]) -> str:
    """docs/scale.md: `transfuse simulate --markdown`; a test keeps it so."""
    from sharding.cost import MIN_GAIN

    gaining = [
        f"{each.scenario.name} ({p.mode}) {100 * p.fan_out_gain:.0f} %"
        for each in planned
        for p in (each.full, each.delta)
        if p.fan_out_gain >= MIN_GAIN
    ]
    sections = [
        SCALE_HEAD,
        markdown([row for each in planned for row in simulated_rows(each)]),
        f"A gain of a third or more from fan-out: {', '.join(gaining) or 'none'}; it is what a trainer does there"
        " (docs/links.md).",
        *(_section(each) for each in planned),
    ]
    return "\n\n".join(sections) + "\n"


SCALE_HEAD = """# Pushes at sizes that nobody has here

Written by `transfuse simulate --markdown`; a test compares. **Every figure in the first table is a prediction** of
`sharding/cost.py`, from the real routes of the scenario and the rates in its TOML file (`launch/scenarios/`). The host
rates are those of the code as it is on one CPU core a rank: no GPU encodes or installs anything yet. "links alone" is
the time that the network itself needs. With fan-out a row travels to one replica and is passed on from there."""


def _section(planned: Planned) -> str:
    scenario = planned.scenario
    count = f"{scenario.num_parameters / 1e9:.1f} billion parameters in {planned.work.tensors} tensors"
    lines = [f"## {scenario.title}", f"{count}; {planned.plan.num_routes} routes of {len(planned.plan.kinds)} kinds."]
    lines += ["\n".join(f"- {source}" for source in scenario.sources)]
    if scenario.published:
        lines += [
            "Published by others, measured by them, on other hardware and not the same thing:",
            markdown(
                [
                    {"system": p.system, "seconds": p.seconds, "what was measured": p.measured, "source": p.source}
                    for p in scenario.published
                ]
            ),
        ]
    return "\n\n".join(lines)
