"""Files of every kind to rows: what is at a path, and an iterator over its rows that can stop and go on.

| ending | rows |
|-|-|
| .jsonl .ndjson | a JSON object a line |
| .json | a list of objects, {"data": [...]}, or a line each as in .jsonl |
| .csv .tsv | a header, then a record a row; fields in quotes may hold newlines; a lone quote is a character in .tsv |
| .txt | a line is a row {"text": line} |
| .parquet .arrow | as they are; .arrow in either form (file and stream) |
| .xlsx | the first sheet, a header on top; every cell is read as text |

Text files may end in .gz or .zst too. Blank lines are no rows. A path is a file, a folder (its files, sorted, all of
one kind), a pattern such as data/**/*.jsonl, an address that fsspec knows (gs://…), or hf://owner/name[@revision]
[/folder] for a data set of the hub.
"""

import contextlib
import io
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import Source
from jaxtune.data.reading import hub, tables, text
from jaxtune.errors import UserError, nearest

Reader = Callable[[Any, str, Any], Iterator[text.Step]]


class Kind(NamedTuple):
    """A kind of file: how it is read, and whether it may be compressed."""

    read: Reader
    compressed: bool


KINDS: Mapping[str, Kind] = {
    ".jsonl": Kind(text.jsonl, True),
    ".ndjson": Kind(text.jsonl, True),
    ".json": Kind(text.json_file, True),
    ".csv": Kind(text.csv_file, True),
    ".tsv": Kind(text.tsv_file, True),
    ".txt": Kind(text.plain, True),
    ".parquet": Kind(tables.parquet, False),
    ".arrow": Kind(tables.arrow, False),
    ".xlsx": Kind(tables.xlsx, False),
}
CODECS = {".gz": "gzip", ".zst": "zstd"}


