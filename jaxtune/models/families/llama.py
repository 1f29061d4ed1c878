"""LLaMA 1, 2 and 3.x, and what is built like it: SmolLM2, DeepSeek-R1's LLaMA distils (model_type "llama")."""

from typing import Any

from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import base


def from_hf(hf: base.Hf) -> DecoderConfig:
    """A config.json as `DecoderConfig`; see `base.common` for what is raised."""
    return DecoderConfig(**base.common(hf), **base.biases(hf))


def to_hf(c: DecoderConfig) -> dict[str, Any]:
    """A config.json of a `DecoderConfig`."""
    return base.to_hf(c, "LlamaForCausalLM", attention_bias=c.qkv_bias, mlp_bias=c.mlp_bias)
