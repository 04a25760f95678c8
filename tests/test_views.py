"""Views read what other tools wrote as checkpoint form, byte for byte, and no more of it than is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as converters
from safetensors.torch import save_file
from torch import Tensor

from quant.checkpoint import Checkpoint, CheckpointError
from quant.name_maps import NAME_MAPS, merging
from quant.names import NameMap, NameRule
from quant.views import CheckpointView
from tests import goldens, reference

CODES, SCALES = torch.uint8, torch.float8_e4m3fn


def random_bytes(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Bytes 1..126: no zero, so that padding shows, and no NaN in any dtype used here."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(1, 127, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def written(directory: Path, tensors: Mapping[str, Tensor], **config: Any) -> Checkpoint:
    directory.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    stated = {"quant_algo": "NVFP4", "group_size": 16, "swap_weight_nibbles": False, "ignore": [], **config}
    packed = any(tensor.dtype == CODES for tensor in tensors.values())
    (directory / "config.json").write_text(json.dumps({"quantization_config": stated} if packed else {}))
    return Checkpoint(directory)


def assert_same(view: Checkpoint, expected: Mapping[str, Tensor]) -> None:
    assert view.names() == tuple(sorted(expected))
    for name, tensor in expected.items():
        assert name in view
        assert (view.spec(name).shape, view.rows(name).dtype) == (tuple(tensor.shape), tensor.dtype), name
        assert view.rows(name).shape == tensor.shape
        assert torch.equal(goldens.bytes_of(view.rows(name)), goldens.bytes_of(tensor)), name


# ---------------------------------------------------------------- the file that Black Forest Labs would write

PARTS = {"to_q": "img_attn.qkv", "to_k": "img_attn.qkv", "to_v": "img_attn.qkv"}
ROWS, ELEMENTS = 72, 80  # three parts make 216 rows: parts begin inside a tile of 128, and 224 rows with padding


def canonical() -> dict[str, Tensor]:
    """Two NVFP4 modules, one of which is packed in the file, and one in BF16, as a ModelOpt export has them."""
    tensors: dict[str, Tensor] = {}
    for seed, module in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")):
        name = f"transformer_blocks.0.{module}"
        tensors |= {
            f"{name}.weight": random_bytes((ROWS, ELEMENTS // 2), CODES, seed),
            f"{name}.weight_scale": random_bytes((ROWS, ELEMENTS // 16), SCALES, 10 + seed),
            f"{name}.weight_scale_2": torch.tensor(0.5 if module != "attn.to_out.0" else 0.25),
            f"{name}.input_scale": torch.tensor(0.125),
        }
    tensors["x_embedder.weight"] = random_bytes((24, 16), torch.bfloat16, 20)
    return tensors


def swap_each(codes: Tensor) -> Tensor:
    """Byte by byte: 0x12 becomes 0x21."""
    flat = [(byte % 16) * 16 + byte // 16 for byte in codes.reshape(-1).tolist()]
    return torch.tensor(flat, dtype=torch.uint8).view(codes.shape)


def comfy_scales(scales: Tensor, columns: int) -> Tensor:
    """Rows to 16, columns to a multiple, then tiles of 128 x 4; noted as the matrix that it no longer is."""
    padded = reference.pad(scales.view(torch.uint8).numpy(), 16, columns)
    tall, wide = -(-padded.shape[0] // 128) * 128, -(-padded.shape[1] // 4) * 4
    return torch.from_numpy(reference.swizzle_128x4(padded)).view(tall, wide).view(SCALES)


def bfl_file(pad_columns: bool) -> dict[str, Tensor]:
    columns = 16 if pad_columns else 1
    ours = canonical()
    stored = {"img_in.weight": ours["x_embedder.weight"]}
    for theirs, parts in {"qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",)}.items():

        def packed(leaf: str, parts: tuple[str, ...] = parts) -> Tensor:
            return torch.cat([ours[f"transformer_blocks.0.attn.{part}.{leaf}"].view(torch.uint8) for part in parts])

        name = f"double_blocks.0.img_attn.{theirs}"
        codes = torch.from_numpy(reference.pad(swap_each(packed("weight")).numpy(), 16, columns))
        stored |= {
            f"{name}.weight": codes,
            f"{name}.weight_scale": comfy_scales(packed("weight_scale"), columns),
            f"{name}.weight_scale_2": ours[f"transformer_blocks.0.attn.{parts[0]}.weight_scale_2"].clone(),
            f"{name}.input_scale": ours[f"transformer_blocks.0.attn.{parts[0]}.input_scale"].clone(),
            f"{name}.comfy_quant": torch.tensor([123, 125], dtype=torch.uint8),
        }
    return stored


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Of the weights, in elements."""
    return {
        name: (tensor.shape[0], tensor.shape[1] * (2 if tensor.dtype == CODES else 1))
        for name, tensor in tensors.items()
        if name.endswith(".weight")
    }


