"""Tables of names: how published checkpoints call what diffusers' classes call otherwise, one row a rule.

Sources: the converters of diffusers (loaders/single_file_utils.py) and the modules of the original repositories.
{leaf} is what a module holds: weight, bias, and the scales of a quantized one, which go the same way.
"""

from __future__ import annotations

from .names import IDENTITY, NameMap, NameRule

HALVES_SWAPPED = ((1, 2, 2), (0, 1, 2))

# ComfyUI keeps a whole pipeline in one file, the transformer below this.
COMFY_PREFIX = "model.diffusion_model."


def _halves_swapped(source: str, target: str) -> NameRule:
    """The final AdaLN of Black Forest Labs' code computes (shift, scale), that of diffusers (scale, shift)."""
    return NameRule(source, (target, target), fills=HALVES_SWAPPED)


def _rules(*rows: tuple[str, str]) -> tuple[NameRule, ...]:
    return tuple(NameRule(source, (target,)) for source, target in rows)


# Both models: attention of the double blocks, q, k and v packed in one tensor.
_BFL_ATTENTION = (
    NameRule(
        "double_blocks.{n}.img_attn.qkv.{leaf}",
        tuple(f"transformer_blocks.{{n}}.attn.to_{x}.{{leaf}}" for x in "qkv"),
    ),
    NameRule(
        "double_blocks.{n}.txt_attn.qkv.{leaf}",
        tuple(f"transformer_blocks.{{n}}.attn.add_{x}_proj.{{leaf}}" for x in "qkv"),
    ),
    *_rules(
        ("double_blocks.{n}.img_attn.norm.query_norm.scale", "transformer_blocks.{n}.attn.norm_q.weight"),
        ("double_blocks.{n}.img_attn.norm.key_norm.scale", "transformer_blocks.{n}.attn.norm_k.weight"),
        ("double_blocks.{n}.txt_attn.norm.query_norm.scale", "transformer_blocks.{n}.attn.norm_added_q.weight"),
        ("double_blocks.{n}.txt_attn.norm.key_norm.scale", "transformer_blocks.{n}.attn.norm_added_k.weight"),
        ("double_blocks.{n}.img_attn.proj.{leaf}", "transformer_blocks.{n}.attn.to_out.0.{leaf}"),
        ("double_blocks.{n}.txt_attn.proj.{leaf}", "transformer_blocks.{n}.attn.to_add_out.{leaf}"),
        ("single_blocks.{n}.norm.query_norm.scale", "single_transformer_blocks.{n}.attn.norm_q.weight"),
        ("single_blocks.{n}.norm.key_norm.scale", "single_transformer_blocks.{n}.attn.norm_k.weight"),
    ),
    _halves_swapped("final_layer.adaLN_modulation.1.{leaf}", "norm_out.linear.{leaf}"),
    *_rules(
        ("final_layer.linear.{leaf}", "proj_out.{leaf}"),
        ("img_in.{leaf}", "x_embedder.{leaf}"),
        ("txt_in.{leaf}", "context_embedder.{leaf}"),
    ),
)

