"""Rows of named tasks: their columns under the task's own names (`examples.RECORDS`), checked and in one form."""

import ast
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxtune.data.examples import RECORDS, Record
from jaxtune.data.formats.values import Row, Tags, blank, flag, integer, label, listed, number, structure, text, texts
from jaxtune.errors import UserError


def record(task: str) -> Callable[[Row, str, Tags], Record]:
    """What makes records of a task. Columns that the task does not know stay as they are."""

    def make(row: Row, origin: str, tags: Tags) -> Record:
        own = {k: v for k, v in row.items() if k in known and v is not None and not (k == "label" and blank(v))}
        return Record({k: v for k, v in row.items() if k not in known} | _MAKERS[task](own, origin), task, origin)

    c = RECORDS[task]
    known = {*c.needed, *c.answers, *c.optional}
    return make


def _texts(row: Row, origin: str) -> dict[str, Any]:
    return {k: text(v, k, origin) for k, v in row.items()}


def _classification(row: Row, origin: str) -> dict[str, Any]:
    """`{"text": "A fine film.", "label": "positive"}`; a list of labels where several may hold

    In a cell of a table the list stands as JSON or as Python writes it.
    """
    out = _texts({k: v for k, v in row.items() if k != "label"}, origin)
    if "label" in row:
        given = _cell(row["label"])
        several = isinstance(given, list)
        found = [label(x, "label", origin).strip() for x in (given if several else [given])]
        if not all(found):
            raise UserError(f"{origin}: column 'label' holds an empty label; got {given!r:.60}")
        out["label"] = found if several else found[0]
    return out


