"""Gemma 1, 2 and the text model of 3: scaled embeddings, norms around one, soft caps, windows by layer.

Gemma 3's layers with a window turn by a rotary embedding of their own.
"""

from typing import Any

from jaxtune.errors import UserError
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import base

_LOCAL_THETA, _GLOBAL_THETA = 10_000.0, 1_000_000.0


def from_hf(hf: base.Hf) -> DecoderConfig:
    """A config.json as `DecoderConfig`; see `base.common` for what is raised."""
    kind, n = hf["model_type"], hf["num_hidden_layers"]
    longest = 131_072 if kind == "gemma3_text" else 8192
    hf = {"head_dim": 256, "tie_word_embeddings": True, "max_position_embeddings": longest, **hf}
    if kind == "gemma":  # an early config says "gelu" and means the tanh form; `hidden_activation` was never read
        act = hf.get("hidden_act", "gelu")
        hf = {**hf, "hidden_activation": "gelu_pytorch_tanh" if act == "gelu" else act}
    else:  # `hidden_act` is never read
        hf = {"hidden_activation": "gelu_pytorch_tanh", **hf}
    if kind == "gemma3_text":
        hf = {"rope_theta": _GLOBAL_THETA, "sliding_window": 4096, **hf}
        if hf.get("attn_logit_softcapping"):
            raise UserError("attn_logit_softcapping is not supported in gemma3_text (transformers does not heed it)")
    fields = base.common(hf)
    bias = bool(hf.get("attention_bias"))
    fields |= {"norm_around_one": True, "embed_scale": fields["embed"] ** 0.5, "qkv_bias": bias, "o_bias": bias}
    if kind == "gemma":
        return DecoderConfig(**fields)
    hf = {"sliding_window": 4096, **hf}
    every = 2 if kind == "gemma2" else hf.get("sliding_window_pattern") or 6
    types = base.layer_types(hf, [base.SLIDING if (i + 1) % every else base.FULL for i in range(n)])
    caps = (30.0, 50.0) if kind == "gemma2" else (None, None)
    fields |= {
        "norms": "both",
        "windows": base.windows(hf, types),
        "attention_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        "logit_softcap": hf.get("final_logit_softcapping", caps[0]) or 0.0,
        "attention_softcap": (hf.get("attn_logit_softcapping", caps[1]) or 0.0) if kind == "gemma2" else 0.0,
    }
    if kind == "gemma3_text":
        local = {"max_position_embeddings": fields["context"], "rope_theta": hf.get("rope_local_base_freq")}
        if base.SLIDING in (nested := hf.get("rope_parameters") or {}):
            local["rope_parameters"] = {"rope_theta": _LOCAL_THETA, **nested[base.SLIDING]}
        local["rope_theta"] = local["rope_theta"] or _LOCAL_THETA
        fields |= {
            "qk_norm": "head",
            "ropes": (base.rope_from_hf(hf, fields["head"], base.FULL), base.rope_from_hf(local, fields["head"])),
            "rope_of": tuple(int(t == base.SLIDING) for t in types),
        }
    return DecoderConfig(**fields)


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json of a `DecoderConfig`."""
    act = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": c.qkv_bias}
    if c.family == "gemma":
        return base.to_hf(c, "GemmaForCausalLM", **act)
    scalar = (c.attention_scale or c.head**-0.5) ** -2
    act |= {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "final_logit_softcapping": c.logit_softcap or None,
        "attn_logit_softcapping": c.attention_softcap or None,
        **base.types_to_hf(c),
    }
    if c.family == "gemma2":
        return base.to_hf(c, "Gemma2ForCausalLM", **act)
    local = c.ropes[1]
    return base.to_hf(c, "Gemma3ForCausalLM", rope_local_base_freq=local.theta if local else _LOCAL_THETA, **act)
