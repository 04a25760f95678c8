"""Checkpoints on disk: what is read, lazily, and what is refused."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import save_file

from quant.checkpoint import PACKAGED, CheckpointError, open_checkpoint

CONFIG = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_directory(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A Llama of one layer with random FP32 weights; returns what was stored, under GGUF's names."""
    generator = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    letters = [*"abcdefg", "ab", "<s>", "</s>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 8 + [3] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(8)
    writer.add_eos_token_id(9)
    shapes = {
        "token_embd.weight": (len(letters), 64),
        "output_norm.weight": (64,),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
    }
    stored = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, values in stored.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def test_rows_and_specs_of_a_directory(tmp_path: Path) -> None:
    weight = torch.randn(6, 4).to(torch.bfloat16)
    scale = torch.tensor(2.5)
    codes = torch.arange(24, dtype=torch.uint8).view(6, 4).view(torch.float8_e4m3fn)
    write_directory(tmp_path, {"b.weight": weight, "a.scale": scale, "c.codes": codes})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == ("a.scale", "b.weight", "c.codes")
        assert "b.weight" in checkpoint and "b.bias" not in checkpoint
        spec = checkpoint.spec("b.weight")
        assert (spec.name, spec.dtype, spec.shape) == ("b.weight", "BF16", (6, 4))
        assert checkpoint.spec("a.scale").shape == () and checkpoint.spec("c.codes").dtype == "F8_E4M3"
        assert torch.equal(checkpoint.rows("b.weight", 2, 5), weight[2:5])
        assert torch.equal(checkpoint.rows("b.weight"), weight) and len(checkpoint.rows("b.weight", 3, 3)) == 0
        assert checkpoint.rows("a.scale", 0, 1) == scale
        assert torch.equal(checkpoint.rows("c.codes", 1, 2).view(torch.uint8), codes[1:2].view(torch.uint8))
        assert checkpoint.quantization is None and checkpoint.config_dir == tmp_path


def test_an_unknown_tensor_is_named_together_with_the_checkpoint(tmp_path: Path) -> None:
    write_directory(tmp_path, {"a": torch.ones(2)})
    with open_checkpoint(tmp_path) as checkpoint:
        for read in (checkpoint.spec, checkpoint.rows):
            with pytest.raises(CheckpointError, match=rf"{tmp_path}.*'b'"):
                read("b")


def test_an_index_spreads_tensors_over_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == ("a", "b") and len(checkpoint.rows("b")) == 3
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names files that are not there: two.safetensors"):
        open_checkpoint(tmp_path)


def test_files_without_an_index_must_not_hold_a_tensor_twice(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"two.safetensors: a is also in .*one.safetensors"):
        open_checkpoint(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write_directory(tmp_path, {"a": torch.ones(200)})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (whole[:-8], whole[:5], b""):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read as safetensors"):
            open_checkpoint(tmp_path).rows("a")


@pytest.mark.parametrize("what", ["nowhere", "empty"])
def test_what_is_no_checkpoint_is_refused_with_what_would_be_one(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=rf"{tmp_path / what}.*(safetensors|smollm2)"):
        open_checkpoint(tmp_path / what)


# As nvidia-modelopt 0.47.0 writes them beside the golden export_qwen3moe_nvfp4_default.
EXPORTED = {
    "hf_quant_config.json": {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"],
        },
    },
    "config.json": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "quantization_config": {
            "ignore": ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"],
            "quant_algo": "NVFP4",
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "quant_method": "modelopt",
        },
    },
}


@pytest.mark.parametrize("where", EXPORTED)
def test_an_export_says_its_format_and_what_it_excludes(tmp_path: Path, where: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / where).write_text(json.dumps(EXPORTED[where]))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.quantization is not None
        assert checkpoint.quantization.format == "nvfp4"
        assert checkpoint.quantization.exclude == ("lm_head", "model.embed_tokens", "model.layers.0.mlp.gate")


def test_an_unsupported_quantization_is_refused_by_name(tmp_path: Path) -> None:
    write_directory(tmp_path, {"a": torch.ones(2)}, quantization_config={"quant_algo": "W4A8_AWQ"})
    with pytest.raises(CheckpointError, match=r"'W4A8_AWQ' is not supported; known: FP8, .*NVFP4"):
        open_checkpoint(tmp_path)


