"""SmolLM3: LLaMA in which every fourth layer knows no positions (NoPE; model_type "smollm3")."""

from typing import Any

from jaxtune.errors import UserError
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import base


def from_hf(hf: base.Hf) -> DecoderConfig:
    """A config.json as `DecoderConfig`; see `base.common` for what is raised."""
    n = hf["num_hidden_layers"]
    hf = {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
        **hf,
    }
    every = hf.get("no_rope_layer_interval") or 4
    turns = hf.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(n)]  # 1 where positions are known
    if len(turns) < n:
        raise UserError(f"no_rope_layers: there are {len(turns)} for {n} layers")
    turns = turns[:n]
    fields = base.common(hf)
    if not hf.get("use_sliding_window"):
        hf["sliding_window"] = None
    types = base.layer_types(hf, [base.FULL if t else base.SLIDING for t in turns])
    if not all(turns):
        fields |= {"ropes": (*fields["ropes"], None), "rope_of": tuple(int(not t) for t in turns)}
    return DecoderConfig(**fields, **base.biases(hf), windows=base.windows(hf, types))


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json of a `DecoderConfig`."""
    return base.to_hf(
        c,
        "SmolLM3ForCausalLM",
        attention_bias=c.qkv_bias,
        mlp_bias=c.mlp_bias,
        no_rope_layers=[int(c.ropes[r] is not None) for r in c.rope_of or (0,) * c.layers],
        use_sliding_window=bool(c.windows),
        **base.types_to_hf(c),
    )
