"""Gradient-selected matrices: those whose gradients matter most train, within a budget, chosen anew every few steps.

It follows the line of Fisher masks (Sung et al., 2021, "Training Neural Networks with Fixed Sparse Masks",
https://arxiv.org/abs/2111.09839), with whole matrices for single numbers and a choice that is made again, as methods do
that select blocks by their gradients (AdaGradSelect, 2025). Here a *unit* is one matrix of one layer.

Dimensions: L layers of a stacked weight, S its slots, U units.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.config import GradientSelect
from jaxtune.errors import UserError
from jaxtune.layers import is_weight, plain_names
from jaxtune.models.decoder import DecoderConfig, abstract_weights
from jaxtune.tuning import blocks
from jaxtune.tuning.blocks import Chooser, Seen, Stacks
from jaxtune.tuning.lora import targetable
from jaxtune.tuning.method import CHOSEN, FROZEN, TRAIN, Method, Training, covering, decoder_names, leave, named
from jaxtune.weights import Array, path_name

SMOOTHING = 0.9  # of the scores, from step to step
_WEIGHT = "/weight"


def method(tuning: GradientSelect, decoder: DecoderConfig, training: Training) -> Method:
    """The layers' matrices are candidates, but for what `tuning.train` names, which trains all the time.

    Raises:
      UserError: a pattern matches nothing, the budget holds no matrix, or the optimiser cannot follow.
    """
    blocks.check("gradient_select", training, decoder)
    patterns, names = named(tuning.train, decoder.tied), decoder_names(decoder)
    covering(patterns, names, "tuning.train")
    units = {n for n in names if n.startswith("layers/") and targetable(n)}
    units -= {n for n in units if any(re.search(p, n) for p in patterns)}
    sizes = {n: size for n, size in _sizes(decoder).items() if n in units}
    if not sizes:
        raise UserError("tuning.train: matches all matrices of the layers, so none is left to choose; narrow it")
    least = min(sizes.values()) / sum(sizes.values())
    if tuning.budget < least:
        enough = math.ceil(least * 1e4) / 1e4
        raise UserError(f"tuning.budget={tuning.budget:g}: holds no matrix; raise it to {enough:g} or more")
    kinds = "|".join(sorted({re.escape(n.split("/", 2)[2]) for n in units}))
    rules = [*[(p, TRAIN) for p in patterns], (rf"^layers/\d+/({kinds})$", CHOSEN), ("", FROZEN)]

    def slots(L: int) -> int:
        return min(L, math.ceil(2 * tuning.budget * L))

    def choose(scores: Stacks, seen: Seen) -> Stacks:
        worth = {
            path: score_L * (1 + tuning.hysteresis * blocks.active(seen.layers[path], score_L.size))
            for path, score_L in scores.items()
        }
        return greedy(worth, {path: w[0].size for path, w in seen.weights.items()}, tuning.budget, slots)

    chooser = Chooser(
        slots=slots,
        start=lambda weights: {path: jnp.zeros(w.shape[0]) for path, w in weights.items()},
        watch=lambda scores, seen: _watched(scores, seen, tuning.score),
        due=lambda step: (step >= tuning.warmup) & ((step - tuning.warmup) % tuning.every == 0),
        choose=choose,
        restart=False,
    )
    return Method(leave, rules, around=lambda tx: blocks.around(tx, rules, chooser, training.optim), choice=_units_now)


def _sizes(decoder: DecoderConfig) -> dict[str, int]:
    """Numbers in each weight of a layer, by plain name."""
    out: dict[str, int] = {}
    for p, w in jax.tree_util.tree_leaves_with_path(abstract_weights(decoder), is_leaf=is_weight):
        plain = plain_names(path_name(p))
        out |= {name: math.prod(w.value.shape) // len(plain) for name in plain}
    return out


def _watched(scores: Stacks, seen: Seen, score: str) -> Stacks:
    """Scores per parameter, smoothed: mean squared gradient, its root, or mean |weight · gradient|."""
    out = {}
    for path, old_L in scores.items():
        g, axes = seen.grads[path].astype(jnp.float32), tuple(range(1, seen.grads[path].ndim))
        if score == "taylor":
            now_L = jnp.mean(jnp.abs(g * seen.weights[path].astype(jnp.float32)), axis=axes)
        else:
            now_L = jnp.mean(jnp.square(g), axis=axes)
            now_L = jnp.sqrt(now_L) if score == "norm" else now_L
        out[path] = SMOOTHING * old_L + (1 - SMOOTHING) * now_L
    return out


def greedy(worth: Stacks, sizes: dict[str, int], budget: float, slots: Callable[[int], int]) -> Stacks:
    """The best units, one after another, as long as they fit into the budget and into the slots of their stack.

    Args:
      worth: float32 [L] by stack.
      sizes: numbers in a layer of each stack.
      budget: share of all numbers.
      slots: of a stack of so many layers.

    >>> greedy({"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 2.0])}, {"a": 10, "b": 20}, 0.5, lambda L: L)["b"]
    Array([ True, False], dtype=bool)
    """
    one = math.gcd(*sizes.values())  # counts in units of this stay small
    stack_U = np.repeat(np.arange(len(worth)), [x.size for x in worth.values()])
    size_U = np.array([sizes[path] // one for path in worth])[stack_U]
    room = np.array([slots(x.size) for x in worth.values()], np.int32)
    order_U = jnp.argsort(-jnp.concatenate(list(worth.values())))

    def take(carry: tuple[Array, Array], unit: Array) -> tuple[tuple[Array, Array], Array]:
        left, room = carry
        size, stack = jnp.asarray(size_U, jnp.int32)[unit], jnp.asarray(stack_U)[unit]
        fits = (size <= left) & (room[stack] > 0)
        return (left - fits * size, room.at[stack].add(-fits.astype(room.dtype))), fits

    total = jnp.int32(math.floor(budget * int(size_U.sum()) + 1e-6))
    _, fits_U = jax.lax.scan(take, (total, jnp.asarray(room)), order_U)
    chosen_U = jnp.zeros(order_U.size, bool).at[order_U].set(fits_U)
    cuts = np.cumsum([x.size for x in worth.values()])[:-1].tolist()
    return dict(zip(worth, jnp.split(chosen_U, cuts), strict=True))


def _units_now(state: object) -> dict[str, Array]:
    """1 for each matrix that trains now, 0 for the others."""
    out: dict[str, Array] = {}
    for path, layers_S in blocks.found(state).layers.items():
        names = plain_names(path)
        now_L = blocks.active(layers_S, len(names)).astype(jnp.int32)
        out |= {name.removesuffix(_WEIGHT): now_L[i] for i, name in enumerate(names)}
    return out
