"""From sources to rows: read, split, mixed, encoded (in processes, or from the cache), packed or put into buckets."""

import functools
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.config import Data, Source
from jaxtune.data import encode, formats, heads, reading, registry, templates, token_cache, workers
from jaxtune.data.batches import Batch, Batches, Rows, told
from jaxtune.data.encode import Encoded, Encoding, Settings
from jaxtune.data.examples import AsConversation, Conversation, Example, Record, strings
from jaxtune.data.mixing import mixed
from jaxtune.data.packing import buckets, pack
from jaxtune.data.streaming import Stream
from jaxtune.data.token_cache import Encoder
from jaxtune.errors import UserError

__all__ = ["Batch", "Batches", "Prepared", "Rows", "Stream", "encoder", "prepare"]


class Prepared(NamedTuple):
    """What `prepare` gives: the sets, the template that was used, and remarks for the log."""

    train: Rows | Stream
    validation: Rows | None
    template: str | None
    remarks: list[str]
    held: Sequence[Example] = ()  # the validation set as it was read, to be asked and scored
    labels: tuple[str, ...] = ()  # of a head
    multi: bool = False  # whether a text has several

    @property
    def rows(self) -> Rows:
        """The training set.

        Raises:
          UserError: it is a stream.
        """
        if not isinstance(self.train, Rows):
            raise UserError("data.streaming is for training only; set it to false")
        return self.train

    @property
    def facts(self) -> list[tuple[str, str]]:
        """Names and values for a table."""
        held = self.validation
        return [*self.train.facts, ("validation", f"{len(held):,} rows, {held.summary}" if held else "none")]


def prepare(
    data: Data,
    tokenizer: Any,
    seed: int,
    objective: str = "sft",
    virtual: Sequence[int] = (),
    ask: AsConversation | None = None,
) -> Prepared:
    """Read, split, mix, encode and pack. The split is drawn by the seed, over examples, before they are mixed.

    Every text starts with the ids `virtual`, which count towards `max_length` and are not trained on. `ask` says how
    the rows of named tasks become conversations. Where `data.streaming` is set, `train` is read later.
    """
    remarks: list[str] = []
    sources, held_sources = registry.resolve(data)
    validation = [e for s in held_sources for e in _read(s, data, remarks)]
    if data.streaming:
        _check_streaming(data, objective)
        train = [next(_examples(s, data)) for s in sources]  # the template is chosen by them
    else:
        sets = [_read(s, data, remarks) for s in sources]
        if isinstance(data.validation, int | float) and data.validation > 0:
            sets, validation = _split(sets, data.validation, seed)
        train = sets[0] if len(sets) == 1 and sources[0].weight == 1 else _mix(data, sources, sets, seed, remarks)
    if objective in heads.READS:
        return _for_head(data, tokenizer, objective, train, validation, remarks)
    held = validation
    train, validation = (
        [ask(e) if isinstance(e, Record) and ask is not None else e for e in es] for es in (train, validation)
    )
    template = choose_template(data, tokenizer, [*train, *validation], remarks)
    encoded = encoder(data, tokenizer, template, objective, virtual)

    def ready(examples: list[Example], name: str) -> Rows:
        return to_rows(examples, encoded, data, name, remarks)

    held_rows = ready(validation, "validation") if validation else None
    if data.streaming:
        if len(sources) > 1 and data.mix == "concat":
            remarks.append(
                f"streaming with data.mix=concat: sets come one after the other, shuffled among "
                f"{data.shuffle_buffer:,} examples only; data.mix=interleave_over mixes them"
            )
        stream = Stream(data, sources, functools.partial(_examples, data=data), encoded, _contents(sources), ask)
        return Prepared(stream, held_rows, template, remarks, held)
    return Prepared(ready(train, "train"), held_rows, template, remarks, held)