_BFL_FLUX = (
    *_BFL_ATTENTION,
    NameRule(
        "single_blocks.{n}.linear1.{leaf}",
        (
            *(f"single_transformer_blocks.{{n}}.attn.to_{x}.{{leaf}}" for x in "qkv"),
            "single_transformer_blocks.{n}.proj_mlp.{leaf}",
        ),
        sizes=(1, 1, 1, 4),  # the class's mlp_ratio, which no config changes
    ),
    *_rules(
        ("time_in.in_layer.{leaf}", "time_text_embed.timestep_embedder.linear_1.{leaf}"),
        ("time_in.out_layer.{leaf}", "time_text_embed.timestep_embedder.linear_2.{leaf}"),
        ("vector_in.in_layer.{leaf}", "time_text_embed.text_embedder.linear_1.{leaf}"),
        ("vector_in.out_layer.{leaf}", "time_text_embed.text_embedder.linear_2.{leaf}"),
        ("guidance_in.in_layer.{leaf}", "time_text_embed.guidance_embedder.linear_1.{leaf}"),
        ("guidance_in.out_layer.{leaf}", "time_text_embed.guidance_embedder.linear_2.{leaf}"),
        ("double_blocks.{n}.img_mod.lin.{leaf}", "transformer_blocks.{n}.norm1.linear.{leaf}"),
        ("double_blocks.{n}.txt_mod.lin.{leaf}", "transformer_blocks.{n}.norm1_context.linear.{leaf}"),
        ("double_blocks.{n}.img_mlp.0.{leaf}", "transformer_blocks.{n}.ff.net.0.proj.{leaf}"),
        ("double_blocks.{n}.img_mlp.2.{leaf}", "transformer_blocks.{n}.ff.net.2.{leaf}"),
        ("double_blocks.{n}.txt_mlp.0.{leaf}", "transformer_blocks.{n}.ff_context.net.0.proj.{leaf}"),
        ("double_blocks.{n}.txt_mlp.2.{leaf}", "transformer_blocks.{n}.ff_context.net.2.{leaf}"),
        ("single_blocks.{n}.modulation.lin.{leaf}", "single_transformer_blocks.{n}.norm.linear.{leaf}"),
        ("single_blocks.{n}.linear2.{leaf}", "single_transformer_blocks.{n}.proj_out.{leaf}"),
    ),
)

_BFL_FLUX2 = (
    *_BFL_ATTENTION,
    *_rules(
        ("time_in.in_layer.{leaf}", "time_guidance_embed.timestep_embedder.linear_1.{leaf}"),
        ("time_in.out_layer.{leaf}", "time_guidance_embed.timestep_embedder.linear_2.{leaf}"),
        ("guidance_in.in_layer.{leaf}", "time_guidance_embed.guidance_embedder.linear_1.{leaf}"),
        ("guidance_in.out_layer.{leaf}", "time_guidance_embed.guidance_embedder.linear_2.{leaf}"),
        ("double_stream_modulation_{x:img|txt}.lin.{leaf}", "double_stream_modulation_{x}.linear.{leaf}"),
        ("single_stream_modulation.lin.{leaf}", "single_stream_modulation.linear.{leaf}"),
        ("double_blocks.{n}.img_mlp.0.{leaf}", "transformer_blocks.{n}.ff.linear_in.{leaf}"),
        ("double_blocks.{n}.img_mlp.2.{leaf}", "transformer_blocks.{n}.ff.linear_out.{leaf}"),
        ("double_blocks.{n}.txt_mlp.0.{leaf}", "transformer_blocks.{n}.ff_context.linear_in.{leaf}"),
        ("double_blocks.{n}.txt_mlp.2.{leaf}", "transformer_blocks.{n}.ff_context.linear_out.{leaf}"),
        # packed in diffusers too, in the same order
        ("single_blocks.{n}.linear1.{leaf}", "single_transformer_blocks.{n}.attn.to_qkv_mlp_proj.{leaf}"),
        ("single_blocks.{n}.linear2.{leaf}", "single_transformer_blocks.{n}.attn.to_out.{leaf}"),
    ),
)

