"""Rows that come and go over one KV cache: each request's texts are decoded together with those of others.

Every row's tokens lie side by side and end at the cache's one write index. A prompt is read alone, and laid into a free
row so that it ends there too; where places run out, all rows move left by what none of them needs. How a row chooses
its tokens is a row of arrays, so requests of all kinds share a step. No row's text depends on the others.

Dimensions: R rows, T prompt length, S places in the cache, V vocab, N steps of a call, k likeliest tokens.
"""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import decoding
from jaxtune.decoding import Decoding
from jaxtune.generate import Generator, bucket, stable_hash
from jaxtune.models.decoder import Cache, Decoder
from jaxtune.nodes.soft_prompt import Prefix, of
from jaxtune.weights import Array

SIZES = (1, 4, 16, 32)  # rows of a batch
STEPS = 8  # of one call, at most
LIKELIEST = 20
_LOOK_S = 0.1  # between two looks at what was decoded, at most, about
_PLACES = 128  # and twice as many, as often as needed
_PROMPTS = 8  # that are read between two looks
_TOGETHER = 4  # of them at once, where they are short: several cost little more than one
_SHORT = 256  # tokens
_FIRST = 2  # steps after prompts were read: their texts begin at once, and more prompts may have come meanwhile
_PROMPT = 32  # tokens that a prompt is padded to, and twice as many, as often as needed


class Choice(NamedTuple):
    """How a row's next token is chosen: biases and penalties, temperature, top-p; drawn by its own key."""

    temperature: Any  # 0 is greedy
    top_p: Any
    presence: Any  # taken from the logits of tokens that are in the new text
    frequency: Any  # for each time that they are
    bias: Any  # [V]; None of a row that has none


class State(NamedTuple):
    """A batch on its device."""

    cache: Cache
    logits_RV: Array  # of the next token
    position_R: Array
    count_RV: Array  # how often each token is in the new text
    choice: Choice  # of arrays
    key_R: Array


class Made(NamedTuple):
    """New tokens; log-probabilities are those of the model alone."""

    token_NR: Any
    logprob_NR: Any
    top_NRk: Any  # None where nobody wants them
    top_logprob_NRk: Any


@functools.partial(jax.jit, static_argnames=("model", "top"), donate_argnames=("s",))
def step(model: Decoder, weights: Any, s: State, live_R: Array, n: Array, top: int) -> tuple[State, Made]:
    """`n` more tokens in every live row, `STEPS` at most."""
    R = s.position_R.shape[0]
    wide = (STEPS, R, top)
    tops = (jnp.zeros(wide, jnp.int32), jnp.zeros(wide, jnp.float32)) if top else (None, None)
    made = Made(jnp.zeros((STEPS, R), jnp.int32), jnp.zeros((STEPS, R), jnp.float32), *tops)

    def one(i: Array, carry: tuple[State, Made]) -> tuple[State, Made]:
        s, made = carry
        token_R = choose(s, live_R)
        logprob_RV = jax.nn.log_softmax(s.logits_RV.astype(jnp.float32), -1)
        logprob_R = jnp.take_along_axis(logprob_RV, token_R[:, None], 1)[:, 0]
        made = made._replace(token_NR=made.token_NR.at[i].set(token_R), logprob_NR=made.logprob_NR.at[i].set(logprob_R))
        if top:
            best_Rk, top_Rk = jax.lax.top_k(logprob_RV, top)
            made = made._replace(
                top_NRk=made.top_NRk.at[i].set(top_Rk), top_logprob_NRk=made.top_logprob_NRk.at[i].set(best_Rk)
            )
        segment_R1 = live_R.astype(jnp.int32)[:, None]
        read: Any = model.apply({"params": weights}, token_R[:, None], segment_R1, s.position_R[:, None], s.cache)
        outputs, cache = read
        return s._replace(
            cache=cache,
            logits_RV=outputs.logits()[:, 0],
            position_R=s.position_R + live_R,
            count_RV=s.count_RV.at[jnp.arange(R), token_R].add(1),
        ), made

    return jax.lax.fori_loop(0, n, one, (s, made))


