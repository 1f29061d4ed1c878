"""Rows to examples: conversations, texts, preferences, records of tasks, each knowing where it stood.

What "auto" looks for in the first row that can be read; the first line whose columns are all there holds. More columns
do no harm, but for those that would make it another format's.

| columns | format |
|-|-|
| input_ids | tokens |
| segments | segments |
| preferred_output, non_preferred_output; or chosen, rejected | preference |
| kto_tag; messages, label; conversations, label; or prompt, completion, label; the label true, false, 0 or 1 | kto |
| messages | messages |
| conversations | sharegpt |
| prompt, completion | prompt_completion |
| instruction, output | alpaca |
| paragraphs (SQuAD's own file); or context, question | qa |
| translation (whose languages data.columns names) | translation |
| question, choices | choice |
| tokens, tags; text, spans; or text, slots | token_classification |
| document, summary | summarisation |
| question, answer | none: maths, or prompt_completion by data.columns; name it |
| source, target | none: translation or summarisation; name it |
| text, label | none: classification, regression or text; name it |
| text, labels | none: classification by data.columns, or text; name it |
| text | text |
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxtune.config import Source
from jaxtune.data.examples import RECORDS, Example
from jaxtune.data.formats import chat, plain, preference, records
from jaxtune.data.formats.values import Row, Tags, blank
from jaxtune.data.reading import Rows
from jaxtune.errors import UserError


class Format(NamedTuple):
    """What makes an example of a row, the columns that it cannot do without, and those that hold the answer."""

    build: Callable[[Row, str, Tags], Example]
    needed: tuple[str, ...]
    answers: tuple[str, ...] = ()  # not needed where nothing is to be trained or scored


FORMATS: Mapping[str, Format] = {
    "messages": Format(chat.messages, ("messages",)),
    "sharegpt": Format(chat.sharegpt, ("conversations",)),
    "prompt_completion": Format(chat.prompt_completion, ("prompt",), ("completion",)),
    "alpaca": Format(chat.alpaca, ("instruction",), ("output",)),
    "text": Format(plain.document, ("text",)),
    "segments": Format(plain.segments, ("segments",)),
    "tokens": Format(plain.tokens, ("input_ids",)),
    "preference": Format(preference.pair, ("chosen", "rejected")),
    "kto": Format(preference.kto, ()),
    **{task: Format(records.record(task), c.needed, c.answers) for task, c in RECORDS.items()},
}
DETECTED: tuple[tuple[str, str | None], ...] = (
    ("input_ids", "tokens"),
    ("segments", "segments"),
    ("preferred_output non_preferred_output", "preference"),
    ("chosen rejected", "preference"),
    ("kto_tag", "kto"),
    ("messages label", "kto"),
    ("conversations label", "kto"),
    ("prompt completion label", "kto"),
    ("messages", "messages"),
    ("conversations", "sharegpt"),
    ("prompt completion", "prompt_completion"),
    ("instruction output", "alpaca"),
    ("paragraphs", "qa"),
    ("context question", "qa"),
    ("translation", "translation"),
    ("question choices", "choice"),
    ("tokens tags", "token_classification"),
    ("text spans", "token_classification"),
    ("text slots", "token_classification"),
    ("document summary", "summarisation"),
    ("question answer", None),
    ("source target", None),
    ("text label", None),
    ("text labels", None),
    ("text", "text"),
)
_PROMPTS = {"prompt completion": "prompt", "instruction output": "instruction"}  # what is left without answers
_NAME_IT = {
    "question answer": "maths, or map them with data.columns={prompt: question, completion: answer}",
    "source target": "translation or summarisation",
    "text label": "classification, regression or text",
    "text labels": "classification (with data.columns={label: labels}) or text",
}


def read(
    source: Source, answers: bool = True, bad_rows: str = "stop", skipped: list[str] | None = None
) -> list[Example]:
    """All examples of a source; without `answers` a row may be a prompt alone.

    Args:
      source: what is read; "auto" takes the format of the first row.
      answers: whether rows must hold what is to be learnt.
      bad_rows: "stop" raises on a row that cannot be read; "skip" leaves it out.
      skipped: takes origin and reason of every row that was left out.

    Raises:
      UserError: nothing is there, or a row cannot be read; with file and line.
    """
    examples = Examples(source, answers, bad_rows, streaming=False)
    found = list(examples)
    if skipped is not None:
        skipped += examples.skipped
    return found


def detect(row: Row, origin: str, answers: bool = True) -> str:
    """The format whose columns a row has.

    >>> detect({"instruction": "Add.", "output": "3"}, "a.jsonl:1")
    'alpaca'
    """
    for columns, kind in DETECTED:
        if all(c in row for c in (columns if answers else _PROMPTS.get(columns, columns)).split()):
            if kind == "kto" and columns.endswith("label") and not preference.judges(row["label"]):
                continue
            if kind is None:
                raise UserError(
                    f"{origin}: columns {', '.join(map(repr, row))} may be {_NAME_IT[columns]}; say which with "
                    "data.format"
                )
            return kind
    raise UserError(
        f"{origin}: columns {', '.join(map(repr, row))} fit no format; wanted messages, prompt and completion, "
        "instruction and output, or text; map them with data.columns, such as {prompt: question, completion: answer}"
    )


class Examples:
    """The examples of a source in order; with `state` as `reading.Rows` has it, and `skipped`.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "a.jsonl")
    >>> _ = file.write_text('{"text": "one"}\\n{"text": "two"}\\n')
    >>> examples = Examples(Source(path=str(file)))
    >>> state = next(examples) and examples.state
    >>> examples = Examples(Source(path=str(file)))
    >>> examples.state = state
    >>> [e.text for e in examples]
    ['two']
    """

    def __init__(self, source: Source, answers: bool = True, bad_rows: str = "stop", *, streaming: bool = True) -> None:
        """Args:
        source, answers, bad_rows: as in `read`.
        streaming: as in `reading.Rows`.

        Raises:
          UserError: there is nothing at the path; while iterating: a row cannot be read, or none can.
        """
        self._source, self._answers, self._skip = source, answers, bad_rows == "skip"
        self._rows = Rows(source, bad_rows, streaming)
        self._left_out: list[str] = []
        self._unseen = {v for v in source.columns.values() if v} if answers else set()
        self._begin()

    def _begin(self) -> None:
        self._kind: str | None = None if self._source.format == "auto" else self._source.format
        self._given = 0
        self._before = self._rows.state  # the row that is being spread, and how many of its examples were taken
        self._taken = 0
        self._spread: Iterator[tuple[str, Row | UserError]] = iter(())

    def __iter__(self) -> "Examples":
        return self

    def __next__(self) -> Example:
        while self._given != self._source.max_samples:
            for origin, row in self._spread:
                self._taken += 1
                try:
                    if isinstance(row, UserError):
                        raise row
                    example = self._made(row, origin)
                except UserError as e:
                    if not self._skip:
                        raise
                    self._left_out.append(str(e))
                    continue
                self._given += 1
                return example
            before = self._rows.state
            found = next(self._rows, None)
            if found is None:
                break
            self._before, self._taken = before, 0
            origin, raw = found
            self._spread = _spread(raw, origin, self._source.format)
        self._ended()
        raise StopIteration

    @property
    def skipped(self) -> list[str]:
        """Origin and reason of every row that was left out since this was made or set to a state."""
        return [*self._rows.skipped, *self._left_out]

    @property
    def state(self) -> dict[str, Any]:
        return {"rows": self._before, "taken": self._taken, "given": self._given, "format": self._kind}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._rows.state = state["rows"]
        self._begin()
        self._unseen = set()  # they may have been in the rows before
        self._kind = state["format"]
        if state["taken"]:
            found = next(self._rows, None)
            if found is None:
                raise UserError(
                    f"{self._source.path}: is shorter than when the run stopped; give it the file as it was"
                )
            origin, raw = found
            self._spread = _spread(raw, origin, self._source.format)
            for _ in range(state["taken"]):
                next(self._spread, None)
        self._taken, self._given = state["taken"], state["given"]

    def _made(self, raw: Row, origin: str) -> Example:
        row: Row = renamed(raw, self._source.columns)
        if self._kind is None:
            self._kind = detect(row, origin, self._answers)
        kind = self._kind
        if kind == "translation" and isinstance(raw.get("translation"), dict):
            raw = {**{k: v for k, v in raw.items() if k != kind}, **raw[kind]}
            row = renamed(raw, self._source.columns)
        self._unseen -= raw.keys()
        if kind == "token_classification" and "slots" in row and row.get("spans") is None:
            row = records.slots(row, origin)
        f = FORMATS[kind]
        if kind != "preference" or "preferred_output" not in row:
            answers = records.tagged(row) if kind == "token_classification" else f.answers
            _require(raw, row, (*f.needed, *answers) if self._answers else f.needed, kind, self._source, origin)
        return f.build(row, origin, self._source.tags)

    def _ended(self) -> None:
        if not self._given:
            if not self.skipped:
                raise UserError(
                    f"{self._source.path}: holds no rows; a JSONL or CSV file with at least one was expected"
                )
            raise UserError(
                f"{self._source.path}: none of its {len(self.skipped)} rows can be read; the first: {self.skipped[0]}"
            )
        if self._unseen:
            column = min(self._unseen)
            name = next(k for k, v in self._source.columns.items() if v == column)
            raise UserError(
                f"{self._source.path}: no row has a column {column!r}, which data.columns names for {name!r}"
            )


def _spread(raw: Row, origin: str, format: str) -> Iterator[tuple[str, Row | UserError]]:
    """A row as those that it holds: an article of SQuAD has many questions."""
    if format in ("auto", "qa") and "paragraphs" in raw:
        return records.questions(raw, origin)
    return iter([(origin, raw)])


def renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row under our names. Who maps a name means no other column by it; one that is mapped to "" is left out.

    >>> renamed({"q": "Hi", "system": "S", "id": 3}, {"prompt": "q", "system": ""})
    {'id': 3, 'prompt': 'Hi'}
    """
    taken = {*columns.values(), *columns}
    return {k: v for k, v in row.items() if k not in taken} | {k: row[v] for k, v in columns.items() if v in row}


def _require(raw: Row, row: Row, needed: Iterable[str], kind: str, source: Source, origin: str) -> None:
    needed = [*needed]
    missing = [c for c in needed if row.get(c) is None or (c == "label" and blank(row[c]))]
    if missing and row.get(missing[0]) is not None:
        raise UserError(f"{origin}: column 'label' is empty, and format {kind!r} needs it; fill it in, or drop the row")
    if missing:
        taken = {*source.columns.values(), *needed}
        raise UserError(
            f"{origin}: no column {missing[0]!r}, which format {kind!r} needs; the row has "
            f"{', '.join(repr(c) for c in raw) or 'none'}; map it with data.columns, such as "
            f"{{{missing[0]}: {next((c for c in raw if c not in taken), 'name')}}}"
        )
