"""Columns: those that are missing or empty, and those that nothing reads."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from jaxtune.data.formats.values import blank
from jaxtune.prepare.finding import Finding, Look
from jaxtune.prepare.rows import Row, Table, example

_MAY_BE_EMPTY = ("input", "system", "history", "answers", "label")


def missing(table: Table, look: Look) -> Finding:
    """Rows that lack a column, or in which it is empty; conversations with an empty turn or without an answer."""
    detail = {i: why for i, row in enumerate(table.rows) if (why := _fault(table, row))}
    return Finding(
        "rows lack something", detail, "remove" if detail else "none", "remove them" if detail else "", safe=True
    )


def extra(table: Table, look: Look) -> Finding:
    """Columns that training does not read."""
    known = table.known
    counts = Counter(c for row in table.rows for c in row.raw if c not in known)
    detail = {
        i: "has " + ", ".join(sorted(set(row.raw) - known)) for i, row in enumerate(table.rows) if set(row.raw) - known
    }
    remarks = tuple(
        f"column {c!r} in {n} rows is not read by format {table.format!r}" for c, n in sorted(counts.items())
    )
    changes = {i: {c: v for c, v in table.rows[i].raw.items() if c in known} for i in detail}
    return Finding(
        "rows have columns that training does not read", detail, "change" if detail else "none",
        "drop these columns" if detail else "", changes, False, remarks,
    )  # fmt: skip


def _fault(table: Table, row: Row) -> str:
    absent = [c for c in table.needed if row.raw.get(c) is None]
    split = row.raw.get(table.columns.get("tokens", "tokens"))
    if table.format == "token_classification" and not split:
        text = table.columns.get("text", "text")
        absent = [] if str(row.raw.get(text) or "").strip() else ["text"]
    if absent:
        return f"no {absent[0]!r}"
    allowed = table.named(_MAY_BE_EMPTY)
    for c in table.needed:
        if c not in allowed and _empty(row.raw.get(c)):
            return f"{c!r} is empty"
        if c == table.label and blank(row.raw[c]):
            return f"{c!r} is empty"
    for c in ("messages", "conversations"):
        turns = row.raw.get(table.columns.get(c, c))
        if c in table.needed and isinstance(turns, list) and (why := _turns(turns, table.tags)):
            return why
    if table.format == "token_classification":
        answers = table.named(("tags",) if split else ("spans", "slots"))
        if all(row.raw.get(c) is None for c in answers):
            return f"no {answers[0]!r}"
    if table.format in ("preference", "kto") and not "".join(table.texts(row.raw)).strip():
        return "is empty"
    made = example(table, row)
    return made if isinstance(made, str) else ""


def _empty(value: Any) -> bool:
    return (isinstance(value, str) and not value.strip()) or (isinstance(value, list | Mapping) and not value)


def _turns(turns: list[Any], tags: Mapping[str, str]) -> str:
    roles = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            return f"turn {i} is no {{role, content}}"
        roles.append(turn.get(tags.get("role", "role"), turn.get("from")))
        content = turn.get(tags.get("content", "content"), turn.get("value"))
        if (content is None or _empty(content)) and not turn.get("tool_calls"):
            return f"turn {i} is empty"
    if not {"assistant", "gpt", "model", "function_call", tags.get("assistant")} & {*roles}:
        return "has no turn of the assistant"
    return ""
