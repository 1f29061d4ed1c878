"""What is asked of a model: a text as it was trained to see it, and the answer whose value is explained.

Dimensions: T tokens that are read, C tokens of the answer (1 for a head).
"""

import itertools
import re
from typing import Any, NamedTuple

from jaxtune import config
from jaxtune.data import heads
from jaxtune.data.examples import Conversation, Document, Example, Message, Record
from jaxtune.data.turns import Texts, with_system
from jaxtune.errors import UserError, nearest
from jaxtune.predicting import asked_of
from jaxtune.tuned import Tuned

OF_TEXTS = ("classification", "regression")  # heads that read the last token of a text
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


class Text(NamedTuple):
    """A prompt in tokens, and the answer that its row gives."""

    name: str  # where it came from
    shown: str
    ids: list[int]
    spans: list[tuple[int, int]]  # of each token, its characters in `shown`
    answer: str | None
    lead: str = ""  # what the template writes before an answer's own words, such as a space

    def pieces(self, tokenizer: Any) -> list[str]:
        """The tokens as text; the name of one that has no text of its own."""
        out, at = [], 0
        for name, (a, b) in zip(tokenizer.convert_ids_to_tokens(self.ids), self.spans, strict=True):
            out.append(self.shown[max(a, at) : b] or name)  # spans may overlap
            at = max(at, b)
        return out

    def words(self, tokenizer: Any) -> list[tuple[str, list[int]]]:
        """The words, and which tokens each has; what has no letters of a word stands for itself."""
        found = [m.span() for m in _WORD.finditer(self.shown)]
        special = {*tokenizer.added_tokens_decoder}
        out: list[tuple[Any, str, list[int]]] = []
        pieces, at = self.pieces(tokenizer), 0
        for i, (a, b) in enumerate(self.spans):
            while at < len(found) and found[at][1] <= a:
                at += 1
            inside = at < len(found) and found[at][0] < b and self.ids[i] not in special
            key, text = (at, self.shown[slice(*found[at])]) if inside else (-1 - i, pieces[i])
            if out and out[-1][0] == key:
                out[-1][2].append(i)
            else:
                out.append((key, text, [i]))
        return [(text, tokens) for _, text, tokens in out]


class Question(NamedTuple):
    """A text, and what is said to it: which outputs, at which tokens, are looked at."""

    text: Text
    ids: list[int]  # T: virtual tokens, the text, and the answer but for its last token
    first: int  # virtual tokens
    at: list[int]  # C places in `ids`
    target: list[int]  # C tokens, or the label
    says: str  # the answer as text

    @property
    def prompt(self) -> slice:
        """The text's tokens among all."""
        return slice(self.first, self.first + len(self.text.ids))


