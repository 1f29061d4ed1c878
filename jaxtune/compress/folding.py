"""Scales of a layer's inputs folded into what makes these inputs: the layer computes what it did before.

Matrices that share an input are multiplied by a scale for each input; the norm before them, the values' matrix or the
up matrix is divided by it. Activations whose magnitudes differ much are evened out so (SmoothQuant), and the weights
that matter most are rounded finer (AWQ).

Dimensions: O outputs and I inputs of a matrix.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxtune.models.decoder import NORMS, DecoderConfig
from jaxtune.weights import Array

Tree = Any


class Seam(NamedTuple):
    """Matrices of a layer that share an input, and what makes it: a norm, or a matrix whose outputs it scales."""

    source: str  # such as "input_layernorm" or "mlp/up_proj"
    matrices: tuple[str, ...]


def seams(c: DecoderConfig, norms_only: bool = False) -> list[Seam]:
    """Where scales of a layer's inputs can be folded, in the order of computation.

    Not before matrices that read the residual stream bare (norms "post"), and not between values and the output matrix
    where several query heads share a head of values, or are one matrix with them.
    """
    names, found = NORMS[c.norms], []
    if names.attention_in:
        qkv = ("qkv_proj",) if c.fused else ("q_proj", "k_proj", "v_proj")
        found.append(Seam(names.attention_in, tuple(f"self_attn/{n}" for n in qkv)))
    if c.heads == c.kv_heads and not c.fused and not norms_only:
        found.append(Seam("self_attn/v_proj", ("self_attn/o_proj",)))
    if names.mlp_in:
        gate_up = ("gate_up_proj",) if c.fused else ("gate_proj", "up_proj")
        found.append(Seam(names.mlp_in, tuple(f"mlp/{n}" for n in gate_up)))
    if not norms_only:
        found.append(Seam("mlp/gate_up_proj" if c.fused else "mlp/up_proj", ("mlp/down_proj",)))
    return found


def matrix(layer: Tree, name: str, inputs: int) -> Array:
    """A layer's matrix by name, such as "mlp/up_proj", as `[O, I]`."""
    return module(layer, name)["weight"].reshape(inputs, -1).T


def module(layer: Tree, name: str) -> Tree:
    """The part of a layer that a name says."""
    for part in name.split("/"):
        layer = layer[part]
    return layer


def with_weight(layer: Tree, name: str, value: Array, leaf: str = "weight") -> Tree:
    """The layer with another weight, in the shape and dtype of the old."""
    head, _, rest = name.partition("/")
    if rest:
        return {**layer, head: with_weight(layer[head], rest, value, leaf)}
    old = layer[head][leaf]
    return {**layer, head: {**layer[head], leaf: value.reshape(old.shape).astype(old.dtype)}}


def put(layer: Tree, name: str, w_OI: Array) -> Tree:
    """The layer with a matrix, given as `[O, I]`, instead of its own."""
    return with_weight(layer, name, w_OI.T)


def fold(c: DecoderConfig, layer: Tree, seam: Seam, scale_I: Array) -> Tree:
    """The layer with the matrices of a seam multiplied by a scale for each input, and their source divided by it."""
    n_in = scale_I.shape[0]
    for name in seam.matrices:
        layer = put(layer, name, matrix(layer, name, n_in).astype(jnp.float32) * scale_I)
    source = module(layer, seam.source)
    for leaf, w in source.items():
        layer = with_weight(layer, seam.source, _divided(c, seam.source, leaf, w, scale_I), leaf)
    return layer


def _divided(c: DecoderConfig, source: str, leaf: str, w: Array, scale_I: Array) -> Array:
    """A source's weight or bias, its outputs divided."""
    x = w.astype(jnp.float32)
    if not source.endswith("_proj"):
        return (x + c.norm_around_one) / scale_I - c.norm_around_one
    if not c.fused:  # the outputs are the last axes
        return (x.reshape(-1, scale_I.shape[0]) / scale_I).reshape(w.shape)
    up = x[..., 1, :] / scale_I  # gate and up in one
    return jnp.stack([x[..., 0, :], up], -2)


def shared_inputs(c: DecoderConfig) -> Sequence[tuple[str, ...]]:
    """All of a layer's matrices, those with the same input together."""
    if c.fused:
        return [("self_attn/qkv_proj",), ("self_attn/o_proj",), ("mlp/gate_up_proj",), ("mlp/down_proj",)]
    qkv, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    return [
        tuple(f"self_attn/{n}" for n in qkv),
        ("self_attn/o_proj",),
        tuple(f"mlp/{n}" for n in mlp),
        ("mlp/down_proj",),
    ]
