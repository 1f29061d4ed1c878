"""Rows that are read, shuffled, encoded and packed as they are needed, without end.

A block of `data.shuffle_buffer` examples is read and shuffled; its examples are encoded and packed a window at a time.
So where the stream stands is where its block began, which window of it, and which row: going on reads one block again
and encodes one window, however long the run was.

Dimensions: B batch, T time.
"""

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import Data, Source
from jaxtune.data import workers
from jaxtune.data.batches import Batch, stacked, told
from jaxtune.data.encode import Encoded
from jaxtune.data.examples import AsConversation, Example, Record
from jaxtune.data.formats import Examples
from jaxtune.data.packing import lay_out, pack
from jaxtune.data.token_cache import Encoder
from jaxtune.errors import UserError

WINDOW = 1000  # examples that are packed together, at least
WINDOW_ROWS = 64  # rows' worth of tokens that are packed together, at least
_AHEAD = 3  # batches made before they are asked for


class Reading:
    """Examples of several sources in the order that `data.mix` asks for, beginning again where they end.

    A source without any raises by itself, so none is begun again for ever.
    """

    def __init__(self, data: Data, sources: Sequence[Source], reader: Callable[[Source], Examples]) -> None:
        self._how, self._sources, self._reader = data.mix, sources, reader
        self._readers = [reader(s) for s in sources]
        self._passes = [0] * len(sources)  # how often each was begun again
        self._skipped = [0] * len(sources)  # rows left out in the first pass, before the reader was made
        self._at = 0  # the source that is read, where they are concatenated

    @property
    def state(self) -> dict[str, Any]:
        """Small JSON."""
        return {
            "readers": [r.state for r in self._readers],
            "passes": list(self._passes),
            "skipped": [self._left_out(k) for k in range(len(self._sources))],
            "at": self._at,
        }

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._readers = [self._reader(s) for s in self._sources]
        for reader, there in zip(self._readers, state["readers"], strict=True):
            reader.state = there
        self._passes, self._skipped, self._at = list(state["passes"]), list(state["skipped"]), state["at"]

    @property
    def skipped(self) -> int:
        """Rows that could not be read, each counted once."""
        return sum(self._left_out(k) for k in range(len(self._sources)))

    def _left_out(self, k: int) -> int:
        return self._skipped[k] + (0 if self._passes[k] else len(self._readers[k].skipped))

    def take(self, n: int, rng: np.random.Generator) -> list[Example]:
        """The next `n` examples."""
        return self._concatenated(n, rng) if self._how == "concat" else self._interleaved(n, rng)

    def _concatenated(self, n: int, rng: np.random.Generator) -> list[Example]:
        """A weight of 2.5 is two passes and one in which every other row is drawn."""
        taken: list[Example] = []
        while len(taken) < n:
            k = self._at
            weight, done = self._sources[k].weight, self._passes[k]
            turns = -(-weight // 1)
            example = next(self._readers[k], None)
            if example is None:
                self._again(k)
                if (done + 1) % turns == 0:
                    self._at = (k + 1) % len(self._sources)
                continue
            share = min(1.0, weight - done % turns)
            if share == 1 or rng.random() < share:
                taken.append(example)
        return taken

    def _interleaved(self, n: int, rng: np.random.Generator) -> list[Example]:
        weights = np.array([s.weight for s in self._sources])
        taken: list[Example] = []
        for k in rng.choice(len(weights), size=n, p=weights / weights.sum()).tolist():
            example = next(self._readers[k], None)
            if example is None:
                for other in range(len(weights)) if self._how == "interleave_under" else (k,):
                    self._again(other)
                example = next(self._readers[k])
            taken.append(example)
        return taken

    def _again(self, k: int) -> None:
        """Begin a source again."""
        self._skipped[k] = self._left_out(k)
        self._passes[k] += 1
        self._readers[k] = self._reader(self._sources[k])


@dataclasses.dataclass(frozen=True)
class Stream:
    """Rows without end, in the place of `Rows`."""

    data: Data
    sources: Sequence[Source]
    reader: Callable[[Source], Examples]
    encoder: Encoder
    files: str  # a hash of what the sources hold
    ask: AsConversation | None = None

    def asked(self, example: Example) -> Example:
        """A row of a named task as the conversation that asks it."""
        return self.ask(example) if isinstance(example, Record) and self.ask is not None else example

    @property
    def length(self) -> int:
        return self.data.max_length

    @property
    def widths(self) -> np.ndarray:
        """The lengths T of rows: one."""
        return np.array([self.length])

    @functools.cached_property
    def sample(self) -> Encoded:
        """An example to show: the first that has something to train on."""
        for source in self.sources:
            reader = self.reader(source)
            for _, example in zip(range(WINDOW), reader, strict=False):
                if pieces := self.encoder(self.asked(example)).pieces:
                    return pieces[0]
        raise UserError(
            f"data.max_length={self.length}: none of the first {WINDOW:,} examples has a token to train on within it; "
            "raise it"
        )

    def empty_row(self, length: int) -> dict[str, np.ndarray]:
        """A row without examples, as columns of `[length]`."""
        return lay_out([], length, self.sample)

    @property
    def summary(self) -> str:
        """What there is, in a line."""
        return f"{len(self.sources)} {'set' if len(self.sources) == 1 else 'sets'}, read as they are needed"

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        return [
            ("data", f"{self.summary}, shuffled among {self.data.shuffle_buffer:,} examples"),
            ("rows", f"as many as are needed, of {self.length} tokens"),
        ]

    def digest(self) -> str:
        """A hash of what the sources hold and of all settings on which the rows depend."""
        d = self.data
        settings = (d.mix, d.shuffle_buffer, d.packing is not False, d.max_length, d.bad_rows, WINDOW, WINDOW_ROWS)
        told = f"{self.files} {settings} {self.encoder.fingerprint()}"
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def extent(self, batch_size: int, epochs: float, steps: int | None, seed: int | None) -> tuple[int, int | None]:
        """Optimiser steps of a run: as many as are asked for.

        Raises:
          UserError: none are.
        """
        if steps is None:
            raise UserError(
                "data.streaming: how many rows there are is not known before they are read; say how long to train "
                "with train.steps, or set data.streaming=false"
            )
        return steps, None

    def batches(
        self, batch_size: int, *, seed: int | None, row_count: int | None = None, own: Collection[int] | None = None
    ) -> "Streamed":
        """The batches of training; with `own`, the rows in these places of a batch are laid out alone."""
        return Streamed(self, batch_size, seed or 0, own)


class _Window(NamedTuple):
    rows: list[list[tuple[Encoded, str]]]
    start: int  # in the block
    stop: int
    outcomes: Counter[str]


class Streamed:
    """The batches of a stream, made ahead in a thread; `state` goes into a checkpoint and back, and is small JSON."""

    def __init__(self, stream: Stream, batch_size: int, seed: int, own: Collection[int] | None = None) -> None:
        self._stream, self._size, self._seed, self._own = stream, batch_size, seed, own
        self._reading = Reading(stream.data, stream.sources, stream.reader)
        # the default is for many examples: how many there will be is not known
        self._pool = workers.Pool(stream.encoder, workers.number(stream.data.workers, workers.WORTH))
        self._thread = ThreadPoolExecutor(1)
        self._ahead: list[Future[tuple[Batch, dict[str, Any]]]] = []
        self._n_block = 0
        self._block: list[Example] = []
        self._before = self._reading.state  # where the block began
        self._window = _Window([], 0, 0, Counter())
        self._row = 0  # of the window, the next
        self._outcomes: Counter[str] = Counter()  # of windows before this one
        self._given = 0  # rows
        self._state = self._now()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._ahead) < _AHEAD:
            self._ahead.append(self._thread.submit(self._made))
        batch, self._state = self._ahead.pop(0).result()
        return batch

    @property
    def state(self) -> dict[str, Any]:
        """Where the batches stand that were given, whatever was made ahead."""
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._settle()
        self._reading.state = state["reading"]
        self._n_block, self._given = state["block"], state["given"]
        self._outcomes = Counter(state["outcomes"])
        self._read_block()
        self._window, self._row = self._packed(state["start"]), state["row"]
        self._state = state

    @property
    def remarks(self) -> list[str]:
        """What was cut and left out until now."""
        lines = told(self._state["seen"], self._stream.data, "train")
        skipped = self._state["skipped"]
        return [*lines, *([f"train: {skipped:,} rows could not be read and were left out"] if skipped else [])]

    def close(self) -> None:
        """End the thread and the processes."""
        self._settle()
        self._thread.shutdown()
        self._pool.close()

    def _settle(self) -> None:
        for future in self._ahead:
            if not future.cancel():
                future.exception()  # waits; what it made is not wanted any more
        self._ahead = []

    def _now(self) -> dict[str, Any]:
        return {
            "reading": self._before,
            "block": self._n_block,
            "start": self._window.start,
            "row": self._row,
            "given": self._given,
            "outcomes": dict(self._outcomes),
            "seen": dict(self._outcomes + self._window.outcomes),
            "skipped": self._reading.skipped,
        }

    def _made(self) -> tuple[Batch, dict[str, Any]]:
        rows: list[list[tuple[Encoded, str]]] = []
        while len(rows) < self._size:
            if self._row == len(self._window.rows):
                self._next_window()
            rows.append(self._window.rows[self._row])
            self._row += 1
        T = self._stream.length
        empty, own = lay_out([], T, rows[0][0][0]), self._own
        laid = [lay_out([e for e, _ in row], T) if own is None or k in own else empty for k, row in enumerate(rows)]
        numbers = range(self._given, self._given + len(rows))
        self._given += len(rows)
        origins = [origin for row in rows for _, origin in row]
        batch = stacked(laid, empty, numbers, origins, self._size)
        if own is not None:
            batch = batch._replace(all_tokens=sum(len(e.ids) for row in rows for e, _ in row))
        return batch, self._now()

    def _read_block(self) -> None:
        self._before = self._reading.state
        rng = np.random.default_rng([self._seed, self._n_block])
        found = self._reading.take(self._stream.data.shuffle_buffer, rng)
        self._block = [self._stream.asked(found[i]) for i in rng.permutation(len(found))]

    def _next_window(self) -> None:
        """The next window that has rows.

        Raises:
          UserError: a whole block has none.
        """
        barren = 0
        while True:
            self._outcomes += self._window.outcomes
            start = self._window.stop
            if start == len(self._block):
                if self._block and barren == start:
                    raise UserError(
                        f"train: none of {start:,} examples has a token to train on within data.max_length="
                        f"{self._stream.length}; raise it"
                    )
                self._n_block += bool(self._block)
                self._read_block()
                start = barren = 0
            self._window, self._row = self._packed(start), 0
            if self._window.rows:
                return
            barren += self._window.stop - start

    def _packed(self, start: int) -> _Window:
        """The window of the block that begins at an example."""
        T, stop = self._stream.length, start
        encoded: list[tuple[Encoded, str]] = []
        outcomes: Counter[str] = Counter()
        tokens = 0
        while stop < len(self._block) and (stop == start or tokens < WINDOW_ROWS * T):
            examples = self._block[stop : stop + WINDOW]
            for example, encoding in zip(examples, self._pool(examples), strict=True):
                outcomes[encoding.outcome] += 1
                encoded += [(piece, example.origin) for piece in encoding.pieces]
                tokens += sum(len(piece.ids) for piece in encoding.pieces)
            stop += len(examples)
        lengths = [len(e.ids) for e, _ in encoded]
        packed = pack(lengths, T) if self._stream.data.packing is not False else [[i] for i in range(len(encoded))]
        order = np.random.default_rng([self._seed, self._n_block, start]).permutation(len(packed))
        return _Window([[encoded[i] for i in packed[k]] for k in order], start, stop, outcomes)
