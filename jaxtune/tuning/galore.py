"""GaLore: every weight trains, and the optimiser sees matrices' gradients at a low rank (Zhao et al., 2024).

Dimensions: X layers, and experts, that a leaf holds; S the shorter side of a matrix, O the longer, R the rank.
"""

import dataclasses
import re
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.config import Galore
from jaxtune.errors import UserError
from jaxtune.layers import Weight, is_weight, plain_names
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning.lora import targetable
from jaxtune.tuning.method import TRAIN, Method, Training, covering, decoder_names, leave
from jaxtune.weights import Array, path_name

Tree = Any


def method(tuning: Galore, decoder: DecoderConfig, training: Training) -> Method:
    """Everything trains; the gradients of the matrices that `tuning.targets` names are projected.

    Raises:
      UserError: a pattern matches nothing, or some layers of a module and not others.
    """
    listed = [tuning.targets] if isinstance(tuning.targets, str) else tuning.targets
    patterns = [r"^layers/"] if tuning.targets == "all-linear" else listed
    names = [n.removesuffix("/weight") for n in decoder_names(decoder) if targetable(n)]
    covering(patterns, names, "tuning.targets")
    mine = {n for n in names if any(re.search(p, n) for p in patterns)}

    def matrix(path: tuple, w: Weight) -> "_Matrix | None":
        plain = [n.removesuffix("/weight") for n in plain_names(path_name(path))]
        if not mine & set(plain):
            return None
        if other := set(plain) - mine:
            raise UserError(
                f"tuning.targets matches {min(mine & set(plain))} and not {min(other)}: GaLore projects a module in "
                "all layers or in none; leave the layer out of the pattern"
            )
        shape = w.value.shape
        return _Matrix(shape, prod(shape[w.lead : w.lead + w.n_in]), prod(shape[w.lead + w.n_in :]), tuning.rank)

    def within(tx: optax.GradientTransformation, weights: Tree) -> optax.GradientTransformation:
        leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_weight)
        matrices = {path_name(p): found for p, w in leaves if (found := matrix(p, w)) is not None}
        return projected(tx, matrices, tuning.every, tuning.scale)

    return Method(leave, [("", TRAIN)], within=within)


@dataclasses.dataclass(frozen=True)
class _Matrix:
    """How a leaf is piled-up matrices."""

    shape: tuple[int, ...]
    into: int
    outof: int
    wanted: int  # rank

    @property
    def short(self) -> int:
        return min(self.into, self.outof)

    @property
    def rank(self) -> int:
        return min(self.wanted, self.short)

    @property
    def count(self) -> int:
        return prod(self.shape) // (self.into * self.outof)

    def low(self) -> tuple[int, int, int]:
        return self.count, self.rank, max(self.into, self.outof)

    def flat(self, g: Array) -> Array:
        """`[X, S, O]`, float32."""
        g_XIO = g.astype(jnp.float32).reshape(-1, self.into, self.outof)
        return g_XIO if self.into <= self.outof else g_XIO.swapaxes(1, 2)

    def back(self, u_XSO: Array) -> Array:
        return (u_XSO if self.into <= self.outof else u_XSO.swapaxes(1, 2)).reshape(self.shape)


class GaloreState(NamedTuple):
    """The projections by path, and the state of the optimiser that sees what they leave."""

    step: Array
    projection: dict[str, Array]  # [X, S, R]
    inner: Any


def projected(
    tx: optax.GradientTransformation, matrices: dict[str, Any], every: int, scale: float
) -> optax.GradientTransformation:
    """`tx` on gradients of low rank: `u = scale · P tx(Pᵀ g)`, and on all else as it is.

    P are the R left singular vectors of the gradient with the largest singular values, of its shorter side, taken anew
    every few steps; the moments stay. They are eigenvectors of `g gᵀ`: the same, for less work.

    Args:
      tx: acts on each number by itself and looks at no weights.
      matrices: by path, which leaves are matrices and how.
      every: steps between two projections.
      scale: of projected updates.
    """

    def init(params: Tree) -> GaloreState:
        projection = {n: jnp.zeros((m.count, m.short, m.rank)) for n, m in matrices.items()}
        low = _each(lambda m, p: jnp.zeros(m.low()), matrices, params)
        return GaloreState(jnp.zeros([], jnp.int32), projection, tx.init(low))

    def update(grads: Tree, state: GaloreState, params: Tree = None) -> tuple[Tree, GaloreState]:
        due = state.step % every == 0
        projection: dict[str, Array] = {}

        def down(path: tuple, g: Array) -> Array:
            if (m := matrices.get(name := path_name(path))) is None:
                return g
            g_XSO, old_XSR = m.flat(g), state.projection[name]
            p_XSR = jax.lax.cond(due, lambda: _principal(g_XSO, m.rank), lambda: old_XSR)
            projection[name] = p_XSR
            return jnp.einsum("xsr,xso->xro", p_XSR, g_XSO, precision="highest")

        low, inner = tx.update(jax.tree_util.tree_map_with_path(down, grads), state.inner)

        def up(path: tuple, u: Array) -> Array:
            if (m := matrices.get(name := path_name(path))) is None:
                return u
            return m.back(scale * jnp.einsum("xsr,xro->xso", projection[name], u, precision="highest"))

        updates = jax.tree_util.tree_map_with_path(up, low)
        return updates, GaloreState(state.step + 1, projection, inner)

    return optax.GradientTransformation(init, update)


def _each(f: Any, matrices: dict[str, Any], tree: Tree) -> Tree:
    """`f` on the leaves that are matrices; the others stay."""

    def one(path: tuple, x: Array) -> Array:
        m = matrices.get(path_name(path))
        return x if m is None else f(m, x)

    return jax.tree_util.tree_map_with_path(one, tree)


def _principal(g_XSO: Array, rank: int) -> Array:
    """The leading left singular vectors `[X, S, R]`, one matrix at a time."""

    def one(g_SO: Array) -> Array:
        g_SO = g_SO / jnp.maximum(jnp.abs(g_SO).max(), jnp.finfo(jnp.float32).tiny)  # whose square is no underflow
        return jnp.linalg.eigh(jnp.matmul(g_SO, g_SO.T, precision="highest"))[1][:, -rank:]

    return jax.lax.map(one, g_XSO)
