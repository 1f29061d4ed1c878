"""GPTQ: each input's rounding error is made good by the inputs that are not rounded yet.

Dimensions: O outputs and I inputs of a matrix, b inputs of a block.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxtune import log
from jaxtune.errors import UserError
from jaxtune.nodes.grid import Grid, Scheme, decode, encode, fit
from jaxtune.weights import Array

_BLOCK = 128  # inputs whose errors are carried on one by one; the others wait for the whole block


def gptq(w_OI: Array, gram_II: Array, s: Scheme, act_order: bool = False, damp: float = 0.01) -> Grid:
    """A matrix rounded so that its products change little — GPTQ (Frantar et al., 2022,
    https://arxiv.org/abs/2210.17323).

    Args:
      w_OI: the matrix, outputs first.
      gram_II: XᵀX over what it is multiplied by.
      s: the grid.
      act_order: begin with the inputs whose squares are greatest; groups then hold inputs that are no neighbours.
      damp: this share of its mean is added to the diagonal; more, and said, where that leaves it singular.
    """
    w_OI, gram_II = w_OI.astype(jnp.float32), gram_II.astype(jnp.float32)
    n_in = w_OI.shape[1]
    order_I = jnp.argsort(-jnp.diagonal(gram_II), stable=True) if act_order else jnp.arange(n_in)
    w_OI, gram_II = w_OI[:, order_I], gram_II[order_I][:, order_I]
    while not bool(jnp.isfinite(upper_II := _upper(gram_II, damp)).all()):
        damp *= 10
        if damp > 10:
            raise UserError(
                "--method gptq: what a matrix is multiplied by is not finite; look whether the model is whole"
            )
        log.warn(f"GPTQ: XᵀX is singular; {damp:g} of its mean is added to its diagonal")
    codes_OI, scale_OG, zero_OG = _rounded(w_OI, upper_II, s)
    back_I = jnp.argsort(order_I)
    group_I = (jnp.arange(n_in, dtype=jnp.int32) // (s.group or n_in))[back_I]
    return Grid(codes_OI[:, back_I], scale_OG, zero_OG, group_I)


@jax.jit
def _upper(gram_II: Array, damp: Array | float) -> Array:
    """`U` with `UᵀU = (XᵀX + damping)⁻¹`; inputs that are always 0 are left to themselves."""
    diagonal_I = jnp.diagonal(gram_II)
    added_I = damp * diagonal_I.mean() + (diagonal_I == 0)
    inverse_II = jnp.linalg.inv(gram_II + jnp.diag(added_I))
    return jnp.linalg.cholesky((inverse_II + inverse_II.T) / 2, symmetrize_input=False).T


@functools.partial(jax.jit, static_argnames="s")
def _rounded(w_OI: Array, upper_II: Array, s: Scheme) -> tuple[Array, Array, Array]:
    n_out, n_in = w_OI.shape
    b = math.gcd(s.group, _BLOCK) if s.group else max(n for n in range(1, min(n_in, _BLOCK) + 1) if n_in % n == 0)
    each = (s.group or n_in) // b  # blocks of a group
    exact = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

    def block(carry: tuple[Array, Array, Array], n: Array) -> tuple[tuple[Array, Array, Array], tuple]:
        w_OI, scale_O, zero_O = carry
        at = n * b
        begun = jax.lax.dynamic_slice(w_OI, (0, at), (n_out, s.group or n_in)) if s.group else w_OI
        found = fit(begun, s)  # from what the errors before it have made of the group
        scale_O, zero_O = (
            jnp.where(n % each == 0, new, old) for new, old in zip(found, (scale_O, zero_O), strict=True)
        )
        rows_bI = jax.lax.dynamic_slice(upper_II, (at, 0), (b, n_in))
        rows_bb = jax.lax.dynamic_slice(rows_bI, (0, at), (b, b))

        def column(w_Ob: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
            code_O = encode(w_Ob[:, j], scale_O, zero_O, s)
            error_O = (w_Ob[:, j] - decode(code_O, scale_O, zero_O)) / rows_bb[j, j]
            return w_Ob - error_O[:, None] * rows_bb[j], (code_O, error_O)

        w_Ob = jax.lax.dynamic_slice(w_OI, (0, at), (n_out, b))
        _, (codes_bO, errors_bO) = jax.lax.scan(column, w_Ob, jnp.arange(b))
        behind_bI = jnp.where(jnp.arange(n_in) >= at + b, rows_bI, 0)
        return (w_OI - exact(errors_bO.T, behind_bI), scale_O, zero_O), (codes_bO, scale_O, zero_O)

    start = w_OI, *fit(w_OI, s)
    _, (codes_nbO, scale_nO, zero_nO) = jax.lax.scan(block, start, jnp.arange(n_in // b))
    return codes_nbO.reshape(n_in, n_out).T, scale_nO[::each].T, zero_nO[::each].T