def text_of(tuned: Tuned, e: Example, most: int, prompt: str | None = None) -> Text:
    """An example as the model was trained to read it; `prompt` is how a head's run put its texts.

    Raises:
      UserError: it is of a kind that the model does not read, has no tokens, or more than `most`.
    """
    head, words, lead = tuned.blueprint.decoder.task, tuned.tokenizer, ""
    if head is not None:
        s = tuned.head_settings(config.Data(max_length=2**30))
        assert s is not None
        (record,) = heads.records([e], head.kind)
        if record.row.get("text") is None:
            raise UserError(f"{e.origin}: has no text; a model with a head for {head.kind} is explained on texts")
        shown = heads.text_of(record, prompt)
        bare = record._replace(row={k: v for k, v in record.row.items() if k != "label"})
        pieces = heads.encode(bare, words, s._replace(room=2**30, prompt=prompt)).pieces
        ids, answer = pieces[0].ids.tolist(), record.row.get("label")
        answer = None if answer is None or isinstance(answer, list) else str(answer)
        spans = words(shown, return_offsets_mapping=True).offset_mapping
    else:
        shown, answer = asked_of(tuned, e)
        out = words(shown, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = out.input_ids, out.offset_mapping
        if tuned.template is not None and isinstance(e, Conversation):
            lead = _lead(tuned, e, shown)
    if not ids:
        raise UserError(f"{e.origin}: has no tokens; leave it out")
    context = tuned.blueprint.decoder.context - len(tuned.blueprint.virtual_ids)
    if len(ids) > min(most, context):
        what = f"--max-tokens {most}" if most < context else f"the model's context of {context}"
        remedy = (
            "shorten it, or raise that (maps of attention grow with its square)" if most < context else "shorten it"
        )
        raise UserError(f"{e.origin}: its {len(ids):,} tokens are more than {what}; {remedy}")
    return Text(e.origin, shown, ids, [tuple(x) for x in spans][: len(ids)], answer, lead)


def _lead(tuned: Tuned, c: Conversation, prompt: str) -> str:
    """What the template writes between a prompt and the answer's own words; nothing where it writes the prompt anew."""
    asked = [*c.messages[:-1]] if c.messages[-1].role == "assistant" else [*c.messages]
    whole = with_system(c._replace(messages=(*asked, Message("assistant", "answer"))), tuned.system)
    [text] = Texts(tuned.tokenizer, tuned.template or "", tuned.thinking)(whole, [(len(whole.messages), False)])
    lead, found, _ = text.text.removeprefix(prompt).partition("answer")
    return lead if found and text.text.startswith(prompt) else ""


def example_of(tuned: Tuned, text: str, name: str) -> Example:
    """A bare text as an example: of the head's task, or the words of a user.

    Raises:
      UserError: there is nothing in it.
    """
    if not text.strip():
        raise UserError(f"{name}: is empty; give a text")
    head = tuned.blueprint.decoder.task
    if head is not None:
        return Record({"text": text}, heads.READS[head.kind], name)
    if tuned.template is None:
        return Document(text, name)
    return Conversation((Message("user", text),), "messages", name)


def answered(tuned: Tuned, text: Text, answer: str) -> Question:
    """The question why a text has this answer: a label's name, or words that go on.

    Raises:
      UserError: there is no such label, or no room for the words.
    """
    head, virtual = tuned.blueprint.decoder.task, list(tuned.blueprint.virtual_ids)
    if head is not None:
        if head.kind == "regression":
            return choice(tuned, text, 0)
        if answer not in head.labels:
            raise UserError(f"{text.name}: no label is named {answer!r}{nearest(answer, list(head.labels))}")
        return choice(tuned, text, head.labels.index(answer))
    words = answer if text.lead and answer.startswith(text.lead) else text.lead + answer
    whole = tuned.tokenizer(text.shown + words, add_special_tokens=False).input_ids
    start = len([*itertools.takewhile(lambda p: p[0] == p[1], zip(text.ids, whole[:-1], strict=False))])
    if not answer or start < 1:
        raise UserError(f"{text.name}: {answer!r} adds no token to the text; give the words that go on")
    kept = text._replace(ids=whole[:start], spans=text.spans[:start])
    ids = [*virtual, *whole[:-1]]
    if len(ids) > tuned.blueprint.decoder.context:
        raise UserError(f"{text.name}: with {answer!r} it is longer than the model's context; shorten it")
    return Question(kept, ids, len(virtual), [*range(len(virtual) + start - 1, len(ids))], whole[start:], answer)


def choice(tuned: Tuned, text: Text, output: int) -> Question:
    """The question why a text has this label, or this next token."""
    head, virtual = tuned.blueprint.decoder.task, list(tuned.blueprint.virtual_ids)
    ids = [*virtual, *text.ids]
    says = head.labels[output] if head else tuned.tokenizer.decode([output]) or f"token {output}"
    return Question(text, ids, len(virtual), [len(ids) - 1], [output], says)


def check(tuned: Tuned) -> None:
    """Raises: UserError: the model has a head whose outputs are of tokens."""
    head = tuned.blueprint.decoder.task
    if head is not None and head.kind not in OF_TEXTS:
        raise UserError(
            f"explain reads language models and heads for {' and '.join(OF_TEXTS)}; this one has a head for {head.kind}"
        )
