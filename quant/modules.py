"""Quantized modules: parameters in kernel layout, forward from those very bytes.

Where the device has a kernel for the layout (quant.gemms), forward feeds it the parameters themselves. Elsewhere
`decode_` reads the installed bytes through the inverse index into BF16 buffers, once a version, at addresses that stay.
The buffers hold code times block scale, which BF16 holds exactly; the global scales reach the output through the
derived scalars, as they would in the kernel's epilogue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cells import Changed, Refresh, needed_of, touched_cells
from .formats import Format, decode_unscaled
from .gemms import Gemm, choose_gemm
from .layouts import (
    Layout,
    LayoutPlan,
    LayoutTagError,
    Placement,
    invert_rows,
    plan_experts,
    plan_linear,
    quantized_names,
)

log = logging.getLogger(__name__)

# Scratch of a decode: the packed rows of a piece of this many decoded bytes, small enough to stay in the cache.
PIECE_BYTES = 1 << 20

Activation = Callable[[Tensor], Tensor]
Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One logical weight of a module: its checkpoint tensors, in the format's order, and its rows once decoded."""

    prefix: str
    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    buffer: str
    index: Index


class QuantModule(nn.Module):
    """Storages and derived scalars of a layout plan as parameters, none of which requires grad; the plan names them."""

    def __init__(self, plan: LayoutPlan, fmt: Format, layout: Layout, name: str, device: torch.device | str) -> None:
        super().__init__()
        self.plan, self.fmt, self.layout, self.name = plan, fmt, layout, name
        self.layout_tag: str | None = None
        self.gemm: Gemm | None = None  # chosen where the parameters are, once a version
        self._views: dict[str, Tensor] = {}  # see kernel_operands
        # Zeros, not empty: padding bytes belong to no tensor, and nobody writes them again.
        for storage in plan.storages:
            self._register(storage.leaf, torch.zeros(storage.shape, dtype=storage.dtype, device=device))
        for derived in plan.derived:
            self._register(derived.leaf, torch.zeros(derived.shape, dtype=torch.float32, device=device))

    def _register(self, leaf: str, value: Tensor) -> None:
        self.register_parameter(leaf, nn.Parameter(value, requires_grad=False))

    def storage_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(full storage name, parameter), derived scalars included; sharded ones while the module is sharded."""
        names = [storage.name for storage in self.plan.storages] + [derived.name for derived in self.plan.derived]
        for name in names:
            yield name, self.get_parameter(name.rpartition(".")[2])

    def mark_applied(self) -> None:
        """Say that the parameters now hold this module's layout; forward refuses to run before."""
        self.layout_tag = self.layout.name

    @property
    def decoded_shapes(self) -> dict[str, tuple[int, ...]]:
        """Buffer name -> shape."""
        raise NotImplementedError

    def _matrix_buffers(self) -> Iterator[tuple[str, str, Index]]:
        """(checkpoint prefix of a matrix, decoded buffer that holds it, where in the buffer)."""
        raise NotImplementedError

    @cached_property
    def matrices(self) -> tuple[Matrix, ...]:
        """The weights in this module, as a trainer names them."""
        placements: dict[str, list[Placement]] = {}
        for placement in self.plan.placements:
            placements.setdefault(placement.tensor.name.rpartition(".")[0], []).append(placement)
        shapes = {name: torch.empty(shape, device="meta") for name, shape in self.decoded_shapes.items()}
        return tuple(
            Matrix(
                prefix=prefix,
                shape=tuple(shapes[buffer][index].shape),
                placements=tuple(placements[prefix]),
                buffer=buffer,
                index=index,
            )
            for prefix, buffer, index in self._matrix_buffers()
        )

    @property
    def sizes(self) -> dict[str, int]:
        """What a layout's multiples are of, by name."""
        raise NotImplementedError

    def kernel_operands(self) -> dict[str, Tensor]:
        """What a kernel is fed, by leaf: the view of every storage that it wants, the derived scalars, and a bias.

        No copies. Look again in every forward: what FSDP gathers does not stay where it was. Views are kept as long as
        they show the parameter's memory, since making one takes as long as a launch; a compiler keeps none.
        """
        found: dict[str, Tensor] = {name: each for name, each in self._parameters.items() if each is not None}
        views = {} if torch.compiler.is_compiling() else self._views
        for storage in self.plan.storages:
            whole, view = found[storage.leaf], views.get(storage.leaf)
            if view is None or view.data_ptr() != whole.data_ptr():
                view = views[storage.leaf] = storage.kernel_view(whole.detach())
            found[storage.leaf] = view
        return found

    def _choose_gemm(self) -> tuple[Gemm | None, str]:
        return choose_gemm(self.layout, self.sizes, next(self.parameters()).device, getattr(self, "act_fn", None))

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the decoded buffers, whether they are allocated yet or not."""
        if self._choose_gemm()[0] is not None:
            return 0
        return sum(2 * torch.Size(shape).numel() for shape in self.decoded_shapes.values())

    @torch.no_grad()
    def decode_(self, changed: Changed | None = None) -> None:
        """Refresh the decoded buffers from the bytes that are in the (unsharded) parameters now.

        changed: by tensor, the bytes that are not as they were when the buffers were last refreshed; all by default.
        """
        refresh = Refresh(changed)
        self.plan_decode(refresh, changed)
        refresh.run()

    def plan_decode(self, refresh: Refresh, changed: Changed | None) -> None:
        """Add what `decode_` has to do to a refresh, for changes that may be yet to come."""
        self._require(self.layout_tag is not None, "its layout was not applied; load weights, then mark_applied()")
        sharded = [name for name, parameter in self.storage_parameters() if hasattr(parameter, "to_local")]
        self._require(not sharded, f"{', '.join(sharded)} hold a shard only; unshard the model before decode_()")
        self.gemm, why = self._choose_gemm()
        if self.gemm is not None:
            _say(self.layout.name, why, self.gemm.tested)
            for name in self.decoded_shapes:
                setattr(self, name, None)
            return
        bytes_of = {name: value.view(-1).view(torch.uint8) for name, value in self.storage_parameters()}
        changed = None if self._allocate() else changed
        for matrix in self.matrices:
            out, at = self.get_buffer(matrix.buffer)[matrix.index], matrix.placements
            if changed is not None and not any(placement.tensor.name in changed for placement in at):
                continue
            shape = (out.shape[0], out.shape[1])
            cells = None if changed is None else touched_cells(self.fmt, at, changed, shape)
            if cells is None:
                refresh.add_whole(partial(_decode_rows, self.fmt, at, bytes_of, out))
            elif len(cells):
                refresh.add_cells(self.fmt, at, cells, bytes_of, out)

    def _allocate(self) -> bool:
        """Whether buffers had to be made, which hold nothing yet."""
        absent = {name: shape for name, shape in self.decoded_shapes.items() if getattr(self, name) is None}
        for name, shape in absent.items():
            device = next(self.parameters()).device
            setattr(self, name, torch.empty(shape, dtype=torch.bfloat16, device=device))
        return bool(absent)

    def _decoded(self, name: str, like: Tensor) -> Tensor:
        buffer = getattr(self, name)
        self._require(self.layout_tag is not None, "its layout was not applied; load weights, then mark_applied()")
        self._require(buffer is not None, "its bytes were not decoded; call decode_() once a version")
        # A no-op for BF16 activations, which is what models run; FP32 ones are for comparisons.
        return torch.as_tensor(buffer).to(like.dtype)

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise LayoutTagError(f"{self.name} ({type(self).__name__}, layout {self.layout.name}): {problem}")


@cache
def _say(layout: str, why: str, tested: bool) -> None:
    """Once for all modules and versions."""
    log.log(logging.INFO if tested else logging.WARNING, "layout %s: forward calls %s", layout, why)


def _decode_rows(fmt: Format, placements: Sequence[Placement], bytes_of: Mapping[str, Tensor], out: Tensor) -> None:
    parts = list(zip(fmt.components, placements, strict=True))
    needed = needed_of(fmt, placements, bytes_of)
    step = max(1, PIECE_BYTES // out[:1].nbytes // fmt.row_step) * fmt.row_step
    for row0 in range(0, len(out), step):
        piece = out[row0 : row0 + step]
        rows = {
            part.suffix: _low_nibble_first(at, row0 // part.rows, -(-len(piece) // part.rows), bytes_of[at.storage])
            for part, at in parts
            if part.rows
        }
        decode_unscaled(fmt, {**rows, **needed}, piece)


def _low_nibble_first(at: Placement, row0: int, n: int, storage: Tensor) -> Tensor:
    """Rows as the format has them, whatever nibble order their checkpoint had: kernels are fed one order only."""
    return invert_rows(replace(at, swap_nibbles=False), row0, n, storage, 0)


class QuantLinear(QuantModule):
    """y = (x @ decoded.T) * (alpha * input_scale_inv) + bias, or what the layout's kernel makes of the same bytes."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        fmt: Format,
        layout: Layout,
        name: str,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(plan_linear(layout, fmt, name, out_features, in_features), fmt, layout, name, device)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None)
        if bias:
            self._register("bias", torch.zeros(out_features, dtype=torch.bfloat16, device=device))
        self.register_buffer("decoded", None, persistent=False)

    @property
    def sizes(self) -> dict[str, int]:
        return {"rows": self.out_features, "elements": self.in_features}

    @property
    def decoded_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"decoded": (self.out_features, self.in_features)}

    def _matrix_buffers(self) -> Iterator[tuple[str, str, Index]]:
        yield self.name, "decoded", (slice(None),)

    def forward(self, x: Tensor) -> Tensor:
        if self.gemm is not None:
            return self.gemm.run(x, self.kernel_operands(), self.out_features)
        y = F.linear(x, self._decoded("decoded", x))
        if hasattr(self, "alpha"):  # formats without a global scale have all of it in the decoded weight
            # The kernel quantizes x * input_scale_inv and multiplies the sum by alpha; here x stays as it is.
            y = y * (self.get_parameter("alpha") * self.get_parameter("input_scale_inv"))
        return (y if self.bias is None else y + self.get_parameter("bias")).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.fmt.name}, {self.layout.name}"


