"""Prefill and decoding with a KV cache: the compiled half of generation, see `generate`.

Each function is compiled once for its shapes, so who calls it rounds them up.

Dimensions: B batch, R rows (samples or beams of each prompt, prompt by prompt), T prompt length, S places in the cache,
C completion length, K beams, V vocab, D embed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxtune import sampling
from jaxtune.layers import BATCH_AXES, group_name
from jaxtune.models.decoder import Cache, Decoder
from jaxtune.sampling import Sampling, Search
from jaxtune.weights import Array

_LOGITS_BYTES = 2**26  # of the logits that `score` holds at a time


class Decoding(NamedTuple):
    """Rows on their way."""

    cache: Cache
    logits_RV: Array  # of the next token
    position_R: Array
    made: Array  # new tokens so far
    done_R: Array
    seen_RV: Array | None  # which tokens a row holds, where there is a penalty
    key_R: Array | None  # where the temperature is above 0


@functools.partial(jax.jit, static_argnames=("model", "size", "copies", "seen"))
def prefill(
    model: Decoder,
    weights: Any,
    ids_BT: Array,
    segment_BT: Array,
    key_R: Array | None,
    size: int,
    copies: int,
    seen: bool,
) -> Decoding:
    """Prompts read once, each then in `copies` rows, with `size` places for tokens in the cache."""
    c = model.c
    B = ids_BT.shape[0]
    position_BT = jnp.maximum(jnp.cumsum(segment_BT, 1) - 1, 0)
    read: Any = model.apply({"params": weights}, ids_BT, segment_BT, position_BT, keep=True)
    before = read[1].segment_BS.shape[1] - ids_BT.shape[1]  # places of a prefix
    outputs, cache = read[0], read[1].grown(before + size)
    logits_BV = outputs.logits(outputs.hidden_BTD[:, -1:])[:, 0]
    cache = _place(_rows(cache, lambda x, axis: jnp.repeat(x, copies, axis)))
    seen_RV = None
    if seen:
        seen_BV = jnp.zeros((B, c.rows), bool).at[jnp.arange(B)[:, None], ids_BT].max(segment_BT > 0)
        seen_RV = jnp.repeat(seen_BV, copies, 0)
    logits_RV, position_R = (jnp.repeat(x, copies, 0) for x in (logits_BV, position_BT[:, -1] + 1))
    return Decoding(cache, logits_RV, position_R, jnp.int32(0), jnp.zeros(B * copies, bool), seen_RV, key_R)


def _rows(cache: Any, f: Callable[[Array, int], Array]) -> Cache:
    """A cache with its rows changed by `f(array, axis)`."""
    layers = jax.tree.map(lambda x: f(x, 1), cache.layers)
    return cache.replace(layers=layers, segment_BS=f(cache.segment_BS, 0))


def _place(cache: Any) -> Cache:
    """Split a cache over the mesh: rows over its batch axes, heads over `tensor`, where they divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return cache

    def axes(size: int, *names: str) -> tuple[str, ...] | None:
        there = tuple(a for a in names if a in mesh.axis_names)
        return there if there and size % math.prod(mesh.shape[a] for a in there) == 0 else None

    def layer(x: Array) -> Array:
        spec = PartitionSpec(None, axes(x.shape[1], *BATCH_AXES), axes(x.shape[2], "tensor"), None, None)
        return jax.lax.with_sharding_constraint(x, spec)

    segment_BS = jax.lax.with_sharding_constraint(
        cache.segment_BS, PartitionSpec(axes(cache.segment_BS.shape[0], *BATCH_AXES), None)
    )
    return cache.replace(layers=jax.tree.map(layer, cache.layers), segment_BS=segment_BS)


def _read(model: Decoder, weights: Any, d: Decoding, token_R: Array) -> Decoding:
    """One token more in every row."""
    R = token_R.shape[0]
    seen_RV = None if d.seen_RV is None else d.seen_RV.at[jnp.arange(R), token_R].set(True)
    ones_R1 = jnp.ones((R, 1), jnp.int32)
    outputs, cache = model.apply({"params": weights}, token_R[:, None], ones_R1, d.position_R[:, None], d.cache)
    return d._replace(
        cache=_place(cache),
        logits_RV=outputs.logits()[:, 0],
        position_R=d.position_R + 1,
        made=d.made + 1,
        seen_RV=seen_RV,
    )


@functools.partial(jax.jit, static_argnames=("model", "s", "n", "ends"), donate_argnames=("d",))
def decode(
    model: Decoder, weights: Any, d: Decoding, s: Sampling, n: int, ends: tuple[int, ...]
) -> tuple[Decoding, tuple[Array, Array]]:
    """`n` more tokens and their log-probabilities, both `[n, R]`; -1 for rows that are done."""

    def one(d: Decoding, _: None) -> tuple[Decoding, tuple[Array, Array]]:
        key_R = None if d.key_R is None else jax.vmap(jax.random.fold_in)(d.key_R, d.position_R)
        token_R = sampling.choose(sampling.bar_ends(d.logits_RV, ends, d.made, s), d.seen_RV, key_R, s)
        logprob_R = _logprob(d.logits_RV, token_R)
        done_R = d.done_R | sampling.is_end(token_R, ends)
        d = _read(model, weights, d, token_R)._replace(done_R=done_R)
        return d, (jnp.where(done_R, -1, token_R), logprob_R)

    return jax.lax.scan(one, d, None, length=n)


