"""Attention: grouped queries over the keys of their own segment, scores in float32.

Dimensions: B batch, T time of the queries, S time of the keys, N query heads, K key/value heads, G query heads per
key/value head, H head dim.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.weights import Array, precision

PREFIX = -1  # the segment of what stands before every segment
NEVER = -1e30  # a masked score; finite, so that a row without any key gives no NaN


@dataclasses.dataclass(frozen=True)
class Scores:
    """How the scores of attention are made and which of them count."""

    scale: float | None = None  # 1/√H where None
    softcap: float = 0.0  # scores stay within ± this (Gemma 2); 0 is no bound

    def __call__(self, q_BKqH: Array, k_BKSH: Array) -> Array:
        """Scores in float32, `[B, K, q, S]`, of queries that are scaled already."""
        score_BKqS = _batched(q_BKqH, k_BKSH, 3)
        return jnp.tanh(score_BKqS / self.softcap) * self.softcap if self.softcap else score_BKqS

    def factor(self, head: int) -> float:
        """What scores are multiplied by."""
        return head**-0.5 if self.scale is None else self.scale

    def by_head(self, q_BTNH: Array, kv_heads: int) -> Array:
        """Scaled queries by the key heads that they share, `[B, K, G, T, H]`."""
        B, T, N, H = q_BTNH.shape
        scaled = q_BTNH * self.factor(H)
        return scaled.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def attend(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_BT: Array,
    scores: Scores = Scores(),
    window: Array | int = 0,
    blocks: int = 8,
    segment_BS: Array | None = None,
    offset: Array | int = 0,
) -> Array:
    """Causal grouped-query attention within segments, `[B, T, N, H]`.

    Queries go in at most `blocks` blocks, each over the keys that it can see, so nearly half of the scores are never
    made. Scores and the softmax are float32. Segment 0 is padding. A query sees `window` keys, its own included; 0 is
    all.

    Where the queries are a part of those that belong to the keys, `segment_BS` are the segments of the keys, and the
    first query stands at place `offset`; then every block goes over all keys.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    part, segment_BS = segment_BS is not None, segment_BT if segment_BS is None else segment_BS
    q_BKGTH = scores.by_head(q_BTNH, K)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    fixed = window if isinstance(window, int) else 0
    size = max(64, -(-T // blocks))
    out = []
    for i in range(0, T, size):
        j = min(i + size, T)
        first = max(0, i - fixed + 1) if fixed and not part else 0
        last = segment_BS.shape[1] if part else j
        behind_ts = offset + jnp.arange(i, j)[:, None] - jnp.arange(first, last)
        seen_ts = behind_ts >= 0
        if not isinstance(window, int) or window:
            seen_ts &= behind_ts < window
        same_Bts = segment_BT[:, i:j, None] == segment_BS[:, None, first:last]
        score_BKgs = scores(q_BKGTH[:, :, :, i:j].reshape(B, K, -1, H), k_BKTH[:, :, first:last])
        score_BKGts = score_BKgs.reshape(B, K, -1, j - i, last - first)
        p_BKGts = jax.nn.softmax(jnp.where((seen_ts & same_Bts)[:, None, None], score_BKGts, NEVER), -1)
        p_BKgs = p_BKGts.astype(v_BKTH.dtype).reshape(B, K, -1, last - first)
        out.append(_batched(p_BKgs, v_BKTH[:, :, first:last], 2).reshape(B, K, -1, j - i, H))
    o_BKGTH = jnp.concatenate(out, 3) if len(out) > 1 else out[0]
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def probabilities(
    q_BTNH: Array, k_BTKH: Array, segment_BT: Array, scores: Scores = Scores(), window: Array | int = 0
) -> Array:
    """How much each query of `attend` takes from each key, float32 `[B, N, T, S]`: to be looked at."""
    B, T, N, _ = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKgH = scores.by_head(q_BTNH, K).reshape(B, K, -1, q_BTNH.shape[-1])
    score_BKGTS = scores(q_BKgH, k_BTKH.transpose(0, 2, 1, 3)).reshape(B, K, -1, T, T)
    behind_TS = jnp.arange(T)[:, None] - jnp.arange(T)
    seen_TS = behind_TS >= 0
    if not isinstance(window, int) or window:
        seen_TS &= behind_TS < window
    seen_BTS = seen_TS & (segment_BT[:, :, None] == segment_BT[:, None])
    return jax.nn.softmax(jnp.where(seen_BTS[:, None, None], score_BKGTS, NEVER), -1).reshape(B, N, T, T)


class Rounded(NamedTuple):
    """Keys or values in 8 bits, each head's of a token with a scale of its own: `code · scale`."""

    codes_BKSH: Array  # int8
    scale_BKS1: Array  # float32


def rounded(x_BKSH: Array) -> Rounded:
    """Keys or values as a cache in 8 bits holds them.

    >>> rounded(jnp.array([[[[127.0, -63.6]]]])).codes_BKSH.tolist()
    [[[[127, -64]]]]
    """
    x_BKSH = x_BKSH.astype(jnp.float32)
    scale_BKS1 = jnp.abs(x_BKSH).max(-1, keepdims=True) / 127
    codes = jnp.round(x_BKSH / jnp.where(scale_BKS1 > 0, scale_BKS1, 1.0))
    return Rounded(codes.astype(jnp.int8), scale_BKS1)


def _whole(x: Array | Rounded, dtype: Any) -> Array:
    """What a cache holds, in `dtype`."""
    if not isinstance(x, Rounded):
        return x
    return (x.codes_BKSH.astype(jnp.float32) * x.scale_BKS1).astype(dtype)


class Past(NamedTuple):
    """Keys and values that were read before, in places of which some may be empty (their segment is 0).

    Those of a prefix, in the first places, are seen from every segment: theirs is `PREFIX`.
    """

    k_BKSH: Array | Rounded
    v_BKSH: Array | Rounded
    segment_BS: Array
    length: Array  # the place at which what is new begins
    position_BT: Array  # of what is new


def attend_past(
    q_BTNH: Array,
    k_BKTH: Array,
    v_BKTH: Array,
    segment_BT: Array,
    past: Past,
    scores: Scores = Scores(),
    window: Array | int = 0,
) -> Array:
    """As `attend`, over the past and then what is new; the past is read where it lies, not copied."""
    B, T, N, H = q_BTNH.shape
    pastk_BKSH, pastv_BKSH = (_whole(x, k_BKTH.dtype) for x in (past.k_BKSH, past.v_BKSH))
    K, S = pastk_BKSH.shape[1:3]
    q_BKgH = scores.by_head(q_BTNH, K).reshape(B, K, -1, H)
    score_BKgs = jnp.concatenate([scores(q_BKgH, pastk_BKSH), scores(q_BKgH, k_BKTH)], -1)
    place_s = jnp.concatenate([jnp.arange(S), past.length + jnp.arange(T)])
    behind_ts = past.length + jnp.arange(T)[:, None] - place_s
    segment_B1s = jnp.concatenate([past.segment_BS, segment_BT], 1)[:, None]
    token_BT1, prefix_B1s = segment_BT[:, :, None], segment_B1s == PREFIX
    seen_Bts = (behind_ts >= 0) & ((token_BT1 == segment_B1s) | (prefix_B1s & (token_BT1 > 0)))
    if not isinstance(window, int) or window:  # of a prefix the place is the position
        seen_Bts &= jnp.where(prefix_B1s, past.position_BT[:, :, None] - place_s, behind_ts) < window
    score_BKGts = score_BKgs.reshape(B, K, -1, T, S + T)
    p_BKGts = jax.nn.softmax(jnp.where(seen_Bts[:, None, None], score_BKGts, NEVER), -1)
    p_BKgs = p_BKGts.astype(v_BKTH.dtype).reshape(B, K, -1, S + T)
    o_BKgH = _batched(p_BKgs[..., :S], pastv_BKSH, 2) + _batched(p_BKgs[..., S:], v_BKTH, 2)
    return o_BKgH.reshape(B, K, -1, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def after(x: Array, read: Array) -> Array:
    """`x`, once `read` is there (a NaN in its first place goes along).

    XLA updates an array in place only where all that reads it provably comes before. Without this it copies the whole
    KV cache twice for each token, on CPU a quarter of the time; an optimization barrier is gone before it decides.
    """
    return jnp.where(jnp.isnan(read.reshape(-1)[0]), jnp.nan, x)


def _batched(x: Array, y: Array, contract: int) -> Array:
    """Matrix products over batch and heads, each sharded in its own way; contracts axis `contract` of `y`."""
    dims = (((3,), (contract,)), ((0, 1), (0, 1)))
    wide = jnp.float32 if contract == 3 else None  # scores
    return jax.lax.dot_general(x, y, dims, precision=precision(x.dtype), preferred_element_type=wide)
