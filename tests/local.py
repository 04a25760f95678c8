"""A whole service in this process, over real gRPC on loopback, without Ray: one rank a replica."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quant.checkpoint import open_checkpoint
from quant.models import build_model, owners_of
from quant.modules import layouts_of, mark_all_applied
from service.control_server import ControlServer
from service.coordinator import CoordinatorShell
from service.engine import Engine
from service.faults import Faults
from service.guard import Limits
from service.keeper import StoreConfig, keep_versions
from service.loading import cold_load
from service.logs import Seeing
from service.pages import Pages
from service.rank import RankIdentity, RankServer
from service.refresh import Refresher
from service.restart import Weights
from service.witness import Witness
from service.workers import Serving, make_worker, offload_of
from weight_update.channels import PLAINTEXT
from weight_update.receiver import Receiver
from weight_update.security import Security
from weight_update.store import Store

SERVING = Serving(max_tokens=512)


@dataclass(frozen=True)
class LocalService:
    """address: of Control and Generation. ranks, models: one a replica. pages: host:port of metrics and status page."""

    address: str
    ranks: Sequence[RankServer]
    models: Sequence[nn.Module]
    shell: CoordinatorShell
    server: ControlServer
    pages: str = ""

    def bytes(self) -> list[dict[str, bytes]]:
        """Every live storage of every replica, as it lies in memory."""
        return [rank.receiver.storage_bytes() for rank in self.ranks]

    def addresses(self) -> list[dict[str, int]]:
        """The data pointers of every live storage of every replica."""
        return [rank.receiver.storage_addresses() for rank in self.ranks]


def cold(model_dir: Path, layout: str, format: str = "nvfp4") -> tuple[nn.Module, Receiver]:
    """A model and its receiver, freshly loaded from a checkpoint."""
    with open_checkpoint(model_dir) as checkpoint:
        model = build_model(checkpoint.config_dir, format, layout)
        receiver = Receiver.from_module(model)
        cold_load(receiver, checkpoint, None, owners_of(model))
    mark_all_applied(model)
    return model, receiver


def start_rank(
    model_dir: Path,
    replica: int,
    layout: str,
    format: str,
    source: Path | None = None,
    scrub_s: float = 0.0,
    serving: Serving = SERVING,
    security: Security = PLAINTEXT,
    limits: Limits | None = None,
) -> tuple[RankServer, nn.Module]:
    """One replica of one rank, serving. source: where its weights come from, if not from the model's folder."""
    model, receiver = cold(source or model_dir, layout, format)
    with open_checkpoint(source or model_dir) as checkpoint:
        witness = Witness(receiver, checkpoint)
    refresher = Refresher(model, receiver, sharded=False, offload=offload_of(model, serving))
    worker = make_worker(model, model_dir, serving, refresher)
    engine = Engine(worker, group=None, rank=0, world=1, version=0, commit_between=serving.commit_between)
    engine.warm_up()
    engine.start()
    identity = RankIdentity(replica=replica, rank=0, format=format, layout=", ".join(layouts_of(model)))
    rank = RankServer(
        identity=identity,
        receiver=receiver,
        engine=engine,
        reshard=lambda: None,
        foresee=refresher.foresee,
        faults=Faults(),
        listen="127.0.0.1:0",
        scrub_s=scrub_s,
        witness=witness,
        security=security,
        limits=limits,
    )
    return rank, model


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> float:
    """Seconds until the condition held; fails where it does not in time."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < timeout_s, "timed out"
        time.sleep(0.02)
    return time.monotonic() - start_s


@contextmanager
def local_service(
    model_dir: Path,
    state_dir: Path,
    layouts: Sequence[str] = ("trtllm",),
    format: str = "nvfp4",
    serving: Serving = SERVING,
    *,
    store_dir: Path | None = None,
    keep: int = 4,
    scrub_s: float = 0.0,
    security: Security = PLAINTEXT,
    limits: Limits | None = None,
    pages: bool = False,
    record_dir: Path | None = None,
) -> Iterator[LocalService]:
    """Replicas with these layouts behind one coordinator. store_dir: of the version store; its newest version is what
    is served, as after a restart. pages: with metrics and a status page."""
    torch.set_num_threads(1)
    weights = Weights(str(model_dir), store_dir)
    source = Path(weights.source())
    started = [
        start_rank(model_dir, replica, layout, format, source, scrub_s, serving, security, limits)
        for replica, layout in enumerate(layouts)
    ]
    ranks = [rank for rank, _ in started]
    for rank in ranks:
        manifest = rank.receiver.manifest
        if store_dir is not None:
            rank.sources.store = Store(store_dir, config_dir=model_dir, manifest=manifest, read_only=True)
    shell = CoordinatorShell(
        addresses=[rank.address for rank in ranks],
        state_file=state_dir / "state.sqlite",
        source=str(model_dir),
        loaded=weights.loaded,
        security=security,
    )
    config = StoreConfig(directory=store_dir, keep=keep) if store_dir is not None else None
    keeper = None if config is None else keep_versions(shell, model_dir, config)
    shown = "127.0.0.1:0" if pages else ""
    server = ControlServer(
        shell,
        listen="127.0.0.1:0",
        tokenizer_dir=model_dir,
        keeper=keeper,
        security=security,
        limits=limits,
        pages=shown,
        record_dir=record_dir,
    )
    for rank in ranks:
        rank.show(Seeing(record_dir=record_dir))
        rank.pages = Pages(shown, {"/metrics": rank.metrics.text}, rank.guard) if pages else None
    models = [model for _, model in started]
    at = "" if server.pages is None else server.pages.address
    try:
        yield LocalService(address=server.address, ranks=ranks, models=models, shell=shell, server=server, pages=at)
    finally:
        if keeper is not None:
            keeper.stop()
        server.stop()
        shell.stop()
        for rank in ranks:
            rank.stop()
