"""Characters that should not be there: text decoded with the wrong table, control characters, unusual case."""

import re
from collections.abc import Callable

from jaxtune.prepare.checks.masks import without_any
from jaxtune.prepare.finding import Finding, Look
from jaxtune.prepare.rows import Row, Table, excerpt

# C0 and C1 but tab, newline and carriage return; byte-order marks, zero-width spaces, bidirectional overrides and lone
# surrogates. Joiners (U+200C, U+200D) stay: emoji and several scripts need them.
CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ud800-\udfff]"
)
LOST = "\ufffd"  # stands where a character could not be decoded


def mojibake(table: Table, look: Look) -> Finding:
    """Text that was decoded with the wrong table ("cafÃ©"), repaired by ftfy (Speer, 2019)."""
    from ftfy import fix_encoding
    from ftfy.badness import is_bad

    def repair(text: str) -> str:
        fixed = text
        while is_bad(fixed) and (better := fix_encoding(fixed)) != fixed:
            fixed = better
        return fixed

    found = changes(table, repair)
    lost = {i: f"{n} characters are lost (�)" for i, r in enumerate(table.rows) if (n := _lost(table, r))}
    remarks = (
        (f"{len(lost)} rows hold characters that were lost before (�), such as {_first(table, lost)}",) if lost else ()
    )
    return repaired(table, found, "rows hold text decoded with the wrong table (mojibake)", "repair it", remarks)


def control(table: Table, look: Look) -> Finding:
    """Control characters, byte-order marks, zero-width spaces, bidirectional overrides and lone surrogates."""
    found = changes(table, lambda text: CONTROL.sub("", text))
    return repaired(table, found, "rows hold control or invisible characters", "take them out")


def case(table: Table, look: Look) -> Finding:
    """Rows that shout: at least 20 cased letters in a text, nine tenths of them capital."""
    found = changes(table, lambda text: sentence_case(text) if shouts(text) else text)
    f = repaired(table, found, "rows are in capitals", "write them as sentences, which loses names' capitals")
    return Finding(f.title, f.detail, f.action, f.proposal, f.changes)


def shouts(text: str) -> bool:
    """Whether a text is in capitals."""
    upper, lower = sum(map(str.isupper, text)), sum(map(str.islower, text))
    return upper + lower >= 20 and upper >= 0.9 * (upper + lower)


def sentence_case(text: str) -> str:
    """A text in small letters but for the first of each sentence.

    >>> sentence_case("STOP THAT! PLEASE.")
    'Stop that! Please.'
    """
    return re.sub(r"(^|[.!?]\s+)(\w)", lambda m: m[1] + m[2].upper(), text.lower())


# --- shared with the other checks that rewrite text -------------------------------------------------------------------


def changes(table: Table, change: Callable[[str], str]) -> dict[int, dict]:
    """The rows that a change of their texts alters, as they would be."""
    out = {}
    for i, row in enumerate(table.rows):
        if any(change(s) != s for s in table.texts(row.raw)):
            out[i] = following_spans(table, row, change)
    return out


def following_spans(table: Table, row: Row, change: Callable[[str], str]) -> dict:
    """The row with its texts changed; the place of an extractive answer follows its context.

    A row whose answer is no longer in its context, or that marks spans of characters, stays as it is.
    """
    raw = row.raw
    new = table.with_texts(raw, change)
    spans = raw.get(table.columns.get("spans", "spans")) or raw.get("slots")
    if table.format == "token_classification" and spans:
        return raw
    answers = new.get(table.columns.get("answers", "answers"))
    if table.format != "qa" or not isinstance(answers, dict) or "answer_start" not in answers:
        return new
    context, old = (x.get(table.columns.get("context", "context")) or "" for x in (new, raw))
    starts = []
    for text, start in zip(answers["text"], answers["answer_start"], strict=False):
        near = len(change(old[:start]))
        places = [m.start() for m in re.finditer(re.escape(text), context)] if text else []
        if not places:
            return raw
        starts.append(min(places, key=lambda p: abs(p - near)))
    answers["answer_start"] = starts
    return new


def repaired(table: Table, found: dict[int, dict], title: str, proposal: str, remarks: tuple[str, ...] = ()) -> Finding:
    """A finding of rows to be rewritten; those that cannot be without losing a span are counted and left."""
    fixed = {i: new for i, new in found.items() if new != table.rows[i].raw}
    if n := len(found) - len(fixed):
        first = table.rows[min(set(found) - set(fixed))].origin
        remarks = (*remarks, f"{n} more stay as they are, since spans of characters would move, such as {first}")
    detail = {i: excerpt(without_any(_difference(table, i, new))) for i, new in fixed.items()}
    return Finding(title, detail, "change" if fixed else "none", proposal if fixed else "", fixed, True, remarks)


def _difference(table: Table, i: int, new: dict) -> str:
    """The first text that differs, as it would be."""
    pairs = zip(table.texts(table.rows[i].raw), table.texts(new), strict=True)
    return next(b for a, b in pairs if a != b)


def _lost(table: Table, row: Row) -> int:
    return sum(s.count(LOST) for s in table.texts(row.raw))


def _first(table: Table, detail: dict[int, str]) -> str:
    return table.rows[min(detail)].origin
