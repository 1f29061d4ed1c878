"""Which languages there are, and terms that should not be there."""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from jaxtune.prepare.finding import Finding, Look
from jaxtune.prepare.rows import Table, joined

_ENOUGH = 40  # letters below which a language is not judged
_SHARE = 0.05  # of the rows: a language of so many belongs to the file
_LOOK_AT = 200  # characters of a text by which its language is judged


def language(table: Table, look: Look) -> Finding:
    """Rows in another language than the rest of their column, by lingua; without it, in another script."""
    lingua = _lingua()
    detail: dict[int, str] = {}
    counts: Counter[str] = Counter()
    for column in (*table.inputs, *table.answers):
        texts = {i: t for i, row in enumerate(table.rows) if (t := joined(row.raw.get(column))[:_LOOK_AT])}
        texts = {i: t for i, t in texts.items() if sum(map(str.isalpha, t)) >= (_ENOUGH if lingua else 1)}
        found = _languages(lingua, texts)
        here = Counter(found.values())
        usual = {name for name, n in here.items() if n >= max(_SHARE * here.total(), 2)} or {*here}
        odd = {i: name for i, name in found.items() if name not in usual}
        if lingua and odd:  # a second look, more accurate and slower, at these alone
            sure = _languages(lingua, {i: texts[i] for i in odd}, {*usual, *odd.values()})
            found = {i: name for i, name in found.items() if i not in odd} | sure
            odd = {i: name for i, name in sure.items() if name not in usual}
        counts += Counter(found.values())
        detail |= {i: f"{column} is {name}" for i, name in odd.items()}
    remarks = () if lingua else (
        "lingua is not installed (the extra `languages`), so Unicode scripts are told apart instead of languages",
    )  # fmt: skip
    kind = "language" if lingua else "script"
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
        import lingua
    except ImportError:
        return None
    return lingua


def _languages(lingua: Any, texts: Mapping[int, str], among: Collection[str] | None = None) -> dict[int, str]:
    """The languages of texts, of all quickly or `among` some carefully; those that are in doubt are left out."""
    if lingua is None:
        return {i: name for i, t in texts.items() if (name := script(t))}
    if among is not None and len(among) < 2:
        return dict.fromkeys(texts, *among)
    if among is None:
        builder = lingua.LanguageDetectorBuilder.from_all_spoken_languages().with_low_accuracy_mode()
    else:
        names = (lingua.Language.from_str(name) for name in sorted(among))
        builder = lingua.LanguageDetectorBuilder.from_languages(*names)
    found = builder.with_minimum_relative_distance(0.2).build().detect_languages_in_parallel_of(list(texts.values()))
    return {i: f.name.capitalize() for i, f in zip(texts, found, strict=True) if f is not None}


def words(table: Table, look: Look) -> Finding:
    """Rows that hold a term of the user's list, as a whole word where its script has words; case does not count."""
    title = "rows hold terms of the list"
    if not look.words:
        return Finding(title, {}, remarks=("no list of terms was given (--words)",))
    pattern = re.compile(
        "|".join(_term(w) for w in sorted({w.casefold() for w in look.words}, key=lambda w: (-len(w), w)))
    )
    detail = {}
    for i, row in enumerate(table.rows):
        found = Counter(m[0] for s in table.texts(row.raw) for m in pattern.finditer(s.casefold()))
        if found:
            detail[i] = ", ".join(f"{w} ×{n}" if n > 1 else w for w, n in sorted(found.items()))
    return Finding(title, detail, "remove" if detail else "none", "remove them" if detail else "")


def _term(word: str) -> str:
    spaced = all(
        c.isascii() or unicodedata.name(c, "").split()[:1] in (["LATIN"], ["CYRILLIC"], ["GREEK"]) for c in word
    )
    return rf"(?<!\w){re.escape(word)}(?!\w)" if spaced else re.escape(word)
