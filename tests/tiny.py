"""Tiny random models with the real classes of transformers, saved as checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


def tiny_llama(seed: int, *, tied: bool = True, num_layers: int = 2, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A Llama of hidden 128, vocabulary 256."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=320,  # no multiple of 128: the last row tile is partly padding
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).eval()


def tiny_qwen3_moe(seed: int) -> nn.Module:
    """A Qwen3-MoE of 4 experts, hidden 128, expert intermediate 64."""
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        decoder_sparse_step=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def save(model: nn.Module, directory: Path) -> Path:
    """Write a checkpoint as transformers does."""
    model.save_pretrained(directory)  # type: ignore[operator]
    return directory
