"""One answer on its way: tokens of a row become pieces of text."""

from typing import Any

import jax
import numpy as np

from jaxtune.serve.inference import batch
from jaxtune.serve.inference.asks import Ask, Piece, Word
from jaxtune.serve.inference.batch import Row, Token
from jaxtune.serve.inference.words import Text


class Answer:
    """A text of a question."""

    def __init__(self, id: int, index: int, ask: Ask, held: Any, row: Row) -> None:
        self.id, self.index, self.ask, self.held, self.row = id, index, ask, held, row
        self.text = Text(held.tuned.tokenizer, row.prompt, ask.stop, ask.specials)
        self.tokens, self.score, self.before = 0, 0.0, 0
        self.words: list[Word] = []  # not told yet

    def take(self, tokens: list[Token]) -> Piece | None:
        """What the text goes on with, if there is something to tell."""
        finish = None
        for t in tokens:
            if t.id in self.held.tuned.generator.eos:
                finish = "stop"
                break
            at = len(self.text.text) + self.before
            self.text.push(t.id)
            self.tokens += 1
            self.score += t.logprob
            if self.ask.logprobs is not None:
                self.words.append(self.held.speller.word(t.id, t.logprob, t.top[: self.ask.logprobs], at))
            if self.text.stopped or self.tokens == self.row.limit:
                finish = "stop" if self.text.stopped else "length"
                break
        if finish is not None:
            self.text.end()
            finish = "stop" if self.text.stopped else finish
        return self._piece(finish)

    def nothing(self) -> Piece:
        """The piece that ends a text for which no token was wanted."""
        return Piece(self.index, "", None if self.ask.logprobs is None else [], "length")

    def echo(self, prompt: str | None) -> Piece:
        """The prompt as a piece; `prompt` is its text, where it came as text."""
        g, ids = self.held.tuned.generator, self.row.prompt
        spoken, at = Text(g.tokenizer, []), []
        for i in ids:
            at.append(len(spoken.text))
            spoken.push(i)
        spoken.end()
        text = spoken.text if prompt is None else prompt
        self.before = len(text)
        if self.ask.logprobs is None:
            return Piece(self.index, text)
        whole = [*g.first, *ids]
        ids_1T, segment_1T = np.zeros((2, 1, self.held.batch.padded(len(whole))), np.int32)
        ids_1T[0, : len(whole)], segment_1T[0, : len(whole)] = whole, 1
        top = min(batch.LIKELIEST, g.model.c.vocab)
        made = jax.device_get(batch.judge(g.model, g.weights, ids_1T, segment_1T, top))
        words = []
        for n, i in enumerate(ids):
            place = len(g.first) + n - 1  # of the token after which it comes
            known = place >= 0
            tops = zip(made.top_NRk[place, 0].tolist(), made.top_logprob_NRk[place, 0].tolist(), strict=True)
            likeliest = list(tops)[: self.ask.logprobs] if known else []
            logprob = float(made.logprob_NR[place, 0]) if known else None
            words.append(self.held.speller.word(i, logprob, likeliest, at[n]))
        return Piece(self.index, text, words)

    def _piece(self, finish: str | None) -> Piece | None:
        sure = self.text.sure(finish is not None)
        new, self.text.told = self.text.text[self.text.told : sure], max(sure, self.text.told)
        told = [w for w in self.words if finish is not None or w.at < self.before + sure]
        self.words = self.words[len(told) :]
        if self.text.stopped:
            told = [w for w in told if w.at < self.before + len(self.text.text)]
        if not new and not told and finish is None:
            return None
        end = (finish, self.tokens, self.score) if finish is not None else ()
        return Piece(self.index, new, None if self.ask.logprobs is None else told, *end)
