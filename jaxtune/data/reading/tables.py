"""Tables to rows: Parquet and Arrow batch by batch, Excel sheets cell by cell."""

import io
import warnings
from collections.abc import Iterator
from typing import Any

from jaxtune.data.reading.text import Row, Step
from jaxtune.errors import UserError

_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
BATCH = 1024  # rows that are turned into Python values at a time


def parquet(f: Any, path: str, at: list[int] | None) -> Iterator[Step]:
    """Row group by row group; `at` is the group, the row in it, and the row in the file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            file = pq.ParquetFile(f)
        except (pa.ArrowException, OSError, ValueError) as e:
            raise _damaged(path, 1, e) from e
    _named_once(path, file.schema_arrow.names)
    group, row, number = at or (0, 0, 0)
    for g in range(group, file.num_row_groups):
        yield from _rows(
            lambda g=g: file.iter_batches(BATCH, row_groups=[g]), path, g, row if g == group else 0, number
        )
        number += file.metadata.row_group(g).num_rows - (row if g == group else 0)


def arrow(f: Any, path: str, at: list[int] | None) -> Iterator[Step]:
    """Record batch by record batch, of the file form or the stream; `at` as for Parquet."""
    import pyarrow as pa

    try:
        try:
            file = pa.ipc.open_file(f)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        except pa.ArrowInvalid:
            f.seek(-len(_END), io.SEEK_END)
            if f.read() != _END:  # a stream that is cut between two batches looks whole but for this
                raise
            f.seek(0)
            file = pa.ipc.open_stream(f)
            batches = iter(file)
    except (pa.ArrowException, OSError, ValueError) as e:
        raise _damaged(path, 1, e) from e
    _named_once(path, file.schema.names)
    group, row, number = at or (0, 0, 0)
    g = 0
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError, ValueError) as e:
            raise _damaged(path, number + 1, e) from e
        if batch is None:
            return
        if g >= group:
            skipped = row if g == group else 0
            yield from _rows(lambda batch=batch: [batch], path, g, skipped, number)
            number += batch.num_rows - skipped
        g += 1


def _rows(batches: Any, path: str, group: int, skipped: int, number: int) -> Iterator[Step]:
    """Rows of a group after the first `skipped`; `number` rows of the file came before them."""
    import pyarrow as pa

    first = 0  # of the batch, in the group
    try:
        for batch in batches():
            if skipped < first + batch.num_rows:
                begin = max(0, skipped - first)
                for start in range(begin, batch.num_rows, BATCH):
                    for i, row in enumerate(_values(batch.slice(start, BATCH), path, number + 1), first + start + 1):
                        number += 1
                        yield number, row, [group, i, number]
            first += batch.num_rows
    except (pa.ArrowException, OSError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise _damaged(path, number + 1, e) from e


def _values(batch: Any, path: str, number: int) -> list[Row | UserError]:
    """A batch as Python values; where one of its rows has none (text that is not UTF-8), that row alone is bad."""
    try:
        batch.validate(full=True)  # pyarrow trusts the lengths in an .arrow file, and would read beyond its memory
        return batch.to_pylist()
    except (ValueError, OverflowError) as e:
        if batch.num_rows == 1:
            return [UserError(f"{path}:{number}: a value cannot be read: {e}")]
        return [r for i in range(batch.num_rows) for r in _values(batch.slice(i, 1), path, number + i)]


def _named_once(path: str, names: list[str]) -> None:
    if twice := [n for n in names if names.count(n) > 1]:
        raise UserError(f"{path}:1: names column {twice[0]!r} twice; rename one")


def _damaged(path: str, number: int, e: Exception) -> UserError:
    reason = " ".join(str(e).split())[:200]
    return UserError(f"{path}:{number}: cannot be read from here on ({reason}); is the file cut short or damaged?")


def xlsx(f: Any, path: str, at: int | None) -> Iterator[Step]:
    """The first sheet, its first row the header. Every cell is text, as in CSV; `at` is the last row that was read."""
    import openpyxl

    number = 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of features that only matter to who draws the sheet
            book = openpyxl.load_workbook(f, read_only=True, data_only=True)
            sheet = book.worksheets[0]
            table = iter(sheet.iter_rows(values_only=True))
            names = [_cell(c) for c in next(table, ())]
            while names and not names[-1]:
                names.pop()
            _named_once(path, names)
            for number, cells in enumerate(table, 2):
                if at is not None and number <= at:
                    continue
                values = [_cell(c) for c in cells]
                if not any(values):
                    continue
                row = dict(zip(names, values + [""] * (len(names) - len(values)), strict=False))
                more = any(values[len(names) :])
                bad = UserError(f"{path}:{number}: has cells beyond the header's {len(names)} columns; name them")
                yield number, bad if more else row, number
    except UserError:
        raise
    except Exception as e:  # openpyxl lets through whatever zipfile, its XML parser and its own code raise
        raise _damaged(path, number, e) from e


def _cell(value: Any) -> str:
    return "" if value is None else str(value)
