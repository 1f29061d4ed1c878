"""What the values of a row have to be, whatever the format: each check gives the value back or says where it stood."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxtune.data.reading.text import parse
from jaxtune.errors import UserError, nearest

Row = Mapping[str, Any]
Tags = Mapping[str, str]


def text(value: Any, column: str, origin: str) -> str:
    """Text."""
    if not isinstance(value, str):
        raise UserError(f"{origin}: column {column!r} should be text, got {type(value).__name__}")
    return value


def optional(row: Row, column: str, origin: str) -> str:
    """A column of text that may be missing or null; then it is empty."""
    value = row.get(column)
    return "" if value is None else text(value, column, origin)


def structure(value: Any, column: str, origin: str) -> Any:
    """A list or an object; or the same as JSON in a string, as it stands in CSV."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        return parse(value, f"{origin}: column {column!r}")
    return value


def listed(value: Any, column: str, origin: str, of: str = "values") -> list[Any]:
    """A list, or JSON of one."""
    value = structure(value, column, origin)
    if not isinstance(value, list):
        raise UserError(f"{origin}: column {column!r} should be a list of {of}, got {type(value).__name__}")
    return value


def texts(value: Any, column: str, origin: str) -> list[str]:
    """A list of texts."""
    return [text(v, f"{column}[{i}]", origin) for i, v in enumerate(listed(value, column, origin, "texts"))]


def integer(value: Any, column: str, origin: str) -> int:
    """A whole number, also one that a table keeps as 3.0."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{origin}: column {column!r} should be a whole number, got {value!r:.60}")
    return value


def number(value: Any, column: str, origin: str) -> float:
    """A finite number, also as text."""
    try:
        given = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        given = math.nan
    if not math.isfinite(given):
        raise UserError(f"{origin}: column {column!r} should be a number, got {value!r:.60}")
    return given


def flag(value: Any, column: str, origin: str) -> bool:
    """True or false: a boolean, 0 or 1, or one of those words."""
    words = {"true": True, "false": False, "1": True, "0": False}
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(word, str) and word in words:
        return words[word]
    if isinstance(word, bool | int | float) and word in (0, 1):
        return bool(word)
    raise UserError(f"{origin}: column {column!r} should be true or false, got {value!r:.60}")


def label(value: Any, column: str, origin: str) -> str:
    """A label as text; whole numbers without a point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value)):
        return str(value)
    raise UserError(f"{origin}: column {column!r} should be a label (text or a number), got {value!r:.60}")


def blank(value: Any) -> bool:
    """Whether a value is nothing but white space, as an empty cell of a table is."""
    return isinstance(value, str) and not value.strip()


def known(tags: Tags, allowed: Sequence[str]) -> None:
    """Complain of a tag that means nothing."""
    for name in tags:
        if name not in allowed:
            raise UserError(f"data.tags: unknown tag {name!r}{nearest(name, list(allowed))}")
