"""A weight some of whose numbers are zero and stay so, whatever trains beneath.

Dimensions: letters of an einsum equation; E experts, M rows of tokens.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxtune.weights import Array, Node, apply, densify, grouped, is_node, node, take


@node
class Masked(Node):
    """`x (W ∘ mask)`: of an array, or of a node as a whole, so that an adapter's product has the zeros too.

    Gradients of what is masked are zero. Should an optimiser move it all the same, it is as zero as before here and in
    what is exported.
    """

    whole: (
        Any  # what is masked; rules see its leaves under this name, so that "/base/" is still what an adapter is upon
    )
    mask: Any  # bool, of the array's shape; true is kept

    @property
    def base(self) -> Any:
        return self.whole

    def seeded(self, key: Array) -> "Masked":
        """With a key for what is masked."""
        return dataclasses.replace(self, whole=self.whole.seeded(key)) if is_node(self.whole) else self


@apply.register
def _(w: Masked, eqn: str, x: Array) -> Array:
    return apply(densify(w), eqn, x)


@grouped.register
def _(w: Masked, x: Array, sizes_E: Array) -> Array:
    return grouped(densify(w), x, sizes_E)


@take.register
def _(w: Masked, ids: Array, dtype: Any) -> Array:
    return take(densify(w), ids, dtype)


@densify.register
def _(w: Masked) -> Any:
    array = densify(w.whole)
    return jnp.where(w.mask, array, jnp.zeros((), array.dtype))
