"""FSDP2 over models whose modules may be quantized: shard, gather once a version, and find the local bytes.

    shard_model(model, mesh, quantized={module: names})    each layer, then what is called; nothing requires grad
    unshard_all(model)                                     gathered once, kept over any number of forwards
    reshard_all(model)                                     local shards registered again, gathered copies freed

In-place writes to `local_bytes(parameter)` are seen by the next gather. Take the parameters while the model is sharded:
the gathered ones are other tensors, and their addresses move.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

# gloo cannot gather a group made only of these: store uint8 and view it as float8 inside computation.
UNSHARDABLE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


class ShardingError(ValueError):
    """A model or parameter cannot be sharded as it is; the message lists every reason."""


def shard_model(model: nn.Module, mesh: DeviceMesh, *, quantized: Mapping[nn.Module, Collection[str]]) -> None:
    """Shard every layer and every root over `mesh`; parameters on the meta device become zeros, shard by shard.

    `quantized` says which parameter names each quantized module may own.
    """
    problems = list(_problems(model, quantized))
    if problems:
        what = f"cannot shard {type(model).__name__}: {len(problems)} problem(s)"
        raise ShardingError("\n  - ".join([what, *problems]))
    model.requires_grad_(False)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    for root in roots_of(model):
        fully_shard(root, mesh=mesh)
    for module in _fsdp_modules(model):
        # Before FSDP's own hook, which gathers. Any nn.Module may be an FSDPModule, which mypy does not know.
        cast(nn.Module, module).register_forward_pre_hook(_refuse_capture, prepend=True)
    _materialize(model, torch.device(mesh.device_type))


def _problems(model: nn.Module, quantized: Mapping[nn.Module, Collection[str]]) -> Iterator[str]:
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            where = f"{path}.{name}" if path else name
            if module in quantized and name not in quantized[module]:
                known = ", ".join(sorted(quantized[module]))
                yield f"{where}: {type(module).__name__} owns no parameter {name!r}; known: {known}; add it to its row"
            if parameter.dim() == 0:
                yield f"{where}: 0-d parameters are not shardable; give it shape [1]"
            if parameter.dtype in UNSHARDABLE:
                yield f"{where}: dtype {parameter.dtype}; store uint8 and view it as float8 where it is computed with"


def roots_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are called: the model, or what it contains where it is a mere container without forward."""
    if type(model).forward is not nn.Module.forward:
        return [model]
    return [root for child in model.children() for root in roots_of(child)]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The items of the outermost module lists: a transformer's layers."""
    layers: list[nn.Module] = []
    for child in model.children():
        layers += list(child) if isinstance(child, nn.ModuleList) else layers_of(child)
    return layers


def _materialize(model: nn.Module, device: torch.device) -> None:
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    # to_empty() is the call that FSDP2 follows, but it would empty the buffers too (a rotary table is not in any
    # checkpoint), so those are put back.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            local_bytes(parameter).zero_()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def shard_range(num_units: int, rank: int, world: int) -> tuple[int, int]:
    """Units [start, stop) of `rank`, as torch.chunk splits them: the last ranks may hold fewer, or none."""
    size = -(-num_units // world)
    return min(rank * size, num_units), min((rank + 1) * size, num_units)


def unit_range(parameter: Tensor) -> tuple[int, int]:
    """Units [start, stop) along dim 0 that this rank holds of a parameter."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = [axis for axis, placement in enumerate(placements) if placement == Shard(0)]
    whole = [axis for axis, placement in enumerate(placements) if placement == Replicate()]
    if len(sharded) > 1 or len(sharded) + len(whole) != len(placements):
        raise ShardingError(f"placements {placements}: expected Replicate() and at most one Shard(0)")
    if not sharded:
        return 0, parameter.shape[0]
    return shard_range(parameter.shape[0], mesh.get_local_rank(sharded[0]), mesh.size(sharded[0]))


def local_bytes(parameter: Tensor) -> Tensor:
    """The rank's shard as a flat uint8 view of its storage; writing to it writes the parameter."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if not local.is_contiguous():
        raise ShardingError(f"local shard {tuple(local.shape)} has strides {local.stride()}; expected contiguous")
    return local.detach().view(-1).view(torch.uint8)


def unshard_all(model: nn.Module) -> None:
    """Gather every FSDP module; forwards issue no collective until reshard_all. Collective: every rank calls it."""
    if is_capturing():
        check_capturable(model)
    for module in _fsdp_modules(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def reshard_all(model: nn.Module) -> None:
    """Free what was gathered. The root needs this too: by default it stays gathered after a forward."""
    for module in _fsdp_modules(model):
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


def _fsdp_modules(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def is_capturing() -> bool:
    """Whether a CUDA graph records what this thread launches now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _refuse_capture(module: nn.Module, args: object) -> None:
    """Forward pre-hook of every sharded module."""
    if is_capturing():
        check_capturable(module)


def check_capturable(model: nn.Module) -> None:
    """Raise ShardingError where a CUDA graph of this model's forward would hold addresses that move.

    What FSDP gathers lies elsewhere after every forward (and a capture over the gather raises nothing), so only modules
    that it does not shard may be captured. A forward of a sharded module asks by itself while a graph is captured; ask
    before a capture that does not go through it (a compiler's).
    """
    sharded = [path or type(model).__name__ for path, module in model.named_modules() if isinstance(module, FSDPModule)]
    if sharded:
        shown = ", ".join(sharded[:8]) + (", ..." if len(sharded) > 8 else "")
        raise ShardingError(
            f"CUDA graph refused: FSDP gathers the parameters of {shown} to another address for every forward;"
            " capture modules that are whole on this rank"
        )
