"""Small changes of a text: easy data augmentation (Wei and Zou, 2019) and slips of the hand; pure functions of a seed.

A text is taken as words and what is between them; where a script has no spaces, characters are words. Words that are
`kept` (negations, label names, numbers) are never touched.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_](?:[\w'’]|-(?=\w))*|\s+|.", re.DOTALL)
NEGATIONS = frozenset(
    "no not nor never none nothing nobody neither nowhere cannot without hardly barely kein keine keinen nicht nie "
    "niemals ohne non ne pas jamais sans nunca sin 不 没 無 无 非 未 别".split()
)
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# Pairs of letters that are often taken for one another in English spelling.
_SPELLINGS = ("ie ei", "ei ie", "ll l", "ss s", "tt t", "able ible", "ible able", "ance ence", "ence ance", "er or",
              "ph f", "ea ee", "ou o", "ght gt", "their there", "its it's", "your you're")  # fmt: skip
_MISSPELT = tuple(tuple(pair.split()) for pair in _SPELLINGS)

Draw = Any  # numpy.random.Generator
Keep = Callable[[str], bool]


def kept(words: frozenset[str]) -> Keep:
    """Whether a word must stay: a negation, one of `words`, or one with a digit.

    >>> [w for w in "It isn't 3 good apples".split() if kept(frozenset({"good"}))(w)]
    ["isn't", '3', 'good']
    """

    def keep(word: str) -> bool:
        plain = word.casefold().replace("’", "'")
        return plain in NEGATIONS or plain.endswith("n't") or plain in words or any(map(str.isdigit, plain))

    return keep


def _free(pieces: Sequence[str], keep: Keep) -> list[int]:
    """Where the words are that may be touched."""
    return [i for i, p in enumerate(pieces) if p[0].isalnum() and not keep(p)]


def _few(rate: float, n: int) -> int:
    return max(1, round(rate * n))


def swap(text: str, rate: float, draw: Draw, keep: Keep) -> str:
    """Two words change places, as often as `rate` of the words."""
    pieces = WORDS.findall(text)
    free = _free(pieces, keep)
    for _ in range(_few(rate, len(free)) if len(free) > 1 else 0):
        i, j = draw.choice(free, 2, replace=False)
        pieces[i], pieces[j] = pieces[j], pieces[i]
    return "".join(pieces)


def delete(text: str, rate: float, draw: Draw, keep: Keep) -> str:
    """Words go, each with the space before it; one at least stays."""
    pieces = WORDS.findall(text)
    free = _free(pieces, keep)
    n = min(_few(rate, len(free)), len(free) - 1)
    for i in draw.choice(free, n, replace=False) if n > 0 else ():
        pieces[i] = ""
        if i and pieces[i - 1].isspace():
            pieces[i - 1] = ""
    return "".join(pieces).strip()


def synonym(text: str, rate: float, draw: Draw, keep: Keep, table: Mapping[str, Sequence[str]]) -> str:
    """Words are replaced by others of the user's table."""
    pieces = WORDS.findall(text)
    known = [i for i in _free(pieces, keep) if table.get(pieces[i].casefold())]
    n = min(_few(rate, len(pieces)), len(known))
    for i in draw.choice(known, n, replace=False) if n else ():
        pieces[i] = _cased(str(draw.choice(table[pieces[i].casefold()])), pieces[i])
    return "".join(pieces)


def insert(text: str, rate: float, draw: Draw, keep: Keep, table: Mapping[str, Sequence[str]]) -> str:
    """Synonyms of words of the text are put before other words."""
    pieces = WORDS.findall(text)
    words = _free(pieces, lambda _: False)
    known = [i for i in _free(pieces, keep) if table.get(pieces[i].casefold())]
    for _ in range(_few(rate, len(words)) if known else 0):
        word = str(draw.choice(table[pieces[draw.choice(known)].casefold()]))
        at = draw.choice(words)
        pieces[at] = f"{word} {pieces[at]}"
        known = [i for i in known if i != at]
        if not known:
            break
    return "".join(pieces)


def keyboard(text: str, rate: float, draw: Draw, keep: Keep) -> str:
    """Letters become a neighbour on the keyboard (QWERTY), change places, stand twice or go."""
    pieces = WORDS.findall(text)
    free = [i for i in _free(pieces, keep) if len(pieces[i]) > 2 and pieces[i].isascii()]
    n = min(_few(rate, len(free)), len(free))
    for i in draw.choice(free, n, replace=False) if n else ():
        w, at = pieces[i], int(draw.integers(0, len(pieces[i]) - 1))
        slips = [w[:at] + w[at + 1] + w[at] + w[at + 2 :], w[: at + 1] + w[at:], w[:at] + w[at + 1 :]]
        if near := _neighbours(w[at]):
            slips.append(w[:at] + _cased(str(draw.choice(near)), w[at]) + w[at + 1 :])
        pieces[i] = slips[int(draw.integers(len(slips)))]
    return "".join(pieces)


def spelling(text: str, rate: float, draw: Draw, keep: Keep) -> str:
    """Words are misspelt as English often is."""
    pieces = WORDS.findall(text)
    fit = [i for i in _free(pieces, keep) if any(a in pieces[i] for a, _ in _MISSPELT)]
    n = min(_few(rate, len(pieces)), len(fit))
    for i in draw.choice(fit, n, replace=False) if n else ():
        a, b = draw.choice([pair for pair in _MISSPELT if pair[0] in pieces[i]])
        pieces[i] = pieces[i].replace(str(a), str(b), 1)
    return "".join(pieces)


def _neighbours(letter: str) -> list[str]:
    """
    >>> _neighbours("S")
    ['a', 'd', 'w', 'x']
    """
    for r, row in enumerate(_ROWS):
        if (at := row.find(letter.lower())) >= 0:
            beside = [row[k] for k in (at - 1, at + 1) if 0 <= k < len(row)]
            return beside + [_ROWS[k][at] for k in (r - 1, r + 1) if 0 <= k < 3 and at < len(_ROWS[k])]
    return []


def _cased(word: str, like: str) -> str:
    return word[:1].upper() + word[1:] if like[:1].isupper() else word