def _for_head(
    data: Data,
    tokenizer: Any,
    objective: str,
    train: Sequence[Example],
    validation: Sequence[Example],
    remarks: list[str],
) -> Prepared:
    """The same for a head: no template, but labels; and a row for each text, unless packing is asked for."""
    data = data if data.packing else data.model_copy(update={"packing": False})
    train = heads.answerable(train, objective, remarks)
    labels, multi = heads.label_names(heads.records(train, objective), objective, data.labels)
    s = head_settings(data, objective, labels, multi)
    rows = to_rows(train, Encoder(heads.encode, tokenizer, s), data, "train", remarks)
    every = Encoder(heads.encode, tokenizer, s._replace(truncate="right") if s.truncate == "drop" else s)
    held = to_rows(validation, every, data, "validation", remarks) if validation else None
    return Prepared(rows, held, None, remarks, validation, labels, multi)


def head_settings(data: Data, objective: str, labels: tuple[str, ...], multi: bool) -> heads.HeadSettings:
    """What the tokens of a head's records depend on."""
    return heads.HeadSettings(objective, labels, multi, data.max_length, data.truncate, data.stride, data.prompt)


def _check_streaming(data: Data, objective: str) -> None:
    if objective not in ("sft", "pretrain"):
        raise UserError(f"data.streaming goes with objective sft and pretrain, not {objective}; set it to false")
    if isinstance(data.validation, int | float) and data.validation > 0:
        raise UserError(
            f"data.validation={data.validation:g}: nothing can be held out of a stream, whose rows are not counted; "
            "give a file of its own, or set data.streaming=false"
        )


def examples(data: Data, remarks: list[str], answers: bool = True) -> list[Example]:
    """The examples of `data.train`, to be asked or judged; without `answers` a row may lack them."""
    return [e for s in registry.resolve(data)[0] for e in _read(s, data, remarks, answers)]


def _examples(source: Source, data: Data) -> formats.Examples:
    return formats.Examples(source, bad_rows=data.bad_rows)


def _read(source: Source, data: Data, remarks: list[str], answers: bool = True) -> list[Example]:
    """All examples of a source; what was left out is counted in `remarks`, with the first places."""
    skipped: list[str] = []
    examples = formats.read(source, answers, data.bad_rows, skipped)
    if skipped:
        shown = "; ".join(skipped[:3]) + ("; …" if len(skipped) > 3 else "")
        remarks.append(
            f"{source.path}: {len(skipped):,} of {len(skipped) + len(examples):,} rows could not be read and were left "
            f"out: {shown}"
        )
    return examples


def _split(sets: Sequence[list[Example]], validation: float, seed: int) -> tuple[list[list[Example]], list[Example]]:
    """Each set without what is held out, and that."""
    every = [e for s in sets for e in s]
    drawn = np.random.default_rng(seed).permutation(len(every))[: held_out(validation, len(every))]
    held = np.zeros(len(every), bool)
    held[drawn] = True
    out, at = [], 0
    for s in sets:
        out.append([e for e, h in zip(s, held[at : at + len(s)], strict=True) if not h])
        at += len(s)
    return out, [every[i] for i in np.flatnonzero(held)]


def _mix(
    data: Data, sources: Sequence[Source], sets: Sequence[list[Example]], seed: int, remarks: list[str]
) -> list[Example]:
    """The sets as one; how many examples of each there are is told in `remarks`."""
    for s, examples in zip(sources, sets, strict=True):
        if not examples:
            raise UserError(f"{s.path}: no example is left to train on, all are held out; lower data.validation")
    picks = mixed([len(s) for s in sets], [s.weight for s in sources], data.mix, seed)
    counts = Counter(k for k, _ in picks)
    told = [f"{counts[k]:,} of {s.path} ({len(sets[k]):,}, weight {s.weight:g})" for k, s in enumerate(sources)]
    remarks.append(f"train: {data.mix} of {'; '.join(told)}")
    return [sets[k][i] for k, i in picks]


