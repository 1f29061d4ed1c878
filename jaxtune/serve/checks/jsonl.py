"""JSON from strangers, looked at before it is parsed: its depth, and files of one object a line."""

import json
import re
from pathlib import Path

from jaxtune.serve.settings import Limits

_BOM = b"\xef\xbb\xbf"
# A string, whole or cut off at the end of the data, or a bracket. Each byte is looked at once: the loop is possessive,
# and a string that has begun always matches.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.?)*+(?:"|\Z)|[\[\]{}]', re.DOTALL)


def too_deep(data: bytes, limit: int) -> bool:
    """Whether JSON nests deeper than a limit; nothing here recurses.

    >>> too_deep(b'[[1]]', 2), too_deep(b'[[[1]]]', 2), too_deep(b'["[[["]', 2)
    (False, True, False)
    """
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    depth = 0
    for token in _TOKEN.finditer(data):
        first = token[0][:1]
        depth += (first in b"[{") - (first in b"]}")
        if depth > limit:
            return True
    return False


def jsonl_fault(path: Path, limits: Limits) -> str | None:
    """What keeps a file from being JSONL, or None: each line is looked at alone, so that memory is bounded."""
    what = "Expected file to have JSONL format, where every line is a valid JSON dictionary."
    seen = 0
    with path.open("rb") as f:
        for number, line in enumerate(iter(lambda: f.readline(limits.line_bytes + 1), b""), 1):
            if len(line) > limits.line_bytes:
                return f"{what} Line {number} has more than {limits.line_bytes} bytes."
            text = line.removeprefix(_BOM) if number == 1 else line
            if not text.strip():
                continue
            if too_deep(text, limits.json_depth):
                return f"{what} Line {number} nests deeper than {limits.json_depth} levels."
            if not _is_object(text):
                return f"{what} Line {number} is not a dictionary."
            seen += 1
            if seen > limits.examples:
                return f"The file has more than {limits.examples} lines; split it."
    return None if seen else f"{what} The file is empty."


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:  # no JSON, no UTF-8, a number of thousands of digits
        return False
