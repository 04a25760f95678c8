"""The matcher of excluded modules: what each dialect matches, and packed projections."""

from __future__ import annotations

from typing import get_args

import pytest

from quant.excludes import ConfigError, Dialect, Excludes


@pytest.mark.parametrize(
    ("dialect", "pattern", "name", "matches"),
    [
        ("glob_full", "proj_out", "proj_out", True),
        ("glob_full", "proj_out", "single_transformer_blocks.0.proj_out", False),
        ("glob_full", "*.proj_out", "single_transformer_blocks.0.proj_out", True),
        ("glob_full", "*.norm*.linear", "transformer_blocks.3.norm1.linear", True),
        ("glob_full", "blocks.1.*", "blocks.10.attn", False),
        ("glob_full", "blocks.1*", "blocks.10.attn", True),
        ("glob_full", "a.b", "aXb", False),
        ("glob_full", "a[0]?", "a[0]?", True),
        ("glob_full", "a[0]", "a0", False),
        ("per_part", "lm_head", "lm_head", True),
        ("per_part", "gate", "model.layers.0.mlp.gate", True),
        ("per_part", "gate", "model.layers.0.mlp.gate_proj", False),
        ("per_part", "gate*", "model.layers.0.mlp.gate_proj", True),
        ("per_part", "*_a_proj", "model.layers.0.self_attn.q_a_proj", True),
        ("per_part", "model.layers.0*", "language_model.model.layers.0.mlp", True),
        ("per_part", "mlp.gate", "model.layers.0.mlp.gate", False),
        ("regex", r"norm\d?\.linear$", "transformer_blocks.3.norm1.linear", True),
        ("regex", r"^norm", "transformer_blocks.3.norm1.linear", False),
        ("regex", r"blocks.0", "blocksX0", True),
    ],
)
def test_a_pattern_matches_by_the_rule_of_its_dialect(dialect: Dialect, pattern: str, name: str, matches: bool) -> None:
    assert Excludes(patterns=("nothing", pattern), dialect=dialect).matches(name) is matches


def test_no_pattern_matches_nothing() -> None:
    for dialect in get_args(Dialect):
        assert not Excludes(dialect=dialect).matches("proj_out")


def test_an_unknown_dialect_and_a_bad_regex_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"dialect 'fnmatch': unknown; known: glob_full, per_part, regex"):
        Excludes(dialect="fnmatch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"exclude pattern '\(': no regular expression"):
        Excludes(patterns=("(",), dialect="regex")
    assert Excludes(patterns=("(",)).matches("(")


def test_packed_projections_are_excluded_whole_or_not_at_all() -> None:
    excludes = Excludes(patterns=("*.0.attn.to_q", "*.0.attn.to_k", "*.0.attn.to_v", "*.1.attn.to_q", "*.2.up"))
    parts = {f"b.{i}.attn.qkv": [f"b.{i}.attn.to_{part}" for part in "qkv"] for i in (0, 1, 3)}
    assert excludes.packed({name: parts[name] for name in ("b.0.attn.qkv", "b.3.attn.qkv")}) == {"b.0.attn.qkv"}
    with pytest.raises(ConfigError) as caught:
        excludes.packed({**parts, "b.2.fc": ["b.2.gate", "b.2.up"]})
    assert "b.1.attn.qkv: b.1.attn.to_k quantized, b.1.attn.to_q excluded, b.1.attn.to_v quantized" in str(caught.value)
    assert "b.2.fc: b.2.gate quantized, b.2.up excluded" in str(caught.value)
    assert "b.0.attn.qkv" not in str(caught.value)