class QuantExperts(QuantModule):
    """Stacked gated experts, called as transformers calls its own: (hidden_states, top_k_index, top_k_weights)."""

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        inter: int,
        act_fn: Activation,
        fmt: Format,
        layout: Layout,
        name: str,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(plan_experts(layout, fmt, name, num_experts, hidden, inter), fmt, layout, name, device)
        self.num_experts, self.hidden, self.inter, self.act_fn = num_experts, hidden, inter, act_fn
        self._scalars = tuple(derived.leaf for derived in self.plan.derived)
        self.register_buffer("decoded_w13", None, persistent=False)
        self.register_buffer("decoded_w2", None, persistent=False)

    @property
    def sizes(self) -> dict[str, int]:
        return {"experts": self.num_experts, "hidden": self.hidden, "inter": self.inter}

    @property
    def decoded_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "decoded_w13": (self.num_experts, 2 * self.inter, self.hidden),  # gate first, whatever the layout's order
            "decoded_w2": (self.num_experts, self.hidden, self.inter),
        }

    def _matrix_buffers(self) -> Iterator[tuple[str, str, Index]]:
        gate, up = slice(0, self.inter), slice(self.inter, None)
        for expert in range(self.num_experts):
            prefix = f"{self.name}.{expert}"
            yield f"{prefix}.gate_proj", "decoded_w13", (expert, gate)
            yield f"{prefix}.up_proj", "decoded_w13", (expert, up)
            yield f"{prefix}.down_proj", "decoded_w2", (expert,)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if self.gemm is not None:
            return self.gemm.run(hidden_states, top_k_index, top_k_weights, self.kernel_operands())
        w13, w2 = (self._decoded(name, hidden_states) for name in self.decoded_shapes)
        out = torch.zeros_like(hidden_states)
        # An index past the last expert is transformers' mark of a token that is routed elsewhere.
        routed = top_k_index.flatten().bincount(minlength=self.num_experts)[: self.num_experts]
        for expert in routed.nonzero().flatten().tolist():
            token, choice = torch.where(top_k_index == expert)
            y = self._expert(hidden_states[token], expert, w13[expert], w2[expert])
            out.index_add_(0, token, (y * top_k_weights[token, choice, None]).to(out.dtype))
        return out

    def _expert(self, x: Tensor, expert: int, w13: Tensor, w2: Tensor) -> Tensor:
        """The epilogues of the layout's two GEMMs, each scalar where its kernel applies it."""
        gate, up = F.linear(x, w13).chunk(2, dim=-1)
        if not hasattr(self, "g1_alphas"):  # formats without a global scale have all of it in the decoded weights
            return F.linear(self.act_fn(gate) * up, w2)
        # Shape [1] each, not 0-d: a 0-d FP32 factor would leave the products in BF16.
        scale = {name: _of_expert(self.get_parameter(name), expert) for name in self._scalars}
        quant13 = scale["w13_input_scale_quant"]
        activated = self.act_fn(gate * (scale["g1_alphas"] * quant13))
        if "g1_scale_c" in scale:
            # TRT-LLM: one scalar takes the up half to the second GEMM's quantized input.
            h = activated * (up * (scale["g1_scale_c"] * quant13))
        else:
            h = activated * (up * (scale["g1_alphas_up"] * quant13)) * scale["w2_input_scale_quant"]
        return F.linear(h.to(x.dtype), w2) * scale["g2_alphas"]

    def extra_repr(self) -> str:
        sizes = f"num_experts={self.num_experts}, hidden={self.hidden}, inter={self.inter}"
        return f"{sizes}, {self.fmt.name}, {self.layout.name}"


