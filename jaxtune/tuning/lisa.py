"""LISA: embeddings and head all the time, and a few layers that are drawn anew every few steps.

Pan et al., 2024, https://arxiv.org/abs/2403.17919. Masters and optimiser state of the layers begin anew with each draw.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import Lisa
from jaxtune.errors import UserError
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning import blocks
from jaxtune.tuning.blocks import Chooser, Seen, Stacks
from jaxtune.tuning.method import CHOSEN, FROZEN, TRAIN, Method, Training, covering, decoder_names, leave, named
from jaxtune.weights import Array

FLOOR = 0.2  # share of a draw by importance in which all layers are equally likely, so that none starves


def method(tuning: Lisa, decoder: DecoderConfig, training: Training) -> Method:
    """What `tuning.train` names trains; of the layers, `tuning.layers` drawn ones do.

    Raises:
      UserError: a pattern matches nothing, there are fewer layers, or the optimiser cannot follow.
    """
    blocks.check("lisa", training, decoder)
    patterns, names = named(tuning.train, decoder.tied), decoder_names(decoder)
    covering(patterns, names, "tuning.train")
    rest = [n for n in names if n.startswith("layers/") and not any(re.search(p, n) for p in patterns)]
    drawn_L = np.isin(np.arange(decoder.layers), [int(n.split("/")[1]) for n in rest])
    if tuning.layers > drawn_L.sum():
        raise UserError(f"tuning.layers={tuning.layers}: the model has {drawn_L.sum()} layers to draw from; lower it")
    rules = [*[(p, TRAIN) for p in patterns], ("^layers/", CHOSEN), ("", FROZEN)]
    chooser = Chooser(
        slots=lambda L: min(tuning.layers, L),
        start=lambda weights: jnp.full(decoder.layers, -1.0),  # what layers learned per parameter; −1 is not known
        watch=lambda learned_L, seen: _learned(learned_L, seen, tuning.every),
        due=lambda step: step % tuning.every == 0,
        choose=lambda learned_L, seen: _drawn(learned_L, seen, drawn_L, tuning.layers, training.train.seed),
        restart=True,
        measure=tuning.draw == "importance",
    )
    return Method(leave, rules, around=lambda tx: blocks.around(tx, rules, chooser, training.optim), choice=_layers_now)


def _learned(learned_L: Array, seen: Seen, every: int) -> Array:
    """By layer, the root mean square of what its weights moved by in its last turn, which ends now if a draw is due."""
    if not seen.moved:
        return learned_L
    squares_L = count_L = jnp.zeros(learned_L.size)
    for path, moved_S in seen.moved.items():
        w, first = seen.weights[path], blocks.layer_numbers(path)[0]
        at_S = jnp.where(seen.layers[path] < w.shape[0], first + seen.layers[path], learned_L.size)
        squares_L = squares_L.at[at_S].add(moved_S, mode="drop")
        count_L = count_L.at[at_S].add(float(w[0].size), mode="drop")
    rms_L = jnp.sqrt(squares_L / jnp.maximum(count_L, 1))
    return jnp.where((count_L > 0) & (seen.step % every == 0), rms_L, learned_L)


def odds(learned_L: Array, drawn_L: Array) -> Array:
    """How likely each layer is to be drawn first; one that has not trained yet counts as the mean of those that have.

    >>> p_L = odds(jnp.array([3.0, 1.0, -1.0, 9.0]), jnp.array([True, True, True, False]))
    >>> [round(float(p), 3) for p in p_L]
    [0.467, 0.2, 0.333, 0.0]
    """
    known_L = (learned_L >= 0) & drawn_L
    mean = jnp.sum(jnp.where(known_L, learned_L, 0)) / jnp.maximum(jnp.sum(known_L), 1)
    weight_L = jnp.where(known_L, learned_L, mean) * drawn_L
    even_L = drawn_L / jnp.sum(drawn_L)
    total = jnp.sum(weight_L)
    return jnp.where(total > 0, (1 - FLOOR) * weight_L / jnp.where(total > 0, total, 1) + FLOOR * even_L, even_L)


def _drawn(learned_L: Array, seen: Seen, drawn_L: np.ndarray, k: int, seed: int) -> Stacks:
    """k layers without replacement by their odds: the largest of log odds with Gumbel noise."""
    key = jax.random.fold_in(jax.random.key(seed), seen.step)
    score_L = jnp.log(odds(learned_L, jnp.asarray(drawn_L))) + jax.random.gumbel(key, learned_L.shape)
    _, picked_k = jax.lax.top_k(score_L, k)
    now_L = blocks.active(picked_k, learned_L.size)
    return {path: now_L[jnp.array(blocks.layer_numbers(path))] for path in seen.weights}


def _layers_now(state: object) -> dict[str, Array]:
    """1 for each layer that trains now, 0 for the others."""
    out: dict[str, Array] = {}
    for path, layers_S in blocks.found(state).layers.items():
        numbers = blocks.layer_numbers(path)
        now_L = blocks.active(layers_S, len(numbers)).astype(jnp.int32)
        out |= {f"layers/{n}": now_L[i] for i, n in enumerate(numbers)}
    return dict(sorted(out.items(), key=lambda x: int(x[0].split("/")[1])))