@pytest.mark.parametrize("pad_columns", [False, True])
def test_a_packed_swapped_swizzled_and_padded_file_reads_as_the_canonical_one(
    tmp_path: Path, pad_columns: bool
) -> None:
    stored = written(
        tmp_path,
        bfl_file(pad_columns),
        swap_weight_nibbles=True,
        checkpoint_uses_packed_qkv=True,
        checkpoint_weight_scale_layout="swizzled",
        ignore=["img_in"],
    )
    with CheckpointView(stored, name_map=NAME_MAPS["bfl_flux2"], shapes=shapes_of(canonical())) as view:
        assert_same(view, canonical())
        assert view.config_dir == tmp_path
        stated = view.quantization
        assert stated is not None
        assert (stated.swap_nibbles, stated.packed_qkv, stated.scale_layout) == (False, False, "linear")
        assert stated.exclude == ("x_embedder",)


def test_options_are_taken_instead_of_what_the_checkpoint_says(tmp_path: Path) -> None:
    stored = written(tmp_path, bfl_file(False))
    view = CheckpointView(
        stored,
        name_map=NAME_MAPS["bfl_flux2"],
        swap_nibbles=True,
        scale_layout="swizzled",
        shapes=shapes_of(canonical()),
    )
    assert_same(view, canonical())


def test_a_prefix_names_the_component(tmp_path: Path) -> None:
    ours = {"x_embedder.weight": random_bytes((4, 2), torch.bfloat16, 0)}
    view = CheckpointView(written(tmp_path, ours), prefix="transformer_2")
    assert_same(view, {"transformer_2.x_embedder.weight": ours["x_embedder.weight"]})


