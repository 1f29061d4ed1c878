"""Layers as the stages of a pipeline (GPipe, Huang et al., 2019, https://arxiv.org/abs/1811.06965).

Each stage holds its share of the layers. The rows go through in micro-batches: at a tick every stage runs its layers on
the micro-batch that it has, all stages at once (a `vmap` over an axis that the mesh splits), then hands it on to the
next (a roll of that axis: a collective permute). The first and last ticks find some stages empty: of M micro-batches
through S stages (S - 1) / (M + S - 1) of the time is lost.

Dimensions: S stages, M micro-batches, B batch, b rows of a micro-batch, T time, D embed, L layers, l layers of a stage.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtune.errors import UserError
from jaxtune.layers import BATCH_AXES, time_axis
from jaxtune.weights import Array

STAGE = "stage"
_PER_STAGE = 4  # micro-batches at most, for each stage: a fifth of the time is lost then


def stages() -> int:
    """How many stages the mesh has; 1 is no pipeline."""
    return jax.sharding.get_abstract_mesh().shape.get(STAGE, 1)


def check(stages: int, layers: int, groups: int, experts: int) -> None:
    """Look for what a pipeline cannot hold.

    Raises:
      UserError: it cannot.
    """
    if layers % stages:
        fit = [n for n in range(2, layers + 1) if layers % n == 0]
        near = min(fit, key=lambda n: abs(n - stages))
        raise UserError(f"mesh.stage={stages}: {layers} layers do not divide over the stages; mesh.stage={near} would")
    if groups > 1:
        raise UserError(
            f"mesh.stage={stages}: layers that train and layers that do not make {groups} groups, and a pipeline takes "
            "one; tune all layers alike, or leave mesh.stage out"
        )
    if experts:
        raise UserError(f"mesh.stage={stages}: a mixture of experts has no stages; take mesh.expert")


def micro_batches(rows: int, stages: int) -> int:
    """How many micro-batches the rows of one device make.

    >>> micro_batches(8, 2), micro_batches(32, 2), micro_batches(6, 4), micro_batches(1, 2)
    (8, 8, 6, 1)
    """
    return max(m for m in range(1, _PER_STAGE * stages + 1) if rows % m == 0)


Layer = Callable[[Any, Array, Any, Any], Array]


def run(layer: Layer, weights_L: Any, x_BTD: Array, own_L: Any, rest_B: Any) -> Array:
    """`x = layer(weights, x, own, rest)` for one layer after the other, stage by stage, `[B, T, D]`.

    Args:
      layer: of one layer and some rows.
      weights_L: its weights; every leaf has the layer axis in front.
      x_BTD: the input of the first.
      own_L: what else a layer has of its own, likewise.
      rest_B: what is the same for all layers; every leaf has the batch axis in front.
    """
    mesh, S, B = jax.sharding.get_abstract_mesh(), stages(), x_BTD.shape[0]
    axes = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
    shards = math.prod(mesh.shape[a] for a in axes)
    if B % shards:
        axes, shards = (), 1
    M = micro_batches(B // shards, S)
    place = PartitionSpec(STAGE, axes, time_axis(x_BTD.shape[1]), None)

    def split(x_B: Array) -> Array:  # neighbouring rows into different micro-batches: none leaves its device
        return jnp.moveaxis(x_B.reshape(B // M, M, *x_B.shape[1:]), 1, 0)

    def stage(mine_l: Any, x_bTD: Array, rest_b: Any, micro: Array) -> Array:
        def one(x_bTD: Array, mine: Any) -> tuple[Array, None]:
            weights, own = mine
            weights = jax.tree.map(lambda a: jax.random.fold_in(a, micro) if _is_key(a) else a, weights)
            return layer(weights, x_bTD, own, rest_b), None

        return jax.lax.scan(one, x_bTD, mine_l)[0]

    mine_Sl = jax.tree.map(lambda a: a.reshape(S, -1, *a.shape[1:]), (weights_L, own_L))
    x_MbTD, rest_Mb = split(x_BTD), jax.tree.map(split, rest_B)

    def tick(x_SbTD: Array, t: Array) -> tuple[Array, Array]:
        micro_S = jnp.clip(t - jnp.arange(S), 0, M - 1)  # an empty stage computes on zeros, which nobody reads
        rest_Sb = jax.tree.map(lambda a: a[micro_S], rest_Mb)
        x_SbTD = jax.vmap(stage, spmd_axis_name=STAGE)(mine_Sl, x_SbTD, rest_Sb, micro_S)
        new_SbTD = jnp.roll(x_SbTD, 1, 0).at[0].set(x_MbTD[jnp.minimum(t + 1, M - 1)])
        return jax.lax.with_sharding_constraint(new_SbTD, place), x_SbTD[-1]

    start = jnp.zeros((S, *x_MbTD.shape[1:]), x_BTD.dtype).at[0].set(x_MbTD[0])
    out = jax.lax.scan(tick, jax.lax.with_sharding_constraint(start, place), jnp.arange(M + S - 1))[1]
    return jnp.moveaxis(out[S - 1 :], 0, 1).reshape(x_BTD.shape)


def _is_key(a: Any) -> bool:
    return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)
