"""Which languages there are, and terms that should not be there."""

import re
import unicodedata
from collections import Counter
from typing import Any

from jaxtune.prepare.finding import Finding, Look
from jaxtune.prepare.rows import Table, joined

_ENOUGH = 40  # letters below which a language is not judged
_SHARE = 0.05  # of the rows: a language of so many belongs to the file
_LOOK_AT = 300  # characters of a text by which its language is judged


def language(table: Table, look: Look) -> Finding:
    """Rows in another language than the rest of their column, by lingua; without it, in another script."""
    detector = _lingua()
    detail: dict[int, str] = {}
    counts: Counter[str] = Counter()
    for column in (*table.inputs, *table.answers):
        texts = {i: t for i, row in enumerate(table.rows) if (t := joined(row.raw.get(column))[:_LOOK_AT])}
        texts = {i: t for i, t in texts.items() if sum(map(str.isalpha, t)) >= (_ENOUGH if detector else 1)}
        found = dict(zip(texts, _languages(detector, list(texts.values())), strict=True))
        here = Counter(name for name in found.values() if name)
        counts += here
        usual = {name for name, n in here.items() if n >= max(_SHARE * here.total(), 2)} or {*here}
        detail |= {i: f"{column} is {name}" for i, name in found.items() if name and name not in usual}
    remarks = () if detector else (
        "lingua is not installed (the extra `languages`), so Unicode scripts are told apart instead of languages",
    )  # fmt: skip
    kind = "language" if detector else "script"
    return Finding(f"rows are in another {kind} than the rest", detail, "remove" if detail else "none",
                   "remove them" if detail else "", remarks=remarks, counts=dict(counts.most_common()))  # fmt: skip


def script(text: str) -> str | None:
    """The script of most letters of a text.

    >>> script("Добрый день"), script("你好"), script("42")
    ('Cyrillic', 'CJK', None)
    """
    names = Counter(unicodedata.name(c, "?").split()[0].capitalize() for c in text if c.isalpha())
    if not names:
        return None
    name = names.most_common(1)[0][0]
    return "CJK" if name == "Cjk" else name


def _lingua() -> Any:
    try:
        from lingua import LanguageDetectorBuilder
    except ImportError:
        return None
    builder = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode()
    return builder.with_minimum_relative_distance(0.2).build()


def _languages(detector: Any, texts: list[str]) -> list[str | None]:
    if detector is None:
        return [script(t) for t in texts]
    found = detector.detect_languages_in_parallel_of(texts)
    return [None if language is None else language.name.capitalize() for language in found]


def words(table: Table, look: Look) -> Finding:
    """Rows that hold a term of the user's list, as a whole word where its script has words; case does not count."""
    title = "rows hold terms of the list"
    if not look.words:
        return Finding(title, {}, remarks=("no list of terms was given (--words)",))
    pattern = re.compile("|".join(_term(w) for w in sorted({w.casefold() for w in look.words}, key=lambda w: (-len(w), w))))
    detail = {}
    for i, row in enumerate(table.rows):
        found = Counter(m[0] for s in table.texts(row.raw) for m in pattern.finditer(s.casefold()))
        if found:
            detail[i] = ", ".join(f"{w} ×{n}" if n > 1 else w for w, n in sorted(found.items()))
    return Finding(title, detail, "remove" if detail else "none", "remove them" if detail else "")


def _term(word: str) -> str:
    spaced = all(c.isascii() or unicodedata.name(c, "").split()[:1] in (["LATIN"], ["CYRILLIC"], ["GREEK"]) for c in word)
    return rf"(?<!\w){re.escape(word)}(?!\w)" if spaced else re.escape(word)
