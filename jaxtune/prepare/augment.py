"""`jaxtune augment`: more rows of the same meaning. Only the text that asks changes; labels and answers never do."""

import dataclasses
import difflib
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import log
from jaxtune.config import Source
from jaxtune.errors import UserError
from jaxtune.prepare import edits, rows
from jaxtune.prepare.report import jsonl
from jaxtune.prepare.rows import Row, Table, normal

EDA = ("swap", "delete", "insert", "synonym")
TYPOS = ("keyboard", "spelling")
# The column that changes, by format; of a conversation the last turn of the user.
COLUMNS: Mapping[str, str] = {
    "prompt_completion": "prompt", "alpaca": "instruction", "classification": "text", "regression": "text",
    "qa": "question", "maths": "question", "choice": "question", "translation": "source", "summarisation": "document",
    "messages": "messages", "sharegpt": "conversations", "kto": "prompt", "preference": "prompt",
}  # fmt: skip
_HELD_BACK = re.compile(r"(?i)(^|[^a-z])(validation|valid|val|dev|test|eval)([^a-z]|$)")
_USERS = {"user", "human"}
Rewrite = Callable[[Sequence[str], int], list[str]]  # texts and the number of the copy -> other texts


@dataclasses.dataclass(frozen=True)
class Options:
    """How rows are multiplied."""

    operations: Sequence[str] = ()  # of `EDA` and `TYPOS`, taken in turn
    table: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)  # synonyms of words in small letters
    copies: int = 1  # of each row
    rate: float = 0.1  # share of the words that change
    closest: float = 0.3  # similarity with its row that a copy must have
    seed: int = 0
    column: str | None = None  # which column changes; that of `COLUMNS` where not given


def augment(
    source: Source, out: Path, options: Options, rewrites: Mapping[str, Rewrite] | None = None
) -> tuple[int, Counter[str]]:
    """Write the rows and, after each, its copies, marked by `augmented` (how) and `source` (of which row; `source_row`
    where `source` is a column of the rows).

    A copy is dropped where it is as its row or as another copy, is too far from its row, or has lost a number, a
    negation, the name of a label or the span of an answer.

    Args:
      source: rows to train on.
      out: JSONL.
      options: how.
      rewrites: further ways by name, such as a paraphrase by a model; each makes `options.copies` copies too.

    Returns: how many rows were read, and how many copies were made by which way or dropped for which reason.

    Raises:
      UserError: the rows are held back, marked already, or of a format whose text cannot change by itself.
    """
    if _HELD_BACK.search(Path(source.path).stem):
        raise UserError(
            f"{source.path}: looks like data that is held back, which is never augmented; give the training data"
        )
    if out.exists():
        raise UserError(f"{out}: is there already; name another file with --out")
    table, unreadable = rows.open_table(source)
    if unreadable:
        raise UserError(f"{unreadable[0]}; repair the data first, with `jaxtune prepare`")
    column = options.column or table.columns.get(COLUMNS.get(table.format, ""), COLUMNS.get(table.format))
    if column is None or table.format == "token_classification":
        raise UserError(f"{source.path}: rows of format {table.format!r} have no text that can change by itself")
    if marked := next((r.origin for r in table.rows if "augmented" in r.raw), None):
        raise UserError(f"{marked}: is augmented already; give the data as it was before")
    asked = [_text(table, row, column) for row in table.rows]
    keep = edits.kept(_label_words(table))
    counts: Counter[str] = Counter()
    copies: list[list[dict[str, Any]]] = [[] for _ in table.rows]
    seen: list[set[str]] = [{normal(t)} for t in asked]

    def take(i: int, made: str, how: str) -> None:
        fault = _fault(asked[i], made, keep, options.closest)
        if not fault and normal(made) in seen[i]:
            fault = "dropped: as the row or another copy"
        new = None if fault else _with(table, table.rows[i], column, made)
        if not fault and new is None:
            fault = "dropped: the answer's span was lost"
        counts[fault or how] += 1
        if new is not None:
            seen[i].add(normal(made))
            row = table.written(new)
            origin = "source_row" if "source" in row else "source"  # which is the text itself in rows to translate
            copies[i].append({**row, "augmented": how, origin: table.rows[i].origin})

    for k in range(options.copies if options.operations else 0):
        for i, text in enumerate(asked):
            op = options.operations[(i + k) % len(options.operations)]
            draw = np.random.default_rng([options.seed, k, _number(text)])
            take(
                i,
                _operation(op, options.table)(text, options.rate, draw, keep),
                f"{'eda' if op in EDA else 'typo'}-{op}",
            )
    for how, rewrite in (rewrites or {}).items():
        for k in range(options.copies):
            for i, made in enumerate(rewrite(asked, k)):
                take(i, made, how)
    out.parent.mkdir(parents=True, exist_ok=True)
    originals = (table.written(row.raw) for row in table.rows)
    log.write_whole(out, jsonl(r for row, more in zip(originals, copies, strict=True) for r in (row, *more)))
    return len(table), counts


