"""Generation: greedy, sampled or by beam search, in left-padded batches of independent rows; and scores of given texts.

Batches, lengths and caches are rounded up to buckets, so that few shapes are compiled.

Dimensions: B batch, R rows (samples or beams of each prompt, prompt by prompt), T prompt length, C completion length,
K beams, N places for new tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import decoding, sampling
from jaxtune.decoding import Decoding
from jaxtune.errors import UserError
from jaxtune.models.decoder import Decoder
from jaxtune.nodes import soft_prompt
from jaxtune.nodes.soft_prompt import Prefix, SoftPrompt
from jaxtune.sampling import Sampling, choose
from jaxtune.weights import Array

__all__ = ["Generation", "Generator", "Sampling", "Scored", "choose"]

_BUCKET = 64  # prompt lengths and caches are rounded up to this, so that few shapes are compiled
_ROWS = 8  # batches are rounded up to a power of two, and from here on to multiples of this
_AHEAD = 16  # tokens decoded between two looks at stop strings, where nobody watches

_GREEDY = Sampling()

Prompt = str | Sequence[int]  # text, or its tokens


class Generation(NamedTuple):
    """One finished text.

    >>> Generation(" Apples.", [17, 4], "stop", [-0.1, -0.2]).finish
    'stop'
    """

    text: str
    ids: list[int]  # new tokens, without the one that ended it
    finish: str  # "stop" or "length"
    logprobs: list[float]  # of each new token by the model alone, before penalty, temperature and the like


class Scored(NamedTuple):
    """What the model makes of one given completion."""

    logprobs: list[float]  # of each of its tokens
    greedy: bool  # whether each is the likeliest


class Generator:
    """Texts from prompts, by one set of weights.

    >>> model = jaxtune.load("runs/demo")  # doctest: +SKIP
    >>> model.generator.generate(["The fox"], Sampling(max_new_tokens=4))[0].text  # doctest: +SKIP
    ' eats berries.'

    On CPU it holds the weights layer by layer (a copy, where they are stacked): XLA copies what it slices in a loop.
    """

    def __init__(self, model: Decoder, weights: Any, tokenizer: Any, eos: Sequence[int]) -> None:
        if jax.default_backend() == "cpu":
            model, weights = decoding.by_layer(model, weights)
        self.model, self.weights, self.tokenizer, self.eos = model, weights, tokenizer, tuple(eos)
        prompt = soft_prompt.of(weights)
        self.first = list(prompt.virtual_ids) if isinstance(prompt, SoftPrompt) else []  # before every text
        self.virtual = prompt.tokens if isinstance(prompt, Prefix) else len(self.first)

    @property
    def context(self) -> int:
        """Positions that the model has for text."""
        return self.model.c.context - self.virtual

    @property
    def switch(self) -> int:
        """The length of text after which all keys turn otherwise, and are read again (LongRoPE)."""
        longs = (r.context for r in self.model.c.ropes if r is not None and r.kind == "longrope")
        return min(longs, default=2**31) - self.virtual  # without any beyond the context

    def generate(self, prompts: Sequence[Prompt], s: Sampling = _GREEDY) -> list[Generation]:
        """`s.samples` texts for each prompt, prompt by prompt, decoded together. No text depends on another prompt.

        A text ends at an end token or a stop string ("stop"), or after `s.max_new_tokens` or with the model's context
        ("length").

        Raises:
          UserError: a prompt has no tokens, or leaves no room in the model's context.
        """
        if not prompts:
            return []
        state: _Texts | _Beams = _Beams(self, prompts, s) if s.beams > 1 else _Texts(self, prompts, s)
        while not state.finished:
            state.advance(_AHEAD)
        return state.results()

    def stream(self, prompt: Prompt, s: Sampling = _GREEDY) -> Iterator[str]:
        """The text of one prompt, piece by piece as it comes.

        Raises:
          UserError: as `generate`; or more than one sample or beam is asked for.
        """
        if s.samples > 1 or s.beams > 1:
            raise UserError(f"samples={s.samples} and beams={s.beams} should be 1 where one text is streamed")
        state, sent = _Texts(self, [prompt], s), 0
        while not state.finished:
            state.advance(1)
            text = state.text(0)
            safe = len(text) if state.finished else len(text) - held_back(text, s.stop)
            if safe > sent:
                yield text[sent:safe]
                sent = safe

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Prompt], batch_size: int = 8) -> list[list[float]]:
        """Log-probabilities of the tokens of each completion after its prompt, as given (nothing is added at the end).

        Of texts, prompt and completion are encoded as one, and what goes beyond the prompt's own tokens is scored.

        Raises:
          UserError: a prompt has no tokens, or the two are longer than the model's context.
        """
        return [x.logprobs for x in self.judge(prompts, completions, batch_size)]

    def judge(self, prompts: Sequence[Prompt], completions: Sequence[Prompt], batch_size: int = 8) -> list[Scored]:
        """As `score`, and whether each completion is what greedy decoding would give."""
        pairs = [self._pair(i, *x) for i, x in enumerate(zip(prompts, completions, strict=True))]
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]))  # alike lengths go together
        found: dict[int, Scored] = {}
        for first in range(0, len(order), batch_size):
            part = order[first : first + batch_size]
            B = row_bucket(len(part))
            T, C = (bucket(max(map(size, (pairs[i] for i in part)))) for size in (self._length, _completed))
            ids_BT, segment_BT = np.zeros((2, B, T), np.int32)
            at_BC, target_BC = np.zeros((2, B, C), np.int32)
            for row, i in enumerate(part):
                (ids, start), first = pairs[i], len(self.first)
                read = [*self.first, *ids[:-1]]  # after the last token nothing is asked
                ids_BT[row, : len(read)], segment_BT[row, : len(read)] = read, 1
                n = len(ids) - start
                at_BC[row, :n], target_BC[row, :n] = first + np.arange(start - 1, len(ids) - 1), ids[start:]
            both = decoding.score(self.model, self.weights, ids_BT, segment_BT, at_BC, target_BC)
            logprob_BC, greedy_BC = (np.asarray(x) for x in both)
            for row, i in enumerate(part):
                n = _completed(pairs[i])
                found[i] = Scored(logprob_BC[row, :n].tolist(), bool(greedy_BC[row, :n].all()))
        return [found[i] for i in range(len(pairs))]

    def _pair(self, i: int, prompt: Prompt, completion: Prompt) -> tuple[list[int], int]:
        """The tokens of prompt and completion, and where the completion starts."""
        before = self.encode(prompt)
        whole = (
            self.encode(prompt + completion)
            if isinstance(prompt, str) and isinstance(completion, str)
            else [*before, *self.encode(completion)]
        )
        if not before:
            raise UserError(f"prompt {i + 1} is empty; give at least the token that texts begin with")
        if len(whole) > self.context + 1:  # the last token is not read
            raise UserError(
                f"prompt {i + 1} and its completion have {len(whole)} tokens; the model's context is {self._room()}; "
                "shorten the prompt"
            )
        return whole, min(len(before), len(whole))

    def _room(self) -> str:
        """The context, for messages."""
        return f"{self.context}" + (f" beside {self.virtual} virtual tokens" if self.virtual else "")

    def _length(self, pair: tuple[list[int], int]) -> int:
        return len(self.first) + len(pair[0]) - 1

    def left_padded(self, texts: Sequence[list[int]], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """`ids_BT` and `segment_BT` of texts, each after the virtual tokens, in so many rows."""
        texts = [[*self.first, *ids] for ids in texts]
        T = bucket(max(map(len, texts)))
        ids_BT, segment_BT = np.zeros((2, rows, T), np.int32)
        for row, ids in enumerate(texts):
            ids_BT[row, T - len(ids) :], segment_BT[row, T - len(ids) :] = ids, 1
        return ids_BT, segment_BT

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt; nothing is added."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt, add_special_tokens=False).input_ids
        return list(prompt)

    def _read(self, prompts: Sequence[Prompt], s: Sampling, copies: int) -> tuple["_Read", Decoding]:
        """Prompts as tokens, checked, and prefilled in `copies` rows each."""
        all_ids, context = [self.encode(p) for p in prompts], self.context
        for i, ids in enumerate(all_ids):
            if not ids:
                raise UserError(f"prompt {i + 1} is empty")
            if len(ids) >= context:
                raise UserError(
                    f"prompt {i + 1} has {len(ids)} tokens; the model's context is {self._room()}, and the answer "
                    "needs room in it; shorten the prompt or take a model with a longer context"
                )
        limits = [min(s.max_new_tokens, context - len(ids)) for ids in all_ids]
        ends = tuple(sorted({*self.eos, *s.stop_ids}))
        B = row_bucket(len(all_ids))
        ids_BT, segment_BT = self.left_padded(all_ids, B)
        size = bucket(ids_BT.shape[1] + max(limits) + _AHEAD)
        keys = _keys(s.seed, [*all_ids, *[[]] * (B - len(all_ids))], copies) if s.temperature > 0 else None
        seen = s.repetition_penalty != 1.0
        d = decoding.prefill(self.model, self.weights, ids_BT, segment_BT, keys, size, copies, seen)
        return _Read(all_ids, limits, ends), d


class _Read(NamedTuple):
    """Prompts that were read."""

    ids: list[list[int]]
    limits: list[int]  # new tokens of each, at most
    ends: tuple[int, ...]


class _Texts:
    """Prompts on their way to texts."""

    def __init__(self, g: Generator, prompts: Sequence[Prompt], s: Sampling) -> None:
        self.g, self.s = g, s
        (all_ids, limits, self.ends), self.d = g._read(prompts, s, s.samples)
        self.prompts = [ids for ids in all_ids for _ in range(s.samples)]
        self.limits = [n for n in limits for _ in range(s.samples)]
        self.new: list[list[int]] = [[] for _ in self.prompts]
        self.logprobs: list[list[float]] = [[] for _ in self.prompts]
        self.ended: list[str | None] = [None] * len(self.prompts)

    @property
    def finished(self) -> bool:
        return all(self.ended)

    def advance(self, n: int) -> None:
        """Decode up to `n` tokens and look for ends."""
        short = [self.g.switch + 1 - size for size in self._sizes() if size <= self.g.switch]
        n = min([n, *short])  # no further than where keys that were read before have to be read again
        self._decode(n)
        if n in short:
            self._read_again()

    def _sizes(self) -> list[int]:
        """How many tokens each row that goes on has."""
        rows = zip(self.prompts, self.new, self.ended, strict=True)
        return [len(ids) + len(new) for ids, new, ended in rows if not ended]

    def _read_again(self) -> None:
        """Prompts and what came after them, as one."""
        d, s = self.d, self.s
        rows = [[*ids, *new] for ids, new in zip(self.prompts, self.new, strict=True)]
        ids_RT, segment_RT = self.g.left_padded(rows, d.position_R.shape[0])
        size = bucket(ids_RT.shape[1] + max(self.limits) + _AHEAD)
        again = decoding.prefill(
            self.g.model, self.g.weights, ids_RT, segment_RT, d.key_R, size, 1, s.repetition_penalty != 1.0
        )
        self.d = again._replace(made=d.made, done_R=d.done_R)

    def _decode(self, n: int) -> None:
        out = decoding.decode(self.g.model, self.g.weights, self.d, _on_device(self.s), n, self.ends)
        self.d = out[0]
        tokens_nR, logprobs_nR = (np.asarray(x) for x in out[1])
        for row, ended in enumerate(self.ended):
            if ended:
                continue
            had = len(self.new[row])
            tokens = tokens_nR[: self.limits[row] - had, row].tolist()
            end = tokens.index(-1) if -1 in tokens else None
            self.new[row] += tokens[:end]
            self.logprobs[row] += logprobs_nR[: len(tokens[:end]), row].tolist()
            if (cut := self._stopped(row, had)) is not None:
                del self.new[row][cut:], self.logprobs[row][cut:]
            if end is not None or cut is not None:
                self.ended[row] = "stop"
            elif len(self.new[row]) >= self.limits[row]:
                self.ended[row] = "length"

    def _stopped(self, row: int, had: int) -> int | None:
        """The number of tokens with which a stop string is there, if it came after the first `had`."""

        def holds(n: int) -> bool:
            text = _decoded(self.g.tokenizer, self.prompts[row], self.new[row][:n])
            return any(x in text for x in self.s.stop)

        all_there = len(self.new[row])
        if not self.s.stop or not holds(all_there):
            return None
        return next((n for n in range(had + 1, all_there) if holds(n)), all_there)

    def text(self, row: int) -> str:
        """The row's text so far, cut at the first stop string."""
        return _cut(_decoded(self.g.tokenizer, self.prompts[row], self.new[row]), self.s.stop)

    def results(self) -> list[Generation]:
        rows = range(len(self.new))
        return [Generation(self.text(i), self.new[i], self.ended[i] or "length", self.logprobs[i]) for i in rows]


