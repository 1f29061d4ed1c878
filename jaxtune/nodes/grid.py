"""Matrices on a grid: whole numbers of a few bits (or 8-bit floats), with a scale for each group of inputs.

The grids are those of the formats that quantised models are exchanged in, so what is rounded here is written as it is.
Scales are numbers that float16 has. Rounding what lies on a grid gives the same codes, scales and values again.

`FakeQuantized` trains through the rounding: products see the rounded matrix, gradients pass as if it were not rounded
(straight through; Bengio et al., 2013, https://arxiv.org/abs/1308.3432).

Dimensions: O outputs and I inputs of a matrix, as in Hugging Face's files, G groups of inputs, g inputs of a group.
"""

import dataclasses
import functools
import re
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.nodes.quantized import Quantized
from jaxtune.weights import Array, Node, apply, densify, is_node, node, parts, path_name, static, under

Tree = Any
DTYPES = ("int4", "int8", "fp8")
FP8_MOST = 448.0  # the greatest number that e4m3 has
_MATRIX = re.compile(r"^layers_.*_proj/weight$")


class Scheme(NamedTuple):
    """Which numbers a matrix is rounded to."""

    dtype: str = "int4"  # int4 · int8 · fp8
    group: int = 128  # inputs that share a scale; 0: all inputs of an output do
    symmetric: bool = True  # else a group's codes reach from its least to its greatest number

    @property
    def bits(self) -> int:
        return 4 if self.dtype == "int4" else 8


class Grid(NamedTuple):
    """A rounded matrix: `scale · (code - zero)`, scale and zero being those of the input's group."""

    codes_OI: Any  # uint8, or float8_e4m3fn
    scale_OG: Any  # float32, numbers that float16 has; may be negative nowhere
    zero_OG: Any  # uint8
    group_I: Any  # int32, which group an input belongs to

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes_OI.shape


def check_group(inputs: int, group: int, name: str, option: str = "--group ") -> None:
    """Raises: UserError: a matrix's inputs do not divide into groups."""
    if group and inputs % group:
        fits = max(g for g in range(1, group + 1) if inputs % g == 0)
        raise UserError(f"{option}{group}: {name} has {inputs} inputs, which it does not divide; {option}{fits} does")


def fit(w_OGg: Array, s: Scheme, shrink: Array | float = 1.0) -> tuple[Array, Array]:
    """Scale and zero of each group `[..., G]`: the greatest number (times `shrink`) is the grid's greatest."""
    if s.dtype == "fp8":
        scale = jnp.abs(w_OGg).max(-1) * shrink / FP8_MOST
        zero = jnp.zeros(scale.shape, jnp.uint8)
    elif s.symmetric:
        scale = jnp.abs(w_OGg).max(-1) * shrink / (2 ** (s.bits - 1) - 1)
        zero = jnp.full(scale.shape, 2 ** (s.bits - 1), jnp.uint8)
    else:
        low, high = jnp.minimum(w_OGg.min(-1), 0) * shrink, jnp.maximum(w_OGg.max(-1), 0) * shrink
        scale = (high - low) / (2**s.bits - 1)
        # formats store the zero less one, so that it is never 0
        at = jnp.round(-low / jnp.where(scale > 0, scale, 1.0))
        zero = jnp.clip(at, 1, 2**s.bits - 1).astype(jnp.uint8)
    scale = scale.astype(jnp.float16).astype(jnp.float32)
    return jnp.where(scale > 0, scale, 1.0), zero


def encode(x: Array, scale: Array, zero: Array, s: Scheme) -> Array:
    """The nearest codes; scale and zero broadcast."""
    if s.dtype == "fp8":
        return jnp.clip(x / scale, -FP8_MOST, FP8_MOST).astype(jnp.float8_e4m3fn)
    lowest = 1 if s.symmetric else 0  # as far down as up
    return jnp.clip(jnp.round(x / scale) + zero.astype(jnp.float32), lowest, 2**s.bits - 1).astype(jnp.uint8)


def decode(codes: Array, scale: Array, zero: Array) -> Array:
    """What codes stand for, float32; scale and zero broadcast."""
    return (codes.astype(jnp.float32) - zero.astype(jnp.float32)) * scale


