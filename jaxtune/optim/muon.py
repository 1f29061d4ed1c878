"""Muon: momentum whose matrices are made orthogonal (Jordan, 2024; at scale: Liu et al., 2025)."""

from math import prod
from typing import Any

import jax
import optax
from optax import contrib

from jaxtune.layers import Weight, is_weight
from jaxtune.optim.groups import is_matrix
from jaxtune.weights import Array, path_name

Tree = Any
_RMS = 0.2  # of an update's numbers, about as AdamW's, so that learning rates carry over (Liu et al., 2025, eq. 4)


def scale_by_muon(weights: Tree, rest: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon on the layers' matrices, and `rest` on vectors, embeddings and head.

    Layers and experts are matrices of their own, and several input or output axes are one. Momentum is Nesterov's,
    0.95, with five Newton-Schulz iterations. Updates are scaled by 0.2 · √max(in, out).

    Args:
      weights: abstract `Weight`s of what trains; adapters' factors count as matrices.
      rest: for all else.
    """

    def numbers(path: tuple, w: Weight) -> Any:
        if not (is_matrix(w) and path_name(path).startswith("layers_")):
            return optax.MaskedNode()
        axes = tuple(range(len(w.names)))
        return contrib.MuonDimensionNumbers(axes[w.lead : w.lead + w.n_in], axes[w.lead + w.n_in :])

    def is_numbers(x: Any) -> bool:
        return isinstance(x, contrib.MuonDimensionNumbers | optax.MaskedNode)

    def rescaled(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(lambda u, d: u * (_RMS * max(_sizes(u, d)) ** 0.5), updates, dimensions)

    dimensions = jax.tree_util.tree_map_with_path(numbers, weights, is_leaf=is_weight)
    labels = jax.tree.map(
        lambda d: "rest" if isinstance(d, optax.MaskedNode) else "muon", dimensions, is_leaf=is_numbers
    )
    muon = optax.chain(contrib.scale_by_muon(weight_dimension_numbers=dimensions), optax.stateless(rescaled))
    return optax.partition({"muon": muon, "rest": rest}, labels)


def _sizes(x: Array, numbers: contrib.MuonDimensionNumbers) -> tuple[int, int]:
    """How many numbers go into a matrix and come out of it."""
    into, out = (prod(x.shape[i] for i in axes) for axes in numbers)
    return into, out
