"""Rows to batches, in an order that is a function of the seed alone: shuffled anew in each pass.

Which examples share a row is settled once, so the number of rows, and with it the number of steps, is known before
training; where the iterator stands is one small JSON state (Grain's), and nothing is replayed or left over on resume.

Dimensions: B batch, T time, S segments of a row.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import Data
from jaxtune.data.encode import Encoded
from jaxtune.data.packing import lay_out


class Batch(NamedTuple):
    """Columns of `[B, T]` and others of `[B, …]`, which rows they hold, and where these came from."""

    columns: dict[str, np.ndarray]
    rows: np.ndarray  # int64 [B], -1 where a row is only filled up
    origins: Sequence[str] = ()  # file:line of every example
    all_tokens: int | None = None  # where only some rows are laid out

    @property
    def tokens(self) -> int:
        return int((self.columns["segment_BT"] > 0).sum()) if self.all_tokens is None else self.all_tokens


@dataclasses.dataclass(frozen=True)
class Beside:
    """Further columns of every token, example after example, in files that are there when rows are laid out."""

    folder: Path | None
    columns: Mapping[str, tuple[tuple[int, ...], str]]  # by name, such as `x_BTK`: shape beyond T, and dtype

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Memory-mapped, `[all tokens, …]`."""
        if self.folder is None:
            raise ValueError("these columns are planned, and in no files")
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in self.columns}

    def nbytes(self, tokens: int) -> int:
        """Of the files for so many tokens."""
        return tokens * sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.columns.values())

    def empty(self, length: int) -> dict[str, np.ndarray]:
        """The columns of an empty row."""
        return {name: np.zeros((length, *shape), dtype) for name, (shape, dtype) in self.columns.items()}


