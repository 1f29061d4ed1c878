"""Mistral (one sliding window for all layers) and Ministral (windows by layer): model_type "mistral", "ministral"."""

from typing import Any

from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import base


def from_hf(hf: base.Hf) -> DecoderConfig:
    """A config.json as `DecoderConfig`; see `base.common` for what is raised."""
    hf = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072, **hf}  # as transformers
    if hf["model_type"] == "mistral":  # `layer_types` mean nothing to it
        types = [base.SLIDING] * hf["num_hidden_layers"]
    else:
        types = base.layer_types(hf, [base.SLIDING] * hf["num_hidden_layers"])
    return DecoderConfig(**base.common(hf), windows=base.windows(hf, types))


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json of a `DecoderConfig`."""
    own = base.types_to_hf(c)
    if c.family == "mistral":
        return base.to_hf(c, "MistralForCausalLM", sliding_window=own["sliding_window"])
    return base.to_hf(c, "MinistralForCausalLM", **own)
