"""How the next token is chosen: greedy, sampled, or by beam search. Pure functions of logits; no model is called here.

Dimensions: B batch, V vocab, K beams, C candidates of a beam search, N places for new tokens.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.weights import Array

_NEVER = -1e9  # transformers' score of what must not be chosen; its arithmetic is kept, so that its choices are


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the order is penalty, temperature, top-k, top-p, as in transformers.

    >>> Sampling(temperature=0.7, top_p=0.95, stop=("\\n",)).max_new_tokens
    256
    """

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # Keskar et al., 2019
    stop: tuple[str, ...] = ()  # with beams, these cut the text after the search
    seed: int = 0
    samples: int = 1  # texts per prompt: drawn, or the best of the beams
    beams: int = 1
    length_penalty: float = 1.0  # a hypothesis scores its log-probability / length ** penalty
    early_stopping: bool = False  # a search ends with as many hypotheses as beams, even if better ones may come
    stop_ids: tuple[int, ...] = ()  # tokens that end a text, besides the model's own
    min_new_tokens: int = 0  # before these, no token can end a text

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("samples", self.samples >= 1, "at least 1"),
            ("beams", self.beams >= 1, "at least 1"),
            ("min_new_tokens", self.min_new_tokens >= 0, "0 or above"),
            ("temperature", self.beams == 1 or self.temperature == 0, f"0 with beams={self.beams}, which draw nothing"),
            ("samples", self.beams == 1 or self.samples <= self.beams, f"at most beams={self.beams}; raise beams"),
            ("samples", self.samples == 1 or self.beams > 1 or self.temperature > 0,
             "1 at temperature 0, where all would be the same text; raise temperature or beams"),
        ):  # fmt: skip
            if not ok:
                raise UserError(f"{name}={getattr(self, name)} should be {wanted}")