@dataclasses.dataclass(frozen=True)
class Rows:
    """Encoded examples, which of them share a row, and where each came from."""

    examples: Sequence[Encoded]
    origins: Sequence[str]
    rows: Sequence[Sequence[int]]
    length: int  # T, the greatest
    buckets: tuple[int, ...] = ()  # the lengths T that there are, rising; none: each row has `length`
    beside: Beside | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def widths(self) -> np.ndarray:
        """T of each row, int64."""
        filled = np.array([sum(len(self.examples[k].ids) for k in row) for row in self.rows])
        buckets = np.array(self.buckets or (self.length,))
        return buckets[np.searchsorted(buckets, filled)]

    @functools.cached_property
    def segments(self) -> int:
        """S, the most examples of a row."""
        return max(map(len, self.rows))

    def lay_out(self, i: int) -> dict[str, np.ndarray]:
        """Row `i` as columns of `[T]`."""
        examples, width = [self.examples[k] for k in self.rows[i]], int(self.widths[i])
        row = lay_out(examples, width, self.examples[0], self.segments)
        if self.beside is None:
            return row
        more, at = self.beside.empty(width), 0
        for k in self.rows[i]:
            n, first = len(self.examples[k].ids), self.starts[k]
            for name, x in self.beside.arrays.items():
                more[name][at : at + n] = x[first : first + n]
            at += n
        return row | more

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """How many tokens stand before each example, int64."""
        return np.cumsum([0, *(len(e.ids) for e in self.examples)])

    def empty_row(self, length: int) -> dict[str, np.ndarray]:
        """A row without examples, as columns of `[length]`."""
        row = lay_out([], length, self.examples[0], self.segments)
        return row if self.beside is None else row | self.beside.empty(length)

    def batch(self, row_numbers: Sequence[int], size: int, own: Collection[int] | None = None) -> Batch:
        """These rows, of one length T, filled up with empty ones to `size`; with `own`, those are laid out alone."""
        empty = self.empty_row(int(self.widths[row_numbers[0]]))
        laid = [self.lay_out(i) if own is None or k in own else empty for k, i in enumerate(row_numbers)]
        batch = stacked(laid, empty, row_numbers, self.where(row_numbers), size)
        if own is None:
            return batch
        return batch._replace(all_tokens=sum(len(self.examples[k].ids) for i in row_numbers for k in self.rows[i]))

    def where(self, row_numbers: Sequence[int]) -> list[str]:
        """file:line of every example in the given rows."""
        return [self.origins[k] for i in row_numbers if i >= 0 for k in self.rows[i]]

    @property
    def tokens(self) -> int:
        return sum(len(e.ids) for e in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(int(e.mask[1:].sum()) for e in self.examples)

    @property
    def full(self) -> float:
        """The share of all places that hold a token."""
        return self.tokens / int(self.widths.sum())

    @property
    def sample(self) -> Encoded:
        """An example to show."""
        return self.examples[self.rows[0][0]]

    @property
    def summary(self) -> str:
        """What there is, in a line."""
        return f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained on"

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        lengths = np.array([len(e.ids) for e in self.examples])
        widths, counts = np.unique(self.widths, return_counts=True)
        of = ", ".join(f"{n:,} of {T}" for T, n in zip(widths, counts, strict=True))
        return [
            ("data", f"{len(lengths):,} examples of {lengths.min()} to {lengths.max()} tokens, "
                     f"median {np.median(lengths):.0f}; {self.summary}"),
            ("rows", f"{of} tokens, {100 * self.full:.1f} % full"),
        ]  # fmt: skip

    def digest(self) -> str:
        """A hash of all tokens and masks and of how they are packed."""
        h = hashlib.blake2b(f"{self.length} {self.buckets} {self.rows!r}".encode(), digest_size=16)
        for e in self.examples:
            h.update(e.ids.tobytes())
            h.update(e.mask.tobytes())
            for name, x in e.columns.items():
                h.update(f"{name} {np.asarray(x).tolist()}".encode())
        return h.hexdigest()

    def extent(self, batch_size: int, epochs: float, steps: int | None, seed: int | None) -> tuple[int, int | None]:
        """Optimiser steps of a run, and the rows that they take; None where that is as many as `steps` ask for."""
        if steps is not None:
            return steps, None
        rows = math.ceil(len(self) * epochs)
        return (_Bucketed(self, batch_size, seed).upto(rows) if self.buckets else math.ceil(rows / batch_size)), rows

    def batches(
        self, batch_size: int, *, seed: int | None, row_count: int | None, own: Collection[int] | None = None
    ) -> "Batches":
        """The batches of training; see `Batches`."""
        return Batches(self, batch_size, seed=seed, row_count=row_count, own=own)


def told(outcomes: Mapping[str, int], data: Data, name: str) -> list[str]:
    """What became of examples that are not whole, in lines."""
    T, total = data.max_length, sum(outcomes.values())
    lines = {
        "cut": f"are longer than {T} tokens and were cut ({data.truncate})",
        "long": f"are longer than {T} tokens and were left out",
        "empty": f"were left out, nothing to train on is within {T} tokens",
    }
    return [f"{name}: {outcomes[k]:,} of {total:,} examples {line}" for k, line in lines.items() if outcomes.get(k)]


def stacked(
    laid: Sequence[dict[str, np.ndarray]],
    empty: dict[str, np.ndarray],
    row_numbers: Sequence[int],
    origins: Sequence[str],
    size: int,
) -> Batch:
    """Rows as a batch, filled up with `empty` to `size`."""
    missing = size - len(laid)
    columns = {c: np.stack([row[c] for row in (*laid, *[empty] * missing)]) for c in empty}
    return Batch(columns, np.array([*row_numbers, *[-1] * missing], np.int64), origins)


class Batches:
    """The batches in order, endless where `row_count` is None; `state` goes into a checkpoint and back.

    Where rows have several lengths, each batch has rows of one length, and each pass has batches of its own: what is
    left of a length at its end makes a batch that is filled up. Else rows of the next pass fill the batch.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        seed: int | None,
        row_count: int | None,
        own: Collection[int] | None = None,
    ) -> None:
        """Args:
        rows: the packed rows.
        batch_size: rows of a batch.
        seed: of the shuffle; None keeps the order.
        row_count: stop after so many rows; the last batch is filled up with empty ones, or, where rows have several
          lengths, is taken as it is.
        own: places of a batch whose rows are laid out, where the others belong to other processes.
        """
        import grain

        make = _bucketed if rows.buckets else _flat
        ds = make(rows, batch_size, seed, row_count, own)
        self._it = iter(ds.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._it)

    @property
    def state(self) -> dict[str, Any]:
        return self._it.get_state()

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._it.set_state(state)

    @property
    def remarks(self) -> list[str]:
        """What was found on the way; nothing here, where all is known before."""
        return []

    def close(self) -> None:
        """Let go of what reads ahead."""


def _flat(rows: Rows, batch_size: int, seed: int | None, row_count: int | None, own: Collection[int] | None) -> Any:
    import grain

    ds = grain.MapDataset.source(range(len(rows)))
    if seed is not None:
        ds = ds.shuffle(seed % 2**32)
    passes = None if row_count is None else -(-row_count // len(rows))
    if passes != 1:
        ds = ds.repeat(passes)
    if row_count is not None:
        ds = ds[:row_count]
    return ds.batch(batch_size, drop_remainder=False, batch_fn=lambda numbers: rows.batch(numbers, batch_size, own))


def _bucketed(rows: Rows, batch_size: int, seed: int | None, row_count: int | None, own: Collection[int] | None) -> Any:
    import grain

    plan = _Bucketed(rows, batch_size, seed)
    n = 2**40 if row_count is None else plan.upto(row_count)
    return grain.MapDataset.source(range(n)).map(lambda i: rows.batch(plan.row_numbers(i), batch_size, own))


class _Bucketed:
    """Which rows the batches hold, where rows have several lengths."""

    def __init__(self, rows: Rows, batch_size: int, seed: int | None) -> None:
        self._members = [np.flatnonzero(rows.widths == T) for T in np.unique(rows.widths)]
        self._size, self._seed, self._rows = batch_size, seed, len(rows)
        self._per_pass = sum(math.ceil(len(m) / batch_size) for m in self._members)
        self._order: Callable[[int], list[np.ndarray]] = functools.lru_cache(2)(self._drawn)

    def _drawn(self, n_pass: int) -> list[np.ndarray]:
        rng = None if self._seed is None else np.random.default_rng([self._seed, n_pass])
        batches = []
        for members in self._members:
            shuffled = members if rng is None else rng.permutation(members)
            batches += [shuffled[i : i + self._size] for i in range(0, len(members), self._size)]
        return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]

    def row_numbers(self, i: int) -> list[int]:
        """Rows of batch `i`."""
        n_pass, k = divmod(i, self._per_pass)
        return self._order(n_pass)[k].tolist()

    def upto(self, row_count: int) -> int:
        """Batches until so many rows were in one."""
        passes, rest = divmod(row_count, self._rows)
        held = np.cumsum([len(b) for b in self._order(passes)])
        return passes * self._per_pass + (int(np.searchsorted(held, rest)) + 1 if rest else 0)
