"""NEFTune: noise on the embeddings in training.

Dimensions: B batch, T time, D embed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.nodes.soft_prompt import Prefix, SoftPrompt
from jaxtune.weights import Array, Node, apply, densify, is_node, node, static, take

Tree = Any


@node
class Noisy(Node):
    """A table whose rows come with uniform noise of ± alpha / √(T · D) — NEFTune (Jain et al., 2023).

    T is the length of a row of the batch, padding included; where several texts are packed into one it is that row's,
    so they get less noise than each would alone. As a head the table is what it is without noise. There is noise only
    while `key` is there (see `weights.seeded`).
    """

    base: Any
    key: Any = None
    alpha: float = static(default=5.0)

    def seeded(self, key: Array) -> "Noisy":
        """With a key for the noise, and one for what it stands on."""
        mine, other = jax.random.split(key)
        base = self.base.seeded(other) if is_node(self.base) else self.base
        return dataclasses.replace(self, base=base, key=mine)


@apply.register
def _(w: Noisy, eqn: str, x: Array) -> Array:
    return apply(w.base, eqn, x)


@densify.register
def _(w: Noisy) -> Any:
    return densify(w.base)


@take.register
def _(w: Noisy, ids: Array, dtype: Any) -> Array:
    x_BTD = take(w.base, ids, dtype)
    if w.key is None:
        return x_BTD
    bound = w.alpha / (x_BTD.shape[-2] * x_BTD.shape[-1]) ** 0.5
    noise_BTD = jax.random.uniform(w.key, x_BTD.shape, jnp.float32, -bound, bound)
    return x_BTD + noise_BTD.astype(dtype)


def noisy(weights: Tree, alpha: float) -> Tree:
    """The weights with noise on the embeddings; the same where `alpha` is 0."""
    if not alpha:
        return weights
    table = weights["embed_tokens"]
    w = table["weight"]
    if isinstance(w, SoftPrompt | Prefix):  # of the text, not of virtual tokens
        w = dataclasses.replace(w, base=Noisy(w.base, alpha=alpha))
    else:
        w = Noisy(w, alpha=alpha)
    return {**weights, "embed_tokens": {**table, "weight": w}}
