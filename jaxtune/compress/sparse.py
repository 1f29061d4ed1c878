"""Which weights of a matrix become zero, and how those that stay make up for them.

Each function takes one matrix as its papers write it, outputs first, and gives masks (true is kept) or the matrix with
zeros. A target is a share of zeros, or a pattern n:m, "n of m consecutive inputs of an output are kept", which sparse
tensor cores multiply faster.

Dimensions: O outputs, I inputs, M tokens, B inputs of a block, J others.
"""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune import log
from jaxtune.errors import UserError
from jaxtune.weights import Array

_EXACT = jax.lax.Precision.HIGHEST


class Target(NamedTuple):
    """How many weights become zero: a share of all, or in the pattern `n:m` all but n of m."""

    share: float
    n: int = 0
    m: int = 0

    @property
    def pattern(self) -> str:
        return f"{self.n}:{self.m}" if self.m else ""


def target(sparsity: float | None, pattern: str | None) -> Target:
    """A target as it is asked for: a share, or a pattern such as "2:4".

    >>> target(0.5, None), target(None, "2:4")
    (Target(share=0.5, n=0, m=0), Target(share=0.5, n=2, m=4))

    Raises:
      UserError: both or neither are given, or one is not what it should be.
    """
    if (sparsity is None) == (pattern is None):
        raise UserError("give one of --sparsity (a share, such as 0.5) and --pattern (such as 2:4)")
    if pattern is not None:
        if (found := re.fullmatch(r"(\d+):(\d+)", pattern)) is None or not 0 < int(found[1]) < int(found[2]):
            raise UserError(f"--pattern {pattern!r}: is not n:m with n below m; take 2:4 or 4:8")
        n, m = int(found[1]), int(found[2])
        return Target(1 - n / m, n, m)
    if sparsity is None or not 0 <= sparsity < 1:
        raise UserError(f"--sparsity {sparsity}: is a share of zeros from 0 to below 1")
    return Target(sparsity)


def magnitude(w_OI: Array) -> Array:
    """|w|, float32: the smallest go first (Han et al., 2015, https://arxiv.org/abs/1506.02626)."""
    return jnp.abs(w_OI.astype(jnp.float32))


def wanda(w_OI: Array, norm_I: Array) -> Array:
    """|w| · ‖x‖₂ of its input, float32 (Wanda, Sun et al., 2023, https://arxiv.org/abs/2306.11695)."""
    return magnitude(w_OI) * norm_I


def keep(score_OI: Array, to: Target, rows: bool) -> Array:
    """Masks of the highest scores: within each output if `rows`, else of the matrix; n of m where that is the target.

    >>> keep(jnp.array([[3.0, 1.0, 4.0, 2.0]]), Target(0.5, 2, 4), rows=True).tolist()
    [[True, False, True, False]]
    """
    if to.m:
        return (_ranks(score_OI.reshape(len(score_OI), -1, to.m)) >= to.m - to.n).reshape(score_OI.shape)
    flat = score_OI if rows else score_OI.reshape(1, -1)
    return (_ranks(flat) >= round(to.share * flat.shape[-1])).reshape(score_OI.shape)


def _ranks(x: Array) -> Array:
    """The place of each number among those of the last axis, from 0 for the smallest; of equal ones the first."""
    return jnp.argsort(jnp.argsort(x, -1, stable=True), -1, stable=True)


def inverse_factor(gram_II: Array, damping: float = 0.01) -> tuple[Array, Array]:
    """The upper Cholesky factor of the inverse of the damped Hessian `XᵀX`, float32, and which inputs are always 0.

    To the diagonal a share of its mean is added, `damping`. A dead input has 1 on it.
    """
    H = gram_II.astype(jnp.float32)
    diagonal = jnp.diagonal(H)
    dead_I = diagonal == 0
    H = H + jnp.diag(jnp.where(dead_I, 1.0, 0.0) + damping * jnp.mean(diagonal))
    lower = jnp.linalg.cholesky(H)
    eye = jnp.eye(len(H), dtype=H.dtype)
    half = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
    inverse = jnp.matmul(half.T, half, precision=_EXACT)
    return jnp.linalg.cholesky(inverse).T, dead_I


