"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from launch.drill import Drill
    from protos import transfuse_pb2_grpc as pb_grpc
    from tests.local import LocalService
    from weight_update.client import Pusher


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run beside the processes that they start; on two cores more threads only take turns, and where a process
    has more its threads sleep while they wait."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    """A fleet of two replicas that tests break and that recovers. It generates all the while: no longer than a file."""
    from launch.drill import Drill

    with Drill(tmp_path_factory.mktemp("drill")) as running:
        yield running


@pytest.fixture
def pusher(service: LocalService) -> Iterator[Pusher]:
    """A trainer of the file's own service."""
    from weight_update.client import Pusher

    each = Pusher(service.address)
    yield each
    each.close()


@pytest.fixture
def control(service: LocalService) -> Iterator[pb_grpc.ControlStub]:
    """Its coordinator, as an operator calls it."""
    from protos import transfuse_pb2_grpc as pb_grpc
    from weight_update.channels import connect

    with connect(service.address) as channel:
        yield pb_grpc.ControlStub(channel)
