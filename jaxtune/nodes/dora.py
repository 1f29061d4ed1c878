"""Low-rank adapters whose direction and magnitude train apart.

Dimensions: letters of an einsum equation; `r` is the adapter's rank.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.nodes.lora import LowRank, each, product, scaled
from jaxtune.weights import Array, apply, densify, node, parts, static


@node
class DoRA(LowRank):
    """`m · V / ‖V‖` with `V = W + scale · A B` — DoRA (Liu et al., 2024, https://arxiv.org/abs/2402.09353).

    The norm runs over the input axes and is a constant to the gradient (section 4.3 there). `magnitude` m has the
    weight's output axes. Of a quantised base the norm needs the whole matrix in each step.
    """

    base: Any
    a: Any
    b: Any
    magnitude: Any
    key: Any = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)


def norm(base: Array, a: Array, b: Array, scale: float = 1.0) -> Array:
    """`‖W + scale · A B‖` over the input axes of one matrix, float32, without making `A B`; 1 where it is 0.

    Its square is `‖W‖² + 2 scale ⟨W, A B⟩ + scale² ‖A B‖²`, and `⟨W, A B⟩` sums `AᵀW · B` over the rank.
    """
    base, a, b = (x.astype(jnp.float32) for x in (base, a, b))
    into = tuple(range(a.ndim - 1))
    inner = jnp.tensordot(a, base, (into, into), precision="highest")
    gram = jnp.tensordot(a, a, (into, into), precision="highest")
    between = 2 * inner + scale * jnp.tensordot(gram, b, 1, precision="highest")
    return _root((base * base).sum(into) + scale * (between * b).sum(0))


def _root(square: Array) -> Array:
    """A norm; 1 for columns of zeros, as padding of a table has, so that they stay zeros."""
    return jnp.sqrt(jnp.where(square > 0, square, 1.0))


@apply.register
def _(w: DoRA, eqn: str, x: Array) -> Array:
    e = parts(eqn)
    dropped, y = w.dropped(x), apply(w.base, eqn, x)
    down = apply(w.a, f"{e.x},{e.into}r->{e.batch}r", dropped) * w.scale
    update = apply(w.b, f"{e.batch}r,r{e.outof}->{e.out}", down)
    factor = w.magnitude / norm(*jax.lax.stop_gradient((densify(w.base), w.a, w.b)), w.scale)
    if dropped is x:
        return scaled(y + update, factor)
    return y + scaled(apply(w.base, eqn, dropped), factor - 1) + scaled(update, factor)  # as peft has it


@densify.register
def _(w: DoRA) -> Any:
    base = densify(w.base)

    def whole(base: Array, a: Array, b: Array, magnitude: Array) -> Array:
        v = base.astype(jnp.float32) + w.scale * product(a, b)
        return v * (magnitude / _root((v * v).sum(tuple(range(a.ndim - 1)))))

    return each(whole, w.lead)(base, w.a, w.b, w.magnitude).astype(base.dtype)
