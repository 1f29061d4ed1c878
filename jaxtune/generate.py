"""Generation with a KV cache: greedy or sampled, in left-padded batches whose rows do not know of each other.

Dimensions: B batch, T prompt length, S places in the cache, V vocab.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.models.decoder import Cache, Decoder
from jaxtune.weights import Array

_BUCKET = 64  # prompt lengths and caches are rounded up to this, so that few shapes are compiled
_AHEAD = 16  # tokens decoded between two looks at stop strings, where nobody watches


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the order is penalty, temperature, top-k, top-p, as in transformers."""

    max_new_tokens: int = 256
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # Keskar et al., 2019
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (all) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not ok:
                raise UserError(f"{name}={getattr(self, name)} should be {wanted}")


class _Decoding(NamedTuple):
    cache: Any  # a `Cache`
    logits_BV: Array  # of the next token
    position_B: Array
    seen_BV: Array  # which tokens a row holds, for the penalty
    done_B: Array
    key_B: Array


class Generation(NamedTuple):
    """One finished text."""

    text: str
    ids: list[int]  # new tokens, without the one that ended it
    finish: str  # "stop" or "length"


def choose(logits_BV: Array, seen_BV: Array, key_B: Array, s: Sampling) -> Array:
    """The next token of each row, int32 `[B]`; `key_B` are keys, used where the temperature is above 0."""
    if s.repetition_penalty != 1.0:
        penalised_BV = jnp.where(logits_BV < 0, logits_BV * s.repetition_penalty, logits_BV / s.repetition_penalty)
        logits_BV = jnp.where(seen_BV, penalised_BV, logits_BV)
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
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _prefill(model: Decoder, weights: Any, ids_BT: Array, segment_BT: Array, size: int, key_B: Array) -> _Decoding:
    c = model.c
    B = ids_BT.shape[0]
    groups = {name: jax.tree.leaves(w)[0].shape[0] for name, w in weights.items() if "layers_" in name}
    position_BT = jnp.maximum(jnp.cumsum(segment_BT, 1) - 1, 0)
    outputs, cache = model.apply({"params": weights}, ids_BT, segment_BT, position_BT, Cache.empty(groups, c, B, size))
    seen_BV = jnp.zeros((B, c.rows), bool).at[jnp.arange(B)[:, None], ids_BT].max(segment_BT > 0)
    logits_BV = outputs.logits(outputs.hidden_BTD[:, -1:])[:, 0]
    return _Decoding(cache, logits_BV, position_BT[:, -1] + 1, seen_BV, jnp.zeros(B, bool), key_B)


@functools.partial(jax.jit, static_argnames=("model", "s", "n", "eos"), donate_argnames=("d",))
def _decode(
    model: Decoder, weights: Any, d: _Decoding, s: Sampling, n: int, eos: tuple[int, ...]
) -> tuple[_Decoding, Array]:
    """`n` more tokens, `[n, B]`; -1 for rows that are done."""

    def one(d: _Decoding, _: None) -> tuple[_Decoding, Array]:
        B = d.position_B.shape[0]
        token_B = choose(d.logits_BV, d.seen_BV, jax.vmap(jax.random.fold_in)(d.key_B, d.position_B), s)
        done_B = d.done_B | jnp.isin(token_B, jnp.array(eos, jnp.int32))
        seen_BV = d.seen_BV.at[jnp.arange(B), token_B].set(True)
        outputs, cache = model.apply(
            {"params": weights}, token_B[:, None], jnp.ones((B, 1), jnp.int32), d.position_B[:, None], d.cache
        )
        d = _Decoding(cache, outputs.logits()[:, 0], d.position_B + 1, seen_BV, done_B, d.key_B)
        return d, jnp.where(done_B, -1, token_B)

    return jax.lax.scan(one, d, None, length=n)


