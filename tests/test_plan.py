"""The plan of a push as a value, its cost, and what the commands print of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cli import main
from launch.picture import picture, write_picture
from launch.planning import scale_page
from launch.scenario import plan_scenario, read_scenario, shipped
from quant.formats import FORMATS
from quant.parameters import ParameterRow
from sharding.cost import HOST, Work, calibrated, delta_work, predict
from sharding.plan import plan_routes
from sharding.tiles import Tiles, as_tensors, kinds
from weight_update.encoder import encoded
from weight_update.errors import PlanError
from weight_update.manifest import Manifest
from weight_update.routing import push_routes
from weight_update.sharing import plan_push

ROOT = Path(__file__).parents[1]
Range = tuple[int, int, int, int]  # rank, tensor, start, stop


def tiles(ranges: Sequence[Range]) -> Tiles:
    by_rank = {rank: [each for each in ranges if each[0] == rank] for rank, *_ in ranges}
    columns = {rank: np.array(each, np.int64) for rank, each in by_rank.items()}
    return Tiles.joined(Tiles.of(rank, c[:, 1], c[:, 2], c[:, 3]) for rank, c in columns.items())


# ---------------------------------------------------------------- routes


@st.composite
def placements(draw: st.DrawFn) -> tuple[list[int], list[Range], list[Range]]:
    """Rows of tensors; what is sent, each row by one rank; what is owned, by any number of ranks, also twice by one
    replica."""
    rows = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    sent: list[Range] = []
    owned: list[Range] = []
    for tensor, count in enumerate(rows):
        edges = sorted({0, count, *draw(st.lists(st.integers(0, count), max_size=4))})
        sent += [(draw(st.integers(0, 3)), tensor, a, b) for a, b in pairwise(edges)]
        for rank in range(draw(st.integers(1, 4))):
            start = draw(st.integers(0, count))
            owned.append((rank, tensor, start, draw(st.integers(start, count))))
    return rows, sent, owned


@settings(max_examples=60, deadline=None)
@given(placements())
def test_every_row_reaches_every_owner_once_and_from_its_sender(
    case: tuple[list[int], list[Range], list[Range]],
) -> None:
    rows, sent, owned = case
    row_bytes = [3 + tensor for tensor in range(len(rows))]
    plan = plan_routes(tiles(sent), tiles(owned), row_bytes, num_senders=4, num_receivers=4)
    found: Counter[tuple[int, int, int, int]] = Counter()
    for route in plan.routes():
        for row in range(route.start, route.stop):
            found[route.tensor, row, route.sender, route.receiver] += 1
    expected = {
        (tensor, row, sender, receiver): 1
        for sender, tensor, start, stop in sent
        for row in range(start, stop)
        for receiver, other, first, last in owned
        if other == tensor and first <= row < last
    }
    assert found == expected
    links = np.zeros((4, 4), np.int64)
    for tensor, _, sender, receiver in expected:
        links[sender, receiver] += row_bytes[tensor]
    assert np.array_equal(plan.link_bytes(), links)
    for tensor in range(len(rows)):
        assert plan.routes_of(tensor) == [route for route in plan.routes() if route.tensor == tensor]


def test_the_digest_names_the_plan_and_nothing_else() -> None:
    ranges: list[Range] = [(0, 0, 0, 8), (1, 0, 8, 20), (0, 1, 0, 5)]
    owned: list[Range] = [(0, 0, 0, 20), (0, 1, 0, 5)]
    plan = plan_routes(tiles(ranges), tiles(owned), [4, 4])
    assert plan.digest == plan_routes(tiles(ranges), tiles(owned), [4, 4]).digest
    other: list[Range] = [(0, 0, 0, 9), (1, 0, 9, 20), (0, 1, 0, 5)]
    assert plan.digest != plan_routes(tiles(other), tiles(owned), [4, 4]).digest
    assert tiles(ranges).digest != tiles(other).digest


def test_tensors_that_lie_alike_are_planned_once() -> None:
    many: list[Range] = [(rank, tensor, 4 * rank, 4 * rank + 4) for rank in range(2) for tensor in range(100)]
    found = kinds(101, tiles([*many, (0, 100, 0, 8)]))
    assert sorted(len(kind.tensors) for kind in found) == [1, 100]
    plan = plan_routes(tiles(many), tiles([(0, tensor, 0, 8) for tensor in range(100)]), [1] * 100)
    assert len(plan.kinds) == 1 and plan.num_routes == 200


def test_tensors_of_a_parameter_follow_its_rows() -> None:
    """Weight, a scale of 128 rows, one value; parameter 7 is not sent."""
    sent = tiles([(0, 0, 0, 256), (1, 0, 256, 300)])
    found = as_tensors(sent, np.array([0, 0, 0, 7]), np.array([1, 128, 0, 1]))
    assert sorted(found.of_rank(0)) == [(0, 0, 256), (1, 0, 2), (2, 0, 1)]
    assert sorted(found.of_rank(1)) == [(0, 256, 300), (1, 2, 3)]


@pytest.mark.parametrize("format", ["bf16", "nvfp4", "fp8_block", "fp8", "int4_group"])
def test_planned_bytes_are_those_that_are_sent(format: str) -> None:
    shapes = {"a.weight": (300, 256), "b.weight": (128, 128)}
    if format == "fp8_block":
        shapes["a.weight"] = (384, 256)
    rows = tuple(ParameterRow(name=name, shape=shape, format=format) for name, shape in shapes.items())
    manifest = Manifest(
        tensors=tuple(spec for row in rows for spec in FORMATS[format].tensors(row.name, row.shape)), parameters=rows
    )
    plan, problems = plan_push(manifest, [(n, torch.ones(s).bfloat16()) for n, s in shapes.items()], "all")
    assert plan is not None, problems
    cut = [min(128, spec.num_rows) for spec in manifest.tensors]
    whole = [spec.num_rows for spec in manifest.tensors]
    ranks = [SimpleNamespace(row_start=[0] * len(cut), row_stop=cut), SimpleNamespace(row_start=cut, row_stop=whole)]
    links = push_routes(manifest, plan, ranks).link_bytes()
    scale = torch.ones(()) if FORMATS[format].has_global_scale else None
    expected = [0, 0]
    for source in plan.sources:
        for spec, first, data in encoded(source, scale):
            bound = cut[manifest.index[spec.name]]
            low = max(0, min(first + len(data), bound) - first)
            expected[0] += low * spec.row_bytes
            expected[1] += (len(data) - low) * spec.row_bytes
    assert links.tolist() == [expected]


# ---------------------------------------------------------------- cost


def work(**given: object) -> Work:
    one = np.array([1e9])
    usual = {"mode": "full", "source": one * 2, "kept": one, "sent": one, "received": one, "resident": one}
    usual["gathered"] = one * 0
    return Work(**{**usual, "copies": 1.0, "tensors": 10, "own_tensors": 10.0, **given})  # type: ignore[arg-type]


def test_the_slowest_resource_sets_a_phase() -> None:
    fast = replace(HOST, encode=1e12, send=1e12, receive=1e12)
    slow_link = predict(work(), replace(fast, nic_out=1e8))
    assert slow_link.phases["transfer"].seconds == pytest.approx(10.0)
    assert slow_link.phases["transfer"].bottleneck == slow_link.bottleneck == "trainer NIC"
    slow_actor = predict(work(), replace(fast, receive=5e7))
    assert slow_actor.phases["transfer"].seconds == pytest.approx(20.0)
    assert slow_actor.bottleneck == "actor host: receive"
    assert slow_link.seconds == pytest.approx(sum(phase.seconds for phase in slow_link.phases.values()))


def test_fan_out_gains_where_one_link_feeds_many_replicas() -> None:
    many = work(sent=np.array([50e9]), received=np.full(50, 1e9), copies=50.0)
    narrow = predict(many, replace(HOST, nic_out=1e9, nic_in=1e9))
    assert narrow.fan_out_gain > 0.5
    assert predict(work(), HOST).fan_out_gain == 0.0


def test_a_delta_sends_its_share_and_still_encodes_everything() -> None:
    full = predict(work(), HOST)
    delta = predict(delta_work(work(), 0.01), HOST)
    assert delta.wire_bytes == full.wire_bytes // 100 and delta.actor_bytes < full.actor_bytes / 10
    assert delta.phases["plan"].seconds > 2e9 / HOST.encode


def test_rates_of_one_push_predict_it() -> None:
    measured = {"plan": 3.0, "transfer": 4.0, "prepare": 0.5, "commit": 2.0}
    again = predict(work(), calibrated(HOST, work(), measured))
    for phase, seconds in measured.items():
        assert again.phases[phase].seconds == pytest.approx(seconds, rel=0.1)


# ---------------------------------------------------------------- scenarios


def small(tmp_path: Path) -> Path:
    text = """