@functools.partial(jax.jit, static_argnames="s")
def nearest(w_OI: Array, s: Scheme, shrink_OG: Array | float = 1.0) -> Grid:
    """Round to nearest.

    >>> w_OI = jnp.arange(-7.0, 8.0)[None]
    >>> grid = nearest(w_OI, Scheme("int4", 0))
    >>> grid.codes_OI[0, :3].tolist(), bool((dense(grid) == w_OI).all())
    ([1, 2, 3], True)
    """
    n_out, n_in = w_OI.shape
    w_OGg = w_OI.astype(jnp.float32).reshape(n_out, -1, s.group or n_in)
    scale, zero = fit(w_OGg, s, shrink_OG)
    codes = encode(w_OGg, scale[..., None], zero[..., None], s)
    return Grid(codes.reshape(n_out, n_in), scale, zero, jnp.arange(n_in, dtype=jnp.int32) // (s.group or n_in))


def dense(grid: Grid) -> Array:
    """The matrix that a grid stands for, float32 `[O, I]`."""
    return decode(grid.codes_OI, grid.scale_OG[:, grid.group_I], grid.zero_OG[:, grid.group_I])


# --- products of whole numbers --------------------------------------------------------------------------------------


@node
class Int8Product(Node):
    """A matrix on an int8 grid with a scale for each output, whose inputs are rounded to int8 too, each token's by a
    scale of its own; sums are of whole numbers. (qwix's products, see `nodes.product`, are for training: their steps
    are a 255th part of the range instead of a 254th, so they would not take the grid's codes as they are.)"""

    base: Any


@apply.register
def _(w: Int8Product, eqn: str, x: Array) -> Array:
    e, held = parts(eqn), densify(w.base)
    into, outof = len(e.into), len(e.outof)
    w_codes, w_step = _int8(held, tuple(range(into)))
    x_codes, x_step = _int8(x, tuple(range(x.ndim - into, x.ndim)))
    sums = jnp.einsum(eqn, x_codes, w_codes, preferred_element_type=jnp.int32)
    x_step = x_step.reshape(*x.shape[: x.ndim - into], *(1,) * outof)
    return (sums * (x_step * w_step.reshape(held.shape[into:]))).astype(x.dtype)


@densify.register
def _(w: Int8Product) -> Any:
    return densify(w.base)


def _int8(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Codes and steps, of all numbers along some axes together."""
    x = x.astype(jnp.float32)
    step = jnp.abs(x).max(axes, keepdims=True) / 127
    return jnp.round(x / jnp.where(step > 0, step, 1.0)).astype(jnp.int8), step


def with_int8_products(weights: Tree) -> Tree:
    """Weights whose layers' matrices are multiplied in int8, adapters upon them apart."""

    def beneath(w: Any) -> Any:
        return dataclasses.replace(w, base=beneath(w.base)) if is_node(w) else Int8Product(w)

    return jax.tree_util.tree_map_with_path(
        lambda path, w: beneath(w) if _MATRIX.search(path_name(path)) else w, weights, is_leaf=is_node
    )


# --- training ---------------------------------------------------------------------------------------------------------


@node
class FakeQuantized(Node):
    """A matrix that is rounded where it is multiplied; adapters upon it are rounded with it, as merging would."""

    base: Any
    scheme: Scheme = static(default=Scheme())


@apply.register
def _(w: FakeQuantized, eqn: str, x: Array) -> Array:
    def rounded(w: FakeQuantized, x: Array) -> Array:
        return apply(through_rounding(densify(w.base), len(parts(eqn).into), w.scheme), eqn, x)

    return jax.checkpoint(rounded)(w, x)  # the backward pass keeps no second matrix


@densify.register
def _(w: FakeQuantized) -> Any:
    return densify(w.base)


def through_rounding(w: Array, n_in: int, s: Scheme) -> Array:
    """A matrix `[in…, out…]` rounded, its gradient that of the matrix; of its first `n_in` axes the inputs."""
    w_OI = w.astype(jnp.float32).reshape(prod(w.shape[:n_in]), -1).T
    rounded = dense(nearest(jax.lax.stop_gradient(w_OI), s))
    return (w_OI + jax.lax.stop_gradient(rounded - w_OI)).T.reshape(w.shape).astype(w.dtype)


def fake_quantized(weights: Tree, s: Scheme) -> Tree:
    """Weights whose layers' matrices are rounded where they are multiplied.

    Raises:
      UserError: a matrix is quantised already, or belongs to an expert.
    """

    def one(path: tuple, w: Any) -> Any:
        name = path_name(path)
        if "/experts/" in name:
            raise UserError(f"train.qat is not for experts ({name}); leave it out")
        if not _MATRIX.search(name):
            return w
        if isinstance(under(w), Quantized):
            raise UserError(f"train.qat: {name} is held quantised already; leave tuning.base out")
        return FakeQuantized(w, s)

    return jax.tree_util.tree_map_with_path(one, weights, is_leaf=is_node)
