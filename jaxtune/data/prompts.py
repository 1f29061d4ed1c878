"""How a config puts a question: text with columns in braces."""

import re
from collections.abc import Mapping
from typing import Any

from jaxtune.errors import UserError


def fill(prompt: str, row: Mapping[str, Any], origin: str) -> str:
    r"""A prompt with columns in the place of their names in braces; nothing else in it means anything.

    >>> fill("Say {word} in {{German}}.", {"word": "{cat}"}, "a.jsonl:1")
    'Say {cat} in {{German}}.'

    Raises:
      UserError: there is no such column.
    """

    def column(found: re.Match) -> str:
        name = found[1]
        if row.get(name) is None:
            there = ", ".join(k for k, v in row.items() if v is not None)
            raise UserError(f"{origin}: data.prompt names {{{name}}}, which the row has not; it has {there}")
        value = row[name]
        return (
            value if isinstance(value, str) else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        )

    return re.sub(r"(?<!\{)\{(\w+)\}(?!\})", column, prompt)
