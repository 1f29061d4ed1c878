"""Examples to batches, in an order that is a function of the seed alone: shuffled anew in each pass.

Rows are packed once, so their number, and with it the number of steps, is known before training; where the iterator
stands is one small JSON state (Grain's), and nothing is replayed or left over on resume.

Dimensions: B batch, T time.
"""

import dataclasses
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import Data
from jaxtune.data import encode, formats, heads, templates
from jaxtune.data.encode import Encoded, Encoding, Settings
from jaxtune.data.examples import AsConversation, Conversation, Example, Record
from jaxtune.data.packing import lay_out, pack
from jaxtune.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rows:
    """Encoded examples, which of them share a row, and where each came from."""

    examples: Sequence[Encoded]
    origins: Sequence[str]
    rows: Sequence[Sequence[int]]
    length: int  # T

    def __len__(self) -> int:
        return len(self.rows)

    def lay_out(self, i: int) -> dict[str, np.ndarray]:
        """Row `i` as columns of `[T]`."""
        return lay_out([self.examples[k] for k in self.rows[i]], self.length, self.examples[0], self.segments)

    @functools.cached_property
    def segments(self) -> int:
        """S, the most examples of a row."""
        return max(map(len, self.rows))

    @functools.cached_property
    def empty(self) -> dict[str, np.ndarray]:
        """A row without examples."""
        return lay_out([], self.length, self.examples[0], self.segments)

    @property
    def tokens(self) -> int:
        return sum(len(e.ids) for e in self.examples)

    @property
    def trained_tokens(self) -> int:
        return sum(int(e.mask[1:].sum()) for e in self.examples)

    def where(self, row_numbers: Sequence[int]) -> list[str]:
        """file:line of every example in the given rows."""
        return [self.origins[k] for i in row_numbers if i >= 0 for k in self.rows[i]]

    def digest(self) -> str:
        """A hash of all tokens and masks and of how they are packed."""
        h = hashlib.blake2b(f"{self.length} {self.rows!r}".encode(), digest_size=16)
        for e in self.examples:
            h.update(e.ids.tobytes())
            h.update(e.mask.tobytes())
            for name, x in e.columns.items():
                h.update(f"{name} {np.asarray(x).tolist()}".encode())
        return h.hexdigest()


class Prepared(NamedTuple):
    """What `prepare` gives: the sets, the template that was used, and remarks for the log."""

    train: Rows
    validation: Rows | None
    template: str | None
    remarks: list[str]
    held: Sequence[Example] = ()  # the validation set as it was read, to be asked and scored
    labels: tuple[str, ...] = ()  # of a head
    multi: bool = False  # whether a text has several


def prepare(
    data: Data,
    tokenizer: Any,
    seed: int,
    objective: str = "sft",
    virtual: Sequence[int] = (),
    ask: AsConversation | None = None,
) -> Prepared:
    """Read, split, encode and pack. The split is drawn by the seed, over examples, before packing.

    Every text starts with the ids `virtual`, which count towards `max_length` and are not trained on. `ask` says how
    the rows of named tasks become conversations.
    """
    train = [e for s in data.sources for e in formats.read(s)]
    validation = [e for s in data.validation_sources for e in formats.read(s)]
    if isinstance(data.validation, int | float) and data.validation > 0:
        n = held_out(data.validation, len(train))
        order = np.random.default_rng(seed).permutation(len(train))
        validation = [train[i] for i in sorted(order[:n])]
        train = [train[i] for i in sorted(order[n:])]
    remarks: list[str] = []
    held = validation
    if objective in heads.READS:
        return _for_head(data, tokenizer, objective, train, validation)
    train, validation = (
        [ask(e) if isinstance(e, Record) and ask is not None else e for e in es] for es in (train, validation)
    )
    template = choose_template(data, tokenizer, [*train, *validation], remarks)
    encoded = encoder(data, tokenizer, template, objective, virtual)

    def ready(examples: list[Example], name: str) -> Rows:
        return to_rows(examples, encoded, data, name, remarks)

    rows = ready(train, "train"), ready(validation, "validation") if validation else None
    return Prepared(*rows, template, remarks, held)


def _for_head(
    data: Data, tokenizer: Any, objective: str, train: Sequence[Example], validation: Sequence[Example]
) -> Prepared:
    """The same for a head: no template, but labels."""
    remarks: list[str] = []
    labels, multi = heads.label_names(heads.records(train, objective), objective, data.labels)
    s = head_settings(data, objective, labels, multi)

    def encoded(example: Example) -> Encoding:
        return heads.encode(example, tokenizer, s)

    rows = to_rows(train, encoded, data, "train", remarks)
    held = to_rows(validation, encoded, data, "validation", remarks) if validation else None
    return Prepared(rows, held, None, remarks, validation, labels, multi)


def head_settings(data: Data, objective: str, labels: tuple[str, ...], multi: bool) -> heads.HeadSettings:
    """What the tokens of a head's records depend on."""
    return heads.HeadSettings(objective, labels, multi, data.max_length, data.truncate, data.stride, data.prompt)


