"""Averages of the weights over the steps: they are measured and exported in place of the last weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxtune.errors import UserError

Tree = Any


class AverageState(NamedTuple):
    """The optimiser's state, and the moving average of the weights in float32."""

    mean: Tree
    inner: Any


def averaging(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`tx`, and a moving average of the weights that it makes: `mean ← decay · mean + (1 - decay) · weights`.

    It starts as the weights that the run starts from, so after few steps it is near those. With a decay of 0 `tx`.

    Raises:
      UserError: at `init`, `tx` averages by itself.
    """
    if not decay:
        return tx

    def init(params: Tree) -> AverageState:
        inner = tx.init(params)
        if _schedule_free(inner):
            raise UserError("train.ema: schedule_free averages by itself; leave train.ema out")
        # a copy, for both may be donated
        return AverageState(jax.tree.map(lambda w: jnp.array(w, jnp.float32, copy=True), params), inner)

    def update(grads: Tree, state: AverageState, params: Tree = None) -> tuple[Tree, AverageState]:
        updates, inner = tx.update(grads, state.inner, params)
        new = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda m, w: decay * m + (1 - decay) * w.astype(m.dtype), state.mean, new)
        return updates, AverageState(mean, inner)

    return optax.GradientTransformation(init, update)


def averaged(state: Any, trainable: Tree) -> Tree:
    """The weights to measure and to export: the optimiser's average where it keeps one, else `trainable` itself.

    They lie where `trainable` does, also where the optimiser's state is offloaded. For arrays, outside of `jax.jit`.
    """

    def near(tree: Tree) -> Tree:
        return jax.tree.map(lambda m, w: jax.device_put(m, w.sharding), tree, trainable)

    if isinstance(state, AverageState):
        return jax.tree.map(lambda m, w: m.astype(w.dtype), near(state.mean), trainable)
    if found := _schedule_free(state):
        return contrib.schedule_free_eval_params(found[0]._replace(z=near(found[0].z)), trainable)
    return trainable


def _schedule_free(state: Any) -> list[Any]:
    def is_free(x: Any) -> bool:
        return isinstance(x, contrib.ScheduleFreeState)

    return [s for s in jax.tree.leaves(state, is_leaf=is_free) if is_free(s)]
