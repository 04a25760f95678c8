"""A rank is told of the tensors of which it holds rows, and of no others: what it plans and answers does not grow with
what other ranks hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from protos import transfuse_pb2 as pb
from protos import transfuse_pb2_grpc as pb_grpc
from quant.formats import FORMATS, TensorSpec
from quant.layouts import LAYOUTS, place_row_major, plan_experts
from quant.parameters import ParameterRow
from service.control_server import ControlServer
from service.coordinator import CoordinatorShell
from service.faults import Faults
from service.hosts.boundary import Foreign
from service.logs import Seeing
from service.rank import RankIdentity, RankServer
from service.witness import Witness
from sharding.routes import Destination, held
from weight_update.client import Pusher
from weight_update.receiver import Receiver
from weight_update.replay import replay
from weight_update.transport import call, connect

NUM, HIDDEN, INTER = 4, 128, 64
HALVES = {"gate": (INTER, HIDDEN), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER)}
NORM = TensorSpec(name="norm.weight", dtype="BF16", shape=(HIDDEN,))
Weights = dict[str, Tensor]


def rows() -> list[ParameterRow]:
    experts = [
        ParameterRow(name=f"m.{e}.{half}_proj.weight", shape=size, format="nvfp4", group=f"{e} {half != 'down'}")
        for e in range(NUM)
        for half, size in HALVES.items()
    ]
    return [ParameterRow(name=NORM.name, shape=NORM.shape, format="bf16"), *experts]


def weights_of(seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {row.name: torch.randn(row.shape, generator=generator).bfloat16() for row in rows()}


def receiver_of(first: int, stop: int) -> tuple[Receiver, Weights]:
    """Of experts [first, stop), and of whatever is not split among experts where the first one is among them; its
    storages."""
    plan = plan_experts(LAYOUTS["trtllm_moe"], FORMATS["nvfp4"], "m", NUM, HIDDEN, INTER)
    shapes = {each.name: (each.shape, each.dtype) for each in plan.storages}
    shapes |= {each.name: (each.shape, torch.float32) for each in plan.derived}
    shapes[NORM.name] = (NORM.shape, torch.bfloat16)
    shards = {
        name: (first, stop) if shape[0] == NUM else (shape[0] if first else 0, shape[0])
        for name, (shape, _) in shapes.items()
    }
    storages = {
        name: torch.zeros((shards[name][1] - shards[name][0], *shape[1:]), dtype=dtype)
        for name, (shape, dtype) in shapes.items()
    }
    for name, storage in storages.items():
        if name.endswith("input_scale"):  # calibration, which no push of these brings
            storage.fill_(1.0)
    placements = [place_row_major(NORM, NORM.name), *plan.placements]
    return Receiver(storages, placements, plan.derived, shards=shards, parameters=rows()), storages


@dataclass
class Service:
    """Replica 0 is one rank, replica 1 two that hold two experts each."""

    address: str
    ranks: list[RankServer]
    storages: list[Weights]
    records: Path

    def wrong(self) -> list[str]:
        """Storages of replica 1 that are not the same bytes as replica 0's."""
        whole, parts = self.storages[0], self.storages[1:]
        found = []
        for name, storage in whole.items():
            if bytes_of(torch.cat([each[name] for each in parts])) != bytes_of(storage):
                found.append(name)
        return found

    def told(self) -> list[set[str]]:
        """The tensors of which each rank was told last."""
        specs = self.ranks[0].receiver.manifest.tensors
        return [{specs[i].name for i in rank.receiver._listed} for rank in self.ranks]


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    ranks, storages = [], []
    engines: dict[int, Foreign] = {}
    for replica, rank, world, experts in ((0, 0, 1, (0, NUM)), (1, 0, 2, (0, 2)), (1, 1, 2, (2, NUM))):
        receiver, live = receiver_of(*experts)
        nothing = SimpleNamespace(name="idle", pause=lambda: None, renew=lambda version: None, resume=lambda: None)
        server = RankServer(
            identity=RankIdentity(replica=replica, rank=rank, world=world, format="nvfp4", layout="trtllm"),
            receiver=receiver,
            engine=engines.setdefault(replica, Foreign(nothing)),
            reshard=lambda: None,
            faults=Faults(),
            listen="127.0.0.1:0",
            witness=Witness(receiver, None),
        )
        server.show(Seeing(record_dir=tmp_path / "records"))
        ranks.append(server)
        storages.append(live)
    addresses = [rank.address for rank in ranks]
    shell = CoordinatorShell(addresses=addresses, state_file=tmp_path / "state.sqlite", source="zeros")
    records = tmp_path / "records"
    control = ControlServer(shell, listen="127.0.0.1:0", tokenizer_dir=tmp_path, record_dir=records)
    yield Service(address=control.address, ranks=ranks, storages=storages, records=records)
    control.stop()
    shell.stop()
    for rank in ranks:
        rank.stop()


def experts_in(names: set[str]) -> set[int]:
    """Those whose codes are among these; their global scales lie together, on one rank."""
    return {int(name.split(".")[1]) for name in names if name.endswith("_proj.weight")}


def test_a_rank_is_told_of_its_own_tensors_alone(service: Service) -> None:
    pusher = Pusher(service.address)
    weights = weights_of(1)
    assert pusher.push(weights.items()).mode == "full" and not service.wrong()
    whole, first, second = service.told()
    assert [experts_in(each) for each in (whole, first, second)] == [{0, 1, 2, 3}, {0, 1}, {2, 3}]
    assert NORM.name in first and NORM.name not in second and whole == first | second and not first & second
    for name in ("m.1.up_proj.weight", "m.3.down_proj.weight", NORM.name):
        weights[name].view(-1)[5] *= -1
    report = pusher.push(weights.items())
    assert report.mode == "delta" and report.changed_tensors == 3 and not service.wrong()
    pusher.close()
    for folder in service.records.iterdir():
        found = replay(folder)
        assert not (found.partings or found.broken or found.missing), found


def test_a_rank_that_holds_nothing_of_a_push_takes_part(service: Service) -> None:
    """It is told of one tensor, none of whose rows it holds; going back leaves it as it was, too."""
    pusher = Pusher(service.address)
    pusher.push(weights_of(1).items())
    before = [bytes_of(each) for each in service.storages[2].values()]
    report = pusher.push(weights_of(2).items(), [NORM.name])
    assert report.digest_verified and service.told() == [{NORM.name}] * 3 and not service.wrong()
    assert bytes_of(service.storages[0][NORM.name]) == bytes_of(weights_of(2)[NORM.name])
    with connect(service.address) as channel:
        request = pb.RollbackRequest(version=report.version - 1)
        reply = call(pb_grpc.ControlStub(channel).Rollback, request)
    assert reply.version.version == report.version + 1
    assert bytes_of(service.storages[0][NORM.name]) == bytes_of(weights_of(1)[NORM.name]) and not service.wrong()
    assert [bytes_of(each) for each in service.storages[2].values()] == before
    pusher.close()


def test_numbers_are_places_among_those_that_a_rank_is_told_of() -> None:
    start, stop = np.array([0, 0, 3, 0]), np.array([2, 0, 5, 1])
    push = np.array([3, 1, 2])
    to = Destination(ranks=(0,), row_start=start, row_stop=stop)
    assert held(start, stop, push).tolist() == [0, 2] and to.numbers(push).tolist() == [0, -1, 1]
    assert held(start, stop, np.array([1])).tolist() == [0]
