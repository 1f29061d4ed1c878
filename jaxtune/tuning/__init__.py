"""Tuning methods: how weights are wrapped, which leaves train, how updates are shaped. One file a method."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune import config
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning import freeze, full, galore, ia3, lora, prefix, prompt
from jaxtune.tuning.method import Method

METHODS: Mapping[type, Callable[[Any, DecoderConfig], Method]] = {
    config.Full: full.method,
    config.Freeze: freeze.method,
    config.Lora: lora.method,
    config.QLora: lora.method,
    config.Galore: galore.method,
    config.Ia3: ia3.method,
    config.Prompt: prompt.method,
    config.Prefix: prefix.method,
}


def make(tuning: config.Tuning, decoder: DecoderConfig) -> Method:
    """The method that a config names."""
    return METHODS[type(tuning)](tuning, decoder)