def _cell(value: Any) -> Any:
    """A list that stands in a cell; all else as it is.

    >>> _cell('["a", 3]'), _cell("['a', 'b']"), _cell("[a]")
    (['a', 3], ['a', 'b'], '[a]')
    """
    if not isinstance(value, str) or not value.strip().startswith("["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass  # it may be Python
    try:
        with warnings.catch_warnings(action="ignore"):  # of backslashes
            given = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value
    return given if isinstance(given, list) and all(isinstance(x, str) for x in given) else value


def _regression(row: Row, origin: str) -> dict[str, Any]:
    """`{"text": "A fine film.", "label": 4.5}`"""
    out = _texts({k: v for k, v in row.items() if k != "label"}, origin)
    return out | ({"label": number(row["label"], "label", origin)} if "label" in row else {})


def _qa(row: Row, origin: str) -> dict[str, Any]:
    """`{"context": "Oslo is in Norway.", "question": "Where is Oslo?",
    "answers": {"text": ["Norway"], "answer_start": [11]}}`

    Answers may also be texts alone, one or several, or a list of {text, answer_start}. A start where the answer does
    not stand is moved to the nearest place where it does; it is -1 where the context does not hold the answer.
    """
    out = _texts({k: row[k] for k in ("context", "question")}, origin)
    if "id" in row:
        out["id"] = label(row["id"], "id", origin)
    if "answers" in row:
        given = structure(row["answers"], "answers", origin)
        pairs = _answers([given] if isinstance(given, str) else given, origin)
        starts = [_nearest(out["context"], t, s) for t, s in pairs]
        out["answers"] = {"text": [t for t, _ in pairs], "answer_start": starts}
    return out


def _answers(given: Any, origin: str) -> list[tuple[str, int]]:
    if isinstance(given, list) and all(isinstance(a, dict) for a in given):
        given = {k: [a.get(k) for a in given] for k in ("text", "answer_start")}
    elif isinstance(given, list):
        given = {"text": given}
    if not isinstance(given, dict) or given.get("text") is None:
        raise UserError(f"{origin}: column 'answers' should be {{text: [...], answer_start: [...]}}, got {given!r:.60}")
    found = texts(given["text"], "answers.text", origin)
    starts = given.get("answer_start")
    starts = [0] * len(found) if starts is None else listed(starts, "answers.answer_start", origin)
    if len(starts) != len(found):
        raise UserError(f"{origin}: answers has {len(found)} texts and {len(starts)} starts")
    where = "answers.answer_start"
    return [(t, 0 if s is None else integer(s, where, origin)) for t, s in zip(found, starts, strict=True)]


def _nearest(context: str, answer: str, start: int) -> int:
    if start >= 0 and context.startswith(answer, start):
        return start
    found = [m.start() for m in re.finditer(re.escape(answer), context)] if answer else []
    return min(found, key=lambda i: abs(i - start), default=-1)


def _translation(row: Row, origin: str) -> dict[str, Any]:
    """`{"source": "A cat.", "target": "Eine Katze."}`; a list of targets is of references, the first to be learnt"""
    out = _texts({k: v for k, v in row.items() if not isinstance(v, list) or k != "target"}, origin)
    if isinstance(row.get("target"), list):
        out["target"] = texts(row["target"], "target", origin)
        if not out["target"]:
            raise UserError(f"{origin}: column 'target' is an empty list; give a reference at least")
    return out


def _summarisation(row: Row, origin: str) -> dict[str, Any]:
    """`{"document": "…", "summary": "…"}`, and `summaries`, a list of references"""
    out = _texts({k: v for k, v in row.items() if k != "summaries"}, origin)
    return out | ({"summaries": texts(row["summaries"], "summaries", origin)} if "summaries" in row else {})


def _maths(row: Row, origin: str) -> dict[str, Any]:
    """`{"question": "What is 6 times 7?", "answer": "6 * 7 = 42 #### 42"}`"""
    out = {"question": text(row["question"], "question", origin)}
    return out | ({"answer": label(row["answer"], "answer", origin)} if "answer" in row else {})


def _token_classification(row: Row, origin: str) -> dict[str, Any]:
    """`{"tokens": ["to", "Oslo"], "tags": ["O", "B-city"]}`, or
    `{"text": "to Oslo", "spans": [{"start": 3, "end": 7, "label": "city"}]}`"""
    if "tokens" in row:
        out: dict[str, Any] = {"tokens": texts(row["tokens"], "tokens", origin)}
        if "tags" in row:
            out["tags"] = [label(t, f"tags[{i}]", origin) for i, t in enumerate(listed(row["tags"], "tags", origin))]
            if len(out["tags"]) != len(out["tokens"]):
                raise UserError(f"{origin}: {len(out['tokens'])} tokens and {len(out['tags'])} tags")
        return out
    if "text" not in row:
        raise UserError(
            f"{origin}: format 'token_classification' needs 'tokens' and 'tags', or 'text' and 'spans'; map them with "
            "data.columns"
        )
    sentence = text(row["text"], "text", origin)
    return {"text": sentence} | ({"spans": _spans(sentence, row["spans"], origin)} if "spans" in row else {})


def tagged(row: Row) -> tuple[str, str]:
    """The two columns without which nothing can be learnt of a row: its text, and what stands in it."""
    return ("tokens", "tags") if row.get("tokens") is not None else ("text", "spans")


def _spans(sentence: str, given: Any, origin: str) -> list[dict[str, Any]]:
    spans: list[dict[str, Any]] = []
    for i, s in enumerate(listed(given, "spans", origin, "{start, end, label}")):
        if not isinstance(s, dict) or any(s.get(k) is None for k in ("start", "end", "label")):
            raise UserError(f"{origin}: spans[{i}] should have 'start', 'end' and 'label', got {s!r:.60}")
        start, end = (integer(s[k], f"spans[{i}].{k}", origin) for k in ("start", "end"))
        if not 0 <= start < end <= len(sentence):
            raise UserError(f"{origin}: spans[{i}] is {start} to {end} of a text of {len(sentence)} characters")
        spans.append({"start": start, "end": end, "label": label(s["label"], f"spans[{i}].label", origin)})
    spans.sort(key=lambda s: s["start"])
    for before, s in itertools.pairwise(spans):
        if s["start"] < before["end"]:
            raise UserError(f"{origin}: the spans {before} and {s} share characters; a token has one tag")
    return spans


def slots(row: Row, origin: str) -> Row:
    """`{"text": "to Oslo", "slots": [{"entity": "city", "value": "Oslo"}]}` with spans in the place of slots, which
    stand in the text in their order, as words of their own where they do.

    >>> slots({"text": "Osloer in Oslo", "slots": [{"entity": "city", "value": "Oslo"}]}, "a.jsonl:1")["spans"]
    [{'start': 10, 'end': 14, 'label': 'city'}]
    """
    sentence, at = text(row.get("text"), "text", origin), 0
    spans = []
    for i, s in enumerate(listed(row["slots"], "slots", origin, "{entity, value}")):
        if not isinstance(s, dict) or not isinstance(s.get("value"), str) or not s["value"].split():
            raise UserError(f"{origin}: slots[{i}] should have 'entity' and 'value', got {s!r:.60}")
        value, rest = r"\s+".join(map(re.escape, s["value"].split())), sentence[at:]
        found = re.search(rf"(?<!\w){value}(?!\w)", rest) or re.search(value, rest)
        if found is None:
            raise UserError(f"{origin}: slots[{i}]: the text has no {s['value']!r:.60} after its character {at}")
        start, at = at + found.start(), at + found.end()
        spans.append({"start": start, "end": at, "label": label(s.get("entity"), "entity", origin)})
    return {**{k: v for k, v in row.items() if k != "slots"}, "spans": spans}


def _choice(row: Row, origin: str) -> dict[str, Any]:
    """`{"question": "6 times 7?", "choices": ["41", "42"], "answer": 1}`

    The answer is the number of a choice, from 0; or its letter, its label where choices are {text: [...], label:
    [...]}, or the choice itself.
    """
    given = structure(row["choices"], "choices", origin)
    names: list[str] | None = None
    if isinstance(given, dict):
        names = [label(x, "choices.label", origin) for x in listed(given.get("label"), "choices.label", origin)]
        given = given.get("text")
    choices = texts(given, "choices", origin)
    if len(choices) < 2 or (names is not None and len(names) != len(choices)):
        raise UserError(f"{origin}: column 'choices' should be a list of two texts or more, got {row['choices']!r:.60}")
    out: dict[str, Any] = {"question": text(row["question"], "question", origin), "choices": choices}
    if "answer" in row:
        out["answer"] = _index(row["answer"], choices, names, origin)
    return out


def _index(answer: Any, choices: list[str], names: list[str] | None, origin: str) -> int:
    if names is not None and label(answer, "answer", origin) in names:
        return names.index(label(answer, "answer", origin))
    if isinstance(answer, str):
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        numbers = [str(i) for i in range(len(choices))]
        found = {way.index(answer) for way in (choices, letters, numbers) if answer in way}
    else:
        found = {integer(answer, "answer", origin)} & set(range(len(choices)))
    if len(found) != 1:
        raise UserError(
            f"{origin}: column 'answer' is {answer!r:.60}, which names {'more than one' if found else 'none'} of "
            f"{len(choices)} choices; write a number from 0 to {len(choices) - 1}"
        )
    return found.pop()


_MAKERS: Mapping[str, Callable[[Row, str], dict[str, Any]]] = {
    "classification": _classification,
    "regression": _regression,
    "qa": _qa,
    "translation": _translation,
    "summarisation": _summarisation,
    "maths": _maths,
    "token_classification": _token_classification,
    "choice": _choice,
}


def questions(row: Row, origin: str) -> Iterator[tuple[str, Row | UserError]]:
    """An article of SQuAD's own files as rows of a question each, with where they stood.

    Plausible answers to questions that are impossible (version 2) are none.
    """
    for p, paragraph in enumerate(_objects(row.get("paragraphs"), "paragraphs", "qas", origin)):
        where = f"{origin}, paragraphs[{p}]"
        if isinstance(paragraph, UserError):
            yield where, paragraph
            continue
        for q, asked in enumerate(_objects(paragraph["qas"], "qas", "question", where)):
            place = f"{where}.qas[{q}]"
            if isinstance(asked, UserError):
                yield place, asked
                continue
            try:
                impossible = flag(asked.get("is_impossible") or False, "is_impossible", place)
            except UserError as e:
                yield place, e
                continue
            answers = {"text": [], "answer_start": []} if impossible else asked.get("answers")
            one = {"context": paragraph.get("context"), "question": asked["question"], "answers": answers}
            more = {k: v for k, v in (("id", asked.get("id")), ("title", row.get("title"))) if v is not None}
            yield place, {**one, **more}


def _objects(value: Any, column: str, key: str, origin: str) -> Iterator[dict[str, Any] | UserError]:
    if not isinstance(value, list):
        yield UserError(f"{origin}: {column!r} should be a list, got {type(value).__name__}")
        return
    for i, x in enumerate(value):
        good = isinstance(x, dict) and x.get(key) is not None
        yield x if good else UserError(f"{origin}: {column}[{i}] should be an object with {key!r}, got {x!r:.60}")
