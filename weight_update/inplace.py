"""Parameters keep their addresses: copy in place, rebind only before the seal, and an audit that nothing moved.

copy_or_rebind_param(module, "weight", value)     "copied", or "rebound" while the module is being built
seal(model)                                       from here on a rebind raises
audit = AddressAudit.capture(parameters)
audit.check()                                     after every install
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import LayoutError, raise_all

SEALED = "_transfuse_sealed"
ALIASES = "_transfuse_aliases"
PLAIN = frozenset({Tensor, nn.Parameter})

Storages = Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]


# ---------------------------------------------------------------- one parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A tensor elsewhere that shows the storage of a parameter: `module.name = view(parameter)`."""

    module: nn.Module
    name: str
    view: Callable[[Tensor], Tensor]


def seal(module: nn.Module) -> None:
    """The module is built, sharded or captured in a graph: from now on no parameter under it may be rebound."""
    for part in module.modules():
        setattr(part, SEALED, True)


def is_sealed(module: nn.Module) -> bool:
    """Whether a rebind in this module raises."""
    return bool(getattr(module, SEALED, False))


def register_alias(module: nn.Module, name: str, alias: Alias) -> None:
    """Tie a tensor to parameter `name`, so that a rebind renews it and none keeps dead storage."""
    registered: dict[str, list[Alias]] = module.__dict__.setdefault(ALIASES, {})
    registered.setdefault(name, []).append(alias)
    _renew(alias, _tensor_of(module, name))


def copy_or_rebind_param(module: nn.Module, name: str, value: Tensor) -> Literal["copied", "rebound"]:
    """Give a parameter or buffer a new value: into its storage where shape and dtype fit, else in new storage.

    A rebind keeps the Parameter object and its attributes and renews registered aliases. It raises LayoutError after
    seal(), on a sharded parameter and across devices. Either way requires_grad is off afterwards. Call it while the
    model is sharded: FSDP drops what is written to gathered parameters.
    """
    tensor = _tensor_of(module, name)
    where = f"{type(module).__name__}.{name}"
    live = local_of(tensor)
    value = value.detach()
    if live.shape == value.shape and live.dtype == value.dtype:
        _copy(live.detach(), value, where)
        tensor.requires_grad_(False)
        return "copied"
    _refuse_rebind(module, tensor, live, value, where)
    tensor.requires_grad_(False)
    tensor.data = _owned(value)
    for alias in module.__dict__.get(ALIASES, {}).get(name, ()):
        _renew(alias, tensor)
    return "rebound"


def _tensor_of(module: nn.Module, name: str) -> Tensor:
    held: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    tensor = held.get(name)
    if tensor is None:
        known = ", ".join(sorted(held)) or "none"
        raise LayoutError(f"{type(module).__name__}.{name}: no such parameter or buffer; known: {known}")
    return tensor


def _copy(live: Tensor, value: Tensor, where: str) -> None:
    if _same_memory(live, value):
        return
    # A value that overlaps its destination in another order would be read after it was overwritten.
    try:
        live.copy_(value.clone() if _storage_of(live) == _storage_of(value) else value)
    except RuntimeError as error:  # an expanded destination, whose elements share memory
        raise LayoutError(f"{where}: {_shown(live)}, strides {live.stride()}: {error}; allocate it whole") from None


def _refuse_rebind(module: nn.Module, tensor: Tensor, live: Tensor, value: Tensor, where: str) -> None:
    reasons = []
    if is_sealed(module):
        reasons.append("the module is sealed, its address is in use")
    if isinstance(tensor, DTensor):
        reasons.append("it is sharded, FSDP would ignore new storage")
    if live.device != value.device:
        reasons.append(f"it lives on {live.device}, the value on {value.device}")
    if reasons:
        raise LayoutError(
            f"{where}: holds {_shown(live)}, got {_shown(value)}, and cannot be rebound: {'; '.join(reasons)};"
            " rebuild the module"
        )


def _owned(value: Tensor) -> Tensor:
    """The value in storage of its own: a parameter inside somebody's buffer would change with the buffer."""
    owns = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if owns else value.clone(memory_format=torch.contiguous_format)


def _renew(alias: Alias, tensor: Tensor) -> None:
    shown = alias.view(tensor.detach())
    if _storage_of(shown) != _storage_of(tensor):
        raise LayoutError(f"alias {alias.name}: its view copies; return a view of the parameter's storage")
    held = alias.module._parameters.get(alias.name)
    if held is not None:
        held.data = shown
    else:
        setattr(alias.module, alias.name, shown)


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.stride(), a.device) == (b.data_ptr(), b.stride(), b.device)


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """What a kernel or a captured graph holds of a tensor."""

    data_ptr: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Address:
        return cls(data_ptr=tensor.data_ptr(), shape=tuple(tensor.shape), stride=tensor.stride(), dtype=tensor.dtype)

    def is_of(self, tensor: Tensor) -> bool:
        """Whether the tensor is still there, in this form."""
        here = tensor.data_ptr() == self.data_ptr and tensor.dtype is self.dtype
        return here and tensor.shape == self.shape and tensor.stride() == self.stride


class AddressAudit:
    """Addresses of named tensors at one time, to be compared with later.

    storages: a mapping, or a function that looks the tensors up anew (which also sees a replaced Parameter). Aliases
    count by their own names.
    """

    def __init__(self, storages: Storages, held: Mapping[str, Address]) -> None:
        self._storages = storages
        self._held = dict(held)

    @classmethod
    def capture(cls, storages: Storages) -> AddressAudit:
        """Remember where everything is now."""
        return cls(storages, {name: Address.of(local_of(tensor)) for name, tensor in _looked_up(storages).items()})

    def check(self) -> None:
        """Raise LayoutError that names every tensor that moved, changed its form, came or went."""
        found = {name: local_of(tensor) for name, tensor in _looked_up(self._storages).items()}
        if found.keys() == self._held.keys() and all(old.is_of(found[name]) for name, old in self._held.items()):
            return
        now = {name: Address.of(tensor) for name, tensor in found.items()}
        problems = [f"{name}: is gone" for name in self._held.keys() - now.keys()]
        problems += [f"{name}: was not there" for name in now.keys() - self._held.keys()]
        problems += [
            f"{name}: {_difference(old, now[name])}"
            for name, old in self._held.items()
            if name in now and now[name] != old
        ]
        raise_all(LayoutError, "live tensors moved; write into them with copy_, never replace them", problems)


def _looked_up(storages: Storages) -> Mapping[str, Tensor]:
    return storages() if callable(storages) else storages


def local_of(tensor: Tensor) -> Tensor:
    """The tensor itself, or this rank's shard of a sharded one: a view of its storage."""
    if type(tensor) in PLAIN:  # a model has tens of thousands, and the other question takes five times as long
        return tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _difference(old: Address, new: Address) -> str:
    return ", ".join(
        f"{field} was {getattr(old, field)}, is {getattr(new, field)}"
        for field in Address.__dataclass_fields__
        if getattr(old, field) != getattr(new, field)
    )