def _operation(name: str, table: Mapping[str, Sequence[str]]) -> Callable[..., str]:
    if name in ("synonym", "insert"):
        return functools.partial(getattr(edits, name), table=table)
    return {"swap": edits.swap, "delete": edits.delete, "keyboard": edits.keyboard, "spelling": edits.spelling}[name]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _label_words(table: Table) -> frozenset[str]:
    """Words of the labels' names."""
    names = {n for r in table.rows if (n := table.name_of_label(r.raw))}
    return frozenset(w for n in names for w in re.findall(r"[^\W_]+", n.casefold()))


def _fault(text: str, made: str, keep: edits.Keep, closest: float) -> str:
    """Why a copy cannot stand for its text."""
    if not made.strip() or normal(made) == normal(text):
        return "dropped: as the row or another copy"
    if _kept(text, keep) - _kept(made, keep):
        return "dropped: a number, negation or label's name was lost"
    if difflib.SequenceMatcher(None, text.casefold(), made.casefold(), autojunk=False).ratio() < closest:
        return "dropped: too far from its row"
    return ""


def _kept(text: str, keep: edits.Keep) -> Counter[str]:
    return Counter(w.casefold() for w in edits.WORDS.findall(text) if w[0].isalnum() and keep(w))


# --- the text of a row, and the row with another ----------------------------------------------------------------------


def _turn(table: Table, row: Row, column: str) -> tuple[int, str] | None:
    """Number of the last turn of the user, and the key of its text; None where the column is plain text."""
    turns = row.raw[column]
    if isinstance(turns, str):
        return None
    tags = table.tags
    for i, turn in reversed([*enumerate(turns)] if isinstance(turns, list) else []):
        if isinstance(turn, Mapping):
            role = turn.get(tags.get("role", "role"), turn.get("from"))
            for key in (tags.get("content", "content"), "value"):
                if role in (*_USERS, tags.get("user")) and isinstance(turn.get(key), str):
                    return i, key
    raise UserError(f"{row.origin}: column {column!r} has no text of a user that could change")


def _text(table: Table, row: Row, column: str) -> str:
    if column not in row.raw:
        raise UserError(f"{row.origin}: no column {column!r}; the row has {', '.join(map(repr, row.raw))}")
    turn = _turn(table, row, column)
    return row.raw[column] if turn is None else row.raw[column][turn[0]][turn[1]]


def _with(table: Table, row: Row, column: str, text: str) -> dict[str, Any] | None:
    """The row with another text; an answer in it is looked for anew, and there is no row where it cannot be found."""
    turn = _turn(table, row, column)
    if turn is not None:
        turns = list(row.raw[column])
        turns[turn[0]] = {**turns[turn[0]], turn[1]: text}
        return {**row.raw, column: turns}
    new = {**row.raw, column: text}
    if table.format == "qa" and column == table.columns.get("context", "context"):
        name = table.columns.get("answers", "answers")
        answers = row.raw[name]
        if any(text.count(a) != 1 for a in answers["text"]):
            return None
        new[name] = {**answers, "answer_start": [text.index(a) for a in answers["text"]]}
    return new


# --- by a model -------------------------------------------------------------------------------------------------------


def by_models(asked: Sequence[tuple[Any, str]], options: Mapping[str, Any], seed: int, batch_size: int = 8) -> Rewrite:
    """Other texts by models (`tuned.Tuned`), each with its prompt, `{text}` in it being what came before.

    One paraphrases; two, there and back, translate. `options` are those of `Sampling`.
    """
    import jax

    from jaxtune.data.examples import Message
    from jaxtune.generate import Sampling

    def rewrite(texts: Sequence[str], copy: int) -> list[str]:
        now = list(texts)
        for model, prompt in asked:
            s = Sampling(**options, seed=(seed + copy) % 2**32)
            wanted = [model.prompt([Message("user", prompt.replace("{text}", t))]) for t in now]
            with jax.set_mesh(model.mesh):
                made = [
                    model.generator.generate(wanted[i : i + batch_size], s) for i in range(0, len(wanted), batch_size)
                ]
            now = [g.text.strip() for batch in made for g in batch]
        return now

    return rewrite


def read_table(file: Path) -> dict[str, list[str]]:
    """A table of synonyms: `{"big": ["large", "huge"]}`.

    Raises:
      UserError: it is not such a table.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as e:
        raise UserError(f"--table {file}: no such file") from e
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"--table {file}: not JSON ({e}); wanted {{word: [synonyms]}}") from e
    fit = isinstance(found, dict) and all(
        isinstance(v, list) and v and all(isinstance(s, str) for s in v) for v in found.values()
    )
    if not fit or not found:
        raise UserError(f"--table {file}: an object of lists was expected, such as {{'big': ['large', 'huge']}}")
    return {k.casefold(): v for k, v in found.items()}
