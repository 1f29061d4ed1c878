"""Data files to examples: JSONL and CSV rows become conversations or documents, each knowing where it stood."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxtune.config import Source
from jaxtune.data.examples import Conversation, Document, Example, Message
from jaxtune.errors import UserError, nearest

ROLES = ("system", "user", "assistant")


ANSWERS = ("completion", "output")  # columns that a file of prompts may lack


class Examples:
    def __init__(self, source: Source, answers: bool = True, bad_rows: str = "stop") -> None:
        self._all, self._n, self.skipped = read(source, answers), 0, []

    def __iter__(self) -> "Examples":
        return self

    def __next__(self) -> Example:
        if self._n == len(self._all):
            raise StopIteration
        self._n += 1
        return self._all[self._n - 1]

    @property
    def state(self) -> dict:
        return {"n": self._n}

    @state.setter
    def state(self, state: dict) -> None:
        self._n = state["n"]


def read(source: Source, answers: bool = True, bad_rows: str = "stop", skipped: list | None = None) -> list[Example]:
    """All examples of a file; without `answers` a row may be a prompt alone.

    Raises:
      UserError: the file is missing, empty or cut short, or a row lacks a column; with file and line.
    """
    path = Path(source.path)
    rows = list(_limited(_rows(path), source.max_samples))
    if not rows:
        raise UserError(f"{path}: holds no rows; a JSONL or CSV file with at least one was expected")
    kind = (
        source.format if source.format != "auto" else detect(_renamed(rows[0][1], source.columns), f"{path}:1", answers)
    )
    build, required = FORMATS[kind]
    required = required if answers else tuple(c for c in required if c not in ANSWERS)
    examples = []
    for line, raw in rows:
        origin, row = f"{path}:{line}", _renamed(raw, source.columns)
        if missing := [c for c in required if row.get(c) is None]:
            renamed = {v: k for k, v in source.columns.items()}
            raise UserError(
                f"{origin}: no column {missing[0]!r}, which format {kind!r} needs; the row has "
                f"{', '.join(repr(c) for c in raw) or 'none'}; map it with data.columns, such as "
                f"{{{missing[0]}: {next((c for c in raw if c not in renamed), 'name')}}}"
            )
        examples.append(build(row, origin))
    return examples


def detect(row: Mapping[str, Any], origin: str, answers: bool = True) -> str:
    """The format whose columns a row has.

    >>> detect({"instruction": "Add.", "output": "3"}, "a.jsonl:1")
    'alpaca'
    """
    for kind, (_, required) in FORMATS.items():
        if all(c in row for c in required if answers or c not in ANSWERS):
            return kind
    raise UserError(
        f"{origin}: columns {', '.join(map(repr, row))} fit no format; wanted messages, prompt and completion, "
        "instruction and output, or text; map them with data.columns, such as {prompt: question, completion: answer}"
    )


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    taken = set(columns.values())
    return {k: v for k, v in row.items() if k not in taken} | {k: row[v] for k, v in columns.items() if v in row}


def _limited(rows: Iterator[Any], n: int | None) -> Iterator[Any]:
    for i, row in enumerate(rows):
        if i == n:
            return
        yield row


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and rows of a file."""
    readers: Mapping[str, Callable[[Any, Path], Iterator[tuple[int, dict]]]] = {".jsonl": _jsonl, ".csv": _csv}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: files of type {path.suffix or 'none'!r} are not read; allowed: .jsonl, .csv")
    try:
        with path.open(encoding="utf-8-sig", newline="") as f:
            yield from readers[path.suffix.lower()](f, path)
    except FileNotFoundError as e:
        siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file{nearest(path.name, siblings) if siblings else ''}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8") from e


def _jsonl(f: Any, path: Path) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(f, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(
                f"{path}:{number}: a JSON object was expected, but {e.msg[0].lower()}{e.msg[1:]} at column {e.colno}; "
                "is the file cut short?"
            ) from e
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: a JSON object was expected, got {type(row).__name__}")
        yield number, row


def _csv(f: Any, path: Path) -> Iterator[tuple[int, dict]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(f, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}:{reader.line_num}: {len(reader.fieldnames or ())} columns were expected, as in the "
                    "header; is a quote or a comma missing?"
                )
            yield reader.line_num, row
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: not CSV: {e}; is the file cut short?") from e


# --- one row --------------------------------------------------------------------------------------------------------


def _text(value: Any, column: str, origin: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{origin}: column {column!r} should be text, got {type(value).__name__}")
    return value


def _messages(row: Mapping[str, Any], origin: str) -> Conversation:
    """`{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}`"""
    if not isinstance(row["messages"], list) or not row["messages"]:
        raise UserError(f"{origin}: 'messages' should be a list of {{role, content}}, got {row['messages']!r:.60}")
    messages = []
    for i, m in enumerate(row["messages"]):
        if not isinstance(m, dict) or "role" not in m or "content" not in m:
            raise UserError(f"{origin}: messages[{i}] should have 'role' and 'content', got {m!r:.60}")
        if m["role"] not in ROLES:
            raise UserError(f"{origin}: messages[{i}].role is {m['role']!r}; allowed: {', '.join(ROLES)}")
        if m["role"] == "system" and i:
            raise UserError(f"{origin}: messages[{i}].role is 'system'; it can only come first")
        messages.append(Message(m["role"], _text(m["content"], f"messages[{i}].content", origin)))
    return Conversation(tuple(messages), "messages", origin)


def _prompt_completion(row: Mapping[str, Any], origin: str) -> Conversation:
    """`{"prompt": "2 + 2 =", "completion": " 4"}`"""
    return _asked(
        _text(row["prompt"], "prompt", origin), row.get("completion"), "completion", "prompt_completion", origin
    )


def _asked(
    prompt: str, answer: Any, column: str, kind: str, origin: str, system: tuple[Message, ...] = ()
) -> Conversation:
    answered = () if answer is None else (Message("assistant", _text(answer, column, origin)),)
    return Conversation((*system, Message("user", prompt), *answered), kind, origin)


def _alpaca(row: Mapping[str, Any], origin: str) -> Conversation:
    """`{"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}`; `input` may be empty or left out"""
    instruction = _text(row["instruction"], "instruction", origin)
    more = _text(row.get("input") or "", "input", origin)
    prompt = f"{instruction}\n\n{more}" if more else instruction
    system = (Message("system", _text(row["system"], "system", origin)),) if row.get("system") else ()
    return _asked(prompt, row.get("output"), "output", "alpaca", origin, system)


def _document(row: Mapping[str, Any], origin: str) -> Document:
    """`{"text": "Once upon a time …"}`"""
    return Document(_text(row["text"], "text", origin), origin)


FORMATS: Mapping[str, tuple[Callable[[Mapping[str, Any], str], Any], tuple[str, ...]]] = {
    "messages": (_messages, ("messages",)),
    "prompt_completion": (_prompt_completion, ("prompt", "completion")),
    "alpaca": (_alpaca, ("instruction", "output")),
    "text": (_document, ("text",)),
}
