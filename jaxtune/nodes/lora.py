"""Low-rank adapters.

Dimensions: letters of an einsum equation; `r` is the adapter's rank; E experts, M rows of tokens.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.weights import Array, Node, apply, densify, grouped, node, parts, static, take


class LowRank(Node):
    """What has factors `a` `[in…, r]` and `b` `[r, out…]` and drops out some of the adapter's input.

    Dropout acts only while `key` is there (see `weights.seeded`).
    """

    a: Any
    b: Any
    key: Any
    dropout: float

    @property
    def lead(self) -> int:
        """How many axes stand in front of the matrix: layers, experts."""
        return self.a.ndim + self.b.ndim - self.ndim - 2

    def seeded(self, key: Array) -> Any:
        """With a key for dropout, one per layer where it is stacked."""
        if self.dropout == 0.0:
            return self
        keys = jax.random.split(key, self.a.shape[0]) if self.lead else key
        return dataclasses.replace(self, key=keys)  # type: ignore[type-var]

    def dropped(self, x: Array) -> Array:
        """The adapter's input."""
        if self.key is None or self.dropout == 0.0:
            return x
        keep = jax.random.bernoulli(self.key, 1.0 - self.dropout, x.shape)
        return jnp.where(keep, x / (1.0 - self.dropout), 0).astype(x.dtype)


def scaled(x: Array, by: Array) -> Array:
    """`x` times a vector, or an array of its last axes: in float32, for what is learned there is close to one."""
    return (x.astype(jnp.float32) * by.astype(jnp.float32)).astype(x.dtype)


def each(f: Callable[..., Array], lead: int) -> Callable[..., Array]:
    """A function of single matrices as one of matrices that are piled up along `lead` axes."""
    for _ in range(lead):
        f = jax.vmap(f)
    return f


def product(a: Array, b: Array) -> Array:
    """`A B`, float32, of one matrix."""
    return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision="highest")


@node
class LoRA(LowRank):
    """`x W + scale · (x A) B` — LoRA (Hu et al., 2021, https://arxiv.org/abs/2106.09685)."""

    base: Any
    a: Any
    b: Any
    key: Any = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)


@apply.register
def _(w: LoRA, eqn: str, x: Array) -> Array:
    e = parts(eqn)
    down = apply(w.a, f"{e.x},{e.into}r->{e.batch}r", w.dropped(x)) * w.scale
    return apply(w.base, eqn, x) + apply(w.b, f"{e.batch}r,r{e.outof}->{e.out}", down)


@grouped.register
def _(w: LoRA, x: Array, sizes_E: Array) -> Array:
    return grouped(w.base, x, sizes_E) + grouped(w.b, grouped(w.a, w.dropped(x), sizes_E) * w.scale, sizes_E)


@take.register
def _(w: LoRA, ids: Array, dtype: Any) -> Array:
    return take(w.base, ids, dtype) + w.scale * jnp.einsum("...r,rd->...d", take(w.a, ids, dtype), w.b.astype(dtype))


@densify.register
def _(w: LoRA) -> Any:
    base = densify(w.base)
    update = each(product, w.lead)(w.a, w.b).reshape(base.shape)
    return (base.astype(jnp.float32) + w.scale * update).astype(base.dtype)