_WAN_ORIGINAL = tuple(
    rule
    for original, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for rule in _rules(
        (f"blocks.{{n}}.{original}.{{x:[qkv]}}.{{leaf}}", f"blocks.{{n}}.{ours}.to_{{x}}.{{leaf}}"),
        (f"blocks.{{n}}.{original}.o.{{leaf}}", f"blocks.{{n}}.{ours}.to_out.0.{{leaf}}"),
        (f"blocks.{{n}}.{original}.{{x:[kv]}}_img.{{leaf}}", f"blocks.{{n}}.{ours}.add_{{x}}_proj.{{leaf}}"),
        (f"blocks.{{n}}.{original}.norm_k_img.{{leaf}}", f"blocks.{{n}}.{ours}.norm_added_k.{{leaf}}"),
        (f"blocks.{{n}}.{original}.norm_{{x:[qk]}}.{{leaf}}", f"blocks.{{n}}.{ours}.norm_{{x}}.{{leaf}}"),
    )
) + _rules(
    ("blocks.{n}.modulation", "blocks.{n}.scale_shift_table"),
    # The two norms have changed places; of the other one neither keeps a weight.
    ("blocks.{n}.norm3.{leaf}", "blocks.{n}.norm2.{leaf}"),
    ("blocks.{n}.ffn.0.{leaf}", "blocks.{n}.ffn.net.0.proj.{leaf}"),
    ("blocks.{n}.ffn.2.{leaf}", "blocks.{n}.ffn.net.2.{leaf}"),
    ("time_embedding.0.{leaf}", "condition_embedder.time_embedder.linear_1.{leaf}"),
    ("time_embedding.2.{leaf}", "condition_embedder.time_embedder.linear_2.{leaf}"),
    ("time_projection.1.{leaf}", "condition_embedder.time_proj.{leaf}"),
    ("text_embedding.0.{leaf}", "condition_embedder.text_embedder.linear_1.{leaf}"),
    ("text_embedding.2.{leaf}", "condition_embedder.text_embedder.linear_2.{leaf}"),
    ("img_emb.proj.0.{leaf}", "condition_embedder.image_embedder.norm1.{leaf}"),
    ("img_emb.proj.1.{leaf}", "condition_embedder.image_embedder.ff.net.0.proj.{leaf}"),
    ("img_emb.proj.3.{leaf}", "condition_embedder.image_embedder.ff.net.2.{leaf}"),
    ("img_emb.proj.4.{leaf}", "condition_embedder.image_embedder.norm2.{leaf}"),
    ("head.modulation", "scale_shift_table"),
    ("head.head.{leaf}", "proj_out.{leaf}"),
)

# diffusers' own classes after fuse_qkv_projections(), for a trainer that runs them fused. They keep to_q, to_k and to_v
# beside the packed tensor and train the latter: a push leaves the former out, else their names are given twice.
_DIFFUSERS_FUSED = (
    NameRule("{block}.{n}.{attn}.to_qkv.{leaf}", tuple(f"{{block}}.{{n}}.{{attn}}.to_{x}.{{leaf}}" for x in "qkv")),
    NameRule(
        "{block}.{n}.{attn}.to_added_qkv.{leaf}",
        tuple(f"{{block}}.{{n}}.{{attn}}.add_{x}_proj.{{leaf}}" for x in "qkv"),
    ),
    NameRule("{block}.{n}.{attn}.to_kv.{leaf}", tuple(f"{{block}}.{{n}}.{{attn}}.to_{x}.{{leaf}}" for x in "kv")),
    NameRule(
        "{block}.{n}.{attn}.to_added_kv.{leaf}", tuple(f"{{block}}.{{n}}.{{attn}}.add_{x}_proj.{{leaf}}" for x in "kv")
    ),
)

NAME_MAPS: dict[str, NameMap] = {
    "": IDENTITY,
    "bfl_flux": NameMap(_BFL_FLUX, strip=(COMFY_PREFIX,)),
    "bfl_flux2": NameMap(_BFL_FLUX2, strip=(COMFY_PREFIX,)),
    "wan_original": NameMap(_WAN_ORIGINAL, strip=(COMFY_PREFIX,)),
    "diffusers_fused": NameMap(_DIFFUSERS_FUSED),
}


def merging(target: str, sources: tuple[str, ...]) -> tuple[NameRule, ...]:
    """Rules for a model that packs, in equal parts along dim 0, what the checkpoint keeps apart."""
    count = len(sources)
    return tuple(NameRule(source, (target,), fills=((i, i + 1, count),)) for i, source in enumerate(sources))
