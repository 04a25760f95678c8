"""Several ranks on both sides, plain processes: every row is sent once, and the cost model says how long a push takes
over links that are as slow as tc makes them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.bench.matrix import needed_bytes, save_model
from tests.namespaces import namespaces, needs_namespaces, run
from tests.processes import Place, fleet, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

BRIDGE = "tf-links"
MBIT = 40
LINK_BYTES_S = MBIT * 1e6 / 8 * 1448 / 1514  # payload of an Ethernet frame of TCP: tc counts the whole frame
TOLERANCE = 0.15
SLACK = 3.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@contextmanager
def bridged(count: int) -> Iterator[Sequence[Place]]:
    """Places on one bridge, each with a network of its own."""
    places = [Place(host=f"10.231.9.{i + 1}", namespace=f"tflink{i}") for i in range(count)]
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        run("ip", "addr", "add", "10.231.9.254/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        with namespaces([place.namespace for place in places]):
            for place in places:
                inside, outside = f"{place.namespace}-0", f"{place.namespace}-1"
                run("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", place.namespace)
                run("ip", "link", "set", outside, "master", BRIDGE, "up")
                run("ip", "-n", place.namespace, "addr", "add", f"{place.host}/24", "dev", inside)
                run("ip", "-n", place.namespace, "link", "set", inside, "up")
            yield places
    finally:  # the kernel takes a namespace apart later: an end of a cable that is left here is in the next one's way
        for left in (*(f"{place.namespace}-1" for place in places), BRIDGE):
            subprocess.run(["ip", "link", "del", left], capture_output=True, check=False)


def limit(places: Sequence[Place], mbit: int) -> None:
    """What each of them may send."""
    shape = ("root", "tbf", "rate", f"{mbit}mbit", "burst", "128kb", "latency", "400ms")
    for each in places:
        run("ip", "netns", "exec", each.namespace, "tc", "qdisc", "replace", "dev", f"{each.namespace}-0", *shape)


def share_of_link(report: dict[str, Any], gather_s: float) -> float:
    """How much of the link the gather of a commit reached, of which it would take gather_s; 1 where there is none."""
    host_s = report["predicted"]["commit"] - gather_s
    return gather_s / max(report["phases"]["commit"] - host_s, gather_s) if gather_s else 1.0


@needs_namespaces("ip", "tc")
@pytest.mark.parametrize("ranks", [1, 2])
def test_prediction_and_measurement_agree_over_limited_links(model_dir: Path, ranks: int) -> None:
    """2 and 4 ranks, half of them the trainer's. The host rates come from a push before the links are limited, and what
    gloo reaches of a link from one over links four times as fast. Both are printed; what else runs on these cores makes
    the measured time longer, never shorter."""
    with bridged(2 * ranks) as places:
        ours, theirs = places[:ranks], places[ranks:]
        with (
            fleet(model_dir, replicas=1, ranks=ranks, places=theirs, at=theirs[0]) as service,
            trainer(service.address, model_dir, ranks=ranks, places=ours) as push,
        ):
            push(1.0, True)
            push(0.01, True)
            rates = push.ranks[0]("rates")
            fast, slow = ({"nic_out": rate, "nic_in": rate} for rate in (4 * LINK_BYTES_S, LINK_BYTES_S))
            limit(places, 4 * MBIT)
            push.all("expect", replace(rates, **fast, gather=1.0))
            calibration = push(0.01, True)[0]
            gather_s = calibration["wire_bytes"] * (1 - 1 / ranks) / (4 * LINK_BYTES_S)
            reached = share_of_link(calibration, gather_s)
            limit(places, MBIT)
            push.all("expect", replace(rates, **slow, gather=reached))
            report = push(0.01, True)[0]
    predicted = sum(report["predicted"].values())
    measured = sum(report["phases"][name] for name in report["predicted"])
    print(f"{2 * ranks} ranks: predicted {predicted:.2f} s, measured {measured:.2f} s, {report['bottleneck']}")
    assert "NIC" in report["bottleneck"]
    assert predicted <= (1 + TOLERANCE) * measured and measured <= SLACK * predicted


@needs_namespaces("ip", "tc")
def test_over_limited_links_rows_that_are_passed_on_reach_three_replicas_in_the_time_of_one(model_dir: Path) -> None:
    with bridged(4) as places:
        ours, theirs = places[:1], places[1:]
        with (
            fleet(model_dir, replicas=3, ranks=1, places=theirs, at=theirs[0]) as service,
            trainer(service.address, model_dir, ranks=1, places=ours) as push,
        ):
            push(1.0, True)
            limit(places, 4 * MBIT)
            transfers = {}
            for how in ("never", "always"):
                push.all("fan_out", how)
                report = push(0.01, True)[0]
                transfers[how] = report["phases"]["transfer"]
                assert report["digest_verified"] and report["attempts"] == 1
    link_s = report["wire_bytes"] / (4 * LINK_BYTES_S)
    print(f"one copy takes {link_s:.2f} s of a link; to every rank {transfers['never']:.2f} s, passed on", end=" ")
    print(f"{transfers['always']:.2f} s")
    assert report["passed_bytes"] == pytest.approx(2 * report["wire_bytes"], rel=0.01)
    assert transfers["never"] > 2.7 * link_s > 1.5 * transfers["always"]


@pytest.mark.parametrize("sharded", [True, False])
def test_two_trainer_ranks_send_each_byte_once_to_two_replicas_of_two(model_dir: Path, sharded: bool) -> None:
    with fleet(model_dir, replicas=2, ranks=2) as service:
        needed = 2 * needed_bytes(service.address)
        with trainer(service.address, model_dir, ranks=2, sharded=sharded) as push:
            full = push(1.0, True)
            assert all(1.0 <= each["wire_bytes"] / needed < 1.005 for each in full)  # the wire counts frames, too
            assert all(each["digest_verified"] for each in full)
            push(0.001, False)
            delta = push(0.001, False)[0]
            assert delta["mode"] == "delta" and delta["wire_bytes"] < needed / 4 and delta["digest_verified"]