def test_gguf_is_converted_once_whole_and_reports_how_far_it_is(tmp_path: Path) -> None:
    stored = write_gguf(tmp_path / "tiny.gguf")
    steps: list[tuple[int, int]] = []
    cache = tmp_path / "cache"
    with open_checkpoint(
        tmp_path / "tiny.gguf", cache_dir=cache, progress=lambda done, total: steps.append((done, total))
    ) as first:
        assert steps == sorted(steps) and steps[-1] == (100, 100) and len(steps) >= len(stored)
        written = {path.name for path in first.config_dir.iterdir()}
        assert written >= {"config.json", "model.safetensors", "tokenizer.json"}
        assert "lm_head.weight" not in first  # tied
        assert len(first.names()) == len(stored)
        down = torch.from_numpy(stored["blk.0.ffn_down.weight"]).to(torch.bfloat16)
        assert torch.equal(first.rows("model.layers.0.mlp.down_proj.weight"), down)
        # llama.cpp pairs rotary dims (0, 1), transformers (0, half): rows of a head are dealt back
        queries = torch.from_numpy(stored["blk.0.attn_q.weight"]).to(torch.bfloat16)
        dealt = queries.view(4, 8, 2, 64).transpose(1, 2).reshape(64, 64)
        assert torch.equal(first.rows("model.layers.0.self_attn.q_proj.weight"), dealt)
        assert {first.spec(name).dtype for name in first.names()} == {"BF16"}
    again: list[tuple[int, int]] = []
    with open_checkpoint(
        tmp_path / "tiny.gguf", cache_dir=cache, progress=lambda done, total: again.append((done, total))
    ) as second:
        assert second.config_dir == first.config_dir and not again
    assert [path.name for path in cache.iterdir()] == [first.config_dir.name]


def test_a_changed_gguf_is_converted_anew(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    cache = tmp_path / "cache"
    before = open_checkpoint(tmp_path / "tiny.gguf", cache_dir=cache).config_dir
    os.utime(tmp_path / "tiny.gguf", ns=(1, 1))
    assert open_checkpoint(tmp_path / "tiny.gguf", cache_dir=cache).config_dir != before


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")

    def stop(done: int, total: int) -> None:
        if done > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_checkpoint(tmp_path / "tiny.gguf", cache_dir=tmp_path / "cache", progress=stop)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_conversions_at_once_end_in_one_directory(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    both_wrote = threading.Barrier(2)

    def convert() -> Path:
        progress = lambda done, total: both_wrote.wait(60) if done == total else None  # noqa: E731
        return open_checkpoint(tmp_path / "tiny.gguf", cache_dir=tmp_path / "cache", progress=progress).config_dir

    with ThreadPoolExecutor(2) as pool:
        found = {call.result() for call in [pool.submit(convert), pool.submit(convert)]}
    assert list((tmp_path / "cache").iterdir()) == list(found)


def test_the_packaged_smollm2_has_its_real_weights() -> None:
    with open_checkpoint("smollm2") as checkpoint:
        assert len(checkpoint.names()) == 272
        assert checkpoint.spec("model.embed_tokens.weight").shape == (49152, 576)
        gguf = checkpoint_file()
        tensor = next(tensor for tensor in GGUFReader(gguf).tensors if tensor.name == "blk.3.ffn_down.weight")
        assert tensor.tensor_type == GGMLQuantizationType.Q4_1
        # Q4_1: blocks of 32 in 20 bytes, FP16 scale d and minimum m, then 16 bytes; element i and i + 16 share byte i.
        blocks = np.array(tensor.data).reshape(-1, 20)
        d, m = (blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
        codes = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1).astype(np.float32)
        expected = torch.from_numpy((codes * d + m).reshape(576, 1536)).to(torch.bfloat16)
        assert torch.equal(checkpoint.rows("model.layers.3.mlp.down_proj.weight"), expected)


def checkpoint_file() -> Path:
    import importlib.util

    package, file = PACKAGED["smollm2"]
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / file
