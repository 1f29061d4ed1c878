"""Examples to token ids and a loss mask.

The whole rendered conversation is tokenised once, exactly as it would be at inference; which tokens are trained on
follows from the characters of its turns (`turns`). What is longer than a row is cut (`truncation`).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data import truncation
from jaxtune.data.examples import Conversation, Document, Example, Judged, Message, Pair, Record, Segments, Tokens
from jaxtune.data.turns import Texts, find, lay_out, with_system
from jaxtune.errors import UserError


class Encoded(NamedTuple):
    """Token ids, which of them are trained on, and what else a batch holds of this example."""

    ids: np.ndarray  # int32 [n]
    mask: np.ndarray  # bool [n]
    columns: Mapping[str, np.ndarray] = {}  # `name_T` holds [n, …], one value a token; `name_S` one value, of any shape


class Settings(NamedTuple):
    """All that the tokens of an example depend on, beside the tokenizer."""

    template: str | None = None
    train_on: str = "assistant"
    room: int = 2**31 - 1  # tokens that fit into a row
    truncate: str = "right"
    thinking: str = "auto"
    system: str | None = None
    virtual: tuple[int, ...] = ()  # with which every text starts; they are not trained on and are not counted in `room`
    space: bool = False  # whether there is loss on the white space after a turn


class Encoding(NamedTuple):
    """An example as what fits into rows, and what became of it."""

    pieces: list[Encoded]
    outcome: str = "whole"  # or "split" (a text in pieces), "cut", "long" (left out), "empty" (nothing to train on)


def encode(example: Example, tokenizer: Any, s: Settings) -> Encoding:
    """One example within the room that there is.

    Raises:
      UserError: it cannot be rendered or has nothing that could be trained on.
    """
    e = tokens(example, tokenizer, s)
    pieces, outcome = [e], "whole"
    if len(e.ids) > s.room:
        if isinstance(example, Document):
            starts = range(0, len(e.ids), s.room)
            pieces, outcome = [Encoded(e.ids[i : i + s.room], e.mask[i : i + s.room]) for i in starts], "split"
        elif s.truncate == "drop":
            return Encoding([], "long")
        else:
            cut = _cut(example, e, tokenizer, s)
            if cut is None:
                return Encoding([], "long")
            pieces, outcome = [cut], "cut"
    kept = [p for p in (with_virtual(s.virtual, p) for p in pieces) if p.mask[1:].any()]  # the first is never predicted
    return Encoding(kept, outcome if kept else "empty")


def tokens(example: Example, tokenizer: Any, s: Settings) -> Encoded:
    """One example as tokens, whole.

    Documents are trained on throughout and closed with the end-of-sequence token. Segments are as they are: special
    tokens stand in their text.

    Raises:
      UserError: it cannot be rendered, or is of a kind that this objective does not take.
    """
    match example:
        case Conversation():
            laid = _lay(example, tokenizer, s)
            return Encoded(laid.ids, laid.mask)
        case Document():
            ids = tokenizer(example.text).input_ids
            eos = tokenizer.eos_token_id
            if eos is not None and (not ids or ids[-1] != eos):
                ids = [*ids, eos]
            return Encoded(np.array(ids, np.int32), np.ones(len(ids), bool))
        case Segments():
            ends = list(itertools.accumulate(len(text) for text, _ in example.parts))
            spans = [(b - len(text), b) for b, (text, on) in zip(ends, example.parts, strict=True) if on]
            ids_n, mask_n, _ = _tokenised("".join(text for text, _ in example.parts), spans, tokenizer)
            return Encoded(ids_n, mask_n)
        case Tokens():
            if example.ids and not 0 <= min(example.ids) <= max(example.ids) < len(tokenizer):
                raise UserError(
                    f"{example.origin}: has token ids from {min(example.ids)} to {max(example.ids)}, the tokenizer "
                    f"those from 0 to {len(tokenizer) - 1}; tokenise it with this model's tokenizer"
                )
            return Encoded(np.array(example.ids, np.int32), np.array(example.mask, bool))
        case Pair():
            what = "two answers, one preferred, which objective=dpo compares; objective=sft takes one: map prompt and "
            raise UserError(f"{example.origin}: has {what}completion with data.columns, and set data.format")
        case Judged():
            what = "an answer judged good or bad, which objective=kto takes; objective=sft takes answers to learn: map "
            raise UserError(f"{example.origin}: has {what}prompt and completion with data.columns, and set data.format")
        case Record():
            raise UserError(
                f"{example.origin}: is a row of {example.task}; set evaluate.task={example.task} to put it as a "
                "question, or an objective that takes such rows"
            )


def _lay(c: Conversation, tokenizer: Any, s: Settings, anchored: bool = False) -> truncation.Laid:
    """A conversation as tokens; `anchored` finds its last answer even where all is trained on."""
    if s.template is None:
        raise UserError(f"{c.origin}: a conversation needs a chat template; name one with data.template")
    c, texts = with_system(c, s.system), Texts(tokenizer, s.template, s.thinking, s.space)
    turns = lay_out(c, texts, s.train_on)
    ids, mask, offsets = _tokenised(turns.text, turns.trained, tokenizer)
    start = max((a for a, _ in turns.trained), default=0)
    if anchored and s.train_on == "all":
        last = len(c.messages) - 1
        _, answers, marked = find(c, texts, [last])
        start = max(a for a, _ in [*answers.values(), *marked])
    return truncation.Laid(ids, mask, int((offsets[:, 1] > start).argmax()) if len(offsets) else 0)


def _tokenised(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids `[n]`, whether any character of a token lies in a span `[n]`, and the characters of each `[n, 2]`."""
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.array(out.offset_mapping, np.int64).reshape(-1, 2)
    mask = np.zeros(len(offsets), bool)
    for a, b in spans:
        mask |= (offsets[:, 0] < b) & (offsets[:, 1] > a)
    return np.array(out.input_ids, np.int32), mask, offsets