def choose(logits_BV: Array, seen_BV: Array | None, key_B: Array | None, s: Sampling) -> Array:
    """The next token of each row, int32 `[B]`.

    `seen_BV` says which tokens a row holds, and serves the penalty; `key_B` are keys, and serve temperatures above 0.
    """
    logits_BV = penalise(logits_BV, seen_BV, s)
    if s.temperature == 0.0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = logits_BV / s.temperature
    V = logits_BV.shape[-1]
    if 0 < s.top_k < V:
        kth_B1 = jax.lax.top_k(logits_BV, s.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
    if s.top_p < 1.0:  # the fewest tokens that together have at least top_p
        sorted_BV = jnp.sort(logits_BV, -1)[:, ::-1]
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, -1), -1) - jax.nn.softmax(sorted_BV, -1)
        least_B1 = jnp.min(jnp.where(before_BV < s.top_p, sorted_BV, jnp.inf), -1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    assert key_B is not None
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def penalise(logits_BV: Array, seen_BV: Array | None, s: Sampling) -> Array:
    """Logits, or log-probabilities, with those of seen tokens made less likely (Keskar et al., 2019)."""
    if s.repetition_penalty == 1.0:
        return logits_BV
    assert seen_BV is not None
    penalised_BV = jnp.where(logits_BV < 0, logits_BV * s.repetition_penalty, logits_BV / s.repetition_penalty)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def bar_ends(logits_BV: Array, ends: tuple[int, ...], made: Array, s: Sampling) -> Array:
    """Logits without the end tokens while fewer than `min_new_tokens` are made."""
    if not ends or not s.min_new_tokens:
        return logits_BV
    ids = jnp.array(ends, jnp.int32)
    return logits_BV.at[:, ids].set(jnp.where(made < s.min_new_tokens, -jnp.inf, logits_BV[:, ids]))


def is_end(token: Array, ends: tuple[int, ...]) -> Array:
    """Whether a token ends its text."""
    return jnp.isin(token, jnp.array(ends, jnp.int32))


# --- beam search ----------------------------------------------------------------------------------------------------


class Hypotheses(NamedTuple):
    """K texts of each prompt, running or finished."""

    score_BK: Array
    ids_BKN: Array  # new tokens, the end token included
    logprob_BKN: Array  # of each, by the model alone
    length_BK: Array  # without the end token
    finished_BK: Array
    ended_BK: Array  # by an end token, not by length

    def pick(self, index_BC: Array) -> "Hypotheses":
        """Those at `index_BC` along the second axis."""
        return jax.tree.map(lambda x: jax.vmap(lambda a, i: a[i])(x, index_BC), self)


class Search(NamedTuple):
    """A beam search on its way."""

    running: Hypotheses
    best: Hypotheses  # finished ones, best first
    open_B: Array  # whether a better one may yet come
    made: Array  # new tokens so far
    limit_B: Array  # new tokens at most
    length_penalty: Array
    early_stopping: Array


def begin(limit_B: Array, places: int, s: Sampling) -> Search:
    """A search with nothing found. Only the first beam counts at first: all are the same prompt."""
    shape = limit_B.shape[0], s.beams

    def nothing(score_BK: Array) -> Hypotheses:
        places_BKN, no_BK = (*shape, places), jnp.zeros(shape, bool)
        ids_BKN, logprob_BKN = jnp.zeros(places_BKN, jnp.int32), jnp.zeros(places_BKN, jnp.float32)
        return Hypotheses(score_BK, ids_BKN, logprob_BKN, jnp.zeros(shape, jnp.int32), no_BK, no_BK)

    never_BK = jnp.full(shape, _NEVER, jnp.float32)
    start, open_B = nothing(never_BK.at[:, 0].set(0)), jnp.ones(shape[0], bool)
    rule = jnp.float32(s.length_penalty), jnp.array(s.early_stopping)
    return Search(start, nothing(never_BK), open_B, jnp.int32(0), limit_B, *rule)


def done(x: Search) -> Array:
    """Whether a prompt's search is over, `[B]`."""
    full_B = x.best.finished_BK.all(1) & x.early_stopping
    return ~x.open_B | full_B | (x.made >= x.limit_B)


def extend(
    x: Search, logits_BKV: Array, seen_BKV: Array | None, ends: tuple[int, ...], s: Sampling
) -> tuple[Search, Array, Array]:
    """One token more, as transformers' `_beam_search` takes it (version 5.23).

    Returns: the search, the next token of each running beam `[B, K]`, and the beam that it goes on from `[B, K]`.
    """
    B, K, V = logits_BKV.shape
    raw_BKV = jax.nn.log_softmax(logits_BKV, -1)
    flat_RV = bar_ends(raw_BKV.reshape(B * K, V), ends, x.made, s)
    flat_RV = penalise(flat_RV, None if seen_BKV is None else seen_BKV.reshape(B * K, V), s)
    total_BX = (flat_RV.reshape(B, K, V) + x.running.score_BK[:, :, None]).reshape(B, K * V)
    # so many candidates that K are left when all that can end do
    score_BC, at_BC = jax.lax.top_k(total_BX, min(max(2, 1 + len(ends)) * K, K * V))
    from_BC, token_BC = at_BC // V, (at_BC % V).astype(jnp.int32)
    logprob_BC = jnp.take_along_axis(raw_BKV.reshape(B, K * V), at_BC, 1)
    end_BC = is_end(token_BC, ends)
    hit_BC = end_BC | (x.made + 1 >= x.limit_B)[:, None]
    old = x.running.pick(from_BC)
    candidates = Hypotheses(
        score_BC + hit_BC * _NEVER,
        old.ids_BKN.at[:, :, x.made].set(token_BC),
        old.logprob_BKN.at[:, :, x.made].set(logprob_BC),
        x.made + 1 - end_BC,
        hit_BC & (jnp.arange(hit_BC.shape[1]) < K),  # the others are there as a reserve only
        end_BC,
    )
    next_BK = jax.lax.top_k(candidates.score_BK, K)[1]
    running = candidates.pick(next_BK)

    length = (x.made + 1).astype(jnp.float32) ** x.length_penalty
    final_BC = score_BC / length + ~candidates.finished_BK * _NEVER
    final_BC = jnp.where(done(x)[:, None], -jnp.inf, final_BC)
    new = candidates._replace(score_BK=final_BC)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 1), x.best, new)
    best = both.pick(jax.lax.top_k(both.score_BK, K)[1])

    worst_BK = jnp.where(best.finished_BK, best.score_BK.min(1, keepdims=True), _NEVER)
    open_B = x.open_B & (running.score_BK[:, :1] / length > worst_BK).any(1)
    taken_BK = [jnp.take_along_axis(a, next_BK, 1) for a in (token_BC, from_BC)]
    x = x._replace(running=running, best=best, open_B=open_B, made=x.made + 1)
    return x, taken_BK[0], taken_BK[1]
