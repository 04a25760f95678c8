"""An exported version in another library's hands: compressed-tensors loads it, and gives the same logits."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quant.checkpoint import open_checkpoint
from quant.dialects import to_dialect
from quant.formats import FORMATS
from quant.models import build_model, parameters_of
from quant.modules import decode_all
from tests.local import cold, local_service
from tests.tiny import save, tiny_llama
from weight_update.client import Pusher
from weight_update.store import Store

pytest.importorskip("compressed_tensors")

# Their scheme for each of our rows, weights alone: activations stay in BF16 on both sides.
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": "float8_e4m3fn"},
    ),
    "fp8": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
}
# Largest difference of two logits over the largest logit; 0.007 to 0.010 were measured. Not bit for bit: ours decode in
# FP32 and round to BF16 once, theirs multiply in BF16, and of NVFP4 divide by a reciprocal that was rounded, so that a
# weight may differ by a BF16 step, 2^-8 of it.
BOUND = 0.02


def exported(fmt: str, place: Path) -> Path:
    """A pushed version, as `transfuse export` writes it."""
    model_dir = save(tiny_llama(seed=0, tied=False), place / "model")
    with (
        local_service(model_dir, place, ("plain",), fmt, store_dir=place / "store") as service,
        closing(Pusher(service.address)) as pusher,
    ):
        version = pusher.push(tiny_llama(seed=1, tied=False), durable=True).version
        Store.existing(place / "store", version).export(version, place / "exported")
    return place / "exported"


def converted(fmt: str, source: Path, target: Path) -> Path:
    """The same checkpoint in the dialect of compressed-tensors; codes and block scales keep their bytes."""
    target.mkdir()
    tensors = {name: value for path in source.glob("*.safetensors") for name, value in load_file(path).items()}
    with open_checkpoint(source) as checkpoint:
        rows = parameters_of(build_model(checkpoint.config_dir, fmt, "plain", device="meta"))
    written: dict[str, Tensor] = {}
    for row in rows:
        prefix = row.name.removesuffix("weight")
        if not FORMATS[row.format].is_quantized:
            written[row.name] = tensors[row.name]
            continue
        leaves = {part.suffix for part in FORMATS[fmt].components} - {"input_scale"}
        ours = {leaf: tensors[prefix + leaf] for leaf in leaves if prefix + leaf in tensors}
        theirs = to_dialect(fmt, "compressed-tensors", ours)
        written |= {prefix + leaf: value.contiguous() for leaf, value in theirs.items()}
    save_file(written, target / "model.safetensors", metadata={"format": "pt"})
    name, weights = SCHEMES[fmt]
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"symmetric": True, "dynamic": False, **weights},
                "format": name,
            }
        },
    }
    (target / "config.json").write_text(json.dumps(config))
    return target


def logits_of(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of a library under a version of transformers that it does not know yet
@pytest.mark.parametrize("fmt", SCHEMES)
def test_compressed_tensors_loads_an_export_to_the_same_logits(fmt: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = exported(fmt, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        converted(fmt, source, tmp_path / "theirs"), dtype=torch.bfloat16, attn_implementation="eager"
    )
    ours, _ = cold(source, "plain", fmt)
    decode_all(ours)
    ours.set_attn_implementation("eager")  # type: ignore[operator]
    got, wanted = logits_of(theirs.eval()), logits_of(ours.eval())
    off = ((got - wanted).abs().max() / wanted.abs().max()).item()
    assert got.std() > 0.01 and off <= BOUND
    other = logits_of(tiny_llama(seed=0, tied=False))
    assert ((other - wanted).abs().max() / wanted.abs().max()).item() > 10 * BOUND
