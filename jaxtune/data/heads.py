"""Rows of named tasks for a head: token ids and what the head is to say of them.

A text is encoded as transformers' users do it, by a plain call of the tokenizer, so that the exported model is asked in
the way that it was trained. A span head reads the question, then the context, in windows that overlap.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.encode import Encoded, Encoding
from jaxtune.data.examples import Example, Record
from jaxtune.data.prompts import fill
from jaxtune.errors import UserError, nearest

# objective -> the records that it is trained on
READS: Mapping[str, str] = {
    "classification": "classification",
    "regression": "regression",
    "token_classification": "token_classification",
    "span_qa": "qa",
}
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


class HeadSettings(NamedTuple):
    """All that the tokens of a record depend on, beside the tokenizer."""

    objective: str
    labels: tuple[str, ...]
    multi: bool
    room: int  # tokens that fit into a row
    truncate: str = "right"
    stride: int = 128  # tokens that two windows share
    prompt: str | None = None  # how a text is put, with columns in braces


def records(examples: Iterable[Example], objective: str) -> list[Record]:
    """The examples as records of the objective.

    Raises:
      UserError: one is of another kind.
    """
    out = []
    for e in examples:
        if not isinstance(e, Record) or e.task != READS[objective]:
            raise UserError(
                f"{e.origin}: objective {objective} wants rows of format {READS[objective]!r}; set data.format="
                f"{READS[objective]} and map its columns with data.columns"
            )
        out.append(e)
    return out


def answerable(examples: Sequence[Example], objective: str, remarks: list[str]) -> Sequence[Example]:
    """The examples without those questions whose answers do not stand in their contexts; these are counted."""
    if objective != "span_qa":
        return examples

    def is_placed(e: Example) -> bool:
        answers = (e.row.get("answers") if isinstance(e, Record) else None) or {"text": [], "answer_start": []}
        return not answers["text"] or any(a >= 0 for a in answers["answer_start"])

    kept = [e for e in examples if is_placed(e)]
    if gone := len(examples) - len(kept):
        remarks.append(f"train: {gone:,} of {len(examples):,} answers do not stand in their contexts and were left out")
    return kept


def label_names(examples: Sequence[Record], objective: str, given: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """The names of the labels, those `given` or those of the examples in order; and whether a text has several.

    Raises:
      UserError: there are fewer than two labels to tell apart.
    """
    if objective == "regression":
        return ("value",), False
    if objective == "span_qa":
        unanswered = any((e.row.get("answers") or {"text": [1]})["text"] == [] for e in examples)
        return (("answer", "none") if unanswered else ("answer",)), False
    multi = False
    found: set[str] = set()
    for e in examples:
        value = tags(e)[1] if objective == "token_classification" else e.row.get("label")
        multi |= objective == "classification" and isinstance(value, list | tuple)
        found |= set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
    names = tuple(given) or tuple(sorted(found, key=_in_order))
    if len(names) < 2:
        raise UserError(f"objective {objective} needs two labels or more, the data has {', '.join(names) or 'none'}")
    return names, multi


def _in_order(name: str) -> tuple:
    """O first, numbers by size, the others by name."""
    number = re.fullmatch(r"-?\d+", name)
    return (name != "O", number is None, int(name) if number else 0, name)


def encode(example: Example, tokenizer: Any, s: HeadSettings) -> Encoding:
    """One record within the room that there is; the windows of a long context, under a span head.

    Raises:
      UserError: it is of another kind, or has a label that is not known.
    """
    (record,) = records([example], s.objective)
    if s.objective == "span_qa":
        pieces = [_window(w, record) for w in windows(record, tokenizer, s)]
        return Encoding(pieces, "split" if len(pieces) > 1 else "whole")
    if s.objective == "token_classification":
        return _tagged(record, tokenizer, s)
    whole = _without_padding(tokenizer(text_of(record, s.prompt)).input_ids, tokenizer) or [tokenizer.eos_token_id or 0]
    ids, outcome = _cut(whole, s, tokenizer)
    e = Encoded(np.array(ids, np.int32), np.ones(len(ids), bool), {"label_S": _label(record, s)})
    return Encoding([] if outcome == "long" else [e], outcome)


def text_of(record: Record, prompt: str | None = None) -> str:
    """A record's text, and a second one on a line of its own; or as `prompt` puts them."""
    row = record.row
    if prompt is not None:
        return fill(prompt, row, record.origin)
    return f"{row['text']}\n{row['text_pair']}" if row.get("text_pair") else row["text"]


