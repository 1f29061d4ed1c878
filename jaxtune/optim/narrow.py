"""Optimiser state in fewer bits: Adam's moments in 8, or any optimiser's state in bfloat16.

A moment moves by a thousandth a step, and a number of 8 or 16 bits is further from its neighbour than that: rounded to
the nearest it would never move again. So everything here is rounded at random, up or down by how near each neighbour
is, and is right on average. The numbers drawn follow from the step, so a run that is resumed draws the same.

Dimensions: … any, N the last axis, C its blocks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.weights import Array

Tree = Any
_BLOCK = 256
_LARGEST, _NORMAL, _LEAST = 448.0, 2.0**-6, 2.0**-9  # of float8_e4m3fn: the largest, the least normal, the least


def round_at_random(x: Array, bits: int, drawn: Array) -> Array:
    """float32 without its last `bits` bits, to one of the two nearest such numbers; on average `x`.

    `drawn` are random uint32 of the shape of `x`, of which the last `bits` bits are used.
    """
    low = jnp.uint32(2**bits - 1)
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (drawn & low)
    return jax.lax.bitcast_convert_type(raised & ~low, jnp.float32)


# --- bfloat16 -------------------------------------------------------------------------------------------------------


class NarrowState(NamedTuple):
    """The inner optimiser's state, its arrays in bfloat16."""

    step: Array
    inner: Any


def narrowed(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with its state in bfloat16, if all weights are: halves it, too. Each leaf is computed in float32.

    Where a weight is float32, `tx` as it is.
    """

    def narrow(params: Tree) -> bool:
        return all(p.dtype == jnp.bfloat16 for p in jax.tree.leaves(params))

    def wide(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)

    def init(params: Tree) -> Any:
        if not narrow(params):
            return tx.init(params)
        inner = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _held(x) else x, tx.init(wide(params)))
        return NarrowState(jnp.zeros([], jnp.int32), inner)

    def update(grads: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        if not isinstance(state, NarrowState):
            return tx.update(grads, state, params)
        updates, inner = tx.update(wide(grads), wide(state.inner), wide(params))
        leaves, tree = jax.tree.flatten(inner)
        kept = [
            round_at_random(x, 16, noise(state.step, i, x.shape)).astype(jnp.bfloat16) if _held(x) else x
            for i, x in enumerate(leaves)
        ]
        return updates, NarrowState(state.step + 1, jax.tree.unflatten(tree, kept))

    return optax.GradientTransformation(init, update)


def noise(step: Array, leaf: int, shape: tuple[int, ...]) -> Array:
    """Random uint32 by step, leaf and place: a hash, for which a tenth of the work of jax.random's numbers will do."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return _mixed(place + _mixed(step.astype(jnp.uint32) * jnp.uint32(2**12) + jnp.uint32(leaf)))


def _mixed(x: Array) -> Array:
    """Wellons' lowbias32: each bit of the input turns each bit of the output about half of the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _held(x: Array) -> bool:
    return x.ndim > 0 and x.dtype == jnp.float32


# --- 8 bits ---------------------------------------------------------------------------------------------------------


class Adam8bitState(NamedTuple):
    """Moments as codes of the weights' shapes, and what each block of them is scaled by."""

    step: Array
    mu: Tree  # float8_e4m3fn […, N]
    nu: Tree  # of the second moment's square root
    mu_scale: Tree  # float32 […, C]
    nu_scale: Tree


def scale_by_adam8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma & Ba, 2014) whose moments take 8 bits a number and 32 a block, as of Dettmers et al., 2021.

    Blocks are up to 256 long, along the last axis, so that codes lie as their weights do; at that length the state is
    2.03 bytes a parameter. Codes are float8_e4m3fn and not the dynamic code of that paper: hardware converts them,
    where a code book is a gather for each number, and 8 bits of floating point are about as fine. The second moment is
    held as its square root, which halves its range; no block's number that is not 0 is held as 0, lest it be divided
    by.
    """

    def init(params: Tree) -> Adam8bitState:
        def codes() -> Tree:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float8_e4m3fn), params)

        def scales() -> Tree:
            return jax.tree.map(lambda p: jnp.zeros((*p.shape[:-1], _blocks(p.shape[-1])), jnp.float32), params)

        return Adam8bitState(jnp.zeros([], jnp.int32), codes(), codes(), scales(), scales())

    def update(grads: Tree, state: Adam8bitState, params: Tree = None) -> tuple[Tree, Adam8bitState]:
        step = state.step + 1
        below_1, below_2 = (1 - jnp.float32(b) ** step for b in (b1, b2))

        def one(i: int, g: Array, m: Array, v: Array, m_scale: Array, v_scale: Array) -> tuple[Array, ...]:
            g = g.astype(jnp.float32)
            mean = b1 * unpack(m, m_scale) + (1 - b1) * g
            square = b2 * unpack(v, v_scale) ** 2 + (1 - b2) * g * g
            u = (mean / below_1) / (jnp.sqrt(square / below_2) + eps)
            drawn = noise(step, i, g.shape)  # each takes 20 of its bits
            (m, m_scale), (v, v_scale) = pack(mean, drawn >> 12), pack(jnp.sqrt(square), drawn)
            return u, m, v, m_scale, v_scale

        leaves, tree = jax.tree.flatten(grads)
        held = zip(*(jax.tree.leaves(x) for x in state[1:]), strict=True)
        made = [one(i, g, *h) for i, (g, h) in enumerate(zip(leaves, held, strict=True))]
        updates, *moments = (jax.tree.unflatten(tree, x) for x in zip(*made, strict=True))
        return updates, Adam8bitState(step, *moments)

    return optax.GradientTransformation(init, update)


def _blocks(n: int) -> int:
    return -(-n // _BLOCK)


def _split(x: Array) -> Array:
    """`[…, N]` as `[…, C, N/C]`, with zeros behind where it does not divide."""
    n, count = x.shape[-1], _blocks(x.shape[-1])
    size = -(-n // count)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, count * size - n)])
    return padded.reshape(*x.shape[:-1], count, size)


def pack(x: Array, drawn: Array) -> tuple[Array, Array]:
    """float32 as codes of the same shape, and a scale for each block of the last axis; see `round_at_random`."""
    x_CB = _split(x)
    scale_C = jnp.abs(x_CB).max(-1) / _LARGEST
    y_CB = x_CB / jnp.where(scale_C == 0, 1, scale_C)[..., None]
    y = jnp.clip(y_CB.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]], -_LARGEST, _LARGEST)
    shift = jnp.where(jnp.abs(y) < _NORMAL, jnp.copysign(_NORMAL, y), 0)  # to where neighbours are as far apart
    codes = round_at_random(y + shift, 20, drawn) - shift
    codes = jnp.where((y != 0) & (codes == 0), jnp.copysign(_LEAST, y), codes)
    return codes.astype(jnp.float8_e4m3fn), scale_C


def unpack(codes: Array, scale_C: Array) -> Array:
    """What `pack` made, as float32."""
    x = _split(codes.astype(jnp.float32)) * scale_C[..., None]
    return x.reshape(*codes.shape[:-1], -1)[..., : codes.shape[-1]]
