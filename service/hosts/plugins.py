"""Entry points, called by an engine in every of its processes at start: they register names and import nothing else."""

from __future__ import annotations

BACKEND = "transfuse"


def register_vllm() -> None:
    """Of vllm.general_plugins: the weight-transfer backend "transfuse". May be called twice."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "service.hosts.vllm", "TransfuseEngine")
