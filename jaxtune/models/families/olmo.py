"""OLMo 2 and 3: norms after attention and mlp, queries and keys normed over all heads; OLMo 3 has windows by layer.

OLMo 3's layers with a window turn by the unscaled rotary embedding, of the same theta (transformers 5.23 takes 500,000
for them whatever an old config's `rope_theta` says; 4.x, with which the models were made, does not).
"""

from typing import Any

from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import base


def from_hf(hf: base.Hf) -> DecoderConfig:
    """A config.json as `DecoderConfig`; see `base.common` for what is raised."""
    kind, n = hf["model_type"], hf["num_hidden_layers"]
    hf = {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0 if kind == "olmo2" else 500_000.0, **hf}
    fields = base.common(hf)
    bias = bool(hf.get("attention_bias"))
    fields |= {"norms": "post", "qk_norm": "whole", "qkv_bias": bias, "o_bias": bias}
    if kind == "olmo2":
        return DecoderConfig(**fields)
    hf = {"sliding_window": 4096, **hf}
    types = base.layer_types(hf, [base.SLIDING if (i + 1) % 4 else base.FULL for i in range(n)])
    fields["windows"] = base.windows(hf, types)
    nested = hf.get("rope_parameters") or {}
    bare = {k: v for k, v in hf.items() if k not in ("rope_parameters", "rope_scaling")}
    if base.SLIDING in nested:
        bare["rope_parameters"] = nested[base.SLIDING]
    full, local = base.rope_from_hf(hf, fields["head"], base.FULL), base.rope_from_hf(bare, fields["head"])
    if full != local:
        fields |= {"ropes": (full, local), "rope_of": tuple(int(t == base.SLIDING) for t in types)}
    return DecoderConfig(**fields)


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json of a `DecoderConfig`."""
    if c.family == "olmo2":
        return base.to_hf(c, "Olmo2ForCausalLM", attention_bias=c.qkv_bias)
    return base.to_hf(c, "Olmo3ForCausalLM", attention_bias=c.qkv_bias, **base.types_to_hf(c))
