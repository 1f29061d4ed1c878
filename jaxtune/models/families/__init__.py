"""Families of models: Hugging Face's config.json to `DecoderConfig` and back, one short file each."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtune.errors import UserError, nearest
from jaxtune.models import heads
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import gemma, granite, llama, mistral, mixtral, olmo, phi, qwen, smollm3
from jaxtune.models.families.base import Experts

_MULTIMODAL = "gemma3 gemma3n gemma4 mistral3 qwen2_vl qwen2_5_vl qwen3_vl llama4 mllama phi4_multimodal".split()


class Family(NamedTuple):
    """How a family's config.json is read and written, and where its names leave the rule."""

    from_hf: Callable[[Mapping[str, Any]], DecoderConfig]
    to_hf: Callable[[DecoderConfig], dict[str, Any]]
    experts: Experts | None = None


FAMILIES: Mapping[str, Family] = {
    "llama": Family(llama.from_hf, llama.to_hf),
    "mistral": Family(mistral.from_hf, mistral.to_hf),
    "ministral": Family(mistral.from_hf, mistral.to_hf),
    "mixtral": Family(mixtral.from_hf, mixtral.to_hf, mixtral.EXPERTS),
    "qwen2": Family(qwen.from_hf, qwen.to_hf),
    "qwen3": Family(qwen.from_hf, qwen.to_hf),
    "qwen3_moe": Family(qwen.from_hf, qwen.to_hf, qwen.EXPERTS),
    "gemma": Family(gemma.from_hf, gemma.to_hf),
    "gemma2": Family(gemma.from_hf, gemma.to_hf),
    "gemma3_text": Family(gemma.from_hf, gemma.to_hf),
    "phi3": Family(phi.from_hf, phi.to_hf),
    "olmo2": Family(olmo.from_hf, olmo.to_hf),
    "olmo3": Family(olmo.from_hf, olmo.to_hf),
    "granite": Family(granite.from_hf, granite.to_hf),
    "smollm3": Family(smollm3.from_hf, smollm3.to_hf),
}


def from_hf(config: Mapping[str, Any], place: str = "config.json") -> DecoderConfig:
    """Read a Hugging Face config.

    Raises:
      UserError: the model type, or a feature that the config asks for, is not supported.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        known = nearest(kind, list(FAMILIES))
        if kind in _MULTIMODAL:
            known = ": it reads more than text; take a text model of the family"
        raise UserError(f"{place}: model_type {kind!r} is not supported{known}")
    try:
        decoder = FAMILIES[kind].from_hf(config)
        head = heads.from_hf(config)
        return decoder if head is None else dataclasses.replace(decoder, task=head, tied=False)
    except KeyError as e:
        raise UserError(f"{place}: key {e.args[0]!r} is missing; a {kind} config needs it") from e
    except UserError as e:
        raise UserError(f"{place}: {e}") from e


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read, and from which `from_hf` makes the same config."""
    return FAMILIES[config.family].to_hf(config)
