"""Low-rank adapters: `x W + scale · (x A) B` with W frozen (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

Dimensions: in… and out… are the weight's contracted and remaining axes, r is the rank.
"""

import re
from math import prod

import jax
import jax.numpy as jnp

from jaxtune.config import Lora
from jaxtune.errors import UserError
from jaxtune.layers import Weight
from jaxtune.models.decoder import DecoderConfig
from jaxtune.nodes.lora import LoRA
from jaxtune.tuning.method import FROZEN, TRAIN, Method, covering, decoder_names, named
from jaxtune.weights import Array

_WEIGHT = "/weight"
_NORM = re.compile(r"norm/weight$")


def method(tuning: Lora, decoder: DecoderConfig) -> Method:
    """Adapters on the weights that `tuning.targets` names: all matrices of the layers, or regexes on names.

    What `tuning.train` names trains whole, without an adapter.

    Raises:
      UserError: a pattern matches nothing that it can, or experts are to train whole.
    """
    every = decoder_names(decoder)
    patterns = [r"^layers/"] if tuning.targets == "all-linear" else _listed(tuning.targets)
    base = None if tuning.base is None else (tuning.base, tuning.group)
    names = [n for n in every if targetable(n) or (n.startswith("embed_tokens") and not decoder.tied)]
    covering(patterns, [n.removesuffix(_WEIGHT) for n in names], "tuning.targets")
    whole = named(tuning.train, decoder.tied)
    covering(whole, [n for n in every if n.endswith(_WEIGHT) or "/experts/" in n], "tuning.train")
    if taken := [n for n in every if "/experts/" in n and any(re.search(p, n) for p in whole)]:
        raise UserError(
            f"tuning.train matches {taken[0]}: PEFT cannot hold experts that train whole; narrow the pattern, or adapt "
            "them by tuning.targets"
        )

    def wrap(name: str, w: Weight, key: Array) -> Weight | LoRA:
        mine = name in names and any(re.search(p, name.removesuffix(_WEIGHT)) for p in patterns)
        if not mine or any(re.search(p, name) for p in whole):
            return w
        return adapter(w, tuning.rank, tuning.scale, tuning.dropout, key)

    rules = [(r"/(a|b)$", TRAIN), *[(f"(?:{p})(?!.*/bias$)", TRAIN) for p in whole], ("", FROZEN)]
    return Method(wrap, rules, base=base)


def _listed(targets: str | list[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else targets


def targetable(name: str) -> bool:
    """Whether a weight is a matrix of a linear module or of experts; routers and the embedding table are none."""
    matrix = name.endswith(_WEIGHT) and not _NORM.search(name) and not name.endswith("/mlp/gate/weight")
    return (matrix and not name.startswith("embed_tokens")) or "/experts/" in name


def adapter(w: Weight, rank: int, scale: float, dropout: float, key: Array) -> LoRA:
    """A fresh adapter on a weight: A uniform in ±1/√in as peft draws it, B zero, so that nothing changes at first."""
    s = w.lead
    shape, axes = w.value.shape, w.names
    lead, into, out = shape[:s], shape[s : s + w.n_in], shape[s + w.n_in :]
    bound = prod(into) ** -0.5
    if axes[s] == "vocab":  # peft's way with a table
        a, b = jnp.zeros((*into, rank), jnp.float32), jax.random.normal(key, (rank, *out), jnp.float32)
    else:
        a = jax.random.uniform(key, (*lead, *into, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*lead, rank, *out), jnp.float32)
    return LoRA(
        w,
        Weight(a, (*axes[: s + w.n_in], "rank"), n_in=w.n_in),
        Weight(b, (*axes[:s], "rank", *axes[s + w.n_in :]), n_in=1),
        scale=scale,
        dropout=dropout,
    )