def choose(s: State, live_R: Array) -> Array:
    """The next token of each row; of those that are not live any."""
    c = s.choice
    some_RV = s.count_RV > 0
    logits_RV = s.logits_RV + c.bias - s.count_RV * c.frequency[:, None] - some_RV * c.presence[:, None]
    greedy_R = jnp.argmax(logits_RV, -1).astype(jnp.int32)
    warm_R = (c.temperature > 0) & live_R

    def nucleus(logits_RV: Array) -> Array:
        sorted_RV = jnp.sort(logits_RV, -1)[:, ::-1]
        p_RV = jax.nn.softmax(sorted_RV, -1)
        before_RV = jnp.cumsum(p_RV, -1) - p_RV
        least_R1 = jnp.min(jnp.where(before_RV < c.top_p[:, None], sorted_RV, jnp.inf), -1, keepdims=True)
        cut_RV = (logits_RV < least_R1) & (c.top_p < 1)[:, None]
        return jnp.where(cut_RV, -jnp.inf, logits_RV)

    def drawn(logits_RV: Array) -> Array:
        logits_RV = logits_RV / jnp.where(warm_R, c.temperature, 1.0)[:, None]
        logits_RV = jax.lax.cond((warm_R & (c.top_p < 1)).any(), nucleus, lambda x: x, logits_RV)
        key_R = jax.vmap(jax.random.fold_in)(s.key_R, s.position_R)
        return jnp.where(warm_R, jax.vmap(jax.random.categorical)(key_R, logits_RV).astype(jnp.int32), greedy_R)

    return jax.lax.cond(warm_R.any(), drawn, lambda _: greedy_R, logits_RV)


@functools.partial(jax.jit, static_argnames=("before",), donate_argnames=("s",))
def insert(
    s: State, d: Decoding, i: Array, at: Array, choice: Choice, count_V: Array, seeds: tuple[Array, Array, Array],
    before: int,
) -> State:  # fmt: skip
    """Prompt `i` of those read (after `before` places of a prefix) in row `at`, ending where all rows end."""
    S, T = s.cache.segment_BS.shape[1], d.cache.segment_BS.shape[1] - before
    start = s.cache.length - T

    def row(old: Array, new: Array, axis: int) -> Array:
        """All places of one row, empty but for the prefix and the prompt."""
        prefix, prompt = jnp.split(new.astype(old.dtype), [before], axis)
        empty = jnp.zeros((*new.shape[:axis], S - before, *new.shape[axis + 1 :]), old.dtype)
        whole = jnp.concatenate([prefix, empty], axis)
        return jax.lax.dynamic_update_slice_in_dim(whole, prompt, start, axis)

    def put(old: Array, new: Array, axis: int, rows: int) -> Array:
        one = jax.lax.dynamic_slice_in_dim(new, i, 1, rows)
        return jax.lax.dynamic_update_slice_in_dim(old, row(old, one, axis), at, rows)

    layers = jax.tree.map(lambda old, new: put(old, new, 3, 1), dict(s.cache.layers), dict(d.cache.layers))
    seed, hash, sample = seeds
    key = jax.random.fold_in(jax.random.key(seed), hash)
    key = jax.lax.cond(sample > 0, lambda: jax.random.fold_in(key, sample), lambda: key)
    return State(
        Cache(layers, put(s.cache.segment_BS, d.cache.segment_BS, 1, 0), s.cache.length),
        s.logits_RV.at[at].set(d.logits_RV[i]),
        s.position_R.at[at].set(d.position_R[i]),
        s.count_RV.at[at].set(count_V),
        Choice(*(a.at[at].set(x) for a, x in zip(s.choice, choice, strict=True))),
        s.key_R.at[at].set(key),
    )


@functools.partial(jax.jit, static_argnames=("size", "before"))
def moved(s: State, from_R: Array, left: Array, size: int, before: int) -> State:
    """Rows `from_R` (-1: an empty one) in `size` places, moved left; the `before` places of a prefix stay."""
    there_R = from_R >= 0
    place_S = jnp.arange(size)
    old_S = jnp.where(place_S < before, place_S, place_S + left)
    within_S = (old_S >= jnp.minimum(place_S, before)) & (old_S < s.cache.segment_BS.shape[1])
    layers = jax.tree.map(lambda x: x[:, from_R].take(old_S, axis=3, mode="clip"), dict(s.cache.layers))
    segment_RS = jnp.where(within_S & there_R[:, None], s.cache.segment_BS[from_R].take(old_S, axis=1, mode="clip"), 0)
    return State(Cache(layers, segment_RS, s.cache.length - left), *jax.tree.map(lambda x: x[from_R], s[1:]))


