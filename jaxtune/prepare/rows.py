"""Rows as they stand in the file, and which of their columns hold questions, answers and labels."""

import dataclasses
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtune.config import Source
from jaxtune.data import formats
from jaxtune.data.examples import RECORDS, Example
from jaxtune.data.formats import records
from jaxtune.data.reading import Rows
from jaxtune.errors import UserError

Text = tuple[tuple[str | int, ...], str]  # where a string stands in a row, and the string

# Columns of a format that are not a named task's: those of the question, those of the answer.
_CHAT = ("system", "messages", "conversations", "prompt", "history", "instruction", "input", "query", "question")
PARTS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ()),
    "sharegpt": (("system", "conversations"), ()),
    "prompt_completion": (("system", "prompt"), ("completion",)),
    "alpaca": (("system", "history", "instruction", "input"), ("output",)),
    "text": (("text",), ()),
    "segments": (("segments",), ()),
    "tokens": ((), ()),
    "preference": (_CHAT, ("chosen", "rejected", "preferred_output", "non_preferred_output")),
    "kto": (_CHAT, ("completion", "output")),
}
NEEDED: Mapping[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "segments": ("segments",),
    "tokens": ("input_ids",),
}
# Columns that a format knows and that hold no text to look at.
BESIDE: Mapping[str, tuple[str, ...]] = {
    "messages": ("tools",),
    "sharegpt": ("tools",),
    "tokens": ("input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks"),
    "preference": ("tools",),
    "kto": ("label", "kto_tag", "tools"),
    "token_classification": ("slots",),
}
LABELLED = ("classification", "regression")  # formats whose answer is a label, not a text
TURNS = ("messages", "conversations", "prompt", "chosen", "rejected")  # columns that may be lists of turns
_STRUCTURE = {"role", "from", "type", "id", "name", "tool_call_id", "label", "weight"}  # of turns: not text
_ASSISTANT = {"assistant", "gpt", "model", "function_call"}


