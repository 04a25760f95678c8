"""Scenarios: a model, a trainer and a service that need not exist, as one TOML file, and what a push there would cost.

    scenario = read_scenario(Path("launch/scenarios/kimi_k2.toml"))     # or the name of a shipped one
    planned = plan_scenario(scenario)
    planned.full.seconds, planned.delta.seconds, planned.plan.link_bytes()

Everything is in checkpoint form: a quantized parameter is NVFP4 codes, block scales and one global scale. Actor ranks
compute with the rows that they own, as engines with expert and tensor parallelism do: nothing is gathered.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from sharding.cost import HOST, Prediction, Rates, Work, delta_work, full_work, predict
from sharding.fsdp import shard_range
from sharding.plan import RoutePlan, plan_routes
from sharding.tiles import Ints, Numbers, Tiles, as_tensors, senders
from weight_update.errors import PlanError

SHIPPED = Path(__file__).parent / "scenarios"
TILE_ROWS = 128  # of a quantized parameter on the actors' side

# (rows of the parameter for one of its own, 0 for a single value; bytes of a row by columns), by tensor of a parameter
QUANTIZED = ((1, lambda columns: columns // 2), (1, lambda columns: columns // 16), (0, lambda columns: 4))
PLAIN = ((1, lambda columns: 2 * columns),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """layers (times experts) parameters of one shape. plain: not quantized, BF16."""

    name: str
    rows: int
    columns: int
    layers: int = 1
    experts: int = 0
    plain: bool = False

    @property
    def count(self) -> int:
        return self.layers * max(1, self.experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """ranks, of which expert_ranks split the experts (the rest of them their rows) and dense_ranks shard all else (the
    rest are replicas)."""

    ranks: int
    dense_ranks: int = 1
    expert_ranks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """replicas of so many ranks: experts split whole, everything else sharded by row tiles."""

    ranks: int
    replicas: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What another system was measured to take, and what exactly was measured."""

    system: str
    seconds: float
    measured: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A file, read and checked. share: of the bytes that a delta sends."""

    name: str
    title: str
    sources: Sequence[str]
    trainer: Trainer
    service: Service
    parameters: Sequence[Parameters]
    rates: Rates = HOST
    share: float = 0.01
    published: Sequence[Published] = ()

    @property
    def num_parameters(self) -> int:
        """Weights in all."""
        return sum(each.count * each.rows * each.columns for each in self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The plan of a scenario, and what a full and a delta push cost."""

    scenario: Scenario
    plan: RoutePlan
    work: Work
    full: Prediction
    delta: Prediction