title = "two to four"
trainer = { ranks = 2, dense_ranks = 2 }
service = { ranks = 2, replicas = 2 }
parameters = [
  { name = "w", layers = 3, rows = 512, columns = 64 },
  { name = "e", experts = 4, layers = 1, rows = 128, columns = 64 },
  { name = "n", rows = 10, columns = 1, plain = true },
]
[rates]
nic_out = 1e6
[delta]
share = 0.1
"""
    path = tmp_path / "small.toml"
    path.write_text(text)
    return path


def test_a_scenario_sends_every_byte_once_to_every_replica(tmp_path: Path) -> None:
    planned = plan_scenario(read_scenario(small(tmp_path)))
    one = 3 * 512 * 36 + 4 * 128 * 36 + 7 * 4 + 20
    links = planned.plan.link_bytes()
    assert links.shape == (2, 4) and links.sum() == planned.full.wire_bytes == 2 * one
    assert np.array_equal(links[:, :2], links[:, 2:])
    assert planned.full.bottleneck == "trainer NIC"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("ranks = 2, dense_ranks = 2", "ranks = 3, dense_ranks = 2"), "must divide the trainer's 3 ranks"),
        (("nic_out", "nic_speed"), "nic_speed"),
        (("title", "name"), "lacks 'title'"),
        (("= 1e6", "="), "line"),
    ],
)
def test_a_wrong_scenario_says_what_is_wrong(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = small(tmp_path)
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(PlanError, match=said):
        read_scenario(path)


def test_docs_scale_is_what_simulate_prints() -> None:
    page = scale_page([plan_scenario(read_scenario(name)) for name in shipped()])
    assert (ROOT / "docs" / "scale.md").read_text() == page, "transfuse simulate --markdown > docs/scale.md"


def test_every_shipped_scenario_says_where_its_numbers_come_from() -> None:
    assert {"kimi_k2", "gpus_2048", "replicas_100"} <= set(shipped())
    for name in shipped():
        scenario = read_scenario(name)
        assert scenario.sources and scenario.published and all(each.source for each in scenario.published)
    assert read_scenario("kimi_k2").num_parameters > 1e12


@pytest.mark.slow
def test_a_trillion_parameters_are_planned_in_ten_seconds_and_two_gibibytes() -> None:
    code = """
