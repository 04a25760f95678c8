"""SGLang: a custom weight loader that makes a worker a member, and then tells it of nothing but itself.

    python -m sglang.launch_server --model-path MODEL --custom-weight-loader service.hosts.sglang.load
    POST /begin_weight_update           {"selector": "target"}
    POST /update_weights_from_tensor    {"load_format": "service.hosts.sglang.load", "flush_cache": false,
                                         "serialized_named_tensors": [order(...)]}

The order is one tensor, the bytes of a JSON object, that says where to listen and whom to join. The session stays open:
ending it would run SGLang's processing once more over weights that are in kernel layout already (its shuffle is not
idempotent), and an open session keeps every other writer of weights out. Names are those of sglang 0.5.23. Not run on
a GPU: see docs/engines.md.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from service.rank import RankServer
from weight_update.errors import PlanError, raise_all

from .joining import Joining, joined
from .member import Http, Membership, require_one_rank

ORDER = "transfuse.order"

# Where SGLang keeps the backend of its FP4 kernels, as it resolved it: `get_fp4_gemm_runner_backend()`, an enum.
FP4_UTILS = "sglang.srt.layers.quantization.fp4_utils"
# Its value -> row of plan.SCHEMES. TRT-LLM shuffles, Marlin repacks: neither has a row. "auto" is not resolved yet.
BACKENDS = {f"flashinfer_{name}": "sglang cutlass" for name in ("cutlass", "cudnn", "cutedsl")}
PLAIN = "sglang cutlass"  # of a model without NVFP4, of which no scheme is asked
# Classes of quant_method of modules that hold weights, and the quant_mode that they must have, where they have one.
METHODS = {"UnquantizedLinearMethod": None, "UnquantizedEmbeddingMethod": None, "ModelOptFp4LinearMethod": "w4a4"}

_members: dict[int, RankServer] = {}  # by id of the model: one a process, or two with a draft model
_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangControls:
    """SGLang's routes. retract waits for the step in flight and puts running requests back into the queue, so that the
    cache of old weights can be flushed and their KV is computed anew; in_place does neither."""

    http: Http
    name: str = "sglang"

    def pause(self) -> None:
        self.http.post("/pause_generation", {"mode": "retract"})

    def renew(self, version: int) -> None:
        self.http.post("/flush_cache")
        self.http.post("/update_weight_version", {"new_version": str(version), "abort_all_requests": False})

    def resume(self) -> None:
        self.http.post("/continue_generation")


def order(**fields: Any) -> list[tuple[str, Tensor]]:
    """What to send: fields of Membership, and checkpoint, format, coordinator, world."""
    return [(ORDER, torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8))]


def load(model: nn.Module, named_tensors: Sequence[tuple[str, Tensor]]) -> None:
    """SGLang's custom loader: joins. PlanError where the tensors are no order, or the model cannot be planned."""
    given = dict(named_tensors)
    if given.keys() != {ORDER}:
        raise PlanError(f"{', '.join(given)}: expected {ORDER}; weights come through Pusher(coordinator).push(model)")
    fields = json.loads(bytes(given[ORDER].cpu().tolist()))
    require_one_rank("sglang", int(fields.get("world", 1)))
    url = str(fields["control_url"])
    with _lock:
        if id(model) in _members:
            raise PlanError(f"this worker has joined already, its rank server is {_members[id(model)].address}")
        _members[id(model)] = joined(
            model,
            SglangControls(http=Http(url=url, api_key=str(fields.get("api_key", "")))),
            Joining(
                checkpoint=str(fields["checkpoint"]),
                format=str(fields.get("format", "bf16")),
                scheme=scheme_of(model),
                coordinator=str(fields.get("coordinator", "")),
                membership=Membership(
                    control_url=url,
                    listen=str(fields.get("listen", "127.0.0.1:0")),
                    replica=int(fields.get("replica", 0)),
                ),
            ),
        )


def scheme_of(model: nn.Module) -> str:
    """The row of plan.SCHEMES of this model's linears, by what SGLang says of itself; PlanError for what has none."""
    methods = {name: each for name, module in model.named_modules() if (each := _method(module)) is not None}
    problems = [f"{name}: {_told(each)}" for name, each in methods.items() if not _is_known(each)]
    raise_all(PlanError, f"this model cannot be planned; what can: {', '.join(METHODS)}", problems)
    if not any(type(each).__name__ == "ModelOptFp4LinearMethod" for each in methods.values()):
        return PLAIN
    published = getattr(sys.modules.get(FP4_UTILS), "get_fp4_gemm_runner_backend", None)
    if published is None:
        raise PlanError(f"{FP4_UTILS} does not say which FP4 backend this worker runs; this is for sglang 0.5.23")
    backend = str(published().value)
    if backend not in BACKENDS:
        known = " or ".join(BACKENDS)
        raise PlanError(f"FP4 backend {backend}: its layout has no scheme; start it with --fp4-gemm-backend {known}")
    return BACKENDS[backend]


def _method(module: nn.Module) -> Any:
    """How SGLang computes with a module's weights; None where it has none of its own."""
    return getattr(module, "quant_method", None) if next(module.parameters(recurse=False), None) is not None else None


def _is_known(method: Any) -> bool:
    name = type(method).__name__
    return name in METHODS and getattr(method, "quant_mode", METHODS[name]) == METHODS[name]


def _told(method: Any) -> str:
    """What it is, and what of it has no scheme."""
    name = type(method).__name__
    what = "experts have" if "MoE" in name else "FP8 has" if "Fp8" in name else "it has"
    mode = f" in {method.quant_mode}" if hasattr(method, "quant_mode") else ""
    return f"{name}{mode}, {what} no scheme in this engine"


def address_of(model: nn.Module) -> str:
    """host:port of the rank server of a model that has joined."""
    return _members[id(model)].address


def leave(model: nn.Module) -> None:
    """End the rank server of a model; it keeps its weights."""
    with _lock:
        _members.pop(id(model)).stop()