@functools.partial(jax.jit, static_argnames=("model", "s", "n", "ends"), donate_argnames=("d",))
def search(
    model: Decoder, weights: Any, d: Decoding, x: Search, s: Sampling, n: int, ends: tuple[int, ...]
) -> tuple[Decoding, Search]:
    """`n` more steps of a beam search; the cache's rows go with their beams."""

    def one(carry: tuple[Decoding, Search], _: None) -> tuple[tuple[Decoding, Search], None]:
        d, x = carry
        B, K = x.running.score_BK.shape
        wide = (B, K, d.logits_RV.shape[-1])
        seen_BKV = None if d.seen_RV is None else d.seen_RV.reshape(wide)
        x, token_BK, from_BK = sampling.extend(x, d.logits_RV.reshape(wide), seen_BKV, ends, s)
        from_R = (jnp.arange(B)[:, None] * K + from_BK).reshape(-1)
        d = d._replace(
            cache=_place(_rows(d.cache, lambda a, axis: jnp.take(a, from_R, axis))),
            seen_RV=None if d.seen_RV is None else d.seen_RV[from_R],
        )
        return (_read(model, weights, d, token_BK.reshape(-1)), x), None

    return jax.lax.scan(one, (d, x), None, length=n)[0]


@functools.partial(jax.jit, static_argnames=("model",))
def score(
    model: Decoder, weights: Any, ids_BT: Array, segment_BT: Array, at_BC: Array, target_BC: Array
) -> tuple[Array, Array]:
    """Log-probability of `target_BC` after the tokens at `at_BC`, and whether none is likelier, both `[B, C]`."""
    B, T = ids_BT.shape
    position_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    outputs = model.apply({"params": weights}, ids_BT, segment_BT, position_BT)[0]
    hidden_BCD = jnp.take_along_axis(outputs.hidden_BTD, at_BC[:, :, None], 1)

    def one(column: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_BD, target_B = column
        logits_BV = outputs.logits(hidden_BD[:, None])[:, 0]
        return _logprob(logits_BV, target_B), logits_BV.argmax(-1) == target_B

    at_once = max(1, _LOGITS_BYTES // (B * model.c.rows * 4))
    columns = jnp.moveaxis(hidden_BCD, 1, 0), target_BC.T
    logprob_CB, greedy_CB = jax.lax.map(one, columns, batch_size=min(at_once, target_BC.shape[1]))
    return logprob_CB.T, greedy_CB.T


@functools.partial(jax.jit, static_argnames=("model", "ends"))
def follow(model: Decoder, weights: Any, d: Decoding, ids_RC: Array, length_R: Array, ends: tuple[int, ...]) -> Array:
    """Log-probability of each of some continuations of every prompt read, the same number of each, float32 `[R]`.

    Where `ends` are given, of ending there too: with any of them.
    """
    R, C = ids_RC.shape
    copies = R // d.position_R.shape[0]
    cache = _place(_rows(d.cache, lambda x, axis: jnp.repeat(x, copies, axis)))
    first_RV, position_R = (jnp.repeat(x, copies, 0) for x in (d.logits_RV, d.position_R))
    at_C = jnp.arange(C)
    segment_RC = (at_C < length_R[:, None]).astype(jnp.int32)
    outputs = model.apply({"params": weights}, ids_RC, segment_RC, position_R[:, None] + at_C, cache)[0]

    def one(column: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_RD, target_R = column
        logits_RV = outputs.logits(hidden_RD[:, None])[:, 0]
        return _logprob(logits_RV, target_R), _any_of(logits_RV, ends)

    next_RC = jnp.roll(ids_RC, -1, 1)
    at_once = max(1, _LOGITS_BYTES // (R * model.c.rows * 4))
    next_CR, end_CR = jax.lax.map(one, (jnp.moveaxis(outputs.hidden_BTD, 1, 0), next_RC.T), batch_size=min(at_once, C))
    inner_CR = jnp.where(at_C[:, None] < length_R - 1, next_CR, 0)
    closing_R = jnp.take_along_axis(end_CR, length_R[None] - 1, 0)[0]
    return _logprob(first_RV, ids_RC[:, 0]) + inner_CR.sum(0) + closing_R


def _any_of(logits_BV: Array, ends: tuple[int, ...]) -> Array:
    """The log-probability of any of some tokens; 0 where none are given."""
    if not ends:
        return jnp.zeros(logits_BV.shape[0])
    return jax.nn.logsumexp(logits_BV[:, jnp.array(ends)], -1) - jax.nn.logsumexp(logits_BV, -1)


def _logprob(logits_BV: Array, token_B: Array) -> Array:
    """The log-probability of one token a row, float32 `[B]`."""
    return jnp.take_along_axis(logits_BV, token_B[:, None], 1)[:, 0] - jax.nn.logsumexp(logits_BV, -1)


def by_layer(model: Decoder, weights: Any) -> tuple[Decoder, Any]:
    """The same model with every layer a group of its own."""
    c = dataclasses.replace(model.c, groups=(1,) * model.c.layers)
    if model.c.groups == c.groups:
        return model, weights
    apart: dict[str, Any] = {}
    for name, w in weights.items():
        if name.startswith("layers_"):
            first, last = (int(i) for i in name.removeprefix("layers_").split("-"))
            for i in range(first, last + 1):
                apart[group_name(i, 1)] = jax.tree.map(lambda x, at=i - first: x[at : at + 1], w)
        else:
            apart[name] = w
    return type(model)(c), apart