def shipped() -> list[str]:
    """Names of the scenarios that come with this release."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def read_scenario(path: Path | str) -> Scenario:
    """A file, or a shipped scenario by name. PlanError says what is wrong with it."""
    path = SHIPPED / f"{path}.toml" if str(path) in shipped() else Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}; shipped scenarios: {', '.join(shipped())}") from None
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"{path}: {error}") from None
    return _checked(path, content)


def _checked(path: Path, content: Mapping[str, Any]) -> Scenario:
    try:
        rates = {name: float(value) for name, value in content.get("rates", {}).items()}
        scenario = Scenario(
            name=path.stem,
            title=content["title"],
            sources=content.get("sources", []),
            trainer=Trainer(**content["trainer"]),
            service=Service(**content["service"]),
            parameters=[Parameters(**each) for each in content["parameters"]],
            rates=replace(HOST, **rates),
            share=float(content.get("delta", {}).get("share", 0.01)),
            published=[Published(**each) for each in content.get("published", [])],
        )
    except KeyError as error:
        raise PlanError(f"{path}: lacks {error}; see {SHIPPED / 'kimi_k2.toml'}") from None
    except TypeError as error:  # dataclasses name the argument that they do not know, or lack
        known = ", ".join(field.name for field in fields(Rates))
        raise PlanError(f"{path}: {error}; rates: {known}; see {SHIPPED / 'kimi_k2.toml'}") from None
    trainer, service = scenario.trainer, scenario.service
    sizes = (trainer.ranks, trainer.dense_ranks, trainer.expert_ranks, service.ranks, service.replicas)
    if min(sizes) < 1 or trainer.ranks % trainer.dense_ranks or trainer.ranks % trainer.expert_ranks:
        raise PlanError(f"{path}: dense_ranks and expert_ranks must divide the trainer's {trainer.ranks} ranks")
    return scenario


# ---------------------------------------------------------------- placements


def trainer_tiles(scenario: Scenario) -> Tiles:
    """Which rows of which parameter every trainer rank holds."""
    trainer, parts = scenario.trainer, []
    for each, numbers in _numbered(scenario):
        split = trainer.expert_ranks if each.experts else 1
        shards = trainer.ranks // split if each.experts else trainer.dense_ranks
        ranges = [shard_range(max(1, each.experts), group, split) for group in range(split)]
        of_group = [np.ascontiguousarray(numbers[:, first:last]).ravel() for first, last in ranges]
        for rank in range(trainer.ranks):
            group, place = divmod(rank, shards) if each.experts else (0, rank % shards)
            parts.append(_tile(rank, of_group[group], *shard_range(each.rows, place, shards)))
    return Tiles.joined(part for part in parts if part is not None)


def service_tiles(scenario: Scenario) -> Tiles:
    """Which rows of which parameter every actor rank owns."""
    service, parts = scenario.service, []
    for each, numbers in _numbered(scenario):
        tile, flat = 1 if each.plain else TILE_ROWS, numbers.ravel()
        for rank in range(service.replicas * service.ranks):
            place = rank % service.ranks
            if each.experts:
                first, last = shard_range(each.experts, place, service.ranks)
                parts.append(_tile(rank, numbers[:, first:last].ravel(), 0, each.rows))
                continue
            start, stop = (min(tile * at, each.rows) for at in shard_range(-(-each.rows // tile), place, service.ranks))
            parts.append(_tile(rank, flat, start, stop))
    return Tiles.joined(part for part in parts if part is not None)


def _numbered(scenario: Scenario) -> Iterator[tuple[Parameters, Numbers]]:
    """Each shape with the numbers of its parameters, [layers, experts], ascending."""
    first = 0
    for each in scenario.parameters:
        yield each, np.arange(first, first + each.count, dtype=np.uint32).reshape(each.layers, -1)
        first += each.count


def _tile(rank: int, numbers: Numbers, start: int, stop: int) -> Tiles | None:
    if start >= stop or not numbers.size:
        return None
    column = [np.array([value], np.int64) for value in (rank, start, stop)]
    return Tiles(rank=column[0], start=column[1], stop=column[2], tensors=(numbers,))


# ---------------------------------------------------------------- the plan


def plan_scenario(scenario: Scenario) -> Planned:
    """Plan and predict, on one core, without anything running."""
    num_rows = np.concatenate([np.full(each.count, each.rows) for each in scenario.parameters])
    columns = np.concatenate([np.full(each.count, each.columns) for each in scenario.parameters])
    sent, gaps = senders(trainer_tiles(scenario), num_rows)
    assert not gaps
    parameter, rows, row_bytes = _tensors(scenario)
    num_senders = scenario.trainer.ranks
    plan = plan_routes(
        as_tensors(sent, parameter, rows),
        as_tensors(service_tiles(scenario), parameter, rows),
        row_bytes,
        num_senders=num_senders,
        num_receivers=scenario.service.replicas * scenario.service.ranks,
    )
    held = np.array([int(columns[each].sum()) for each in sent.tensors], np.int64) * (sent.stop - sent.start)
    source = np.bincount(sent.rank, weights=2.0 * held, minlength=num_senders)
    full = full_work(plan, source, scenario.service.replicas, gathers=False)
    delta = predict(delta_work(full, scenario.share), scenario.rates)
    return Planned(scenario=scenario, plan=plan, work=full, full=predict(full, scenario.rates), delta=delta)


def tensor_names(scenario: Scenario) -> list[str]:
    """By tensor of the plan: its shape's name, layer, expert and part."""
    found: list[str] = []
    for each in scenario.parameters:
        parts = ("weight",) if each.plain else ("weight", "weight_scale", "weight_scale_2")
        experts = range(each.experts) if each.experts else (None,)
        found += [
            f"{each.name}.{layer}" + ("" if expert is None else f".{expert}") + f".{part}"
            for part in parts
            for layer in range(each.layers)
            for expert in experts
        ]
    return found


def _tensors(scenario: Scenario) -> tuple[Ints, Ints, Ints]:
    """By tensor: its parameter, the parameter's rows for one of its own, and its bytes a row."""
    found: list[tuple[Ints, Ints, Ints]] = []
    for each, numbers in _numbered(scenario):
        for rows, row_bytes in PLAIN if each.plain else QUANTIZED:
            flat = numbers.ravel().astype(np.int64)
            found.append((flat, np.full_like(flat, rows), np.full_like(flat, row_bytes(each.columns))))
    parameter, rows_, bytes_ = (np.concatenate(column) for column in zip(*found, strict=True))
    return parameter, rows_, bytes_