class Watched(Checkpoint):
    """A checkpoint that keeps what was read of it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.read: list[tuple[str, int, int | None]] = []

    def rows(self, name: str, row_start: int = 0, row_stop: int | None = None) -> Tensor:
        self.read.append((name, row_start, row_stop))
        return super().rows(name, row_start, row_stop)


def test_only_the_rows_and_the_tiles_that_hold_them_are_read(tmp_path: Path) -> None:
    written(tmp_path, bfl_file(False), swap_weight_nibbles=True, checkpoint_weight_scale_layout="swizzled")
    stored = Watched(tmp_path)
    view = CheckpointView(stored, name_map=NAME_MAPS["bfl_flux2"], shapes=shapes_of(canonical()))
    assert stored.read == []
    ours, packed = canonical(), "double_blocks.0.img_attn.qkv"
    # rows 5..9 of k are rows 77..81 of qkv, in the first tile; 60..70 of it 132..142, in the second; q ends at 72
    for part, rows, tiles in (("to_k", (5, 9), (0, 128)), ("to_k", (60, 70), (128, 256)), ("to_k", (50, 70), (0, 256))):
        stored.read.clear()
        name = f"transformer_blocks.0.attn.{part}"
        for leaf in ("weight", "weight_scale"):
            got = view.rows(f"{name}.{leaf}", *rows)
            assert torch.equal(got.view(torch.uint8), ours[f"{name}.{leaf}"][slice(*rows)].view(torch.uint8))
        assert stored.read == [
            (f"{packed}.weight", 72 + rows[0], 72 + rows[1]),
            (f"{packed}.weight_scale", *tiles),
        ]
    assert view.rows("transformer_blocks.0.attn.to_k.weight", 72, 72).shape == (0, 40)
    assert view.rows("transformer_blocks.0.attn.to_k.weight", 70, 200).shape == (2, 40)


@pytest.mark.parametrize("name", goldens.names("dit_nvfp4"))
@pytest.mark.parametrize("form", ["modelopt_pad_row", "modelopt_pad_row_col", "swizzled_ckpt"])
def test_the_padding_and_the_swizzle_of_modelopt_are_undone(tmp_path: Path, name: str, form: str) -> None:
    fixture = goldens.load(name)
    ours = {leaf: fixture[f"ckpt.{leaf}"] for leaf in ("weight", "weight_scale", "weight_scale_2")}
    weight, scale = {
        "swizzled_ckpt": ("ckpt.weight", "out.swizzled_ckpt_scale"),
    }.get(form, (f"out.{form}.weight", f"out.{form}_swizzled.weight_scale"))
    stored = ours | {"weight": fixture[weight], "weight_scale": fixture[scale]}
    checkpoint = written(tmp_path, {f"proj.{leaf}": tensor for leaf, tensor in stored.items()})
    expected = {f"proj.{leaf}": tensor for leaf, tensor in ours.items()}
    assert_same(CheckpointView(checkpoint, scale_layout="swizzled", shapes=shapes_of(expected)), expected)


@pytest.mark.parametrize("name", goldens.names("dit_nvfp4"))
def test_linear_padded_scales_are_cut(tmp_path: Path, name: str) -> None:
    fixture = goldens.load(name)
    expected = {f"proj.{leaf}": fixture[f"ckpt.{leaf}"] for leaf in ("weight", "weight_scale")}
    stored = {f"proj.{leaf}": fixture[f"out.modelopt_pad_row_col.{leaf}"] for leaf in ("weight", "weight_scale")}
    assert_same(CheckpointView(written(tmp_path, stored), shapes=shapes_of(expected)), expected)


def test_rows_are_cut_to_the_bias_where_no_shape_is_given(tmp_path: Path) -> None:
    ours = {"a.weight": random_bytes((40, 16), CODES, 1), "a.weight_scale": random_bytes((40, 2), SCALES, 2)}
    bias = {"a.bias": random_bytes((40,), torch.bfloat16, 3)}
    padded = {"a.weight": torch.nn.functional.pad(ours["a.weight"], (0, 0, 0, 8))}
    padded["a.weight_scale"] = comfy_scales(ours["a.weight_scale"], 1)
    assert_same(CheckpointView(written(tmp_path, padded | bias), scale_layout="swizzled"), ours | bias)


def test_a_shape_that_padding_does_not_explain_is_left_to_whoever_compares_shapes(tmp_path: Path) -> None:
    stored = {"a.weight": random_bytes((48, 16), CODES, 1), "a.weight_scale": random_bytes((48, 2), SCALES, 2)}
    assert_same(CheckpointView(written(tmp_path, stored), shapes={"a.weight": (24, 32)}), stored)


# ---------------------------------------------------------------- diffusers' converters say the same

BLOCK, SINGLE = "double_blocks.0", "single_blocks.0"
NORMS = [f"{BLOCK}.{x}_attn.norm.{y}_norm.scale" for x in ("img", "txt") for y in ("query", "key")]
NORMS += [f"{SINGLE}.norm.{y}_norm.scale" for y in ("query", "key")]
ATTENTION = [f"{BLOCK}.{x}_{y}" for x in ("img", "txt") for y in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
ENDS = ["img_in", "txt_in", "final_layer.adaLN_modulation.1", "final_layer.linear"]
ENDS += [f"{x}_in.{y}_layer" for x in ("time", "guidance") for y in ("in", "out")]
WAN_ATTENTION = [f"{x}_attn.{y}" for x in ("self", "cross") for y in ("q", "k", "v", "o", "norm_q", "norm_k")]
WAN = [f"blocks.0.{x}" for x in (*WAN_ATTENTION, "cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2", "norm3")]
WAN += ["time_embedding.0", "time_embedding.2", "text_embedding.0", "text_embedding.2", "time_projection.1"]
WAN += ["head.head", "patch_embedding", *(f"img_emb.proj.{i}" for i in (0, 1, 3, 4))]

WAN_OTHERS = ["blocks.0.modulation", "head.modulation", "blocks.0.cross_attn.norm_k_img.weight"]


def leaves(modules: list[str], *leaf: str) -> list[str]:
    return [f"{module}.{each}" for module in modules for each in leaf]


# names in the original file, the converter of diffusers, and rows of tensors that it takes for granted
ORIGINALS: dict[str, tuple[list[str], Callable[..., dict[str, Tensor]], Mapping[str, int]]] = {
    "bfl_flux": (
        NORMS
        + leaves([*ATTENTION, *ENDS, f"{BLOCK}.img_mod.lin", f"{BLOCK}.txt_mod.lin"], "weight", "bias")
        + leaves(["vector_in.in_layer", "vector_in.out_layer"], "weight", "bias")
        + leaves([f"{SINGLE}.{x}" for x in ("linear1", "linear2", "modulation.lin")], "weight", "bias"),
        converters.convert_flux_transformer_checkpoint_to_diffusers,
        {f"{SINGLE}.linear1.weight": 7 * 3072, f"{SINGLE}.linear1.bias": 7 * 3072},
    ),
    "bfl_flux2": (
        NORMS
        + leaves([*ATTENTION, *ENDS, f"{SINGLE}.linear1", f"{SINGLE}.linear2"], "weight")
        + leaves([f"double_stream_modulation_{x}.lin" for x in ("img", "txt")], "weight")
        + ["single_stream_modulation.lin.weight"],
        converters.convert_flux2_transformer_checkpoint_to_diffusers,
        {},
    ),
    "wan_original": (
        [*leaves(WAN, "weight", "bias"), *WAN_OTHERS],
        converters.convert_wan_transformer_to_diffusers,
        {},
    ),
}


@pytest.mark.parametrize("map_name", ORIGINALS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_view_of_an_original_file_equals_what_diffusers_converts_it_to(
    tmp_path: Path, map_name: str, prefix: str
) -> None:
    names, convert, rows = ORIGINALS[map_name]
    tensors = {name: random_bytes((rows.get(name, 12), 2), torch.bfloat16, i) for i, name in enumerate(names)}
    view = CheckpointView(
        written(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()}), name_map=NAME_MAPS[map_name]
    )
    assert_same(view, convert(dict(tensors)))


# ---------------------------------------------------------------- packing, either way


def qkv_rule(leaf: str = "{leaf}") -> NameMap:
    return NameMap((NameRule(f"qkv.{leaf}", tuple(f"{x}.{leaf}" for x in "qkv")),))


def test_what_the_checkpoint_keeps_apart_is_one_tensor_of_a_model_that_packs_it(tmp_path: Path) -> None:
    parts = {f"{x}.weight": random_bytes((5, 3), torch.bfloat16, i) for i, x in enumerate("qkv")}
    view = CheckpointView(
        written(tmp_path, parts), name_map=NameMap(merging("qkv.{leaf}", ("q.{leaf}", "k.{leaf}", "v.{leaf}")))
    )
    whole = torch.cat([parts[f"{x}.weight"] for x in "qkv"])
    assert_same(view, {"qkv.weight": whole})
    assert view.sources("qkv.weight") == ("q.weight", "k.weight", "v.weight")
    for first, last in ((0, 5), (4, 6), (3, 12), (10, 15), (7, 7)):
        assert torch.equal(view.rows("qkv.weight", first, last), whole[first:last])


@pytest.mark.parametrize("scales", [(0.5, 0.5, 0.5), (0.5, 0.25, 0.5)])
def test_parts_of_one_tensor_have_one_scale_or_are_refused(tmp_path: Path, scales: tuple[float, ...]) -> None:
    parts = {f"{x}.weight_scale": torch.tensor(scale) for x, scale in zip("qkv", scales, strict=True)}
    view = CheckpointView(
        written(tmp_path, parts), name_map=NameMap(merging("qkv.{leaf}", ("q.{leaf}", "k.{leaf}", "v.{leaf}")))
    )
    if len(set(scales)) == 1:
        assert_same(view, {"qkv.weight_scale": torch.tensor(0.5)})
    else:
        with pytest.raises(CheckpointError, match=r"qkv.weight_scale: .*k.weight_scale 0.25.*onto one"):
            view.rows("qkv.weight_scale")


def test_a_packed_weight_gives_each_part_its_rows_or_its_value_of_a_scale(tmp_path: Path) -> None:
    f8 = torch.float8_e4m3fn
    stored = {
        "qkv.weight": random_bytes((384, 2), f8, 0),
        "qkv.weight_scale": torch.tensor([1.0, 2.0, 3.0]),
        "qkv.weight_scale_inv": random_bytes((3, 2), torch.float32, 1),  # blocks of 128 rows
        "qkv.input_scale": torch.tensor([4.0]),
        "qkv.pre": random_bytes((384, 1), torch.float32, 2),
    }
    expected: dict[str, Tensor] = {}
    for i, x in enumerate("qkv"):
        expected |= {
            f"{x}.weight": stored["qkv.weight"][128 * i : 128 * i + 128],
            f"{x}.weight_scale": torch.tensor([i + 1.0]),
            f"{x}.weight_scale_inv": stored["qkv.weight_scale_inv"][i : i + 1],
            f"{x}.input_scale": torch.tensor([4.0]),
            f"{x}.pre": stored["qkv.pre"][128 * i : 128 * i + 128],
        }
    assert_same(CheckpointView(written(tmp_path, stored), name_map=qkv_rule()), expected)


def test_everything_that_is_stored_otherwise_is_named_at_once(tmp_path: Path) -> None:
    stored = {
        "qkv.weight": random_bytes((300, 2), torch.float8_e4m3fn, 0),
        "qkv.weight_scale_inv": random_bytes((3, 2), torch.float32, 1),  # its blocks cut the parts
        "b.weight": random_bytes((32, 16), CODES, 2),
        "b.weight_scale": random_bytes((32, 2), SCALES, 3),  # linear, and said to be swizzled
    }
    checkpoint = written(tmp_path, stored, ignore=["qkv"])
    with pytest.raises(CheckpointError) as refused:
        CheckpointView(checkpoint, name_map=qkv_rule(), scale_layout="swizzled")
    for said in ("4 problem(s)", "q.weight_scale_inv: ", "3 rows beside a packed weight of 300", "no swizzled scale"):
        assert said in str(refused.value)


def test_a_name_that_two_tensors_claim_is_refused(tmp_path: Path) -> None:
    stored = {"qkv.weight": random_bytes((6, 2), torch.bfloat16, 0), "k.weight": torch.zeros(2, 2).bfloat16()}
    with pytest.raises(CheckpointError, match=r"k.weight: filled twice, from k.weight and qkv.weight"):
        CheckpointView(written(tmp_path, stored), name_map=qkv_rule())


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    view = CheckpointView(written(tmp_path, {"a.weight": torch.zeros(2, 2)}), prefix="transformer")
    assert "a.weight" not in view
    with pytest.raises(CheckpointError, match=r"no tensor 'a.weight' among 1"):
        view.rows("a.weight")