class _Beams:
    """Prompts on their way to the best texts of a beam search."""

    def __init__(self, g: Generator, prompts: Sequence[Prompt], s: Sampling) -> None:
        self.g, self.s = g, s
        self.read, self.d = g._read(prompts, s, s.beams)
        sizes = zip(self.read.ids, self.read.limits, strict=True)
        if any(len(ids) <= g.switch < len(ids) + n for ids, n in sizes):
            raise UserError(
                f"beams={s.beams}: a text would pass {g.switch} tokens, where LongRoPE changes its factors, which beam "
                "search does not follow; lower max_new_tokens or take beams=1"
            )
        B = self.d.position_R.shape[0] // s.beams
        limits = [*self.read.limits, *[0] * (B - len(self.read.limits))]  # rows of padding are done
        self.x = sampling.begin(jnp.array(limits, jnp.int32), bucket(max(limits)), s)
        self.finished = False

    def advance(self, n: int) -> None:
        """Take `n` steps."""
        on = _on_device(self.s)
        self.d, self.x = decoding.search(self.g.model, self.g.weights, self.d, self.x, on, n, self.read.ends)
        self.finished = bool(sampling.done(self.x).all())

    def results(self) -> list[Generation]:
        best, out = jax.tree.map(np.asarray, self.x.best), []
        for row, prompt in enumerate(self.read.ids):
            for k in range(self.s.samples):
                n = int(best.length_BK[row, k])
                ids, logprobs = best.ids_BKN[row, k, :n].tolist(), best.logprob_BKN[row, k, :n].tolist()
                whole = _decoded(self.g.tokenizer, prompt, ids)
                text = _cut(whole, self.s.stop)
                finish = "stop" if best.ended_BK[row, k] or text != whole else "length"
                out.append(Generation(text, ids, finish, logprobs))
        return out


