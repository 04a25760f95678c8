"""copy_or_rebind_param, the seal, and the audit that nothing moved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from weight_update.errors import LayoutError
from weight_update.inplace import AddressAudit, Alias, copy_or_rebind_param, is_sealed, register_alias, seal


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 6)


def address(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def test_a_value_of_the_same_form_is_copied_and_the_address_stays() -> None:
    module = linear()
    parameter, before = module.weight, address(module.weight)
    value = torch.randn(6, 4)
    assert copy_or_rebind_param(module, "weight", value) == "copied"
    assert module.weight is parameter and address(module.weight) == before
    assert torch.equal(module.weight, value) and module.weight.data_ptr() != value.data_ptr()
    assert not module.weight.requires_grad


def test_strides_of_the_destination_stay() -> None:
    module = linear()
    module.weight = nn.Parameter(torch.zeros(4, 6).t())
    before = address(module.weight)
    value = torch.randn(6, 4)
    assert copy_or_rebind_param(module, "weight", value) == "copied"
    assert address(module.weight) == before and torch.equal(module.weight, value)


@pytest.mark.parametrize("value", [torch.ones(8, 4), torch.ones(6, 4, dtype=torch.bfloat16), torch.ones(())])
def test_another_form_is_rebound_on_the_same_parameter_object(value: Tensor) -> None:
    module = linear()
    parameter = module.weight
    parameter.loader = "kept"  # type: ignore[attr-defined]
    assert copy_or_rebind_param(module, "weight", value) == "rebound"
    assert module.weight is parameter and parameter.loader == "kept"  # type: ignore[attr-defined]
    assert torch.equal(parameter, value) and not parameter.requires_grad


def test_buffers_work_alike() -> None:
    module = nn.Module()
    module.register_buffer("scale", torch.zeros(3))
    scale = module.scale
    assert copy_or_rebind_param(module, "scale", torch.ones(3)) == "copied" and scale.sum() == 3
    assert copy_or_rebind_param(module, "scale", torch.ones(5)) == "rebound"
    assert module.scale is scale and len(scale) == 5


def test_a_rebound_parameter_owns_its_memory() -> None:
    module, buffer = linear(), torch.zeros(100)
    copy_or_rebind_param(module, "weight", buffer[:8].view(2, 4))
    buffer.fill_(7)
    assert not module.weight.any()
    copy_or_rebind_param(module, "bias", torch.arange(12.0).view(3, 4).t())
    assert module.bias.is_contiguous() and module.bias.shape == (4, 3)


def test_a_value_that_overlaps_its_destination_arrives_whole() -> None:
    module = nn.Linear(16, 16)
    expected = module.weight.detach().t().clone()
    assert copy_or_rebind_param(module, "weight", module.weight.t()) == "copied"
    assert torch.equal(module.weight, expected)
    assert copy_or_rebind_param(module, "weight", module.weight) == "copied"
    assert torch.equal(module.weight, expected)


def test_after_the_seal_a_rebind_raises_with_both_forms_and_changes_nothing() -> None:
    model = nn.Sequential(linear(), nn.ReLU())
    assert not is_sealed(model)
    seal(model)
    assert is_sealed(model) and is_sealed(model[0])
    before, bytes_before = address(model[0].weight), model[0].weight.detach().clone()
    forms = r"Linear\.weight: holds \(6, 4\) of torch\.float32, got \(8, 4\) of torch\.int8"
    with pytest.raises(LayoutError, match=forms):
        copy_or_rebind_param(model[0], "weight", torch.ones(8, 4, dtype=torch.int8))
    assert address(model[0].weight) == before and torch.equal(model[0].weight, bytes_before)
    assert copy_or_rebind_param(model[0], "weight", torch.ones(6, 4)) == "copied"


def test_a_rebind_across_devices_raises() -> None:
    module = linear()
    with pytest.raises(LayoutError, match="lives on cpu, the value on meta"):
        copy_or_rebind_param(module, "weight", torch.ones(8, 4, device="meta"))


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(LayoutError, match=r"Linear\.wieght: no such parameter or buffer; known: bias, weight"):
        copy_or_rebind_param(linear(), "wieght", torch.ones(1))


def test_an_expanded_destination_is_refused() -> None:
    module = linear()
    module.weight = nn.Parameter(torch.zeros(1, 4).expand(6, 4), requires_grad=False)
    with pytest.raises(LayoutError, match=r"Linear\.weight.*allocate it whole"):
        copy_or_rebind_param(module, "weight", torch.ones(6, 4))


def test_aliases_follow_a_rebind() -> None:
    module, tied = nn.Module(), nn.Module()
    module.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    register_alias(module, "weight", Alias(module=module, name="fp8", view=lambda w: w.view(torch.float8_e4m3fn)))
    tied.weight = nn.Parameter(module.weight.data, requires_grad=False)
    held = tied.weight
    register_alias(module, "weight", Alias(module=tied, name="weight", view=lambda w: w))
    copy_or_rebind_param(module, "weight", torch.full((8, 4), 0x38, dtype=torch.uint8))
    assert torch.equal(module.fp8.float(), torch.ones(8, 4))
    assert tied.weight is held and torch.equal(held, module.weight)
    assert module.fp8.data_ptr() == held.data_ptr() == module.weight.data_ptr()
    with pytest.raises(LayoutError, match="alias wide: its view copies"):
        register_alias(module, "weight", Alias(module=module, name="wide", view=lambda w: w.float()))


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_parameter_is_copied_in_place_and_never_rebound(gloo: None) -> None:
    module = linear().requires_grad_(False)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    module(torch.ones(1, 4))
    module.reshard()  # type: ignore[attr-defined]
    audit = AddressAudit.capture(lambda: dict(module.named_parameters()))
    assert copy_or_rebind_param(module, "weight", torch.eye(6)[:, :4].contiguous()) == "copied"
    copy_or_rebind_param(module, "bias", torch.zeros(6))
    assert torch.equal(module(torch.arange(4.0)[None]), torch.tensor([[0.0, 1, 2, 3, 0, 0]]))
    module.reshard()  # type: ignore[attr-defined]
    with pytest.raises(LayoutError, match="it is sharded, FSDP would ignore new storage"):
        copy_or_rebind_param(module, "weight", torch.ones(8, 4))
    audit.check()


def held_by(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters())


def move_data(module: nn.Linear) -> None:
    module.weight.data = module.weight.data.clone()


def replace_parameter(module: nn.Linear) -> None:
    module.weight = nn.Parameter(module.weight.data.clone())


def transpose_in_place(module: nn.Linear) -> None:
    module.weight.data = module.weight.data.view(4, 6).t()


def retype(module: nn.Linear) -> None:
    module.weight.data = module.weight.data.view(torch.int32)


def drop(module: nn.Linear) -> None:
    del module.weight


def add(module: nn.Linear) -> None:
    module.weight2 = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("move", "message"),
    [
        (move_data, r"weight: data_ptr was \d+, is \d+"),
        (replace_parameter, r"weight: data_ptr was"),
        (transpose_in_place, r"weight: stride was \(4, 1\), is \(1, 6\)"),
        (retype, r"weight: dtype was torch\.float32, is torch\.int32"),
        (drop, "weight: is gone"),
        (add, "weight2: was not there"),
    ],
)
def test_the_audit_sees_every_way_to_move(move: object, message: str) -> None:
    module = linear().requires_grad_(False)
    audit = AddressAudit.capture(lambda: held_by(module))
    module.weight.copy_(torch.ones(6, 4))
    audit.check()
    assert callable(move)
    kept = module.weight.data  # else the allocator may hand out the same address again
    move(module)
    with pytest.raises(LayoutError, match=message):
        audit.check()
    del kept


def test_the_audit_names_every_tensor_that_moved() -> None:
    module = linear()
    audit = AddressAudit.capture(held_by(module))
    kept = [module.weight.data, module.bias.data]
    module.weight.data, module.bias.data = (tensor.clone() for tensor in kept)
    with pytest.raises(LayoutError, match=r"(?s)2 problems.*weight: data_ptr.*bias: data_ptr"):
        audit.check()
