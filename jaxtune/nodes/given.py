"""Embeddings that are given instead of looked up: to differentiate with respect to them, and to replace some.

Dimensions: B batch, T time, D embed.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxtune.nodes.soft_prompt import Prefix, SoftPrompt
from jaxtune.weights import Array, Node, apply, densify, node, take

Tree = Any


@node
class Given(Node):
    """A table that gives these rows, whatever it is asked for. As a head it is what it stands upon."""

    base: Any
    x_BTD: Any


@take.register
def _(w: Given, ids: Array, dtype: Any) -> Array:
    return w.x_BTD.astype(dtype)


@apply.register
def _(w: Given, eqn: str, x: Array) -> Array:
    return apply(w.base, eqn, x)


@densify.register
def _(w: Given) -> Any:
    return densify(w.base)


def looked_up(weights: Tree, ids_T: Array) -> Array:
    """The embeddings of tokens, float32 `[T, D]`, as a decoder's table gives them; those of virtual tokens are not in
    it, and any row stands for them."""
    table = _text(weights["embed_tokens"]["weight"])
    return take(table, jnp.minimum(ids_T, table.shape[0] - 1), jnp.float32)


def given(weights: Tree, x_BTD: Array) -> Tree:
    """A decoder's weights with the embeddings of its text given; those of virtual tokens stay as they are."""
    table = weights["embed_tokens"]
    return {**weights, "embed_tokens": {**table, "weight": _upon(table["weight"], x_BTD)}}


def _upon(table: Any, x_BTD: Array) -> Any:
    if isinstance(table, SoftPrompt | Prefix):
        return dataclasses.replace(table, base=_upon(table.base, x_BTD))
    return Given(table, x_BTD)


def _text(table: Any) -> Any:
    return _text(table.base) if isinstance(table, SoftPrompt | Prefix) else table
