"""How VeRA, LoHa and LoKr start, each as peft starts it: nothing changes at first.

Dimensions: in… and out… are the weight's contracted and remaining axes, I and O all of them; r is the rank.
"""

from collections.abc import Collection
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import leaves
from jaxtune.layers import Weight, is_weight, plain_names
from jaxtune.models.decoder import DecoderConfig, abstract_weights
from jaxtune.nodes import lokr as kronecker
from jaxtune.nodes.loha import LoHa
from jaxtune.nodes.lokr import LoKr
from jaxtune.nodes.vera import VeRA
from jaxtune.weights import Array, path_name

_D_INITIAL = 0.1


def _uniform(key: Array, shape: tuple[int, ...], fan_in: int, gain: float = 1.0) -> Array:
    bound = gain * fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def largest(decoder: DecoderConfig, names: Collection[str]) -> tuple[int, int]:
    """The most inputs and the most outputs that one of the named weights has."""
    found = jax.tree_util.tree_leaves_with_path(abstract_weights(decoder), is_leaf=is_weight)
    mine = [w for p, w in found if any(n.removesuffix("/weight") in names for n in plain_names(path_name(p)))]
    n_in, n_out = (max(prod(leaves.sides(w)[side]) for w in mine) for side in (0, 1))
    return n_in, n_out


def vera(w: Weight, rank: int, largest: tuple[int, int], dropout: float) -> VeRA:
    """A fresh `VeRA`: λd 0.1, λb zero, and its part of random matrices that fit the largest weight, the same always."""
    made = leaves.vera(w, rank)
    into, out = leaves.sides(w)
    of_a, of_b = jax.random.split(jax.random.key(0))
    a_Ir = _uniform(of_a, (largest[0], rank), largest[0], 6**0.5)
    b_rO = _uniform(of_b, (rank, largest[1]), rank, 6**0.5)
    a, b = a_Ir[: prod(into)].reshape(*into, rank), b_rO[:, : prod(out)].reshape(rank, *out)
    values = {
        "a": jnp.broadcast_to(a, made["a"].value.shape),
        "b": jnp.broadcast_to(b, made["b"].value.shape),
        "lambda_d": jnp.full(made["lambda_d"].value.shape, _D_INITIAL, jnp.float32),
        "lambda_b": jnp.zeros(made["lambda_b"].value.shape, jnp.float32),
    }
    return VeRA(w, **{k: made[k].like(x) for k, x in values.items()}, dropout=dropout)


def loha(w: Weight, rank: int, scale: float, key: Array) -> LoHa:
    """A fresh `LoHa`: A2 zero, the others uniform."""
    made = leaves.loha(w, rank)
    fans = {"a1": prod(leaves.sides(w)[0]), "b1": rank, "a2": 0, "b2": rank}
    return LoHa(w, **_drawn(made, fans, key), scale=scale)


def lokr(w: Weight, rank: int, scale: float, key: Array) -> LoKr:
    """A fresh `LoKr`: the left matrix zero; the right one uniform, in two factors where their rank makes it smaller."""
    (m, n), (left_out, k) = (kronecker.factors(prod(side)) for side in leaves.sides(w))
    made = leaves.lokr(w, (m, left_out), rank if rank < max(n, k) / 2 else None)
    return LoKr(w, **_drawn(made, {"left": 0, "right": n, "a": n, "b": rank}, key), scale=scale)


def _drawn(made: leaves.Leaves, fans: dict[str, int], key: Array) -> dict[str, Any]:
    """Leaves, uniform in ±1/√fan; zero where that is 0."""
    keys = dict(zip(made, jax.random.split(key, len(made)), strict=True))
    return {
        k: leaf.like(_uniform(keys[k], leaf.value.shape, fans[k]) if fans[k] else jnp.zeros(leaf.value.shape))
        for k, leaf in made.items()
    }