class Row(NamedTuple):
    """A row, and where it stood."""

    origin: str
    raw: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of a file, and what their columns mean."""

    rows: tuple[Row, ...]
    format: str
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our name of a column -> the file's
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    languages: tuple[str, ...] = ()  # columns that stood inside of `translation`

    def __len__(self) -> int:
        return len(self.rows)

    def named(self, columns: tuple[str, ...]) -> tuple[str, ...]:
        """The file's names of columns."""
        return tuple(self.columns.get(c, c) for c in columns)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Columns of what is asked, as the file names them."""
        if self.format in PARTS:
            return self.named(PARTS[self.format][0])
        c = RECORDS[self.format]
        return self.named((*c.needed, *(o for o in c.optional if o not in ("id", "summaries"))))

    @property
    def answers(self) -> tuple[str, ...]:
        """Columns of what is answered in text, as the file names them."""
        if self.format in PARTS:
            return self.named(PARTS[self.format][1])
        if self.format in LABELLED:
            return ()
        more = tuple(o for o in RECORDS[self.format].optional if o == "summaries")
        return self.named((*RECORDS[self.format].answers, *more))

    @property
    def label(self) -> str | None:
        """The column of the label, where there is one."""
        return self.columns.get("label", "label") if self.format in (*LABELLED, "kto") else None

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that no row may lack, as the file names them."""
        if self.format in NEEDED:
            return self.named(NEEDED[self.format])
        if self.format in RECORDS:
            return self.named((*RECORDS[self.format].needed, *RECORDS[self.format].answers))
        return ()

    @property
    def known(self) -> set[str]:
        """All columns that the format reads, as the file names them."""
        beside = (*BESIDE.get(self.format, ()), "id")
        read = {*self.inputs, *self.answers, *self.needed, *self.named(beside), *self.languages}
        return read | ({self.label} if self.label else set())

    def texts(self, raw: Mapping[str, Any]) -> list[str]:
        """All strings that a model would see of a row."""
        return [s for c in (*self.inputs, *self.answers) if c in raw for _, s in walk(raw[c], (c,))]

    def with_texts(self, raw: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
        """The row with every such string changed; all else as it was."""
        seen = {*self.inputs, *self.answers}
        return {c: changed(v, change) if c in seen else v for c, v in raw.items()}

    def written(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The row as its file had it: languages inside of `translation` where they came from there."""
        inside = {c: raw[c] for c in self.languages if c in raw}
        rest = {c: v for c, v in raw.items() if c not in inside}
        return {**rest, "translation": inside} if inside else rest

    def fields(self, raw: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The texts of the question and those of the answer, one for each column.

        Of a conversation the last turn of the assistant is the answer.
        """
        asked, answered = [], []
        for c in self.inputs:
            value = raw.get(c)
            if isinstance(value, list) and value and c in self.named(TURNS) and self._answers(value[-1]):
                asked.append(joined(value[:-1]))
                answered.append(joined(value[-1]))
            else:
                asked.append(joined(value))
        return tuple(asked), (*answered, *(joined(raw.get(c)) for c in self.answers))

    def _answers(self, turn: Any) -> bool:
        if not isinstance(turn, Mapping):
            return False
        role = turn.get(self.tags.get("role", "role"), turn.get("from"))
        return role in _ASSISTANT or role == self.tags.get("assistant")

    def asked(self, raw: Mapping[str, Any]) -> str:
        """The question as one normalised text."""
        return normal("\n".join(self.fields(raw)[0]))

    def whole(self, raw: Mapping[str, Any]) -> str:
        """All that a row teaches, as one text: question, answer and label, but for spaces."""
        id = self.columns.get("id", "id")
        known = {c: changed(v, normal) for c, v in raw.items() if c in self.known and c != id}
        return json.dumps({c: v for c, v in known.items() if v not in (None, "", [])}, sort_keys=True, default=str)

    def name_of_label(self, raw: Mapping[str, Any]) -> str | None:
        """The label as a text; of several labels all, sorted."""
        if self.label is None or self.format == "regression" or raw.get(self.label) is None:
            return None
        value = raw[self.label]
        return " + ".join(sorted(map(str, value))) if isinstance(value, list) else str(value)


def open_table(source: Source) -> tuple[Table, list[str]]:
    """The rows of a source, and where and why rows could not be read.

    Raises:
      UserError: the file cannot be read, holds no rows, or fits no format.
    """
    read = Rows(source, bad_rows="skip")
    found, skipped = [], []
    for origin, raw in read:
        nested = source.format in ("auto", "qa") and "paragraphs" in raw  # an article of SQuAD has many questions
        for place, row in records.questions(raw, origin) if nested else [(origin, raw)]:
            if isinstance(row, UserError):
                skipped.append(str(row))
            else:
                found.append(Row(place, dict(row)))
    skipped = [*read.skipped, *skipped]
    if not found:
        raise UserError(f"{source.path}: holds no rows{f' that can be read; {skipped[0]}' if skipped else ''}")
    kind = source.format if source.format != "auto" else _detected(found[:100], source.columns)
    languages: dict[str, None] = {}
    if kind == "translation":
        for i, (origin, raw) in enumerate(found):
            if isinstance(inside := raw.get("translation"), Mapping):
                if twice := inside.keys() & raw.keys():
                    raise UserError(f"{origin}: column {min(twice)!r} stands in 'translation' and beside it; keep one")
                languages |= dict.fromkeys(inside)
                found[i] = Row(origin, {**{c: v for c, v in raw.items() if c != "translation"}, **inside})
    return Table(tuple(found), kind, source.columns, source.tags, tuple(languages)), skipped


def _detected(found: list[Row], columns: Mapping[str, str]) -> str:
    """The format of the first row that has one."""
    errors = []
    for row in found:
        try:
            return formats.detect(formats.renamed(row.raw, columns), row.origin)
        except UserError as e:
            errors.append(e)
    raise errors[0]


def example(table: Table, row: Row) -> Example | str:
    """The row as the value that it becomes in training, or why it cannot become one."""
    named: Mapping[str, Any] = formats.renamed(row.raw, table.columns)
    try:
        if table.format == "token_classification" and "slots" in named and named.get("spans") is None:
            named = records.slots(named, row.origin)
        return formats.FORMATS[table.format].build(named, row.origin, table.tags)
    except KeyError as e:
        return f"no {e}"
    except UserError as e:
        return str(e).removeprefix(f"{row.origin}: ")


def walk(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[Text]:
    """Every text inside of a value; roles, names and ids of turns are none.

    >>> list(walk([{"role": "user", "content": "Hi"}]))
    [((0, 'content'), 'Hi')]
    """
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            if k not in _STRUCTURE:
                yield from walk(v, (*path, k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from walk(v, (*path, i))


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """A value with every text inside of it changed.

    >>> changed([{"role": "user", "content": "Hi"}], str.upper)
    [{'role': 'user', 'content': 'HI'}]
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k in _STRUCTURE else changed(v, change) for k, v in value.items()}
    return [changed(v, change) for v in value] if isinstance(value, list) else value


def joined(value: Any) -> str:
    """All text inside of a value."""
    return "\n".join(s for _, s in walk(value))


def normal(text: str) -> str:
    """A text as it is compared: composed letters, single spaces.

    >>> normal("  Hello\\n world ")
    'Hello world'
    """
    return " ".join(unicodedata.normalize("NFC", text).split())


def excerpt(text: str, limit: int = 100) -> str:
    """The beginning of a text on one line."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
