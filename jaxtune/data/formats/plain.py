"""Rows to text that needs no template: documents, segments, tokens."""

from jaxtune.data.examples import Document, Segments, Tokens
from jaxtune.data.formats.values import Row, Tags, flag, integer, listed, text
from jaxtune.errors import UserError

IGNORED = -100  # the label of a token that is not trained on


def document(row: Row, origin: str, tags: Tags) -> Document:
    """`{"text": "Once upon a time …"}`"""
    return Document(text(row["text"], "text", origin), origin)


def segments(row: Row, origin: str, tags: Tags) -> Segments:
    """`{"segments": [{"text": "2 + 2 =", "label": false}, {"text": " 4", "label": true}]}`: loss where the label is"""
    parts = []
    for i, part in enumerate(listed(row["segments"], "segments", origin, "{text, label}")):
        where = f"segments[{i}]"
        if not isinstance(part, dict) or "text" not in part or "label" not in part:
            raise UserError(f"{origin}: {where} should have 'text' and 'label', got {part!r:.60}")
        parts.append((text(part["text"], f"{where}.text", origin), flag(part["label"], f"{where}.label", origin)))
    if not parts:
        raise UserError(f"{origin}: 'segments' is an empty list")
    return Segments(tuple(parts), origin)


def tokens(row: Row, origin: str, tags: Tags) -> Tokens:
    """`{"input_ids": [1, 5, 9], "labels": [-100, 5, 9], "attention_mask": [1, 1, 1]}`

    Without `labels` that is trained on where TRL's `completion_mask` and `assistant_masks` are both 1, and without
    either of them all. Tokens whose attention mask is 0 are padding and go.
    """
    ids = _integers(row["input_ids"], "input_ids", origin)
    if not ids or min(ids) < 0 or max(ids) >= 2**31:
        raise UserError(f"{origin}: column 'input_ids' should be token ids, at least one and none negative")
    labels = _masked(ids, row, origin) if row.get("labels") is None else _integers(row["labels"], "labels", origin)
    seen = [1] * len(ids) if row.get("attention_mask") is None else _integers(row["attention_mask"], "mask", origin)
    if not len(ids) == len(labels) == len(seen):
        raise UserError(f"{origin}: {len(ids)} input_ids, {len(labels)} labels, {len(seen)} in the attention mask")
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, IGNORED):
            raise UserError(f"{origin}: labels[{i}] is {label}; allowed: input_ids[{i}], {token}, or {IGNORED}")
    kept = [i for i, s in enumerate(seen) if s]
    if not kept:
        raise UserError(f"{origin}: the attention mask leaves no token")
    return Tokens(tuple(ids[i] for i in kept), tuple(labels[i] != IGNORED for i in kept), origin)


def _masked(ids: list[int], row: Row, origin: str) -> list[int]:
    """Labels by the masks of a row."""
    for column in ("completion_mask", "assistant_masks"):
        if row.get(column) is not None:
            mask = [flag(v, f"{column}[{i}]", origin) for i, v in enumerate(listed(row[column], column, origin))]
            if len(mask) != len(ids):
                raise UserError(f"{origin}: {len(ids)} input_ids, {len(mask)} values in {column!r}")
            ids = [t if m else IGNORED for t, m in zip(ids, mask, strict=True)]
    return ids


def _integers(value: object, column: str, origin: str) -> list[int]:
    return [integer(v, f"{column}[{i}]", origin) for i, v in enumerate(listed(value, column, origin, "numbers"))]
