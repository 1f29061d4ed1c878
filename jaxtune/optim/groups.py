"""Learning rates and weight decay of single parameters: groups, layer-wise decay, and the method's own factors."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.config import Optim
from jaxtune.errors import UserError
from jaxtune.layers import Weight, is_weight, plain_names
from jaxtune.tuning.method import covering, named
from jaxtune.weights import path_name

Tree = Any
_LAYER = re.compile(r"^layers/(\d+)/")


def is_matrix(w: Weight) -> bool:
    """Whether a weight has inputs and outputs: the table and the head, matrices, experts', adapters' factors."""
    return 0 < w.n_in < len(w.names) - w.lead


def factors(c: Optim, weights: Tree, rates: Sequence[tuple[str, float]] = ()) -> tuple[Tree, Tree]:
    """What multiplies the learning rate, and the weight decay, of each leaf of `weights` (None where frozen).

    The factor of a parameter is the product of three. That of its group: `learning_rate` over `optim.learning_rate`.
    That of its layer, as of BEiT (Bao et al., 2021) and ELECTRA (Clark et al., 2020): with d = `optim.layer_decay` and
    L layers it is 1 for head and last norm, d^(L - i) for layer i, d^(L + 1) for the embeddings, tied ones too. And
    that of the first of `rates` whose pattern matches. Where layers that lie in one leaf differ, it is an array `[L, 1
    …]`. Decay is that of the group, else `optim.weight_decay` for matrices and 0 for the rest.

    Raises:
      UserError: a group's pattern matches nothing that trains.
    """
    leaves = jax.tree_util.tree_leaves_with_path(weights, is_leaf=lambda x: x is None or is_weight(x))
    every = [n for p, _ in leaves for n in plain_names(path_name(p))]
    trained = [n for p, w in leaves if w is not None for n in plain_names(path_name(p))]
    patterns = named([g.match for g in c.groups], tied="lm_head" not in weights)
    covering(patterns, trained, "optim.groups")
    L = 1 + max((int(m[1]) for n in every if (m := _LAYER.match(n))), default=-1)

    def rate(name: str) -> float:
        group = next((g for p, g in zip(patterns, c.groups, strict=True) if re.search(p, name)), None)
        own = 1.0 if group is None or group.learning_rate is None else group.learning_rate / c.learning_rate
        method = next((f for p, f in rates if re.search(p, name)), 1.0)
        return own * method * c.layer_decay ** _depth(name, L)

    def decay(name: str, w: Weight) -> float:
        group = next((g for p, g in zip(patterns, c.groups, strict=True) if re.search(p, name)), None)
        if group is not None and group.weight_decay is not None:
            return group.weight_decay
        return c.weight_decay if is_matrix(w) else 0.0

    def tree(of: Any) -> Tree:
        def leaf(path: tuple, w: Weight) -> Any:
            return _together([of(n, w) for n in plain_names(path_name(path))], w.value.ndim)

        return jax.tree_util.tree_map_with_path(leaf, weights, is_leaf=is_weight)

    return tree(lambda n, _: rate(n)), tree(decay)


def _depth(name: str, layers: int) -> int:
    """How far below the head a parameter is."""
    if m := _LAYER.match(name):
        return layers - int(m[1])
    return layers + 1 if name.startswith("embed_tokens/") else 0


def _together(values: list[float], ndim: int) -> Any:
    if len(set(values)) == 1:
        return values[0]
    return np.array(values, np.float32).reshape(-1, *(1,) * (ndim - 1))


def own(rates: Tree, decays: Tree, given: tuple[Tree, Tree] | None = None) -> optax.GradientTransformation:
    """Add each weight's decay to its update, and multiply by its factor: `(u + decay · w) · rate`.

    `given` are both again, as arrays that are traced: the numbers of `rates` and `decays` then only say where there is
    something to do.

    Raises:
      UserError: at `init`, factors that differ by layer do not fit the weights, of which a method trains a part.
    """
    if all(isinstance(r, float) and r == 1.0 for r in jax.tree.leaves(rates)) and not any(
        np.any(d) for d in jax.tree.leaves(decays)
    ):
        return optax.identity()

    def init(params: Tree) -> optax.EmptyState:
        sizes = {(np.shape(f), p.shape) for x in (rates, decays) for f, p in _pairs(x, params)}
        if odd := [s for s in sizes if s[0] and s[0][0] != s[1][0]]:
            raise UserError(
                f"optim.groups and optim.layer_decay cannot tell {odd[0][0][0]} layers apart of which {odd[0][1][0]} "
                "train at a time; take rates that are the same for all layers"
            )
        return optax.EmptyState()

    def one(u: jax.Array, w: jax.Array, decays: bool, rate: Any, decay: Any) -> jax.Array:
        if decays:
            u = u + jnp.asarray(decay, u.dtype) * w.astype(u.dtype)
        return u * jnp.asarray(rate, u.dtype)

    def update(updates: Tree, state: optax.EmptyState, params: Tree = None) -> tuple[Tree, optax.EmptyState]:
        return jax.tree.map(one, updates, params, jax.tree.map(np.any, decays), *(given or (rates, decays))), state

    return optax.GradientTransformation(init, update)


def _pairs(factors: Tree, params: Tree) -> list[tuple[Any, Any]]:
    pairs: list[tuple[Any, Any]] = []
    jax.tree.map(lambda p, f: pairs.append((f, p)), params, factors)
    return pairs
