"""The matrices of a model rounded by a method, layer after layer.

Dimensions: O outputs and I inputs of a matrix, G groups of inputs.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.compress import awq, folding
from jaxtune.compress.calibrate import Stats, through
from jaxtune.compress.gptq import gptq
from jaxtune.compress.smooth import smoothing
from jaxtune.errors import UserError
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.inside import Layers
from jaxtune.nodes.grid import Grid, Scheme, check_group, dense, nearest
from jaxtune.weights import Array

Tree = Any
METHODS = ("rtn", "gptq", "awq", "smoothquant")
CALIBRATED = ("gptq", "awq", "smoothquant")


class How(NamedTuple):
    """A method and its settings."""

    method: str = "gptq"
    scheme: Scheme = Scheme()
    act_order: bool = False  # of GPTQ: the greatest inputs first
    damp: float = 0.01  # of GPTQ
    clip: bool = True  # of AWQ: ranges may shrink
    strength: float = 0.5  # of SmoothQuant: α


def inputs_of(c: DecoderConfig, name: str) -> int:
    """How many inputs a layer's matrix has."""
    return {"self_attn/o_proj": c.heads * c.head, "mlp/down_proj": c.mlp}.get(name, c.embed)


def names_of(c: DecoderConfig) -> list[str]:
    """A layer's matrices, such as "self_attn/q_proj"."""
    return [n for shared in folding.shared_inputs(c) for n in shared]


def check(c: DecoderConfig, s: Scheme) -> None:
    """Look whether a model's matrices can be rounded so.

    Raises:
      UserError: it has experts, or inputs do not divide into groups.
    """
    if c.experts:
        raise UserError("quantize: a mixture of experts is not quantised; take a dense model")
    for name in names_of(c):
        check_group(inputs_of(c, name), s.group, name.rpartition("/")[2])


def rounded(
    c: DecoderConfig,
    weights: Tree,
    how: How,
    batches: Iterable[Mapping[str, Any]] = (),
    said: Callable[[int], None] = lambda i: None,
) -> tuple[Tree, dict[str, Grid]]:
    """The weights with their layers' matrices rounded, and the grids by plain name, such as "layers/3/mlp/up_proj".

    Each layer is calibrated on what the rounded layers before it give. Methods that scale inputs change norms too.

    Args:
      c: of the model.
      weights: plain arrays, layers stacked in the decoder's groups.
      how: the method.
      batches: to calibrate with, as of `calibrate.through`; rounding to nearest needs none.
      said: is told the number of each layer that is done.
    """
    check(c, how.scheme)
    grids: dict[str, Grid] = {}

    def visit(i: int, layer: Tree, sums: Mapping[str, Stats]) -> Tree:
        layer, grams = scaled(c, layer, how, sums)
        for name in names_of(c):
            w_OI = folding.matrix(layer, name, inputs_of(c, name))
            grid = grid_of(w_OI, grams.get(name), how)
            layer = folding.put(layer, name, dense(grid))
            grids[f"layers/{i}/{name}"] = jax.tree.map(np.asarray, grid)
        said(i)
        return layer

    if how.method in CALIBRATED:
        return through(c, weights, batches, visit), grids
    layers = Layers(c)
    return layers.together(weights, [visit(i, layers.one(weights, i), {}) for i in range(c.layers)]), grids


def grid_of(w_OI: Array, gram_II: Array | None, how: How) -> Grid:
    """One matrix rounded by the method, whose scales are folded in already."""
    if how.method == "gptq" and gram_II is not None:
        return gptq(w_OI, gram_II, how.scheme, how.act_order, how.damp)
    if how.method == "awq" and how.clip and gram_II is not None:
        return awq.clipped(w_OI, gram_II, how.scheme)
    return nearest(w_OI, how.scheme)


def scaled(c: DecoderConfig, layer: Tree, how: How, sums: Mapping[str, Stats]) -> tuple[Tree, dict[str, Array]]:
    """A layer with the method's scales folded in, and XᵀX of each of its matrices then."""
    grams = {name: s.gram_II for name, s in sums.items()}
    if how.method not in ("awq", "smoothquant"):
        return layer, grams
    for seam in folding.seams(c, norms_only=how.method == "smoothquant"):
        first = sums[seam.matrices[0]]
        matrices = [folding.matrix(layer, n, len(first.absolute_I)) for n in seam.matrices]
        if how.method == "awq":
            mean_I = first.absolute_I / first.tokens
            scale_I = awq.scales(matrices, grams[seam.matrices[0]], mean_I, how.scheme)
        else:
            scale_I = smoothing(matrices, first.largest_I, how.strength)
        layer = folding.fold(c, layer, seam, scale_I)
        for name in seam.matrices:
            grams[name] = grams[name] / jnp.outer(scale_I, scale_I)
    return layer, grams


def folded(c: DecoderConfig, weights: Tree, how: How, batches: Iterable[Mapping[str, Any]]) -> Tree:
    """The weights with the method's scales folded in, and nothing rounded."""
    return through(c, weights, batches, lambda i, layer, sums: scaled(c, layer, how, sums)[0])
