"""Text files to rows: JSON Lines, JSON, CSV, TSV and plain lines, all of them UTF-8, told by byte and line."""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxtune.errors import UserError

Row = dict[str, Any]
Step = tuple[int, Row | UserError, Any]  # where a row stands, the row or why it is none, and where the next one begins

DEPTH = 100  # lists and objects inside of one another; Python's own bound depends on who calls
_BOM = b"\xef\xbb\xbf"
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_GAP = re.compile(r"[ \t\r\n]*")


class Line(NamedTuple):
    """A line with its ending, or why it is no text; `after` is the byte and the number of lines behind it."""

    number: int
    text: str | UserError
    after: list[int]


def lines(f: Any, path: str, at: list[int] | None, read: int = 0) -> Iterator[Line]:
    """The lines of a binary file, of which `read` bytes were read, from `at` on. A byte order mark is left out.

    Raises:
      UserError: the file is UTF-16.
    """
    offset, number = at or (read, 0)
    _go_on(f, offset - read)
    for raw in f:
        offset, number = offset + len(raw), number + 1
        if number == 1:
            raw = _without_mark(raw, path)
        yield Line(number, _decoded(raw, f"{path}:{number}"), [offset, number])


def jsonl(f: Any, path: str, at: Any) -> Iterator[Step]:
    """A JSON object a line."""
    for number, line, after in lines(f, path, at):
        if isinstance(line, UserError):
            yield number, line, after
        elif line.strip():
            yield number, _row(line, f"{path}:{number}"), after


def plain(f: Any, path: str, at: Any) -> Iterator[Step]:
    """A line is a row."""
    for number, line, after in lines(f, path, at):
        if isinstance(line, UserError):
            yield number, line, after
        elif line.strip():
            yield number, {"text": line.rstrip("\r\n")}, after


def csv_file(f: Any, path: str, at: Any, delimiter: str = ",") -> Iterator[Step]:
    """A header and records. After a record that cannot be read, the next line begins a new one: a quote that is not
    closed costs its own row only."""
    csv.field_size_limit(2**31 - 1)
    numbered = lines(f, path, None)
    first = next(_records(numbered, path, delimiter), None)
    if first is None:
        return
    line, names, start = first
    if isinstance(names, UserError):
        raise names
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(f"{path}:{line}: the header names column {twice[0]!r} twice; rename one")
    if at is not None:
        numbered = lines(f, path, at, start[0])
    for number, record, after in _records(numbered, path, delimiter, len(names)):
        yield number, record if isinstance(record, UserError) else dict(zip(names, record, strict=True)), after


def tsv_file(f: Any, path: str, at: Any) -> Iterator[Step]:
    """As CSV, with tabs; but in a line that is no CSV, quotes mean nothing unless they stand around a whole field.

    So both kinds are read: fields in quotes as spreadsheets write them, with tabs and newlines inside, and plain ones
    in which a quote is a character. Lines that a quote would join are rows of their own where each has all columns.
    """
    return csv_file(f, path, at, "\t")


def _records(
    numbered: Iterator[Line], path: str, delimiter: str, width: int | None = None
) -> Iterator[tuple[int, list[str] | UserError, list[int]]]:
    ahead: deque[Line] = deque()
    while True:
        used: list[Line] = []
        try:
            record = next(csv.reader(_fed(numbered, ahead, used), delimiter=delimiter, strict=True), None)
            if record is None:
                return
            if not record:
                continue
            alone = [_fields(x.text) for x in used] if delimiter == "\t" and len(used) > 1 else []
            if alone and len(alone[0]) > 1 and {len(fields) for fields in alone} == {width or len(alone[0])}:
                ahead.extendleft(reversed(used[1:]))
                yield used[0].number, alone[0], used[0].after
                continue
            if width is not None and len(record) != width:
                raise UserError(
                    f"{path}:{used[0].number}: {width} columns were expected, as in the header, and there are "
                    f"{len(record)}; is a quote or a comma missing?"
                )
        except csv.Error as e:
            bad = UserError(f"{path}:{used[0].number}: not CSV: {e}; is the file cut short?")
        except UserError as e:
            if not used:  # the file as a whole
                raise
            bad = e
        else:
            yield used[0].number, record, used[-1].after
            continue
        ahead.extendleft(reversed(used[1:]))
        fields = _fields(used[0].text) if delimiter == "\t" else []
        yield used[0].number, fields if fields and len(fields) == (width or len(fields)) else bad, used[0].after


def _fields(line: str | UserError) -> list[str]:
    """What stands between tabs; quotes go only around a whole field.

    >>> _fields('"a\\t"b"\\n')
    ['"a', 'b']
    """
    if isinstance(line, UserError):
        return []
    fields = line.rstrip("\r\n").split("\t")
    return [f[1:-1].replace('""', '"') if _QUOTED.fullmatch(f) else f for f in fields]


def _fed(numbered: Iterator[Line], ahead: deque[Line], used: list[Line]) -> Iterator[str]:
    while line := ahead.popleft() if ahead else next(numbered, None):
        used.append(line)
        if isinstance(line.text, UserError):
            raise line.text
        yield line.text