import resource, time
from launch.scenario import plan_scenario, read_scenario
start = time.process_time()
planned = plan_scenario(read_scenario("kimi_k2"))
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, planned.plan.num_routes)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, peak, routes = map(float, done.stdout.split())
    assert seconds <= 10 and peak <= 2 << 30 and routes > 1e5


# ---------------------------------------------------------------- commands


def run(*command: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert not ended.value.code


def test_plan_prints_routes_links_phases_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, drawn = small(tmp_path), tmp_path / "who.html"
    run("plan", "--scenario", str(path), "--picture", str(drawn), "--full")
    text = capsys.readouterr().out
    for said in ("two to four", "trainer NIC", "predicted, full", "predicted, delta", "w.0.weight_scale_2"):
        assert said in text
    assert "<img" in drawn.read_text()
    run("plan", "--scenario", str(path), "--json")
    value = json.loads(capsys.readouterr().out)
    assert np.array(value["links"]).shape == (2, 4) and [p["mode"] for p in value["predictions"]] == ["full", "delta"]


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (256, 128)])
def test_pictures_of_any_size_say_the_totals(shape: tuple[int, int]) -> None:
    links = np.arange(shape[0] * shape[1], dtype=np.int64).reshape(shape) * 1000 + 1
    figure = picture(links, "a title")
    title = figure.get_suptitle()
    assert "a title" in title and f"of {links.size} links" in title


def test_a_picture_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="a picture ends in"):
        write_picture(tmp_path / "a.bmp", np.ones((1, 1), np.int64), "t")
