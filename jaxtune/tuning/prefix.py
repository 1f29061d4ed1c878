"""Prefix tuning: keys and values before every text, in each layer, train (Li & Liang, 2021).

Dimensions: V virtual tokens, L layers, K key/value heads, H head dim.
"""

import jax

from jaxtune.config import Prefix as PrefixConfig
from jaxtune.layers import Weight
from jaxtune.models.decoder import DecoderConfig
from jaxtune.nodes.soft_prompt import PREFIX_AXES, TABLE, Prefix
from jaxtune.tuning.method import FROZEN, TRAIN, Method, Training
from jaxtune.weights import Array

_START = 0.02  # standard deviation; peft draws with 1, which drowns the text at first


def method(tuning: PrefixConfig, decoder: DecoderConfig, training: Training) -> Method:
    """A prefix for all layers on the token table, drawn small, so that queries see it evenly at first."""
    shape = decoder.layers, decoder.kv_heads, tuning.tokens, decoder.head

    def wrap(name: str, w: Weight, key: Array) -> Weight | Prefix:
        if name != TABLE:
            return w
        return Prefix(
            w, *(Weight(_START * jax.random.normal(k, shape), PREFIX_AXES, n_in=1) for k in jax.random.split(key))
        )

    rules = [(rf"^{TABLE}/[kv]_LKVH$", TRAIN), ("", FROZEN)]
    return Method(wrap, rules, base=None if tuning.base is None else (tuning.base, tuning.group), past=True)