def _on_device(s: Sampling) -> Sampling:
    """What the compiled functions depend on."""
    rest: Any = {"stop": (), "stop_ids": (), "seed": 0, "samples": 1, "length_penalty": 1.0, "early_stopping": False}
    return dataclasses.replace(s, max_new_tokens=1, **rest)


def bucket(n: int) -> int:
    """A length rounded up."""
    return -(-max(n, 1) // _BUCKET) * _BUCKET


def row_bucket(n: int) -> int:
    """A number of rows rounded up."""
    return 1 << (max(n, 1) - 1).bit_length() if n <= _ROWS else -(-n // _ROWS) * _ROWS


def _completed(pair: tuple[list[int], int]) -> int:
    return len(pair[0]) - pair[1]


def held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end that may yet become a stop string, or are half of a character."""
    half = len(text) - len(text.rstrip("\ufffd"))
    return max([half, *(n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))])


def _decoded(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of new tokens, spaces at its start included (decoded alone, some tokenizers drop them)."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode(prompt + new, skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)


def _cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first stop string."""
    ends = [at for x in stop if (at := text.find(x)) >= 0]
    return text[: min(ends)] if ends else text


def _keys(seed: int, prompts: Sequence[Sequence[int]], samples: int) -> Array:
    """A key for each sample of each prompt, from the prompt alone: what stands beside it changes nothing, `[R]`."""
    hashes = jnp.array([stable_hash(ids) for ids in prompts], jnp.uint32)
    fold = jax.vmap(jax.random.fold_in, (None, 0))
    key_B = fold(jax.random.key(seed), hashes)
    if samples == 1:
        return key_B
    more_BM = jax.vmap(fold, (0, None))(key_B, jnp.arange(1, samples))
    return jnp.concatenate([key_B[:, None], more_BM], 1).reshape(-1)


def stable_hash(ids: Sequence[int]) -> int:
    """A number of a prompt, so that equal seeds give it equal text whatever stands beside it."""
    h = 2166136261
    for i in ids:  # FNV-1a
        h = ((h ^ i) * 16777619) & 0xFFFFFFFF
    return h
