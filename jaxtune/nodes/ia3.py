"""Learned scales of what goes into a weight or comes out of it."""

from typing import Any

import jax.numpy as jnp

from jaxtune.nodes.lora import scaled
from jaxtune.weights import Array, Node, apply, densify, node, static


@node
class IA3(Node):
    """`(x W) · l`, or `(x · l) W` for `inputs` — IA³ (Liu et al., 2022, https://arxiv.org/abs/2205.05638)."""

    base: Any
    l: Any
    inputs: bool = static(default=False)
    axes: int = static(default=1)  # of one matrix that `l` has


@apply.register
def _(w: IA3, eqn: str, x: Array) -> Array:
    if w.inputs:
        return apply(w.base, eqn, scaled(x, w.l))
    return scaled(apply(w.base, eqn, x), w.l)


@densify.register
def _(w: IA3) -> Any:
    base = densify(w.base)
    others, lead = (1,) * (base.ndim - w.l.ndim), w.l.shape[: w.l.ndim - w.axes]
    own = w.l.shape[len(lead) :]
    shape = (*lead, *own, *others) if w.inputs else (*lead, *others, *own)
    return scaled(base, jnp.reshape(w.l, shape))
