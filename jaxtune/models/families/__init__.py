"""Families of models: Hugging Face's config.json to `DecoderConfig` and back, one short file each."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtune.errors import UserError, nearest
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.families import llama


class Family(NamedTuple):
    """How a family's config.json is read and written."""

    from_hf: Callable[[Mapping[str, Any]], DecoderConfig]
    to_hf: Callable[[DecoderConfig], dict[str, Any]]


FAMILIES: Mapping[str, Family] = {"llama": Family(llama.from_hf, llama.to_hf)}


def from_hf(config: Mapping[str, Any], place: str = "config.json") -> DecoderConfig:
    """Read a Hugging Face config.

    Raises:
      UserError: the model type, or a feature that the config asks for, is not supported.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(f"{place}: model_type {kind!r} is not supported{nearest(kind, list(FAMILIES))}")
    try:
        return FAMILIES[kind].from_hf(config)
    except KeyError as e:
        raise UserError(f"{place}: key {e.args[0]!r} is missing; a {kind} config needs it") from e
    except UserError as e:
        raise UserError(f"{place}: {e}") from e
