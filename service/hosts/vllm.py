"""vLLM: a plugin that registers the weight-transfer backend "transfuse", and that backend.

    vllm serve MODEL --weight-transfer-config '{"backend": "transfuse"}'     # with VLLM_SERVER_DEV_MODE=1
    POST /init_weight_transfer_engine {"init_info": {"control_url": "http://127.0.0.1:8000",
                                                     "listen": "0.0.0.0:7100", "coordinator": "head:7070"}}

From then on the worker is a replica of the service: bytes arrive over its rank server while vLLM runs, and vLLM is
paused for the install alone. Names are those of vllm 0.33.0. Not run on a GPU: see docs/engines.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from weight_update.errors import PlanError

from .joining import Joining, joined
from .member import Http, Membership, require_one_rank

# Class of a linear's NVFP4 kernel -> row of plan.SCHEMES.
KERNELS = {"CutlassNvFp4LinearKernel": "vllm cutlass", "FlashInferCutlassNvFp4LinearKernel": "vllm cutlass"}
ONLY_PUSHES = "weights of this engine come through a Transfuse service: Pusher(coordinator).push(model)"


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Of POST /init_weight_transfer_engine; see Joining."""

    control_url: str
    listen: str = "127.0.0.1:0"
    replica: int = 0
    coordinator: str = ""
    api_key: str = ""
    format: str = "bf16"


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """Nothing is sent through vLLM's own routes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmControls:
    """vLLM's routes for RL: /pause keeps requests and their KV, the version is shown by /weight_info."""

    http: Http
    name: str = "vllm"

    def pause(self) -> None:
        self.http.post("/pause?mode=keep&clear_cache=false")

    def renew(self, version: int) -> None:
        self.http.post("/reset_prefix_cache")
        self.http.post("/update_weight_version", {"new_version": str(version)})

    def resume(self) -> None:
        self.http.post("/resume")


class TransfuseEngine(WeightTransferEngine):  # type: ignore[misc]
    """One worker's membership. vLLM makes it after the load; init_transfer_engine joins."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    _server: Any = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Plan the model, open the rank server, join. PlanError where the model cannot be planned."""
        if self._server is not None:
            raise PlanError(f"this worker has joined already, its rank server is {self._server.address}")
        require_one_rank("vllm", self.parallel_config.world_size)
        self._server = joined(
            self.model,
            VllmControls(http=Http(url=init_info.control_url, api_key=init_info.api_key)),
            Joining(
                checkpoint=str(self.model_config.model),
                format=init_info.format,
                scheme=scheme_of(self.model),
                coordinator=init_info.coordinator,
                membership=Membership(
                    control_url=init_info.control_url, listen=init_info.listen, replica=init_info.replica
                ),
            ),
        )

    def start_weight_update(self) -> None:
        raise RuntimeError(ONLY_PUSHES)

    def finish_weight_update(self) -> None:
        raise RuntimeError(ONLY_PUSHES)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        raise RuntimeError(ONLY_PUSHES)

    def shutdown(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


def scheme_of(model: Any) -> str:
    """The row of plan.SCHEMES of this model's linears; PlanError for kernels that have none."""
    kernels = {type(kernel).__name__ for module in model.modules() if (kernel := _kernel(module)) is not None}
    unknown = sorted(kernels - KERNELS.keys())
    if unknown:
        raise PlanError(f"kernels {', '.join(unknown)}: no scheme; known: {', '.join(KERNELS)}")
    return "vllm cutlass"


def _kernel(module: Any) -> Any:
    """The NVFP4 kernel of a linear; None of anything else."""
    kernel = getattr(getattr(module, "quant_method", None), "kernel", None)
    return kernel if "NvFp4" in type(kernel).__name__ else None
