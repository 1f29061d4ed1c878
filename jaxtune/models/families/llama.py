"""LLaMA 1, 2 and 3.x (model_type "llama"): config.json of transformers 4 and 5, both ways."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtune.errors import UserError, nearest
from jaxtune.layers import ROPE_KINDS, Rope
from jaxtune.models.decoder import DecoderConfig


def from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """A config.json as `DecoderConfig`; KeyError where a size is missing, UserError where a feature is unknown."""
    if (act := hf.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise UserError(f"hidden_act {act!r} is not supported; allowed: silu")
    heads, embed = hf["num_attention_heads"], hf["hidden_size"]
    config = DecoderConfig(
        vocab=hf["vocab_size"],
        embed=embed,
        layers=hf["num_hidden_layers"],
        heads=heads,
        kv_heads=hf.get("num_key_value_heads") or heads,
        head=hf.get("head_dim") or embed // heads,
        mlp=hf["intermediate_size"],
        rope=rope_from_hf(hf, hf.get("head_dim") or embed // heads),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied=hf.get("tie_word_embeddings", False),
        attention_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
    )
    if heads % config.kv_heads:
        raise UserError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {config.kv_heads}")
    return config


def rope_from_hf(hf: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary embedding of either dialect: `rope_theta` + `rope_scaling` (4.x) or `rope_parameters` (5.x)."""
    p = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = p.get("rope_type", p.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise UserError(f"rope_type {kind!r} is not supported{nearest(str(kind), list(ROPE_KINDS))}")
    if hf.get("partial_rotary_factor", p.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError("partial_rotary_factor other than 1 is not supported")
    longest = hf.get("max_position_embeddings", 2048)
    original = p.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings")
    factor = p.get("factor", 1.0)
    rope = Rope(
        head_dim,
        theta=p.get("rope_theta", hf.get("rope_theta", 10000.0)),
        kind=kind,
        factor=factor,
        context=longest if kind == "dynamic" else original or longest,
        low_freq_factor=p.get("low_freq_factor", 1.0),
        high_freq_factor=p.get("high_freq_factor", 4.0),
        beta_fast=p.get("beta_fast") or 32.0,
        beta_slow=p.get("beta_slow") or 1.0,
        attention_factor=_yarn_attention(p, factor) if kind == "yarn" else 1.0,
        truncate=p.get("truncate", True),
    )
    if kind == "llama3" and original is None:
        raise UserError("rope_type 'llama3' needs original_max_position_embeddings")
    return rope


def _yarn_attention(p: Mapping[str, Any], factor: float) -> float:
    """YaRN's scaling of the logits, eq. 22, with DeepSeek's two optional factors."""
    if p.get("attention_factor") is not None:
        return p["attention_factor"]

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return scale(p["mscale"]) / scale(p["mscale_all_dim"])
    return scale(1.0)


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read. Only the default rotary embedding is written from scratch."""
    if c.rope.kind != "default":
        raise UserError(f"a config.json with rope_type {c.rope.kind!r} is copied from its base, not made anew")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": c.attention_bias,
        "head_dim": c.head,
        "hidden_act": "silu",
        "hidden_size": c.embed,
        "initializer_range": 0.02,
        "intermediate_size": c.mlp,
        "max_position_embeddings": c.rope.context,
        "mlp_bias": c.mlp_bias,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope.theta,
        "tie_word_embeddings": c.tied,
        "torch_dtype": "float32",
        "vocab_size": c.vocab,
    }
