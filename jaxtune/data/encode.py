"""Examples to token ids and a loss mask.

The whole rendered conversation is tokenised once, exactly as it would be at inference; which tokens are the
assistant's follows from the characters that the template put between the prompt of a turn and the end of that turn,
so any template works, with or without a generation tag.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.examples import Conversation, Document, Example, Message
from jaxtune.errors import UserError

# What templates take for today: a day that moved would make other data of the same file, and a run could not go on.
_PARTS = {"%Y": "2024", "%m": "07", "%d": "26", "%b": "Jul", "%B": "July", "%H": "12", "%M": "00", "%S": "00"}
_DATED = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f" | replace('{k}', '{v}')" for k, v in _PARTS.items())
    + " }}{%- endmacro -%}"
)


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
        else:
            pieces, outcome = [Encoded(e.ids[: s.room], e.mask[: s.room])], "cut"
    kept = [p for p in (with_virtual(s.virtual, p) for p in pieces) if p.mask[1:].any()]  # the first is never predicted
    return Encoding(kept, outcome if kept else "empty")


def tokens(example: Example, tokenizer: Any, s: Settings) -> Encoded:
    """One example as tokens, whole. Documents are trained on throughout and closed with the end-of-sequence token."""
    if isinstance(example, Document):
        ids = tokenizer(example.text).input_ids
        eos = tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        return Encoded(np.array(ids, np.int32), np.ones(len(ids), bool))
    if not isinstance(example, Conversation) or s.template is None:
        raise ValueError(f"{example.origin}: a conversation and a template were expected")
    text, spans = render(example, tokenizer, s.template, s.train_on)
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start_end = np.array(out.offset_mapping, np.int64).reshape(-1, 2)
    mask = np.zeros(len(start_end), bool)
    for a, b in spans:
        mask |= (start_end[:, 0] < b) & (start_end[:, 1] > a)
    return Encoded(np.array(out.input_ids, np.int32), mask)


def render(conversation: Conversation, tokenizer: Any, template: str, train_on: str) -> tuple[str, list[tuple]]:
    """The conversation's text, and the spans of characters that are trained on.

    Raises:
      UserError: there is no assistant turn, or the template rewrites earlier turns.
    """
    messages = [m.seen() for m in conversation.messages]
    text = _apply(tokenizer, template, messages, conversation.origin)
    if train_on == "all":
        return text, [(0, len(text))]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise UserError(f"{conversation.origin}: has no assistant turn to train on; add one or set data.train_on=all")
    spans = []
    for i in turns[-1:] if train_on == "last" else turns:
        before = _apply(tokenizer, template, messages[:i], conversation.origin, prompt=True)
        upto = text if i + 1 == len(messages) else _apply(tokenizer, template, messages[: i + 1], conversation.origin)
        if not (text.startswith(upto) and upto.startswith(before)):
            raise UserError(
                f"{conversation.origin}: the chat template rewrites turn {i} when more follows, so what the model "
                "would see differs; set data.train_on=last, or another data.template"
            )
        spans.append((len(before), len(upto.rstrip())))
    return text, spans


def prompt_text(conversation: Conversation, tokenizer: Any, template: str) -> tuple[str, str | None]:
    """What to generate from, and the answer that the conversation ends with, if it does."""
    messages = [m.seen() for m in conversation.messages]
    answer = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages:
        raise UserError(f"{conversation.origin}: has nothing before the assistant's turn to answer to")
    return _apply(tokenizer, template, messages, conversation.origin, prompt=True), answer


def turn_end(tokenizer: Any, template: str | None) -> list[int]:
    """The token with which a template ends the assistant's turn, if it is a single special one; else nothing."""
    if template is None:
        return []
    messages = (Message("user", "a"), Message("assistant", "b"))
    try:
        text, [(start, stop)] = render(Conversation(messages, "messages", "the template"), tokenizer, template, "last")
    except UserError:  # it wants other turns than these
        return []
    ids = tokenizer(text[start:stop].rpartition("b")[2], add_special_tokens=False).input_ids
    return ids if len(ids) == 1 and ids[0] in {*tokenizer.added_tokens_decoder} else []


def _apply(tokenizer: Any, template: str, messages: list[dict], origin: str, prompt: bool = False) -> str:
    import jinja2

    if not messages:
        return ""
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=_DATED + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except jinja2.TemplateError as e:
        raise UserError(f"{origin}: the chat template refuses the conversation: {e}") from e


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