def _contents(sources: Sequence[Source]) -> str:
    """A hash of what sources hold, for which they need not be read: settings, sizes of files and their beginnings."""
    h = hashlib.blake2b(digest_size=16)
    for s in sources:
        h.update(repr(s.model_copy(update={"path": ""})).encode())
        for place in reading.places(s.path):
            if "://" in place:
                h.update(f"{place} {_version(place)}".encode())
                continue
            with Path(place).open("rb") as f:
                h.update(f"{Path(place).stat().st_size}".encode() + f.read(1 << 20))
    return h.hexdigest()


def _version(address: str) -> str:
    """What an object store says of a file; nothing of a data set of the hub, whose address may hold a revision."""
    if reading.hub.is_hub(address):
        return ""
    import fsspec

    store, path = fsspec.core.url_to_fs(address)
    return str(store.checksum(path))


def encoder(data: Data, tokenizer: Any, template: str | None, objective: str, virtual: Sequence[int] = ()) -> Encoder:
    """How an example becomes tokens."""
    room = data.max_length - len(virtual)
    if room < 2:
        raise UserError(
            f"data.max_length={data.max_length} has no room beside {len(virtual)} virtual tokens; raise it, or lower "
            "tuning.tokens"
        )
    train_on = "all" if objective == "pretrain" else data.train_on
    s = Settings(
        template, train_on, room, data.truncate, data.thinking, data.system, tuple(virtual), data.train_on_space
    )
    return Encoder(encode.encode, tokenizer, s)


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


def to_rows(examples: Sequence[Example], encoded: Encoder, data: Data, name: str, remarks: list[str]) -> Rows:
    """Encode and pack; what is cut or left out is counted in `remarks`."""
    T = data.max_length
    kept: list[Encoded] = []
    origins: list[str] = []
    outcomes: Counter[str] = Counter()
    for example, (pieces, outcome) in zip(examples, _encodings(examples, encoded, data, name, remarks), strict=True):
        outcomes[outcome] += 1
        kept += pieces
        origins += [example.origin] * len(pieces)
    remarks += told(outcomes, data, name) + lost(examples, encoded.tokenizer, name)
    if not kept:
        raise UserError(f"{name}: no example has a token to train on within data.max_length={T}; raise it")
    lengths = [len(e.ids) for e in kept]
    if data.packing is not False:
        return Rows(kept, origins, pack(lengths, T), T)
    widths = buckets(lengths, T)
    return Rows(kept, origins, [[i] for i in range(len(kept))], widths[-1], widths)


def lost(examples: Sequence[Example], tokenizer: Any, name: str, first: int = 100) -> list[str]:
    """A remark where the tokenizer drops characters of the first examples: a model cannot learn what it never sees."""
    texts = ["".join(strings(e)) for e in examples[:first]]
    wanted, there = (
        Counter(unicodedata.normalize("NFKC", "".join(t)).casefold())
        for t in (texts, [tokenizer.decode(tokenizer(t).input_ids, skip_special_tokens=True) for t in texts])
    )
    gone = Counter({c: n for c, n in (wanted - there).items() if c.isalnum()})
    share = gone.total() / max(1, sum(n for c, n in wanted.items() if c.isalnum()))
    if share < 0.01:
        return []
    shown = " ".join(c for c, _ in gone.most_common(5))
    return [f"{name}: the tokenizer loses {100 * share:.0f} % of the letters of the first examples, such as {shown}"]


def _encodings(
    examples: Sequence[Example], encoded: Encoder, data: Data, name: str, remarks: list[str]
) -> list[Encoding]:
    def make() -> list[Encoding]:
        with workers.Pool(encoded, workers.number(data.workers, len(examples))) as pool:
            return pool(examples)

    if not data.cache:
        return make()
    key = token_cache.key(encoded, examples)
    encodings, there = token_cache.through(key, make)
    remarks.append(f"{name}: tokens {'from the cache' if there else 'made, and kept for the next run'}")
    return encodings