def json_file(f: Any, path: str, at: Any) -> Iterator[Step]:
    """`[{…}, …]`, `{"data": [{…}, …]}`, or an object a line. The file is held in memory, its rows are not.

    Rows of a list are numbered from 1, for many may stand in a line; damage between them is told by its line."""
    blob = _without_mark(f.read(), path)
    text = _decoded(blob, path)
    if isinstance(text, UserError):
        bad = next(line.text for line in lines(io.BytesIO(blob), path, None) if isinstance(line.text, UserError))
        raise bad
    start = _gap(text, 0)
    if start == len(text):
        return
    if text[start] == "{" and _is_lines(text[start:]):
        yield from jsonl(io.BytesIO(blob), path, at)
        return
    i, number = at or (_first_row(text, start, path), 0)
    while text[(i := _gap(text, i)) : i + 1] != "]":
        if number:
            i = _gap(text, _past(text, i, ",", path))
        number += 1
        row, i = _element(text, i, path, number)
        yield number, row, [i, number]
    rest = ("[" if text[start] == "[" else '{"data": [') + text[i:]
    try:
        json.loads(rest, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        where = _line(text, i, path)
        raise UserError(f"{where}: what follows the list of rows is no JSON ({e}); is the file damaged?") from e


def _is_lines(text: str) -> bool:
    """Whether a text that begins with an object holds one a line."""
    first, _, rest = text.partition("\n")
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return bool(re.match(r"\s*\{", rest)) and first.rstrip().endswith("}")
    return bool(rest.strip()) or not isinstance(value.get("data"), list)


def _first_row(text: str, start: int, path: str) -> int:
    """Where the list of rows begins."""
    if text[start] == "[":
        return start + 1
    i = _gap(text, _past(text, start, "{", path))
    while True:
        key, i = _value(text, i, path)
        i = _gap(text, _past(text, _gap(text, i), ":", path))
        if key == "data" and text[i : i + 1] == "[":
            return i + 1
        _, i = _value(text, i, path)
        i = _gap(text, i)
        if text[i : i + 1] == "}":
            raise UserError(f'{path}: a list of objects was expected, or {{"data": [...]}}; this is one object')
        i = _gap(text, _past(text, i, ",", path))


def _gap(text: str, i: int) -> int:
    return _GAP.match(text, i).end()  # type: ignore[union-attr]  # it matches nothing too


def _past(text: str, i: int, mark: str, path: str) -> int:
    if text[i : i + 1] != mark:
        raise UserError(
            f"{_line(text, i, path)}: {mark!r} was expected, and there is "
            f"{text[i : i + 1] or 'the end of the file'!r}; is the file cut short?"
        )
    return i + 1


def _line(text: str, i: int, path: str) -> str:
    return f"{path}:{1 + text.count(chr(10), 0, i)}"


def _value(text: str, i: int, path: str) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, i)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{_line(text, i, path)}: not JSON: {_said(e)}; is the file cut short?") from e


def _element(text: str, i: int, path: str, number: int) -> tuple[Row | UserError, int]:
    """A row of a list and where it ends. One that is refused, but is JSON, can be left out."""
    origin = f"{path}:{number}"
    try:
        row, end = _DECODER.raw_decode(text, i)
    except _Refused as e:
        return UserError(f"{origin}: {e}"), _value(text, i, path)[1]
    except (ValueError, RecursionError) as e:
        raise UserError(f"{origin}: a JSON object was expected, but {_said(e)}; is the file cut short?") from e
    try:
        return _object(_checked(row, text[i:end], origin), origin), end
    except UserError as e:
        return e, end


# --- one JSON value ---------------------------------------------------------------------------------------------------


class _Refused(ValueError):
    """JSON that Python reads and that nobody can have meant."""


def _once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [k for k, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise _Refused(f"the key {twice!r} stands twice in one object; keep one")
    return row


def _no_number(name: str) -> Any:
    raise _Refused(f"{name} is no JSON; write null or leave the key out")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)


def parse(text: str, origin: str) -> Any:
    """A JSON value with each key once, no NaN, whole Unicode, and not nested beyond reason.

    Raises:
      UserError: it is not such a value.
    """
    try:
        value = _DECODER.decode(text)
    except _Refused as e:
        raise UserError(f"{origin}: {e}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{origin}: a JSON object was expected, but {_said(e)}; is the file cut short?") from e
    return _checked(value, text, origin)


def _checked(value: Any, text: str, origin: str) -> Any:
    if text.count("[") + text.count("{") > DEPTH and _deeper(value, DEPTH):
        raise UserError(f"{origin}: lists and objects are nested more than {DEPTH} deep")
    if "\\u" in text and not _is_unicode(value):
        raise UserError(f"{origin}: half of a surrogate pair (\\ud800 to \\udfff) is no character; write both, or none")
    return value


def _row(text: str, origin: str) -> Row | UserError:
    try:
        return _object(parse(text, origin), origin)
    except UserError as e:
        return e


def _object(value: Any, origin: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{origin}: a JSON object was expected, got {type(value).__name__}")
    return value


def _said(e: Exception) -> str:
    if isinstance(e, json.JSONDecodeError):
        return f"{e.msg[0].lower()}{e.msg[1:]} at column {e.colno}"
    return "it is nested too deeply" if isinstance(e, RecursionError) else str(e)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_deeper(v, depth - 1) for v in inner)


# --- bytes ------------------------------------------------------------------------------------------------------------


def _without_mark(raw: bytes, path: str) -> bytes:
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}:1: UTF-16, not UTF-8 text; save it as UTF-8")
    return raw.removeprefix(_BOM)


def _decoded(raw: bytes, origin: str) -> str | UserError:
    if b"\0" in raw:
        return UserError(f"{origin}: holds NUL bytes, so it is binary or UTF-16, not UTF-8 text; save it as UTF-8")
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        return UserError(f"{origin}: not UTF-8 text ({e.reason} at byte {e.start}); save it as UTF-8")


def _go_on(f: Any, count: int) -> None:
    if f.seekable():
        f.seek(count, io.SEEK_CUR)
        return
    while count > 0 and (skipped := f.read(min(count, 1 << 20))):
        count -= len(skipped)
