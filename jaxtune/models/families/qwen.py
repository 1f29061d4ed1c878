"""Qwen 2 and 2.5 (biases on queries, keys and values), Qwen 3 (norms on queries and keys) and Qwen 3 MoE."""

from typing import Any

from jaxtune.errors import UserError
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import base

EXPERTS = base.Experts("mlp", "gate_proj", "up_proj", "down_proj")


def from_hf(hf: base.Hf) -> DecoderConfig:
    """A config.json as `DecoderConfig`; see `base.common` for what is raised."""
    kind, n = hf["model_type"], hf["num_hidden_layers"]
    hf = {"sliding_window": 4096, "max_position_embeddings": 32768, **hf}
    if not hf.get("use_sliding_window"):
        hf["sliding_window"] = None
    if kind == "qwen2":
        return DecoderConfig(**base.common(hf), qkv_bias=True, windows=base.windows(hf, _types(hf)))
    bias = bool(hf.get("attention_bias"))
    if kind == "qwen3":
        fields = base.common({"head_dim": 128, **hf})
        return DecoderConfig(**fields, qkv_bias=bias, o_bias=bias, qk_norm="head", windows=base.windows(hf, _types(hf)))
    for key, allowed in (("mlp_only_layers", (None, [])), ("decoder_sparse_step", (None, 1))):
        if hf.get(key) not in allowed:
            raise UserError(f"{key}={hf[key]!r}: a mixture of experts in some layers only is not supported")
    fields = base.common({"num_key_value_heads": 4, **hf})
    return DecoderConfig(
        **{**fields, "mlp": hf["moe_intermediate_size"]},
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="head",
        windows=base.windows(hf, [base.SLIDING] * n),
        experts=hf["num_local_experts"] if "num_local_experts" in hf else hf["num_experts"],
        top_k=hf["num_experts_per_tok"],
        normalise_top_k=bool(hf.get("norm_topk_prob", False)),
        router_loss=hf.get("router_aux_loss_coef", 0.001) if hf.get("output_router_logits") else 0.0,
    )


def _types(hf: base.Hf) -> list[str]:
    """By `max_window_layers`, the layers from which on windows slide, where `layer_types` does not say."""
    first = hf.get("max_window_layers", 28)
    return base.layer_types(hf, [base.SLIDING if i >= first else base.FULL for i in range(hf["num_hidden_layers"])])


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json of a `DecoderConfig`."""
    windows = {**base.types_to_hf(c), "use_sliding_window": bool(c.windows)}
    if c.family == "qwen2":
        return base.to_hf(c, "Qwen2ForCausalLM", **windows)
    if c.family == "qwen3":
        return base.to_hf(c, "Qwen3ForCausalLM", attention_bias=c.qkv_bias, **windows)
    return base.to_hf(
        c,
        "Qwen3MoeForCausalLM",
        attention_bias=c.qkv_bias,
        sliding_window=windows["sliding_window"],
        use_sliding_window=bool(c.windows),
        decoder_sparse_step=1,
        mlp_only_layers=[],
        moe_intermediate_size=c.mlp,
        num_experts=c.experts,
        num_experts_per_tok=c.top_k,
        norm_topk_prob=c.normalise_top_k,
        output_router_logits=bool(c.router_loss),
        router_aux_loss_coef=c.router_loss or 0.001,
    )
