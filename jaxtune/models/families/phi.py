"""Phi-3 and Phi-4: one matrix for queries, keys and values, one for gate and up; LongRoPE (model_type "phi3")."""

from typing import Any

from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import base


def from_hf(hf: base.Hf) -> DecoderConfig:
    """A config.json as `DecoderConfig`; see `base.common` for what is raised."""
    sizes = {"original_max_position_embeddings": 4096, "max_position_embeddings": 4096}
    hf = {**sizes, "rms_norm_eps": 1e-5, **hf}
    for key in ("rope_parameters", "rope_scaling"):  # Phi's first configs call LongRoPE "su" or "yarn"
        if (p := hf.get(key)) and p.get("rope_type", p.get("type")) == "yarn":
            hf[key] = {**p, "rope_type": "longrope"}
    return DecoderConfig(
        **base.common(hf), fused=True, windows=base.windows(hf, [base.SLIDING] * hf["num_hidden_layers"])
    )


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json of a `DecoderConfig`."""
    rope = next(r for r in c.ropes if r is not None)
    original = rope.context if rope.kind == "longrope" else c.context
    return base.to_hf(
        c,
        "Phi3ForCausalLM",
        sliding_window=max(c.windows, default=0) or None,
        original_max_position_embeddings=original,
    )