class Generator:
    """Texts from prompts, by one set of weights."""

    def __init__(self, model: Decoder, weights: Any, tokenizer: Any, eos: Sequence[int]) -> None:
        self.model, self.weights, self.tokenizer, self.eos = model, weights, tokenizer, tuple(eos)

    def generate(self, prompts: Sequence[str], s: Sampling = Sampling()) -> list[Generation]:
        """One text for each prompt, decoded together. A row's text does not depend on the others.

        Raises:
          UserError: a prompt has no tokens.
        """
        state = _Texts(self, prompts, s)
        while not state.finished:
            state.advance(_AHEAD)
        return state.results()

    def stream(self, prompt: str, s: Sampling = Sampling()) -> Iterator[str]:
        """The text of one prompt, piece by piece as it comes."""
        state, sent = _Texts(self, [prompt], s), 0
        while not state.finished:
            state.advance(1)
            text = state.text(0)
            safe = len(text) if state.finished else len(text) - _held_back(text, s.stop)
            if safe > sent:
                yield text[sent:safe]
                sent = safe


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may yet become a stop string, or are half of a character."""
    half = 1 if text.endswith("\ufffd") else 0
    return max([half, *(n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))])


class _Texts:
    """Prompts on their way to texts."""

    def __init__(self, g: Generator, prompts: Sequence[str], s: Sampling) -> None:
        self.g, self.s = g, s
        self.prompts = [g.tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
        for i, ids in enumerate(self.prompts):
            if not ids:
                raise UserError(f"prompt {i + 1} is empty")
        T = -(-max(map(len, self.prompts)) // _BUCKET) * _BUCKET
        size = -(-(T + s.max_new_tokens + _AHEAD) // _BUCKET) * _BUCKET
        ids_BT, segment_BT = np.zeros((2, len(prompts), T), np.int32)
        for row, ids in enumerate(self.prompts):
            ids_BT[row, T - len(ids) :] = ids
            segment_BT[row, T - len(ids) :] = 1
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(s.seed), jnp.array([_stable_hash(ids) for ids in self.prompts], jnp.uint32)
        )
        self.d = _prefill(g.model, g.weights, ids_BT, segment_BT, size, keys)
        self.new: list[list[int]] = [[] for _ in prompts]
        self.ended: list[str | None] = [None] * len(prompts)

    @property
    def finished(self) -> bool:
        return all(self.ended)

    def advance(self, n: int) -> None:
        """Decode `n` tokens and look for ends."""
        self.d, tokens_nB = _decode(self.g.model, self.g.weights, self.d, self._on_device(), n, self.g.eos)
        for row, tokens in enumerate(np.asarray(tokens_nB).T.tolist()):
            for token in tokens:
                if self.ended[row]:
                    break
                if token == -1:
                    self.ended[row] = "stop"
                    break
                self.new[row].append(token)
                if self.s.stop and any(x in self._decoded(row) for x in self.s.stop):
                    self.ended[row] = "stop"
                elif len(self.new[row]) == self.s.max_new_tokens:
                    self.ended[row] = "length"

    def _on_device(self) -> Sampling:
        """What the compiled function depends on."""
        return dataclasses.replace(self.s, max_new_tokens=1, stop=(), seed=0)

    def _decoded(self, row: int) -> str:
        """New text of a row, spaces at its start included (decoded alone, some tokenizers drop them)."""
        tokenizer, prompt = self.g.tokenizer, self.prompts[row]
        before = tokenizer.decode(prompt, skip_special_tokens=True)
        whole = tokenizer.decode(prompt + self.new[row], skip_special_tokens=True)
        return (
            whole[len(before) :]
            if whole.startswith(before)
            else tokenizer.decode(self.new[row], skip_special_tokens=True)
        )

    def text(self, row: int) -> str:
        """The row's text so far, cut at the first stop string."""
        text = self._decoded(row)
        ends = [at for x in self.s.stop if (at := text.find(x)) >= 0]
        return text[: min(ends)] if ends else text

    def results(self) -> list[Generation]:
        return [Generation(self.text(i), self.new[i], self.ended[i] or "length") for i in range(len(self.new))]


def _stable_hash(ids: Sequence[int]) -> int:
    """A number of a prompt, so that equal seeds give it equal text whatever stands beside it."""
    h = 2166136261
    for i in ids:  # FNV-1a
        h = ((h ^ i) * 16777619) & 0xFFFFFFFF
    return h
