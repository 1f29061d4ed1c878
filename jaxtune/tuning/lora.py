"""Low-rank adapters: `x W + scale · (x A) B` with W frozen (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

Dimensions: in… and out… are the weight's contracted and remaining axes, r is the rank.
"""

import re
from math import prod

import jax
import jax.numpy as jnp

from jaxtune.config import Lora
from jaxtune.layers import Weight
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning.method import FROZEN, Method, covering, decoder_names
from jaxtune.weights import Array, LoRA

_WEIGHT = "/weight"
_NORM = re.compile(r"norm/weight$")


def method(tuning: Lora, decoder: DecoderConfig) -> Method:
    """Adapters on the weights that `tuning.targets` names: all matrices of the layers, or regexes on names.

    Raises:
      UserError: a pattern matches no matrix.
    """
    patterns = [r"^layers/"] if tuning.targets == "all-linear" else _listed(tuning.targets)
    names = [n.removesuffix(_WEIGHT) for n in decoder_names(decoder) if targetable(n)]
    covering(patterns, names, "tuning.targets")

    def wrap(name: str, w: Weight, key: Array) -> Weight | LoRA:
        if not targetable(name) or not any(re.search(p, name.removesuffix(_WEIGHT)) for p in patterns):
            return w
        return adapter(w, tuning.rank, tuning.scale, tuning.dropout, key)

    return Method(wrap, [(r"/weight/(a|b)$", "train"), ("", FROZEN)])


def _listed(targets: str | list[str]) -> list[str]:
    return [targets] if isinstance(targets, str) else targets


def targetable(name: str) -> bool:
    """Whether a weight is a matrix of a linear module; the embedding table is none (it is looked up)."""
    return name.endswith(_WEIGHT) and not _NORM.search(name) and not name.startswith("embed_tokens")


def adapter(w: Weight, rank: int, scale: float, dropout: float, key: Array) -> LoRA:
    """A fresh adapter on a weight: A uniform in ±1/√in as peft draws it, B zero, so that nothing changes at first."""
    s = int(w.stacked)
    shape, axes = w.value.shape, w.names
    lead, into, out = shape[:s], shape[s : s + w.n_in], shape[s + w.n_in :]
    bound = prod(into) ** -0.5
    a = jax.random.uniform(key, (*lead, *into, rank), jnp.float32, -bound, bound)
    b = jnp.zeros((*lead, rank, *out), jnp.float32)
    return LoRA(
        w,
        Weight(a, (*axes[: s + w.n_in], "rank"), n_in=w.n_in),
        Weight(b, (*axes[:s], "rank", *axes[s + w.n_in :]), n_in=1),
        scale=scale,
        dropout=dropout,
    )
