"""What the matrices of a model are multiplied by, layer after layer, over some rows of text.

A layer is seen, changed, and gone through again before the next one is looked at, so each is fitted to what the changed
layers before it really give (as GPTQ and SparseGPT do). No more than one layer's insides are held, and of these only
sums: `XᵀX` says all that a quadratic error of a layer's output needs.

Dimensions: B batch, T time, D embed, I inputs of a matrix, M tokens.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.inside import Layers
from jaxtune.weights import Array

Tree = Any


class Stats(NamedTuple):
    """Sums over the tokens that a matrix was multiplied by, float32; padding is left out."""

    gram_II: Array  # XᵀX
    absolute_I: Array  # sum of |x|
    largest_I: Array  # greatest |x|
    tokens: Array  # M

    @property
    def norms(self) -> Array:
        """‖x‖₂ of each input over all tokens, `[I]`."""
        return jnp.sqrt(jnp.diagonal(self.gram_II))


Visit = Callable[[int, Tree, Mapping[str, Stats]], Tree]


def through(decoder: DecoderConfig, weights: Tree, batches: Iterable[Mapping[str, Any]], visit: Visit) -> Tree:
    """Go through the layers; what `visit` gives stands in the place of each, before the next one is seen.

    Args:
      decoder: of the model.
      weights: its weights, layers stacked in the decoder's groups.
      batches: columns `ids_BT`, `segment_BT`, `position_BT`, each batch of one shape; all of their hidden states are
        held.
      visit: from a layer's number, its weights without the layer axis, and the sums of each of its matrices, by name
        such as "self_attn/q_proj", to its new weights; those of one group have to be of one form.

    Returns: the weights with the new layers.
    """
    layers = Layers(decoder)
    columns = [{k: jnp.asarray(b[k]) for k in ("ids_BT", "segment_BT", "position_BT")} for b in batches]
    first, seen, run = _programs(decoder)
    hidden = [first(weights, b) for b in columns]
    new = []
    for i in range(decoder.layers):
        layer = layers.one(weights, i)
        sums = None
        for x_BTD, batch in zip(hidden, columns, strict=True):
            here = seen(i, layer, x_BTD, batch)
            sums = here if sums is None else _added(sums, here)
        new.append(visit(i, layer, sums or {}))
        hidden = [run(i, new[-1], x_BTD, b) for x_BTD, b in zip(hidden, columns, strict=True)]
    return layers.together(weights, new)


@functools.lru_cache(4)
def _programs(decoder: DecoderConfig) -> tuple[Callable[..., Any], ...]:
    """What goes into the first layer, what a layer's matrices see, and what it gives; compiled once for all passes."""
    layers = Layers(decoder)
    return jax.jit(layers.first), jax.jit(_seen(layers)), jax.jit(lambda *a: layers.layer(*a)[0])


def _seen(layers: Layers) -> Callable[..., dict[str, Stats]]:
    def seen(i: Array, weights: Tree, x_BTD: Array, batch: Mapping[str, Array]) -> dict[str, Stats]:
        return {n: stats(x, batch["segment_BT"] > 0) for n, x in layers.layer(i, weights, x_BTD, batch)[1].items()}

    return seen


def stats(x_BTI: Array, real_BT: Array) -> Stats:
    """The sums of one batch.

    >>> stats(jnp.array([[[1.0, -2.0], [9.0, 9.0]]]), jnp.array([[True, False]])).gram_II.tolist()
    [[1.0, -2.0], [-2.0, 4.0]]
    """
    x_MI = jnp.where(real_BT[..., None], x_BTI, 0).astype(jnp.float32).reshape(-1, x_BTI.shape[-1])
    gram_II = jnp.matmul(x_MI.T, x_MI, precision=jax.lax.Precision.HIGHEST)
    return Stats(gram_II, jnp.abs(x_MI).sum(0), jnp.abs(x_MI).max(0), real_BT.sum())


def _added(a: Mapping[str, Stats], b: Mapping[str, Stats]) -> dict[str, Stats]:
    return {
        n: Stats(
            a[n].gram_II + b[n].gram_II,
            a[n].absolute_I + b[n].absolute_I,
            jnp.maximum(a[n].largest_I, b[n].largest_I),
            a[n].tokens + b[n].tokens,
        )
        for n in a
    }