def _cut(example: Example, e: Encoded, tokenizer: Any, s: Settings) -> Encoded | None:
    """What stays of an example that is too long."""
    if isinstance(example, Conversation):
        c = with_system(example, s.system)
        answers = [i for i, m in enumerate(c.messages) if m.role == "assistant" and m.trained]
        answers = answers[-1:] if s.train_on == "last" else answers
        if answers:
            kept = truncation.cut(c, answers, s.room, s.truncate, lambda c: _lay(c, tokenizer, s, True), tokenizer)
            return None if kept is None else Encoded(*kept)
    return Encoded(*truncation.cut_plain(e.ids, e.mask, s.room, s.truncate))


def prompt_text(
    conversation: Conversation, tokenizer: Any, template: str, thinking: str = "auto", system: str | None = None
) -> tuple[str, str | None]:
    """What to generate from, and the answer that the conversation ends with, if it does.

    `thinking` and `system` are those of `Settings`.
    """
    c = with_system(conversation, system)
    answer = c.messages[-1].content if c.messages[-1].role == "assistant" else None
    asked = c if answer is None else c._replace(messages=c.messages[:-1])
    if not asked.messages:
        raise UserError(f"{c.origin}: has nothing before the assistant's turn to answer to")
    [prompt] = Texts(tokenizer, template, thinking)(asked, [(len(asked.messages), True)])
    return prompt.text, answer


def turn_end(tokenizer: Any, template: str | None) -> list[int]:
    """The special token that a template writes after the assistant's words, if it writes one; else nothing."""
    if template is None:
        return []
    c = Conversation((Message("user", "a"), Message("assistant", "b")), "messages", "the template")
    try:
        turns = lay_out(c, Texts(tokenizer, template), "last")
    except UserError:  # it wants other turns than these
        return []
    [(start, stop)] = turns.trained
    ids = tokenizer(turns.text[start:stop].rpartition("b")[2].strip(), add_special_tokens=False).input_ids
    return ids[:1] if ids and ids[0] in {*tokenizer.added_tokens_decoder} else []


def with_virtual(virtual: Sequence[int], e: Encoded) -> Encoded:
    """A text after virtual tokens, which are not trained on.

    >>> with_virtual([300], Encoded(np.array([7, 8], np.int32), np.array([True, True])))
    Encoded(ids=array([300,   7,   8], dtype=int32), mask=array([False,  True,  True]), columns={})
    """
    if not virtual:
        return e
    n = len(virtual)
    ids = np.concatenate([np.array(virtual, np.int32), e.ids])
    own = {k: np.pad(x, [(n, 0), *[(0, 0)] * (x.ndim - 1)]) if k.endswith("_T") else x for k, x in e.columns.items()}
    return Encoded(ids, np.concatenate([np.zeros(n, bool), e.mask]), own)


def visible(tokenizer: Any, ids: np.ndarray, mask: np.ndarray) -> list[tuple[str, bool]]:
    """A row as runs of text, each with whether it is trained on; for the sample shown before training."""
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1), len(ids)] if len(ids) else [0]
    return [(tokenizer.decode(ids[a:b].tolist()), bool(mask[a])) for a, b in itertools.pairwise(edges)]
