"""Which scales of a matrix's inputs, and which shrunken ranges, make rounding to nearest hurt its products least.

Dimensions: O outputs and I inputs of a matrix, G groups of inputs, g inputs of a group.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxtune.nodes.grid import Grid, Scheme, dense, nearest
from jaxtune.weights import Array

_STEPS = 20  # of the search, as the paper has it
_exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def error(rounded_OI: Array, w_OI: Array, gram_II: Array) -> Array:
    """`‖(Q - W) X‖²` of each output over what the matrix is multiplied by, `[O]`: `XᵀX` says all of it.

    >>> error(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 0.0]]), jnp.array([[4.0, 0.0], [0.0, 9.0]])).tolist()
    [4.0]
    """
    d_OI = rounded_OI - w_OI.astype(jnp.float32)
    return (_exact(d_OI, gram_II) * d_OI).sum(-1)


def scales(matrices: Sequence[Array], gram_II: Array, mean_I: Array, s: Scheme) -> Array:
    """What the inputs of some matrices that share them are to be multiplied by, `[I]`, and the inputs divided by.

    AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978): powers of the inputs' mean magnitudes from 0 to 1, the one
    with the least error of all products. The power 0 is no scaling, so the error is never above rounding to nearest.

    Args:
      matrices: each `[O, I]`.
      gram_II: XᵀX over what they are multiplied by.
      mean_I: the mean of |x|.
      s: the grid.
    """
    tried = [_power(mean_I, i / _STEPS) for i in range(_STEPS)]
    errors = [sum(_scaled_error(w, gram_II, x, s) for w in matrices) for x in tried]
    return tried[int(jnp.argmin(jnp.stack([jnp.asarray(e) for e in errors])))]


def _power(mean_I: Array, ratio: float) -> Array:
    x_I = jnp.maximum(mean_I.astype(jnp.float32) ** ratio, 1e-4)
    return x_I / jnp.sqrt(x_I.max() * x_I.min())


@functools.partial(jax.jit, static_argnames="s")
def _scaled_error(w_OI: Array, gram_II: Array, scale_I: Array, s: Scheme) -> Array:
    return error(dense(nearest(w_OI * scale_I, s)) / scale_I, w_OI, gram_II).sum()


def clipped(w_OI: Array, gram_II: Array, s: Scheme, least: float = 0.5) -> Grid:
    """A matrix rounded to nearest, the ranges of its groups shrunk down to `least` where that helps.

    Each group's own error chooses; an output whose whole error did not become less keeps its ranges.
    """
    n_in, plain = w_OI.shape[1], nearest(w_OI, s)
    g = s.group or n_in
    gram_Ggg = jnp.stack([gram_II[i : i + g, i : i + g] for i in range(0, n_in, g)])
    tried = [1 - i / _STEPS for i in range(int(_STEPS * (1 - least)) + 1)]
    errors = jnp.stack([_group_errors(w_OI, gram_Ggg, x, s) for x in tried])
    shrunk = nearest(w_OI, s, jnp.asarray(tried)[errors.argmin(0)])
    better_O = error(dense(shrunk), w_OI, gram_II) < error(dense(plain), w_OI, gram_II)
    return jax.tree.map(lambda a, b: jnp.where(better_O[:, None] if a.ndim > 1 else True, a, b), shrunk, plain)


@functools.partial(jax.jit, static_argnames="s")
def _group_errors(w_OI: Array, gram_Ggg: Array, shrink: float, s: Scheme) -> Array:
    G, g, _ = gram_Ggg.shape
    d_OGg = (dense(nearest(w_OI, s, shrink)) - w_OI).reshape(-1, G, g)
    return jnp.einsum("ogi,gij,ogj->og", d_OGg, gram_Ggg, d_OGg, precision="highest")
