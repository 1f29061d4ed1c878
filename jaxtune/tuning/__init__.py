"""Tuning methods: how weights are wrapped, which leaves train, how updates are shaped. One file a method."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune import config
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning import adalora, freeze, full, galore, gradient_select, ia3, lisa, lora, prefix, prompt
from jaxtune.tuning.method import Method, Training

METHODS: Mapping[type, Callable[[Any, DecoderConfig, Training], Method]] = {
    config.Full: full.method,
    config.Freeze: freeze.method,
    config.Lora: lora.method,
    config.QLora: lora.method,
    config.AdaLora: adalora.method,
    config.Lisa: lisa.method,
    config.GradientSelect: gradient_select.method,
    config.Ia3: ia3.method,
    config.Prompt: prompt.method,
    config.Prefix: prefix.method,
    config.Galore: galore.method,
}


def make(tuning: config.Tuning, decoder: DecoderConfig, training: Training = Training()) -> Method:  # noqa: B008
    """The method that a config names, for the training that it is part of."""
    return METHODS[type(tuning)](tuning, decoder, training)
