"""Adapters of two low-rank products, multiplied number by number: of a rank up to r², for twice LoRA's parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.nodes.lora import each, product
from jaxtune.weights import Array, Node, apply, densify, node, static


@node
class LoHa(Node):
    """`W + scale · (A1 B1) ∘ (A2 B2)` — LoHa (FedPara; Hyeon-Woo et al., 2021, https://arxiv.org/abs/2108.06098).

    Factors are `[in…, r]` and `[r, out…]`. The update is made whole where it is used, again for the backward pass.
    """

    base: Any
    a1: Any
    b1: Any
    a2: Any
    b2: Any
    scale: float = static(default=1.0)

    @property
    def lead(self) -> int:
        """How many axes stand in front of the matrix."""
        return self.a1.ndim + self.b1.ndim - self.ndim - 2


def _update(w: LoHa) -> Array:
    def one(a1: Array, b1: Array, a2: Array, b2: Array) -> Array:
        return w.scale * product(a1, b1) * product(a2, b2)

    return each(one, w.lead)(w.a1, w.b1, w.a2, w.b2)


@apply.register
def _(w: LoHa, eqn: str, x: Array) -> Array:
    # `checkpoint`: the backward pass keeps the factors, not their products
    update = jax.checkpoint(lambda w, x: apply(_update(w), eqn, x))
    return apply(w.base, eqn, x) + update(w, x)


@densify.register
def _(w: LoHa) -> Any:
    base = densify(w.base)
    return (base.astype(jnp.float32) + _update(w)).astype(base.dtype)
