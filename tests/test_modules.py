"""Quantized modules: forward from the installed bytes, whatever the layout, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cold import encode_all, install, random_weights
from torch import Tensor, nn
from torch.nn import functional as F

from quant.formats import FORMATS
from quant.layouts import LAYOUTS, LayoutTagError
from quant.modules import QuantExperts, QuantLinear, QuantModule, decode_all, quantized_modules

NVFP4 = FORMATS["nvfp4"]
# Rows for NVFP4 as the format has it, of any number of rows.
HOLDING = [
    row for row in LAYOUTS.values() if "nvfp4" in row.formats and not row.swap_nibbles and "rows" not in row.multiples
]
LINEAR = [f"linear:{row.name}" for row in HOLDING if row.kind in ("linear", "any")]
EXPERTS = [f"experts:{row.name}" for row in HOLDING if row.kind in ("experts", "any")]
N, K = 200, 336  # neither is a multiple of 128; K / 16 = 21 is no multiple of 4
E, HIDDEN, INTER = 3, 192, 64
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantized_without_global_scale(packed: Tensor, scales: Tensor) -> Tensor:
    """Code times block scale in plain torch: a second opinion on the kernels."""
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).long()
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])[codes]
    return (values.unflatten(1, (-1, 16)) * scales.view(torch.float8_e4m3fn).float()[..., None]).flatten(1)


def build(case: str) -> nn.Module:
    """A model of one module, called "block", in one layout: "linear:plain"."""
    kind, _, name = case.partition(":")
    layout = LAYOUTS[name]
    if kind == "linear":
        module: QuantModule = QuantLinear(K, N, True, NVFP4, layout, "block")
    else:
        module = QuantExperts(E, HIDDEN, INTER, nn.SiLU(), NVFP4, layout, "block")
    return nn.ModuleDict({"block": module})


def derived_names(module: QuantModule) -> set[str]:
    return {derived.leaf for derived in module.plan.derived}


def checkpoint(model: nn.Module, input_scale: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    tensors = encode_all(model, random_weights(model, seed))
    return {name: torch.tensor(input_scale) if "input_scale" in name else value for name, value in tensors.items()}


def loaded(case: str, input_scale: float = 1.0, seed: int = 0) -> QuantModule:
    model = build(case)
    install(model, checkpoint(model, input_scale, seed))
    decode_all(model)
    return next(iter(quantized_modules(model)))


def forward(module: QuantModule, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    if isinstance(module, QuantLinear):
        return module(torch.randn(5, module.in_features, generator=generator).to(dtype))
    hidden = torch.randn(6, module.hidden, generator=generator).to(dtype)
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1]])
    weights = torch.rand(6, 2, generator=generator).to(dtype)
    return module(hidden, index, weights)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("case", LINEAR)
def test_decoded_linear_is_code_times_block_scale_exactly(case: str) -> None:
    model = build(case)
    tensors = checkpoint(model)
    install(model, tensors)
    decode_all(model)
    expected = dequantized_without_global_scale(tensors["block.weight"], tensors["block.weight_scale"])
    assert torch.equal(model["block"].decoded.float(), expected)  # BF16 holds these products


@pytest.mark.parametrize("case", EXPERTS)
def test_decoded_experts_are_code_times_block_scale_exactly_gate_first(case: str) -> None:
    model = build(case)
    tensors = checkpoint(model)
    install(model, tensors)
    decode_all(model)
    for expert in range(E):
        gate, up, down = (
            dequantized_without_global_scale(tensors[f"{stem}.weight"], tensors[f"{stem}.weight_scale"])
            for stem in (f"block.{expert}.{half}_proj" for half in ("gate", "up", "down"))
        )
        assert torch.equal(model["block"].decoded_w13[expert].float(), torch.cat((gate, up)))
        assert torch.equal(model["block"].decoded_w2[expert].float(), down)


@pytest.mark.parametrize("input_scale", [1.0, 0.0173])
def test_all_linear_layouts_give_the_same_bits(input_scale: float) -> None:
    outputs = {bits(forward(loaded(case, input_scale))) for case in LINEAR}
    assert len(outputs) == 1


def test_all_expert_layouts_give_the_same_bits_where_the_activation_scale_is_a_power_of_two() -> None:
    outputs = {bits(forward(loaded(case, 0.0625))) for case in EXPERTS}
    assert len(outputs) == 1


def test_trtllm_experts_round_elsewhere_where_the_activation_scale_is_no_power_of_two() -> None:
    # Its g1_scale_c folds 1/a2 into the up half before the product, so FP32 rounds in another place; the others agree.
    outputs = {case: forward(loaded(case, 0.0173), torch.float32) for case in EXPERTS}
    trtllm = outputs.pop("experts:trtllm_moe")
    assert len(outputs) == len(EXPERTS) - 1 and len({bits(value) for value in outputs.values()}) == 1
    reference = outputs["experts:plain"]
    assert (trtllm - reference).abs().max() <= 4 * torch.finfo(torch.float32).eps * reference.abs().max()


@pytest.mark.parametrize("layout", ["cutlass_dit", "trtllm_dit"])
def test_a_checkpoint_of_the_other_nibble_order_gives_the_same_bits(layout: str) -> None:
    model = build(f"linear:{layout}_swapped")
    tensors = checkpoint(model)
    tensors["block.weight"] = (tensors["block.weight"] >> 4) | (tensors["block.weight"] << 4)
    install(model, tensors)
    decode_all(model)
    assert bits(forward(model["block"])) == bits(forward(loaded(f"linear:{layout}")))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_every_layout_of_a_format_gives_the_same_bits(fmt: str, kind: str) -> None:
    found = {}
    for row in LAYOUTS.values():
        if fmt in row.formats and row.kind in (kind, "any") and not row.swap_nibbles:
            try:
                module = loaded_as(kind, fmt, row.name)
            except ValueError as error:  # multiples that this shape is not of
                assert "no multiple of" in str(error)
                continue
            found[row.name] = bits(forward(module).float()) if kind == "linear" else forward(module).float()
    plain = found.pop("plain")
    if kind == "linear":
        assert all(value == plain for value in found.values()), found.keys()
    else:  # FP32 rounds in another place where a scalar is folded into another
        assert all(torch.allclose(value, plain, rtol=2e-2, atol=1e-4) for value in found.values()), found.keys()


def loaded_as(kind: str, fmt: str, layout: str) -> QuantModule:
    shape = (256, 256) if kind == "linear" else (E, 256, 128)
    model = nn.ModuleDict({"block": module_of(kind, fmt, layout, shape)})
    install(model, checkpoint(model))
    decode_all(model)
    return next(iter(quantized_modules(model)))


def module_of(kind: str, fmt: str, layout: str, shape: tuple[int, ...]) -> QuantModule:
    if kind == "linear":
        return QuantLinear(shape[1], shape[0], False, FORMATS[fmt], LAYOUTS[layout], "block")
    return QuantExperts(*shape, nn.SiLU(), FORMATS[fmt], LAYOUTS[layout], "block")


@pytest.mark.parametrize("case", LINEAR)
def test_linear_computes_with_the_dequantized_weight_and_its_bias(case: str) -> None:
    model = build(case)
    tensors = checkpoint(model)
    install(model, tensors)
    decode_all(model)
    weight = dequantized_without_global_scale(tensors["block.weight"], tensors["block.weight_scale"])
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = F.linear(x, weight.double()) * tensors["block.weight_scale_2"].double() + tensors["block.bias"].double()
    assert torch.allclose(model["block"](x), expected, rtol=1e-12)


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_compute_silu_of_gate_times_up_then_down(case: str) -> None:
    model = build(case)
    tensors = checkpoint(model, 0.0173)
    install(model, tensors)
    decode_all(model)

    def weight(stem: str) -> Tensor:
        parts = dequantized_without_global_scale(tensors[f"{stem}.weight"], tensors[f"{stem}.weight_scale"])
        return parts.double() * tensors[f"{stem}.weight_scale_2"].double()

    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gate, up, down = (weight(f"block.1.{half}_proj") for half in ("gate", "up", "down"))
    expected = 0.5 * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    actual = model["block"](x, torch.tensor([[1]]), torch.tensor([[0.5]], dtype=torch.float64))
    assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-7)  # the scalars are FP32


def consumed_bytes(module: QuantModule) -> Iterator[tuple[str, Tensor]]:
    """(what, bytes) of every derived scalar and of every class of layout byte."""
    for derived in module.plan.derived:
        yield derived.leaf, module.get_parameter(derived.leaf).view(-1).view(torch.uint8)
    by_row = {f"_{part.suffix}" for part in module.fmt.row_components}
    for storage in module.plan.storages:
        if any(f"_{storage.leaf}".endswith(suffix) for suffix in by_row):
            yield storage.leaf, module.get_parameter(storage.leaf).view(-1)


@pytest.mark.parametrize("case", [*LINEAR, *EXPERTS])
def test_forward_consumes_every_derived_scalar_and_every_class_of_layout_byte(case: str) -> None:
    module = loaded(case, 0.0173)
    before = bits(forward(module))
    seen = []
    for what, data in consumed_bytes(module):
        saved = data.clone()
        data.bitwise_xor_(0x11)  # flips a bit in both codes of a packed byte, and in every byte of a float
        module.decode_()
        assert bits(forward(module)) != before, f"{what} is not consumed"
        data.copy_(saved)
        module.decode_()
        assert bits(forward(module)) == before, f"{what} was not restored"
        seen.append(what)
    num_matrices = {QuantLinear: 1, QuantExperts: 2}[type(module)]
    assert derived_names(module) < set(seen) and len(seen) == len(derived_names(module)) + 2 * num_matrices


@pytest.mark.parametrize("case", [*LINEAR, *EXPERTS])
def test_one_changed_code_anywhere_changes_the_decoded_weights(case: str) -> None:
    model = build(case)
    tensors = checkpoint(model)
    packed = [key for key in tensors if key.endswith(".weight")]
    install(model, tensors)
    decode_all(model)
    decoded = [buffer.clone() for _, buffer in model["block"].named_buffers()]
    for key in packed:
        for row, column in ((0, 0), (len(tensors[key]) - 1, tensors[key].shape[1] - 1)):
            # Within one code only: flipping the sign of zero would be seen too, since -0.0 has other bits.
            mutated = {**tensors, key: tensors[key].clone()}
            mutated[key][row, column] ^= 0x08
            install(model, mutated)
            decode_all(model)
            changed = sum(
                int((a.view(torch.int16) != b.view(torch.int16)).sum())
                for a, (_, b) in zip(decoded, model["block"].named_buffers(), strict=True)
            )
            assert changed == 1


def test_decoding_again_keeps_every_address_and_shows_the_new_bytes() -> None:
    model = build("experts:trtllm_moe")
    install(model, checkpoint(model, seed=0))
    decode_all(model)
    before = bits(forward(model["block"]))

    def addresses() -> dict[str, int]:
        return {name: tensor.data_ptr() for name, tensor in (*model.named_parameters(), *model.named_buffers())}

    pointers = addresses()
    install(model, checkpoint(model, seed=1))
    decode_all(model)
    assert addresses() == pointers and any("decoded" in name for name in pointers)
    assert bits(forward(model["block"])) != before
    assert bits(forward(model["block"])) == bits(forward(loaded("experts:trtllm_moe", seed=1)))


@pytest.mark.parametrize("case", ["linear:trtllm_linear", "experts:trtllm_moe"])
def test_forward_and_decode_refuse_a_module_whose_layout_was_not_applied_and_name_it(case: str) -> None:
    module = build(case)["block"]
    for call in (module.decode_, lambda: forward(module)):
        with pytest.raises(LayoutTagError, match=rf"block .*{module.layout.name}.*layout was not applied"):
            call()
    module.mark_applied()
    with pytest.raises(LayoutTagError, match=r"block .*not decoded.*decode_\(\)"):
        forward(module)


@pytest.mark.parametrize("case", [*LINEAR, *EXPERTS])
def test_decoded_bytes_are_known_before_they_are_allocated(case: str) -> None:
    planned = build(case)["block"].decoded_bytes
    module = loaded(case)
    assert planned == sum(buffer.nbytes for buffer in module.buffers())
    assert all(not parameter.requires_grad and parameter.ndim for parameter in module.parameters())


def test_an_expert_that_no_token_is_routed_to_and_the_mark_of_another_rank_cost_nothing() -> None:
    module = loaded("experts:plain")
    hidden = torch.ones(2, HIDDEN, dtype=torch.bfloat16)
    weights = torch.ones(2, 1, dtype=torch.bfloat16)
    elsewhere = module(hidden, torch.tensor([[E], [0]]), weights)
    assert not elsewhere[0].any() and elsewhere[1].any()
