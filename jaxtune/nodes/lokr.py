"""Adapters that are the Kronecker product of a small matrix and a low-rank one.

Dimensions: m n of the input, m n numbers in all; l k of the output; r rank.
"""

from math import isqrt
from typing import Any

import jax.numpy as jnp

from jaxtune.nodes.lora import each
from jaxtune.weights import Array, Node, apply, densify, node, parts, precision, static


@node
class LoKr(Node):
    """`W + scale · left ⊗ right`, `right` in two factors where that is smaller — LoKr (LyCORIS; Yeh et al., 2023,
    https://arxiv.org/abs/2309.14859).

    `left` is `[m, l]`; `right` `[n, k]`, or `a` `[n, r]` times `b` `[r, k]`.
    """

    base: Any
    left: Any
    right: Any = None
    a: Any = None
    b: Any = None
    scale: float = static(default=1.0)


def factors(size: int) -> tuple[int, int]:
    """Two factors of a number, as near to each other as can be, the smaller first.

    >>> factors(128), factors(36), factors(7)
    ((8, 16), (6, 6), (1, 7))
    """
    small = next(n for n in range(isqrt(size), 0, -1) if size % n == 0)
    return small, size // small


@apply.register
def _(w: LoKr, eqn: str, x: Array) -> Array:
    n_batch, n_out = len(parts(eqn).batch), len(parts(eqn).outof)
    y = x.reshape(*x.shape[:n_batch], w.left.shape[-2], -1) * w.scale
    for f in (w.right,) if w.right is not None else (w.a, w.b):
        y = jnp.matmul(y, f.astype(x.dtype), precision=precision(x.dtype))
    y = jnp.einsum("...mk,ml->...lk", y, w.left.astype(x.dtype), precision=precision(x.dtype))
    return apply(w.base, eqn, x) + y.reshape(*x.shape[:n_batch], *w.shape[-n_out:])


@densify.register
def _(w: LoKr) -> Any:
    base = densify(w.base)
    right = w.right if w.right is not None else jnp.matmul(w.a, w.b, precision="highest")
    update = each(jnp.kron, w.left.ndim - 2)(w.left.astype(jnp.float32), right.astype(jnp.float32))
    return (base.astype(jnp.float32) + w.scale * update.reshape(base.shape)).astype(base.dtype)
