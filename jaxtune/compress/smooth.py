"""SmoothQuant: outliers of activations moved into the weights, which bear them better."""

from collections.abc import Sequence

import jax.numpy as jnp

from jaxtune.weights import Array


def smoothing(matrices: Sequence[Array], largest_I: Array, strength: float = 0.5) -> Array:
    """What inputs are divided by, and the matrices that share them multiplied by, `[I]`: `max|x|^α / max|w|^(1 - α)`.

    SmoothQuant (Xiao et al., 2022, https://arxiv.org/abs/2211.10438), eq. 4.

    Args:
      matrices: each `[O, I]`.
      largest_I: the greatest |x| of each input.
      strength: α, how much of the difficulty the weights take over; 0.5 shares it evenly.

    >>> smoothing([jnp.array([[1.0, 4.0]])], jnp.array([4.0, 1.0])).tolist()
    [2.0, 0.5]
    """
    w_I = jnp.stack([jnp.abs(w).max(0) for w in matrices]).max(0).astype(jnp.float32)
    scale_I = jnp.maximum(largest_I, 1e-5) ** strength / jnp.maximum(w_I, 1e-5) ** (1 - strength)
    return jnp.maximum(scale_I, 1e-5)
