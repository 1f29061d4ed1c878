"""Adapters of random matrices that all weights share and that stay as they are; scales beside them train.

Dimensions: letters of an einsum equation; `r` is the adapter's rank.
"""

from typing import Any

import jax.numpy as jnp

from jaxtune.nodes.lora import LowRank, each, product, scaled
from jaxtune.weights import Array, apply, densify, node, parts, static


@node
class VeRA(LowRank):
    """`x W + ((x A) · λd) B · λb` — VeRA (Kopiczko et al., 2023, https://arxiv.org/abs/2310.11454).

    `a` and `b` are the first rows and columns of the shared pair, held once for each weight: layers in a loop find
    their leaves side by side. They cost the memory of frozen LoRA factors of that rank, in the compute dtype, and no
    optimiser state.
    """

    base: Any
    a: Any
    b: Any
    lambda_d: Any  # [r]
    lambda_b: Any  # [out…]
    key: Any = None
    dropout: float = static(default=0.0)


@apply.register
def _(w: VeRA, eqn: str, x: Array) -> Array:
    e = parts(eqn)
    down = scaled(apply(w.a, f"{e.x},{e.into}r->{e.batch}r", w.dropped(x)), w.lambda_d)
    up = apply(w.b, f"{e.batch}r,r{e.outof}->{e.out}", down)
    return apply(w.base, eqn, x) + scaled(up, w.lambda_b)


@densify.register
def _(w: VeRA) -> Any:
    base = densify(w.base)

    def update(a: Array, b: Array, d: Array, out: Array) -> Array:
        return product(scaled(a, d), b) * out

    added = each(update, w.lead)(w.a, w.b, w.lambda_d, w.lambda_b).reshape(base.shape)
    return (base.astype(jnp.float32) + added).astype(base.dtype)
