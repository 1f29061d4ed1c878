"""The lines of a training file as JSON objects, one at a time, within limits; what is wrong with one is a finding."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from jaxtune.data.reading.text import parse
from jaxtune.errors import UserError
from jaxtune.serve.settings import Limits

_BOM = b"\xef\xbb\xbf"
_NOT_TEXT = {
    b"\x1f\x8b": "is gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "is zstd; unpack it",
    b"PK\x03\x04": "is a zip or a spreadsheet; write its rows as JSON Lines",
    b"PAR1": "is Parquet; write its rows as JSON Lines",
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
}
_SKIPPED = 1 << 20  # bytes of an overlong line that are read at a time


@dataclass(frozen=True)
class Finding:
    """Something wrong with a line: which (None: the whole file), where in it, by which check, and what to do."""

    line: int | None
    path: str
    check: str
    message: str

    def __str__(self) -> str:
        where = ", ".join(w for w in (f"line {self.line}" if self.line else "", self.path) if w)
        return f"{where}: {self.message}" if where else self.message


def objects(f: IO[bytes], limits: Limits) -> Iterator[tuple[int, dict[str, Any] | Finding]]:
    """Each line that is not blank: its number from 1, and its object or what is wrong with it.

    A finding without a line is of the whole file, and the last.
    """
    first, number = True, 0
    while raw := f.readline(limits.line_bytes + 1):
        number += 1
        if number == 1:
            for magic, what in _NOT_TEXT.items():
                if raw.startswith(magic):
                    yield number, Finding(None, "", "not_jsonl", f"the file {what}")
                    return
            raw = raw.removeprefix(_BOM)
        if len(raw) > limits.line_bytes and not raw.endswith(b"\n"):
            while (rest := f.readline(_SKIPPED)) and not rest.endswith(b"\n"):
                pass
            said = f"has more than {limits.line_bytes} bytes; shorten it, or split the conversation"
            yield number, Finding(number, "", "line_too_long", said)
            continue
        if not raw.strip():
            continue
        if (first and raw.lstrip()[:1] == b"[") or (first and raw.strip() == b"{"):
            said = "the file is one JSON value over several lines; write each example on a line of its own: jq -c '.[]'"
            yield number, Finding(None, "", "not_jsonl", said)
            return
        first = False
        yield number, _object(raw, number, limits.json_depth)


def _object(raw: bytes, number: int, depth: int) -> dict[str, Any] | Finding:
    if b"\0" in raw:
        return Finding(number, "", "nul", "holds a NUL byte; remove it")
    try:
        text = raw.decode()
    except UnicodeDecodeError as e:
        return Finding(number, "", "not_utf8", f"is not UTF-8 at byte {e.start + 1}; save the file as UTF-8")
    try:
        value = parse(text, "")
    except UserError as e:
        return Finding(number, "", "not_json", str(e).removeprefix(": "))
    if not isinstance(value, dict):
        return Finding(number, "", "data_type", f"is {_KINDS[type(value)]}; write an object, {{…}}")
    if text.count("[") + text.count("{") > depth and _deeper(value, depth):
        return Finding(number, "", "too_deep", f"lists and objects are nested more than {depth} deep")
    return value


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def kind(value: Any) -> str:
    """What a JSON value is, in words.

    >>> kind(None), kind([])
    ('null', 'a list')
    """
    return _KINDS.get(type(value), "an object")


def _deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [x for v in level for x in (v.values() if isinstance(v, dict) else v) if isinstance(x, dict | list)]
        if not level:
            return False
    return True


def canonical(value: Any) -> bytes:
    """Bytes that are the same for equal objects."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()
