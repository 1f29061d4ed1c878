"""Frozen layers: the first or last n, and whatever patterns name, train; the backward pass ends at the lowest."""

from jaxtune.config import Freeze
from jaxtune.errors import UserError
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning.method import FROZEN, TRAIN, Method, Training, covering, decoder_names, leave, named


def method(tuning: Freeze, decoder: DecoderConfig, training: Training) -> Method:
    """Rules that train the first and last layers that are asked for and the patterns of `tuning.train`, and no more.

    Raises:
      UserError: there are fewer layers than `first` or `last`, or a pattern matches nothing.
    """
    L = decoder.layers
    for key in ("first", "last"):
        if (n := getattr(tuning, key)) > L:
            raise UserError(f"tuning.{key}={n}: the model has {L} layers")
    patterns = named(tuning.train, decoder.tied)
    covering(patterns, decoder_names(decoder), "tuning.train")
    layers = "|".join(str(i) for i in range(L) if i < tuning.first or i >= L - tuning.last)
    rules = [(p, TRAIN) for p in patterns]
    if layers:
        rules.append((f"^layers/({layers})/", TRAIN))
    return Method(leave, [*rules, ("", FROZEN)])
