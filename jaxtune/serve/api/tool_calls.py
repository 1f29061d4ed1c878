"""Calls of tools in a model's text, as the common families write them.

Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, once or more. Mistral: `[TOOL_CALLS] [{…}, …]`.
Llama 3.1: the whole text is `{"name": …, "parameters": {…}}`, perhaps after `<|python_tag|>`.
"""

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from jaxtune.serve.store import ids

MARKS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>")
_BETWEEN = re.compile(r"(\s|;|,|</?tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>)*")


class Call(NamedTuple):
    """A call."""

    name: str
    arguments: str  # JSON

    def told(self, index: int | None = None) -> dict[str, Any]:
        """As the API tells it; with its index in chunks of a stream."""
        made = {"id": ids.new("call_"), "type": "function", "function": self._asdict()}
        return made if index is None else {"index": index, **made}


def begins(text: str) -> int:
    """Up to where a text, which may go on, is surely no call.

    >>> begins("Let me see. <tool_call>{"), begins("a <b"), begins("a <tool"), begins(' {"na')
    (12, 4, 2, 0)
    """
    if text.lstrip()[:1] in ("{", ""):
        return 0
    found = [at for mark in MARKS if (at := text.find(mark)) >= 0]
    half = [len(text) - n for mark in MARKS for n in range(1, len(mark)) if text.endswith(mark[:n])]
    return min([*found, *half, len(text)])


def split(text: str, names: Collection[str]) -> tuple[str, list[Call]]:
    """The text before calls, and the calls of tools that there are; all is text where one is not as it should be.

    >>> split('Hm. [TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]', {"add"})
    ('Hm.', [Call(name='add', arguments='{"a": 1}')])
    >>> split('{"name": "rm", "parameters": {}}', {"add"})
    ('{"name": "rm", "parameters": {}}', [])
    """
    start = begins(text) if text.strip() else len(text)
    calls, at, decoder = [], start, json.JSONDecoder()
    while (at := _past(text, at)) < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return text, []
        for one in value if isinstance(value, list) else [value]:
            if (call := _call(one, names)) is None:
                return text, []
            calls.append(call)
    return (text[:start].rstrip(), calls) if calls else (text, [])


def _past(text: str, at: int) -> int:
    found = _BETWEEN.match(text, at)
    return found.end() if found else at


def _call(value: Any, names: Collection[str]) -> Call | None:
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or name not in names:
        return None
    given = value.get("arguments", value.get("parameters", {}))
    return Call(name, given if isinstance(given, str) else json.dumps(given))
