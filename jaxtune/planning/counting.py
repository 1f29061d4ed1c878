"""Useful floating-point operations of training, by rule: what the mathematics needs, however it is computed.

For each weight that multiplies and each token: 2 forward; 2 for the gradient of its input, where anything trains at or
below it; 2 for its own gradient, where it trains. That is 6·P for full tuning, 4·P for LoRA, and 2·P for layers
below all that trains (Kaplan et al., 2020, https://arxiv.org/abs/2001.08361, count the first). A looked-up table counts
nothing, an expert only for the tokens that it gets. Attention is causal over the whole row, within its window: 4·H·N
for each key that a query sees, and twice that backward. What remat computes again is not counted, so a utilisation by
these numbers (MFU, Chowdhery et al., 2022) compares across ways to compute.

Dimensions: T time, N query heads, H head dim, P numbers of a matrix.
"""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune.blueprint import Blueprint
from jaxtune.layers import Weight, is_weight
from jaxtune.models.decoder import DecoderConfig
from jaxtune.tuning.method import FROZEN
from jaxtune.weights import is_node, path_name

_GROUP = re.compile(r"^layers_(\d+)-(\d+)/")


class Count(NamedTuple):
    """Operations for one token."""

    forward: float
    inputs: float  # gradients of what matrices multiply
    weights: float  # gradients of matrices
    attention: float  # scores and their products with values, forward and backward

    @property
    def total(self) -> float:
        return sum(self)


def flops_per_token(job_or_blueprint: Any, length: int) -> float:
    """Useful operations for one token of rows of `length` tokens, forward and backward.

    `job_or_blueprint` is a `job.Job` or a `blueprint.Blueprint`; of a job, a live teacher's forward pass counts too.
    """
    return count(job_or_blueprint, length).total


def count(job_or_blueprint: Any, length: int) -> Count:
    """The same by what they are for."""
    b: Blueprint = getattr(job_or_blueprint, "blueprint", job_or_blueprint)
    if (teacher := getattr(job_or_blueprint, "teacher", None)) is not None and teacher.live:
        own, its = count(b, length), count(teacher.blueprint, length)
        return own._replace(forward=own.forward + its.forward, attention=own.attention + its.attention)
    labels = {path_name(p): found for p, found in jax.tree_util.tree_leaves_with_path(b.labels)}
    plain = {path_name(p): w for p, w in jax.tree_util.tree_leaves_with_path(b.plain, is_leaf=is_weight)}
    lowest = _lowest(labels)
    forward = inputs = weights = 0.0
    for path, w in jax.tree_util.tree_leaves_with_path(b.weights, is_leaf=lambda x: is_node(x) or is_weight(x)):
        name = path_name(path)
        for leaf, size in _products(b.decoder, name, w, plain[name]):
            forward += 2 * size
            inputs += 2 * size * _above(name, lowest)
            weights += 2 * size * (labels.get(leaf, FROZEN) != FROZEN)
    attention = sum(x * (3 if i >= lowest else 1) for i, x in enumerate(_attention(b.decoder, length)))
    return Count(forward, inputs, weights, attention)


def seen(length: int, window: int) -> float:
    """How many keys a query sees on average, itself included; a window of 0 is no bound.

    >>> seen(4, 0), seen(4, 2)
    (2.5, 1.75)
    """
    return float(np.minimum(np.arange(1, length + 1), window or length).mean())


def seen_share(d: DecoderConfig, length: int) -> float:
    """The share of all keys of a row that a query sees, over queries and layers."""
    return sum(seen(length, w) for w in d.windows or (0,)) / len(d.windows or (0,)) / length


def _attention(d: DecoderConfig, length: int) -> list[float]:
    """Forward operations of each layer's attention, for one token."""
    windows = d.windows or (0,)
    return [4.0 * d.heads * d.head * seen(length, windows[i % len(windows)]) for i in range(d.layers)]


def _products(d: DecoderConfig, name: str, w: Any, plain: Weight) -> list[tuple[str, float]]:
    """The matrices of a weight by path, with how many of their numbers multiply a token."""
    looked_up = name.startswith("embed_tokens/")
    if (looked_up and not d.tied) or plain.n_in == 0:
        return []
    share = d.top_k / d.experts if "expert" in plain.names else 1.0
    out: list[tuple[str, float]] = []
    inner, path = w, name
    while is_node(inner) and getattr(inner, "base", None) is not None:
        inner, path = inner.base, f"{path}/base"
    out.append((path, plain.value.size * share))  # a quantised one is held as codes, but the matrix multiplies
    if inner is not w and not looked_up:
        for own, leaf in jax.tree_util.tree_leaves_with_path(w, is_leaf=is_weight):
            if is_weight(leaf) and leaf.n_in and not path_name(own).startswith("base"):
                out.append((f"{name}/{path_name(own)}", leaf.value.size * share))
    return out


def _lowest(labels: dict[str, str]) -> float:
    """The lowest layer in which something trains: -1 for what stands before all, infinite for the head alone."""
    found = np.inf
    for name, label in labels.items():
        if label == FROZEN:
            continue
        if m := _GROUP.match(name):
            found = min(found, int(m[1]))
        elif name.startswith("embed_tokens/"):
            found = -1
    return found


def _above(name: str, lowest: float) -> bool:
    """Whether the backward pass goes through this weight on its way down."""
    m = _GROUP.match(name)
    return bool(np.isfinite(lowest)) if m is None else int(m[2]) >= lowest and int(m[1]) >= lowest