class Rows:
    """The rows of a source in order, each with its origin `file:line` (in tables and JSON's lists: `file:row`, from 1).

    `state` is a small JSON value; setting it goes on with the row after the last one that was given: plain text files
    by their byte, tables by their row group, compressed files by unpacking without parsing, .json by its character.

    >>> import pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "a.jsonl")
    >>> _ = file.write_text('{"text": "one"}\\n{"text": "two"}\\n')
    >>> rows = Rows(Source(path=str(file)))
    >>> next(rows)[1], rows.state
    ({'text': 'one'}, {'file': 0, 'at': [16, 1], 'rows': 1})
    """

    def __init__(self, source: Source, bad_rows: str = "stop", streaming: bool = False) -> None:
        """Args:
        source: where the rows are; `max_samples` bounds the rows that are looked at.
        bad_rows: "stop" raises on a row that cannot be read; "skip" puts it into `skipped`.
        streaming: do not download a data set of the hub as a whole before its first row.

        Raises:
          UserError: there is nothing at the path; while iterating: a row or a file cannot be read.
        """
        self._source, self._skip, self._streaming = source, bad_rows == "skip", streaming
        self._places = places(source.path)
        self._file, self._at, self._rows = 0, None, 0
        self._steps: Generator[text.Step, None, None] | None = None
        self.skipped: list[str] = []  # origin and reason

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> tuple[str, dict[str, Any]]:
        while self._file < len(self._places) and self._rows != self._source.max_samples:
            place = self._places[self._file]
            if self._steps is None:
                self._steps = self._open(place)
            step = next(self._steps, None)
            if step is None:
                self._file, self._at, self._steps = self._file + 1, None, None
                continue
            number, row, self._at = step
            self._rows += 1
            if not isinstance(row, UserError):
                return f"{place}:{number}", row
            if not self._skip:
                raise row
            self.skipped.append(str(row))
        self.close()
        raise StopIteration

    @property
    def state(self) -> dict[str, Any]:
        return {"file": self._file, "at": self._at, "rows": self._rows}

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.close()
        self._file, self._at, self._rows = state["file"], state["at"], state["rows"]

    def close(self) -> None:
        """Close the file that is open."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _open(self, place: str) -> Generator[text.Step, None, None]:
        if hub.is_hub(place):
            return hub.rows(self._source, self._streaming, self._at)
        return _read(place, self._at)


def _read(place: str, at: Any) -> Generator[text.Step, None, None]:
    ending, codec = kind_of(place)
    number = 0
    try:
        with contextlib.ExitStack() as stack:
            f = stack.enter_context(_opened(place))
            if codec:
                f = stack.enter_context(_unpacked(f, codec))
            for step in KINDS[ending].read(f, place, at):
                number = step[0]
                yield step
    except OSError as e:
        raise UserError(
            f"{place}:{number + 1}: cannot be read from here on ({e.strerror or e}); is the file cut short or damaged?"
        ) from e


def _unpacked(f: Any, codec: str) -> io.BufferedReader:
    # pyarrow's streams and not the zstandard package's: those take a file that is cut short for one that ends
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(f, codec), 1 << 20)


def _opened(place: str) -> Any:
    if "://" not in place:
        return Path(place).open("rb")
    import fsspec

    with _told(place):
        return io.BufferedReader(fsspec.open(place, "rb").open())


def kind_of(place: str) -> tuple[str, str | None]:
    """The ending in `KINDS` and the codec of a file.

    >>> kind_of("a/b.JSONL.gz")
    ('.jsonl', 'gzip')
    """
    *_, before, last = ["", "", *(s.lower() for s in Path(place).suffixes)]
    codec = CODECS.get(last)
    ending = before if codec else last
    if ending not in KINDS or (codec and not KINDS[ending].compressed):
        raise UserError(
            f"{place}: files of type {(ending if not codec else ending + last) or 'none'!r} are not read; allowed: "
            f"{', '.join(KINDS)}, text files also with {' or '.join(CODECS)}"
        )
    return ending, codec


def places(path: str) -> list[str]:
    """The files that a path stands for, in order.

    Raises:
      UserError: there is none, or a folder's files are of several kinds.
    """
    if hub.is_hub(path):
        return [path]
    magic = any(c in path for c in "*?[")
    if "://" in path:
        found, listed = _remote(path, magic)
    else:
        found, listed = _local(Path(path), magic)
    if not listed:
        kind_of(path)
        return found
    endings = {p: e for p in found if (e := _ending(p))}
    if not endings:
        raise UserError(f"{path}: holds no file that can be read; wanted one of {', '.join(KINDS)}")
    if len(set(endings.values())) > 1:
        raise UserError(
            f"{path}: holds files of several kinds ({', '.join(sorted(set(endings.values())))}); name those that you "
            f"mean by a pattern, such as *{min(endings.values())}"
        )
    return sorted(endings)


def _ending(place: str) -> str | None:
    try:
        return kind_of(place)[0]
    except UserError:
        return None


def _local(path: Path, magic: bool) -> tuple[list[str], bool]:
    """The files, and whether they were looked for (and not named)."""
    if path.is_file():
        return [str(path)], False
    if path.is_dir():
        return [str(p) for p in path.iterdir() if p.is_file() and not p.name.startswith(".")], True
    if magic:
        import glob

        found = [p for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not found:
            raise UserError(f"{path}: no file matches this pattern")
        return found, True
    siblings = [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else []
    raise UserError(f"{path}: no such file{nearest(path.name, siblings) if siblings else ''}")


def _remote(url: str, magic: bool) -> tuple[list[str], bool]:
    import fsspec

    with _told(url):
        if not magic and _ending(url):
            return [url], False
        store, path = fsspec.core.url_to_fs(url)
        found = store.glob(path) if magic else store.ls(path, detail=False)
        return [store.unstrip_protocol(p) for p in found if not Path(p).name.startswith(".")], True


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """What an object store raises, as one line."""
    try:
        yield
    except (OSError, ValueError, ImportError) as e:
        if isinstance(e, UserError):
            raise
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"{url}: cannot be read ({type(e).__name__}: {reason}); look at the name and your rights, and that the "
            "store's package (gcsfs for gs://) is installed"
        ) from e
