"""Matrices held in 4 or 8 bits, each block of consecutive inputs with a scale of its own.

Blocks lie along the last contracted axis, as in the rows of Hugging Face's matrices, so with 64 numbers to a block
nf4 gives the very codes that bitsandbytes gives. Two 4-bit codes share a byte: number i of a block and number
i + group/2. The scales are quantised again ("double quantisation", Dettmers et al., 2023), to 8 bits between the least
and the greatest of up to 256 neighbours: 4.13 or 8.13 bits a number in all.

What is multiplied is made where it is needed, in the input's dtype, and made again for the backward pass: nothing but
codes and scales is ever held. qwix (0.1) rewrites whole models and emulates nf4 without double quantisation; a node at
the seam lets codes be made while shards stream in, and adapters stand upon them.

Dimensions: n blocks, g numbers of a block.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.weights import Array, Node, apply, densify, grouped, node, static

# Quantiles of a normal distribution, symmetric around an exact zero (Dettmers et al., 2023, appendix E).
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_NF4_BETWEEN = (NF4[1:] + NF4[:-1]) / 2
_NEIGHBOURS = 256  # scales that are quantised together


class Kind(NamedTuple):
    """A way to hold numbers between -1 and 1."""

    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]  # to float32
    bits: int


def _integers(most: int, stored: Any) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Round to nearest of -most … most; 4-bit ones are held as most more, which is never negative."""
    above = most if stored == jnp.uint8 else 0
    return (
        lambda x: (jnp.round(x * most) + above).astype(stored),
        lambda c: (c.astype(jnp.float32) - above) / most,
    )


KINDS: Mapping[str, Kind] = {
    "nf4": Kind(
        lambda x: jnp.searchsorted(jnp.asarray(_NF4_BETWEEN), x, method="compare_all").astype(jnp.uint8),
        lambda c: jnp.asarray(NF4)[c],
        4,
    ),
    "int4": Kind(*_integers(7, jnp.uint8), 4),
    "int8": Kind(*_integers(127, jnp.int8), 8),
    "fp8": Kind(
        lambda x: (x * 448.0).astype(jnp.float8_e4m3fn), lambda c: c.astype(jnp.float32) / 448.0, 8
    ),
}  # fmt: skip


@node
class Scales(Node):
    """Positive numbers in 8 bits, between the least and the greatest of their neighbours along the last axis."""

    codes: Any  # uint8
    low: Any  # float32, [.., neighbourhoods]
    step: Any


@node
class Quantized(Node):
    """A quantised matrix: `kind`'s codes times a scale for each block along `axis`, counted from the end."""

    codes: Any
    scale: Any  # `Scales` [.., n, ..]
    kind: str = static(default="nf4")
    axis: int = static(default=-1)
    group: int = static(default=64)
    dtype: str = static(default="float32")  # of the matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        shape = list(self.codes.shape)
        shape[self.axis] *= 8 // KINDS[self.kind].bits
        return tuple(shape)


def block(size: int, group: int) -> int:
    """The largest even block that divides an axis of this size and has at most `group` numbers; 0 where none does.

    >>> block(4096, 64), block(80, 64), block(7, 64)
    (64, 40, 0)
    """
    return next((g for g in range(min(group, size), 1, -1) if size % g == 0 and g % 2 == 0), 0)


def quantize(w: Array, axis: int, kind: str, group: int = 64) -> Quantized:
    """Quantise an array in blocks along `axis`, which is negative.

    >>> q = quantize(jnp.linspace(-1, 1, 64).reshape(64, 1), -2, "nf4")
    >>> q.shape, q.codes.shape, bool(jnp.abs(densify(q) - jnp.linspace(-1, 1, 64)[:, None]).max() < 0.16)
    ((64, 1), (32, 1), True)
    """
    k, g = KINDS[kind], block(w.shape[axis], group)
    at = w.ndim + axis
    x = w.astype(jnp.float32).reshape(*w.shape[:at], -1, g, *w.shape[at + 1 :])
    scale = jnp.abs(x).max(at + 1)
    codes = k.encode(x / jnp.where(scale > 0, scale, 1.0)[(slice(None),) * (at + 1) + (None,)])
    if k.bits == 4:
        low, high = jnp.split(codes, 2, at + 1)
        codes = low | (high << 4)
    codes = codes.reshape(*w.shape[:at], -1, *w.shape[at + 1 :])
    return Quantized(codes, _compress(scale), kind, axis, g, w.dtype.name)


def _compress(scale: Array) -> Scales:
    n = max(g for g in range(1, _NEIGHBOURS + 1) if scale.shape[-1] % g == 0)
    x = scale.reshape(*scale.shape[:-1], -1, n)
    low = x.min(-1)
    step = (x.max(-1) - low) / 255
    codes = jnp.round((x - low[..., None]) / jnp.where(step > 0, step, 1.0)[..., None])
    return Scales(codes.astype(jnp.uint8).reshape(scale.shape), low, step)


def _expand(s: Scales) -> Array:
    x = s.codes.astype(jnp.float32).reshape(*s.low.shape, -1)
    return (x * s.step[..., None] + s.low[..., None]).reshape(s.codes.shape)


def _dense(w: Quantized, dtype: Any) -> Array:
    k, at = KINDS[w.kind], w.codes.ndim + w.axis
    g = w.group * k.bits // 8
    codes = w.codes.reshape(*w.codes.shape[:at], -1, g, *w.codes.shape[at + 1 :])
    if k.bits == 4:
        codes = jnp.concatenate([codes & 15, codes >> 4], at + 1)
    x = k.decode(codes) * jnp.expand_dims(_expand(w.scale), at + 1)
    return x.reshape(w.shape).astype(dtype)


@densify.register
def _(w: Quantized) -> Array:
    return _dense(w, w.dtype)


@apply.register
def _(w: Quantized, eqn: str, x: Array) -> Array:
    # `checkpoint`: the backward pass keeps the codes, not the matrix
    return jax.checkpoint(lambda w, x: apply(_dense(w, x.dtype), eqn, x))(w, x)


@grouped.register
def _(w: Quantized, x: Array, sizes_E: Array) -> Array:
    return jax.checkpoint(lambda w, x: grouped(_dense(w, x.dtype), x, sizes_E))(w, x)