def sparsegpt(w_OI: Array, gram_II: Array, to: Target, block: int = 128, damping: float = 0.01) -> Array:
    """The matrix with zeros, its other weights moved so that its outputs change least; float32.

    Inputs are gone through one by one. A weight that becomes zero leaves an error, which the inputs that are still to
    come take over as the inverse Hessian says; which become zero is chosen block by block, by w² / [H⁻¹]² (SparseGPT,
    Frantar & Alistarh, 2023, https://arxiv.org/abs/2301.00774).

    Args:
      w_OI: the matrix.
      gram_II: `XᵀX` of what it is multiplied by.
      to: the target.
      block: inputs of a block; made a multiple of m.
      damping: see `inverse_factor`; more, and said, where that leaves the Hessian singular in float32.
    """
    upper_II, dead_I = inverse_factor(gram_II, damping)
    while not bool(jnp.isfinite(upper_II).all()) and damping < 1:
        damping *= 10
        log.warn(f"SparseGPT: XᵀX is singular; {damping:g} of its mean is added to its diagonal")
        upper_II, dead_I = inverse_factor(gram_II, damping)
    block = max(block - block % to.m, to.m) if to.m else block
    w_OI = jnp.where(dead_I, 0.0, w_OI.astype(jnp.float32))
    for start in range(0, w_OI.shape[1], block):
        size = min(block, w_OI.shape[1] - start)
        w_OI = _block(w_OI, upper_II, start, round(to.share * w_OI.shape[0] * size), size, to.n, to.m)
    return w_OI


@functools.partial(jax.jit, static_argnames=("size", "n", "m"))
def _block(w_OI: Array, upper_II: Array, start: Array, count: Array, size: int, n: int, m: int) -> Array:
    """One block pruned, and what comes after it moved; `count` weights go, or all but n of m."""
    upper_BI = jax.lax.dynamic_slice_in_dim(upper_II, start, size)
    upper_BB = jax.lax.dynamic_slice_in_dim(upper_BI, start, size, 1)
    w_OB = jax.lax.dynamic_slice_in_dim(w_OI, start, size, 1)
    diagonal_B = jnp.diagonal(upper_BB)
    mask_OB = jnp.ones_like(w_OB, bool)
    if not m:
        mask_OB = (_ranks(((w_OB / diagonal_B) ** 2).reshape(-1)) >= count).reshape(w_OB.shape)

    def one(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        w_OB, mask_OB, error_OB = carry
        if m:  # chosen when the first of the m is reached, by what it is by then

            def choose(mask_OB: Array) -> Array:
                w_Om = jax.lax.dynamic_slice_in_dim(w_OB, i, m, 1)
                score_Om = (w_Om / jax.lax.dynamic_slice_in_dim(diagonal_B, i, m)) ** 2
                return jax.lax.dynamic_update_slice_in_dim(mask_OB, _ranks(score_Om) >= m - n, i, 1)

            mask_OB = jax.lax.cond(i % m == 0, choose, lambda same: same, mask_OB)
        error_O = jnp.where(mask_OB[:, i], 0.0, w_OB[:, i]) / diagonal_B[i]
        w_OB = w_OB - error_O[:, None] * upper_BB[i]
        return w_OB, mask_OB, error_OB.at[:, i].set(error_O)

    w_OB, mask_OB, error_OB = jax.lax.fori_loop(0, size, one, (w_OB, mask_OB, jnp.zeros_like(w_OB)))
    later_BI = jnp.where(jnp.arange(w_OI.shape[1]) >= start + size, upper_BI, 0.0)
    w_OI = w_OI - jnp.matmul(error_OB, later_BI, precision=_EXACT)
    return jax.lax.dynamic_update_slice_in_dim(w_OI, jnp.where(mask_OB, w_OB, 0.0), start, 1)


def refit(w_OI: Array, gram_II: Array, keep_I: Array, damping: float = 0.01) -> Array:
    """The matrix with zeros in the inputs that go, the others fitted by least squares to its former outputs; float32.

    `W G[:, kept] (G[kept, kept] + λ)⁻¹`, with λ a share of the mean of the diagonal; what is ridged is the change, so
    nothing moves where nothing goes.
    """
    w_OI, G = w_OI.astype(jnp.float32), gram_II.astype(jnp.float32)
    gone_OI = jnp.where(keep_I, 0.0, w_OI)
    ridge = damping * jnp.mean(jnp.diagonal(G)) + jnp.where(jnp.diagonal(G) == 0, 1.0, 0.0)
    system_II = jnp.where(keep_I[:, None] & keep_I, G, 0.0) + jnp.diag(jnp.where(keep_I, ridge, 1.0))
    wanted_OI = jnp.where(keep_I, jnp.matmul(gone_OI, G, precision=_EXACT), 0.0)
    moved_IO = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(system_II), wanted_OI.T)
    return jnp.where(keep_I, w_OI + moved_IO.T, 0.0)


def output_error(w_OI: Array, new_OI: Array, gram_II: Array) -> Array:
    """`‖(W − W') X‖²` over all tokens, float32."""
    d_OI = w_OI.astype(jnp.float32) - new_OI.astype(jnp.float32)
    return (jnp.matmul(d_OI, gram_II, precision=_EXACT) * d_OI).sum()
