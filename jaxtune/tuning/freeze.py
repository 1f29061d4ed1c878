"""Frozen layers: the last n, and whatever patterns name, train; the backward pass ends at the lowest of them."""

from jaxtune.config import Freeze
from jaxtune.errors import UserError
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning.method import FROZEN, Method, covering, decoder_names, leave, named


def method(tuning: Freeze, decoder: DecoderConfig) -> Method:
    """Rules that train the last `tuning.last` layers and the patterns of `tuning.train`, and freeze the rest.

    Raises:
      UserError: there are fewer layers than `last`, or a pattern matches nothing.
    """
    L = decoder.layers
    if tuning.last > L:
        raise UserError(f"tuning.last={tuning.last}: the model has {L} layers")
    patterns = named(tuning.train, decoder.tied)
    covering(patterns, decoder_names(decoder), "tuning.train")
    layers = "|".join(str(i) for i in range(L - tuning.last, L))
    rules = [(p, "train") for p in patterns]
    if layers:
        rules.append((f"^layers/({layers})/", "train"))
    return Method(leave, [*rules, ("", FROZEN)])