@functools.partial(jax.jit, static_argnames=("model", "top"))
def judge(model: Decoder, weights: Any, ids_1T: Array, segment_1T: Array, top: int) -> Made:
    """Of each token of a prompt what the model gave it and the likeliest, before it is read: as `Made`, `[T, 1]`."""
    position_1T = jnp.maximum(jnp.cumsum(segment_1T, 1) - 1, 0)
    outputs = model.apply({"params": weights}, ids_1T, segment_1T, position_1T)[0]

    def one(column: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden_D, next_ = column
        logprob_V = jax.nn.log_softmax(outputs.logits(hidden_D[None, None])[0, 0].astype(jnp.float32))
        best_k, top_k = jax.lax.top_k(logprob_V, top)
        return logprob_V[next_], top_k, best_k

    next_1T = jnp.roll(ids_1T, -1, 1)
    logprob_T, top_Tk, best_Tk = jax.lax.map(one, (outputs.hidden_BTD[0], next_1T[0]), batch_size=8)
    return Made(next_1T.T, logprob_T[:, None], top_Tk[:, None], best_Tk[:, None])


# --- the host's side --------------------------------------------------------------------------------------------------


class Row:
    """A text on its way. `owner` is whoever asked for it."""

    def __init__(
        self, owner: Any, prompt: Sequence[int], limit: int, choice: Choice, seed: int, sample: int, top: bool
    ) -> None:
        self.owner, self.prompt, self.limit, self.top = owner, list(prompt), limit, top
        self.choice, self.seed, self.sample = choice, seed, sample
        self.new: list[int] = []


class Token(NamedTuple):
    """A new token of a row."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


class Batch:
    """The rows of one model. Not for several threads.

    Rows wait in the order in which they came until there is a place. Keys and values take `room` bytes at most, or what
    one row needs.
    """

    def __init__(self, g: Generator, room: int) -> None:
        self.g, self.room = g, room
        c = g.model.c
        self.before = g.virtual if isinstance(of(g.weights), Prefix) else 0
        self.longest = bucket(len(g.first) + g.context)  # of a prompt
        self.most = self.before + self.longest + bucket(STEPS)
        self.place_bytes = 2 * c.layers * c.kv_heads * c.head * jnp.dtype(c.dtype).itemsize
        self.waiting: list[Row] = []
        self.rows: list[Row | None] = []  # by slot
        self.state: State | None = None
        self.length = 0  # places taken, as the device counts them
        self.pace = _LOOK_S  # seconds that a step takes
        self.none_V = jnp.zeros(c.rows, jnp.float32)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting) or any(self.rows)

    def add(self, row: Row) -> None:
        """Let a row come in when there is a place."""
        self.waiting.append(row)

    def drop(self, row: Row) -> None:
        """Let a row go; its place is free."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.rows:
            self.rows[self.rows.index(row)] = None
        if not any(self.rows):
            self.clear()

    def clear(self) -> None:
        """Let all rows go that do not wait, and the memory with them."""
        self.rows, self.state, self.length = [], None, 0

    def step(self) -> list[tuple[Row, list[Token]]]:
        """Read prompts for which there is a place, then take a few steps. Who reads these drops rows that ended."""
        self._shrink()
        come: list[tuple[Row, int]] = []
        while self.waiting and len(come) < _PROMPTS and (at := self._slot()) is not None:
            self.rows[at] = row = self.waiting.pop(0)
            come.append((row, at))
        self._lay(come)
        live = [(at, row) for at, row in enumerate(self.rows) if row is not None]
        most = max(row.limit - len(row.new) for _, row in live)  # what others do not want of these is left out
        soon = _FIRST if come else max(1, min(STEPS, int(_LOOK_S / self.pace)))
        n = min(soon, most, *(self._to_switch(row) for _, row in live))
        self._make_room(n)
        top = min(LIKELIEST, self.g.model.c.vocab) if any(row.top for _, row in live) else 0
        live_R = np.array([row is not None for row in self.rows])
        begun = time.monotonic()
        assert self.state is not None
        self.state, made = step(self.g.model, self.g.weights, self.state, live_R, np.int32(n), top)
        made = jax.device_get(made)
        self.length += n
        self.pace = (time.monotonic() - begun) / n
        out = []
        for at, row in live:
            tokens = [_token(made, i, at, row.top) for i in range(min(n, row.limit - len(row.new)))]
            row.new += [t.id for t in tokens]
            out.append((row, tokens))
            if self._size(row) == self.g.switch + 1 and len(row.new) < row.limit:
                self._lay([(row, at)])  # from here on LongRoPE turns all keys otherwise
        return out

    def _size(self, row: Row) -> int:
        """Tokens of a row's text."""
        return len(row.prompt) + len(row.new)

    def _to_switch(self, row: Row) -> int:
        """How many steps a row may take until its keys turn otherwise."""
        left = self.g.switch + 1 - self._size(row)
        return left if left > 0 else STEPS

    def padded(self, n: int) -> int:
        """The length of a prompt of `n` tokens, rounded up, so that few are compiled."""
        return min(max(_PROMPT, 1 << (n - 1).bit_length()), self.longest)

    # --- places

    def _slot(self) -> int | None:
        """A free place for the first row that waits; more are made where they may."""
        if None in self.rows:
            return self.rows.index(None)
        have = len(self.rows)
        wanted = next((n for n in SIZES if n >= have + len(self.waiting)), SIZES[-1])
        longest = max(len(row.prompt) + row.limit for row in [*self.rows, self.waiting[0]] if row is not None)
        while wanted > max(have, 1) and wanted * self._places(longest) * self.place_bytes > self.room:
            wanted = SIZES[SIZES.index(wanted) - 1]
        if wanted <= have:
            return None
        slots = list(range(have)) + [-1] * (wanted - have)
        self.rows += [None] * (wanted - have)
        if self.state is not None:
            self._move(0, self._held, slots)
        return have

    def _shrink(self) -> None:
        """Fewer places, where so few rows are left."""
        kept = [at for at, row in enumerate(self.rows) if row is not None]
        wanted = next(n for n in SIZES if n >= len(kept) + len(self.waiting) or n == SIZES[-1])
        if not kept or wanted >= len(self.rows):
            return
        slots = kept + [-1] * (wanted - len(kept))
        self.rows = [self.rows[at] if at >= 0 else None for at in slots]
        self._move(0, self._held, slots)

    @property
    def _held(self) -> int:
        """Places in the cache."""
        assert self.state is not None
        return self.state.cache.segment_BS.shape[1]

    def _places(self, n: int) -> int:
        """Places for so many tokens of text, rounded up, with a prefix."""
        size = _PLACES
        while size < len(self.g.first) + n + STEPS:
            size *= 2
        return min(self.before + size, self.most)

    def _make_room(self, n: int) -> None:
        """Places for `n` more tokens: by moving left, else by more of them."""
        if self.length + n > self._held:
            needed = max(self._size(row) for row in self.rows if row is not None)
            left = self.length - self.before - len(self.g.first) - needed
            self._move(left, max(self._held, self._places(needed + n)), list(range(len(self.rows))))

    def _move(self, left: int, size: int, slots: list[int]) -> None:
        self.state = moved(self.state, np.array(slots, np.int32), np.int32(left), size, self.before)
        self.length -= left

    def _lay(self, come: list[tuple[Row, int]]) -> None:
        """Read the tokens of rows, and lay them where they belong."""
        alike: dict[int, list[tuple[Row, int]]] = {}
        for row, at in come:
            alike.setdefault(self.padded(len(self.g.first) + self._size(row)), []).append((row, at))
        for T, some in alike.items():
            while some:
                count = _TOGETHER if T <= _SHORT and len(some) >= _TOGETHER - 1 else 1
                self._read(T, some[:count], count)
                del some[:count]

    def _read(self, T: int, some: list[tuple[Row, int]], B: int) -> None:
        """Read rows as `B` prompts of `T` tokens; some may be empty."""
        ids_BT, segment_BT = np.zeros((2, B, T), np.int32)
        for i, (row, _) in enumerate(some):
            ids = [*self.g.first, *row.prompt, *row.new]
            ids_BT[i, T - len(ids) :], segment_BT[i, T - len(ids) :] = ids, 1
        d = decoding.prefill(self.g.model, self.g.weights, ids_BT, segment_BT, None, T, 1, False)
        if self.state is None:
            self.length = self.before + T
            self.state = self._empty(self._places(T), d)
        elif self.length < self.before + T:
            more = self.before + T - self.length
            self._move(-more, max(self._places(T), self._held), list(range(len(self.rows))))
        for i, (row, at) in enumerate(some):
            counts = np.bincount(row.new, minlength=len(self.none_V)).astype(np.float32) if row.new else self.none_V
            choice = row.choice if row.choice.bias is not None else row.choice._replace(bias=self.none_V)
            seeds = np.uint32(row.seed), np.uint32(stable_hash(row.prompt)), np.uint32(row.sample)
            self.state = insert(self.state, d, np.int32(i), np.int32(at), choice, counts, seeds, self.before)

    def _empty(self, S: int, d: Decoding) -> State:
        R, V = len(self.rows), d.logits_RV.shape[1]

        def rows(x: Array) -> Array:
            return jnp.zeros((x.shape[0], R, x.shape[2], S, x.shape[4]), x.dtype)

        cache = Cache(jax.tree.map(rows, dict(d.cache.layers)), jnp.zeros((R, S), jnp.int32), jnp.int32(self.length))
        choice = Choice(jnp.zeros(R), jnp.ones(R), jnp.zeros(R), jnp.zeros(R), jnp.zeros((R, V)))
        logits_RV, position_R = jnp.zeros((R, V), d.logits_RV.dtype), jnp.zeros(R, d.position_R.dtype)
        return State(cache, logits_RV, position_R, jnp.zeros((R, V)), choice, jax.random.split(jax.random.key(0), R))


def _token(made: Made, i: int, at: int, top: bool) -> Token:
    tops = []
    if top:
        tops = list(zip(made.top_NRk[i, at].tolist(), made.top_logprob_NRk[i, at].tolist(), strict=True))
    return Token(int(made.token_NR[i, at]), float(made.logprob_NR[i, at]), tops)