def _without_padding(ids: list[int], tokenizer: Any) -> list[int]:
    """Without padding tokens at the end: transformers looks for the last token before them."""
    while ids and ids[-1] == tokenizer.pad_token_id:
        ids = ids[:-1]
    return ids


def _cut(ids: list[int], s: HeadSettings, tokenizer: Any) -> tuple[list[int], str]:
    """Ids that fit, and what became of them. The token that begins every text stays."""
    over = len(ids) - s.room
    if over <= 0:
        return ids, "whole"
    first = int(ids[0] == tokenizer.bos_token_id)
    kept = s.room - first
    if s.truncate == "left":
        return ids[:first] + ids[len(ids) - kept :], "cut"
    if s.truncate == "middle":
        return ids[: first + kept - kept // 2] + ids[len(ids) - kept // 2 :], "cut"
    return ids[: s.room], "long" if s.truncate == "drop" else "cut"


def _label(record: Record, s: HeadSettings) -> Any:
    """The label as the objective reads it; zero where there is none."""
    if (value := record.row.get("label")) is None:
        return np.zeros(len(s.labels) if s.multi else (), np.float32 if s.multi else np.int32)
    if s.objective == "regression":
        return np.float32(value)
    several = list(value) if isinstance(value, list | tuple) else [value]
    for v in several:
        if v not in s.labels:
            raise UserError(
                f"{record.origin}: label {v!r} is not among {len(s.labels)} known ones{nearest(v, list(s.labels))}; "
                "data.labels names all"
            )
    if s.multi:
        return np.array([name in several for name in s.labels], np.float32)
    if len(several) != 1:
        raise UserError(f"{record.origin}: has {len(several)} labels where every other row has one")
    return np.int32(s.labels.index(several[0]))


# --- tags -------------------------------------------------------------------------------------------------------------


def tags(record: Record) -> tuple[list[str], list[str], str, list[tuple[int, int]]]:
    """A record's words and their tags (IOB2), the text, and where in it the words are.

    >>> tags(Record({"text": "to New York", "spans": [{"start": 3, "end": 11, "label": "city"}]}, "", ""))[:2]
    (['to', 'New', 'York'], ['O', 'B-city', 'I-city'])
    """
    row = record.row
    if row.get("tokens") is not None:
        words = list(row["tokens"])
        text = " ".join(words)
        places: list[tuple[int, int]] = []
        for word in words:
            start = places[-1][1] + 1 if places else 0
            places.append((start, start + len(word)))
        return words, list(row.get("tags") or ["O"] * len(words)), text, places
    text = row["text"]
    places = [m.span() for m in _WORD.finditer(text)]
    found = ["O"] * len(places)
    for span in row.get("spans") or ():
        inside = [i for i, (a, b) in enumerate(places) if a < span["end"] and b > span["start"]]
        for k, i in enumerate(inside):
            found[i] = f"{'I' if k else 'B'}-{span['label']}"
    return [text[a:b] for a, b in places], found, text, places


def first_tokens(record: Record, tokenizer: Any, s: HeadSettings) -> tuple[list[int], list[int]]:
    """Token ids, and for each word the place of its first token, -1 where it is beyond the room."""
    _, _, text, places = tags(record)
    out = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = out.input_ids[: s.room], out.offset_mapping[: s.room]
    at, firsts = 0, []
    for start, end in places:
        while at < len(offsets) and offsets[at][1] <= start:
            at += 1
        inside = at < len(offsets) and offsets[at][0] < end and offsets[at][1] > start
        firsts.append(at if inside else -1)
        at += inside  # a token that spans two words speaks for the first
    return ids, firsts


def _tagged(record: Record, tokenizer: Any, s: HeadSettings) -> Encoding:
    ids, firsts = first_tokens(record, tokenizer, s)
    mask, label_T = np.zeros(len(ids), bool), np.zeros(len(ids), np.int32)
    found = tags(record)[1]
    if len(found) != len(firsts):
        raise UserError(f"{record.origin}: has {len(firsts)} tokens and {len(found)} tags")
    for at, tag in zip(firsts, found, strict=True):
        if at >= 0:
            if tag not in s.labels:
                raise UserError(f"{record.origin}: tag {tag!r} is not known{nearest(tag, list(s.labels))}")
            mask[at], label_T[at] = True, s.labels.index(tag)
    if not mask.any():
        return Encoding([], "empty")
    outcome = "cut" if -1 in firsts else "whole"
    return Encoding([Encoded(np.array(ids, np.int32), mask, {"label_T": label_T})], outcome)


# --- spans ------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """A part of a context, behind the question."""

    ids: list[int]
    places: list[tuple[int, int] | None]  # of each token in the context, in characters; None outside of it


def windows(record: Record, tokenizer: Any, s: HeadSettings) -> list[Window]:
    """The question and the context, in as many windows as it takes. The question keeps its end, in half the room."""
    question, context = record.row["question"].strip(), record.row["context"]
    out = tokenizer(question, context, return_offsets_mapping=True)
    inside = [i for i, k in enumerate(out.sequence_ids()) if k == 1]
    if not inside:
        raise UserError(f"{record.origin}: the context is empty")
    first, stop = inside[0], inside[-1] + 1
    head, tail = out.input_ids[:first], out.input_ids[stop:]
    if (over := len(head) + len(tail) - s.room // 2) > 0:
        head = head[:1] + head[1 + over :]
    size = s.room - len(head) - len(tail)
    step = max(1, size - min(s.stride, size // 2))
    made = []
    for a in range(first, stop, step):
        b = min(a + size, stop)
        places = [*[None] * len(head), *map(tuple, out.offset_mapping[a:b]), *[None] * len(tail)]
        made.append(Window([*head, *out.input_ids[a:b], *tail], places))
        if b == stop:
            break
    return made


def _window(w: Window, record: Record) -> Encoded:
    """A window with its first answer; its first token is the answer where there is none in it."""
    mask = np.array([p is not None for p in w.places])
    mask[0] = True
    start = end = 0
    answers = record.row.get("answers") or {"text": [], "answer_start": []}
    placed = [(t, a) for t, a in zip(answers["text"], answers["answer_start"], strict=True) if a >= 0]
    for text, a in placed[:1]:
        b = a + len(text)
        hit = [i for i, p in enumerate(w.places) if p is not None and p[0] < b and p[1] > a]
        if hit and w.places[hit[0]][0] <= a and w.places[hit[-1]][1] >= b:  # type: ignore[index]
            start, end = hit[0], hit[-1]
    return Encoded(
        np.array(w.ids, np.int32), mask, {"start_S": np.array(start, np.int32), "end_S": np.array(end, np.int32)}
    )


def answer(
    record: Record,
    found: Sequence[Window],
    logits: Sequence[np.ndarray],
    null: bool,
    longest: int = 30,
    best: int = 20,
) -> tuple[str, float]:
    """The likeliest span over all windows, "" where none is likelier; and its score above that of no answer.

    As in BERT's reading of SQuAD (Devlin et al., 2019): the sum of a start's and an end's logit, no more than `longest`
    tokens, among the `best` starts and ends of each window. `logits` are float32 `[n, 2]`, one array a window.
    """
    context = record.row["context"]
    top, text, nothing = -np.inf, "", np.inf
    for w, logits_n2 in zip(found, logits, strict=True):
        nothing = min(nothing, float(logits_n2[0].sum()))
        inside = np.array([p is not None for p in w.places])
        starts, ends = (
            np.argsort(-np.where(inside, logits_n2[:, c], -np.inf))[: min(best, inside.sum())] for c in (0, 1)
        )
        for i in starts:
            for j in ends:
                score = float(logits_n2[i, 0] + logits_n2[j, 1])
                if i <= j < i + longest and score > top:
                    top, text = score, context[w.places[i][0] : w.places[j][1]]
    return ("" if null and nothing > top else text.strip()), top - nothing
