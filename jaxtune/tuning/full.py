"""Full tuning: every weight trains."""

from jaxtune.config import Full
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning.method import TRAIN, Method, Training, leave


def method(tuning: Full, decoder: DecoderConfig, training: Training) -> Method:
    """Nothing is wrapped, everything trains."""
    return Method(leave, [("", TRAIN)])
