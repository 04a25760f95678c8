"""A receiver on CUDA storages: hot is cold, addresses stay, and a captured graph replays what was pushed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quant.formats import FORMATS, amax, encode, global_scale
from quant.layouts import LAYOUTS
from quant.modules import QuantLinear
from weight_update.chunks import Chunk, decode_request, encode_chunk
from weight_update.delta import Patch
from weight_update.errors import LayoutError
from weight_update.receiver import Receiver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = (256, 192)  # rows, elements: the last tile of rows is whole, that of scales is padded


def built(device: str) -> tuple[QuantLinear, Receiver]:
    module = QuantLinear(
        SIZES[1], SIZES[0], False, FORMATS["nvfp4"], LAYOUTS["trtllm_linear"], "m", torch.device(device)
    )
    module.mark_applied()

    def live() -> dict[str, Tensor]:
        return dict(module.storage_parameters())

    return module, Receiver(live(), module.plan.placements, module.plan.derived, live=live)


def tensors_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(SIZES, generator=generator) * 0.02).bfloat16()
    scale = global_scale(FORMATS["nvfp4"], amax(rows))
    return {**encode(FORMATS["nvfp4"], rows, scale), "weight_scale_2": scale, "input_scale": torch.tensor(0.5)}


def stage(receiver: Receiver, tensors: dict[str, Tensor], transaction: int) -> None:
    for index, spec in enumerate(receiver.manifest.tensors):
        data = tensors[spec.name.rpartition(".")[2]].contiguous().reshape(-1).view(torch.uint8).numpy()
        one = np.array([index], np.uint32), np.zeros(1, np.uint64), np.array([len(data)], np.uint32)
        message = encode_chunk(index + 1, *one, [memoryview(data)])
        chunk = decode_request(message)
        assert isinstance(chunk, Chunk)
        receiver.stage(chunk, transaction)


def push(receiver: Receiver, tensors: dict[str, Tensor], version: int, *, abort: bool = False) -> None:
    receiver.begin(version, version, receiver.version, range(len(receiver.manifest.tensors)))
    stage(receiver, tensors, version)
    staged = receiver.prepare()
    assert (receiver.install() == staged).all()
    receiver.abort() if abort else receiver.publish()


def push_delta(receiver: Receiver, old: dict[str, Tensor], version: int, *, abort: bool = False) -> dict[str, Tensor]:
    """Some bytes of the codes change; returns the new tensors."""
    random = np.random.default_rng(version)
    new = {name: value.clone() for name, value in old.items()}
    flat = new["weight"].view(-1)
    at = np.sort(random.choice(flat.numel(), 40, replace=False)).astype(np.int64)
    values = random.integers(1, 256, 40).astype(np.uint8)
    flat[torch.from_numpy(at)] += torch.from_numpy(values)
    index = [spec.name for spec in receiver.manifest.tensors].index("m.weight")
    patch = Patch(tensor=0, first=0, stop=flat.numel(), positions=at, values=values)
    receiver.begin(version, version, receiver.version, [index], blobs=(), patches=[patch])
    staged = receiver.prepare()
    assert (receiver.install() == staged).all()
    receiver.abort() if abort else receiver.publish()
    return old if abort else new


def test_a_graph_replays_after_fifty_pushes_what_a_cold_load_computes() -> None:
    module, receiver = built("cuda")
    tensors = tensors_of(0)
    push(receiver, tensors, 1)
    module.decode_()
    x = torch.randn(8, SIZES[1], device="cuda").bfloat16()
    for _ in range(2):
        module(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = module(x)
    addresses = receiver.storage_addresses()
    for version in range(2, 52):
        abort = version % 5 == 0
        if version % 2:
            tensors = push_delta(receiver, tensors, version, abort=abort)
        else:
            fresh = tensors_of(version)
            push(receiver, fresh, version, abort=abort)
            tensors = tensors if abort else fresh
        module.decode_()
        graph.replay()
        cold, other = built("cuda")
        push(other, tensors, 1)
        cold.decode_()
        assert torch.equal(out, cold(x)), version
        assert receiver.storage_bytes() == other.storage_bytes()
    assert receiver.storage_addresses() == addresses
    assert receiver.last_undo() is not None


def test_bytes_and_digests_are_those_of_the_host() -> None:
    tensors, (_, device), (_, host) = tensors_of(7), built("cuda"), built("cpu")
    for receiver in (device, host):
        push(receiver, tensors, 1)
    assert device.storage_bytes() == host.storage_bytes()
    assert (device.digests() == host.digests()).all()
    changed, _ = (push_delta(receiver, tensors, 2) for receiver in (device, host))
    assert device.storage_bytes() == host.storage_bytes()
    assert (device.digests() == host.digests()).all()
    undone = [receiver.last_undo() for receiver in (device, host)]
    assert undone[0] is not None and undone[1] is not None
    for one, other in zip(undone[0].patches, undone[1].patches, strict=True):
        assert (one.positions == other.positions).all() and (one.values == other.values).all()
    assert torch.equal(changed["weight"].view(-1), device.rows(2, 0, 0, SIZES[0]).view(-1))


def test_a_planted_rebind_is_caught_and_the_old_bytes_are_back() -> None:
    module, receiver = built("cuda")
    push(receiver, tensors_of(1), 1)
    weight = module.weight
    receiver.begin(2, 2, 1, range(len(receiver.manifest.tensors)))
    stage(receiver, tensors_of(2), 2)
    receiver.prepare()
    before = weight.detach().clone()
    module.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    with pytest.raises(LayoutError, match=r"m\.weight"):
        receiver.install()
    assert torch.equal(weight, before)
    module.weight = weight
    receiver.install()
    receiver.publish()
