"""Mixtral: Mistral with a mixture of experts whose chosen shares add up to 1 (model_type "mixtral")."""

from typing import Any

from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import base

EXPERTS = base.Experts("block_sparse_moe", "w1", "w3", "w2")


def from_hf(hf: base.Hf) -> DecoderConfig:
    """A config.json as `DecoderConfig`; see `base.common` for what is raised."""
    hf = {"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, **hf}
    return DecoderConfig(
        **base.common(hf),
        windows=base.windows(hf, [base.SLIDING] * hf["num_hidden_layers"]),
        experts=hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        router_loss=hf.get("router_aux_loss_coef", 0.001) if hf.get("output_router_logits") else 0.0,
    )


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json of a `DecoderConfig`."""
    return base.to_hf(
        c,
        "MixtralForCausalLM",
        sliding_window=max(c.windows, default=0) or None,
        num_local_experts=c.experts,
        num_experts_per_tok=c.top_k,
        output_router_logits=bool(c.router_loss),
        router_aux_loss_coef=c.router_loss or 0.001,
    )
