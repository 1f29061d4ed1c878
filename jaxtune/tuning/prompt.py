"""Prompt tuning: virtual tokens before every text, whose embeddings train (Lester et al., 2021). And P-tuning (Liu et
al., 2021), where a small network makes them.

Dimensions: V virtual tokens, D embed, F width of the network.
"""

import jax
import jax.numpy as jnp

from jaxtune.config import Prompt
from jaxtune.errors import UserError
from jaxtune.layers import Weight
from jaxtune.models.decoder import DecoderConfig
from jaxtune.nodes.soft_prompt import PROMPT_AXES, TABLE, Dense, PromptEncoder, SoftPrompt
from jaxtune.tuning.method import FROZEN, TRAIN, Method, Training
from jaxtune.weights import Array


def method(tuning: Prompt, decoder: DecoderConfig, training: Training) -> Method:
    """Virtual tokens that start as the embeddings of `text` (as often as it takes), or of tokens drawn by the seed.

    With an encoder its table is drawn from a normal distribution, and its layers as torch draws linear ones.

    Raises:
      UserError: `text` is given for an encoder, or has no token.
    """
    V = tuning.tokens
    if tuning.text is not None and tuning.encoder != "none":
        raise UserError(
            f"tuning.text is for tuning.encoder=none: what encoder={tuning.encoder} makes starts at random; leave one "
            "of them out"
        )
    start = () if tuning.text is None else training.encode(tuning.text)
    if tuning.text is not None and not start:
        raise UserError(f"tuning.text={tuning.text!r} has no token; give a text of some words or leave it out")

    def wrap(name: str, w: Weight, key: Array) -> Weight | SoftPrompt:
        if name != TABLE:
            return w
        if tuning.encoder == "mlp":
            return SoftPrompt(w, encoder(key, V, w.value.shape[1], tuning.encoder_hidden))
        given = [start[i % len(start)] for i in range(V)] if start else []
        ids_V = jnp.array(given, jnp.int32) if given else jax.random.randint(key, (V,), 0, decoder.vocab)
        return SoftPrompt(w, Weight(w.value[ids_V].astype(jnp.float32), PROMPT_AXES, n_in=1))

    rules = [(rf"^{TABLE}/prompt(/|$)", TRAIN), ("", FROZEN)]
    base = None if tuning.base is None else (tuning.base, tuning.group)
    return Method(wrap, rules, from_base=tuning.encoder == "none", base=base, virtual=V)


def encoder(key: Array, tokens: int, embed: int, hidden: int) -> PromptEncoder:
    """A fresh encoder of `Weight`s: three layers, as peft's."""
    table_key, *keys = jax.random.split(key, 4)
    sizes = [(embed, hidden), (hidden, hidden), (hidden, embed)]
    table = Weight(jax.random.normal(table_key, (tokens, embed)), PROMPT_AXES, n_in=1)
    return PromptEncoder(table, tuple(_dense(k, *s) for k, s in zip(keys, sizes, strict=True)))


def _dense(key: Array, into: int, out: int) -> Dense:
    w_key, b_key = jax.random.split(key)
    bound = into**-0.5
    return Dense(
        Weight(jax.random.uniform(w_key, (into, out), minval=-bound, maxval=bound), ("virtual", "virtual"), n_in=1),
        Weight(jax.random.uniform(b_key, (out,), minval=-bound, maxval=bound), ("virtual",)),
    )