def encoder(
    data: Data, tokenizer: Any, template: str | None, objective: str, virtual: Sequence[int] = ()
) -> Callable[[Example], Encoding]:
    """How an example becomes tokens."""
    room = data.max_length - len(virtual)
    if room < 2:
        raise UserError(
            f"data.max_length={data.max_length} has no room beside {len(virtual)} virtual tokens; raise it, or lower "
            "tuning.tokens"
        )
    train_on = "all" if objective == "pretrain" else data.train_on
    s = Settings(template, train_on, room, data.truncate, data.thinking, data.system, tuple(virtual))
    return lambda example: encode.encode(example, tokenizer, s)


def choose_template(data: Data, tokenizer: Any, examples: Sequence[Any], remarks: list[str]) -> str | None:
    """The template of the conversations among the examples; None where there are none and none is asked for."""
    kinds = {e.format for e in examples if isinstance(e, Conversation)}
    if not kinds and data.template == "auto":
        return getattr(tokenizer, "chat_template", None)
    kind = "messages" if len(kinds) != 1 else kinds.pop()
    template, name = templates.choose(data.template, getattr(tokenizer, "chat_template", None), kind)
    remarks.append(f"chat template: {name}")
    return template


def held_out(validation: float, n: int) -> int:
    """How many of `n` examples a fraction or a count holds out.

    >>> held_out(0.05, 100), held_out(7, 100)
    (5, 7)
    """
    count = max(1, round(validation * n)) if validation < 1 else int(validation)
    if count >= n:
        raise UserError(
            f"data.validation={validation:g} holds out {count} of {n} examples, so none is left to train on"
        )
    return count


def to_rows(
    examples: Sequence[Example],
    encoded: Callable[[Example], Encoding],
    data: Data,
    name: str,
    remarks: list[str],
) -> Rows:
    """Encode and pack; what is cut or left out is counted in `remarks`."""
    T = data.max_length
    kept: list[Encoded] = []
    origins: list[str] = []
    outcomes: Counter[str] = Counter()
    for example in examples:
        pieces, outcome = encoded(example)
        outcomes[outcome] += 1
        kept += pieces
        origins += [example.origin] * len(pieces)
    told = {
        "cut": f"are longer than {T} tokens and were cut ({data.truncate})",
        "long": f"are longer than {T} tokens and were left out",
        "empty": f"were left out, nothing to train on is within {T} tokens",
    }
    remarks += [f"{name}: {outcomes[k]} of {len(examples)} examples {t}" for k, t in told.items() if outcomes[k]]
    if not kept:
        raise UserError(f"{name}: no example has a token to train on within data.max_length={T}; raise it")
    if data.packing:
        return Rows(kept, origins, pack([len(e.ids) for e in kept], T), T)
    longest = max(len(e.ids) for e in kept)
    return Rows(kept, origins, [[i] for i in range(len(kept))], min(T, -(-longest // 32) * 32))


class Batch(NamedTuple):
    """Columns of `[B, T]` and others of `[B, …]`, and which rows they hold (-1 where a row is only filled up)."""

    columns: dict[str, np.ndarray]
    rows: np.ndarray

    @property
    def tokens(self) -> int:
        return int((self.columns["segment_BT"] > 0).sum())


def extent(n_rows: int, batch_size: int, epochs: float, steps: int | None) -> tuple[int, int]:
    """Optimiser steps of a run, and the rows that they take; the last batch of whole epochs may not be full.

    >>> extent(10, 4, 1.0, None), extent(10, 4, 1.0, 7)
    ((3, 10), (7, 28))
    """
    if steps is not None:
        return steps, steps * batch_size
    rows = math.ceil(n_rows * epochs)
    return math.ceil(rows / batch_size), rows


class Batches:
    """The training batches in order, endless where `row_count` is None; `state` goes into a checkpoint and back."""

    def __init__(self, rows: Rows, batch_size: int, *, seed: int | None, row_count: int | None) -> None:
        """Args:
        rows: the packed rows.
        batch_size: rows of a batch.
        seed: of the shuffle; None keeps the order.
        row_count: stop after so many rows; the last batch is filled up with empty ones.
        """
        import grain

        ds = grain.MapDataset.source(range(len(rows)))
        if seed is not None:
            ds = ds.shuffle(seed % 2**32)
        passes = None if row_count is None else -(-row_count // len(rows))
        if passes != 1:
            ds = ds.repeat(passes)
        if row_count is not None:
            ds = ds[:row_count]
        ds = ds.map(lambda i: (rows.lay_out(i), i))
        ds = ds.batch(batch_size, drop_remainder=False, batch_fn=_collate(rows, batch_size))
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


def _collate(rows: Rows, size: int) -> Callable[[Sequence[tuple]], Batch]:
    def collate(items: Sequence[tuple]) -> Batch:
        filled = [*items, *[(rows.empty, -1)] * (size - len(items))]
        columns = {c: np.stack([row[c] for row, _ in filled]) for c in rows.empty}
        return Batch(columns, np.array([i for _, i in filled], np.int64))

    return collate