def _of_expert(scalars: Tensor, expert: int) -> Tensor:
    """[1, E] or, shared by all experts, [1, 1] -> [1]."""
    return scalars[0, expert : expert + 1] if scalars.shape[1] > 1 else scalars[0]


def quantized_modules(model: nn.Module) -> dict[nn.Module, frozenset[str]]:
    """Every quantized module with the parameter names that it may own: what sharding checks against."""
    known = quantized_names() | {"bias"}
    return {module: known for module in model.modules() if isinstance(module, QuantModule)}


def mark_all_applied(model: nn.Module) -> None:
    """Say that the parameters of every quantized module now hold its layout."""
    for module in model.modules():
        if isinstance(module, QuantModule):
            module.mark_applied()


def layouts_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the layouts in a model, sorted; plain for a model without quantized modules."""
    names = {module.layout.name for module in model.modules() if isinstance(module, QuantModule)}
    return tuple(sorted(names)) or ("plain",)


@torch.no_grad()
def decode_all(model: nn.Module, changed: Changed | None = None) -> None:
    """Refresh every decoded buffer; the model must be unsharded. Once a version.

    changed: by tensor, the bytes that were written since the last time, None for any of them; all by default.
    """
    plan_refresh(model, changed).run()


@torch.no_grad()
def plan_refresh(model: nn.Module, changed: Changed | None = None) -> Refresh:
    """What decode_all does, planned before the bytes change; `run` it when they have, under no_grad."""
    refresh = Refresh(changed)
    for module in model.modules():
        if isinstance(module, QuantModule):
            module.plan_decode(refresh, changed)
    return refresh
