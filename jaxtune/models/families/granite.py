"""Granite 3: LLaMA with multipliers on embeddings, residuals, attention and logits (model_type "granite")."""

from typing import Any

from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import base


def from_hf(hf: base.Hf) -> DecoderConfig:
    """A config.json as `DecoderConfig`; see `base.common` for what is raised."""
    return DecoderConfig(
        **base.common(hf),
        **base.biases(hf),
        embed_scale=float(hf.get("embedding_multiplier", 1.0)),
        residual_scale=float(hf.get("residual_multiplier", 1.0)),
        attention_scale=float(hf.get("attention_multiplier", 1.0)),
        logit_scale=1.0 / hf.get("logits_scaling", 1.0),
    )


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json of a `DecoderConfig`."""
    return base.to_hf(
        c,
        "GraniteForCausalLM",
        attention_bias=c.qkv_bias,
        mlp_bias=c.mlp_bias,
        embedding_multiplier=c.embed_scale,
        residual_multiplier=c.residual_scale,
        attention_multiplier=c.attention_scale,
        logits_scaling=1.0 / c.logit_scale,
    )
