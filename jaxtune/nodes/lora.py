"""Low-rank adapters.

Dimensions: letters of an einsum equation; `r` is the adapter's rank; E experts, M rows of tokens.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.weights import Array, Node, apply, densify, grouped, node, parts, static, take


@node
class LoRA(Node):
    """`x W + scale · (x A) B` — LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685).

    `a` has the weight's input dimensions and the rank, `b` the rank and the weight's output dimensions. Dropout acts
    on the adapter's input, and only while `key` is there (see `weights.seeded`).
    """

    base: Any
    a: Any
    b: Any
    key: Any = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)

    def seeded(self, key: Array) -> "LoRA":
        """With a key for dropout, one per layer where it is stacked."""
        if self.dropout == 0.0:
            return self
        stacked = self.a.ndim + self.b.ndim - self.ndim - 2
        return dataclasses.replace(self, key=jax.random.split(key, self.a.shape[0]) if stacked else key)


def _dropped(w: LoRA, x: Array) -> Array:
    """The adapter's input."""
    if w.key is None or w.dropout == 0.0:
        return x
    keep = jax.random.bernoulli(w.key, 1.0 - w.dropout, x.shape)
    return jnp.where(keep, x / (1.0 - w.dropout), 0).astype(x.dtype)


@apply.register
def _(w: LoRA, eqn: str, x: Array) -> Array:
    e = parts(eqn)
    down = apply(w.a, f"{e.x},{e.into}r->{e.batch}r", _dropped(w, x)) * w.scale
    return apply(w.base, eqn, x) + apply(w.b, f"{e.batch}r,r{e.outof}->{e.out}", down)


@grouped.register
def _(w: LoRA, x: Array, sizes_E: Array) -> Array:
    return grouped(w.base, x, sizes_E) + grouped(w.b, grouped(w.a, _dropped(w, x), sizes_E) * w.scale, sizes_E)


@take.register
def _(w: LoRA, ids: Array, dtype: Any) -> Array:
    return take(w.base, ids, dtype) + w.scale * jnp.einsum("...r,rd->...d", take(w.a, ids, dtype), w.b.astype(dtype))


@densify.register
def _(w: LoRA) -> Any:
    base = densify(w.base)
    update = _low_rank
    for _ in range(w.a.ndim + w.b.ndim - base.ndim - 2):  # axes in front: layers, experts
        update = jax.vmap(update)
    return (base.astype(jnp.float32) + w.scale * update(w.a, w.b).reshape(base.shape)).astype(base.dtype)


def _low_rank(a: Array, b: Array) -> Array:
    return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision="highest")
