"""Tokens on disk, by a hash of all that they depend on, so that the next run need not make them again.

A file holds the tokens of one set of examples as flat arrays (safetensors). It appears whole, is checked when it is
read, and the oldest go when there is more than `LIMIT` of them. Where several processes want the same tokens, one
makes them and the others wait for the file.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import log
from jaxtune.data.encode import Encoded, Encoding
from jaxtune.data.examples import Example

LIMIT = 20 * 2**30  # bytes
PATIENCE = 1800.0  # seconds to wait for another process


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How an example becomes tokens: a function of the example, the tokenizer and settings, and of nothing else.

    It goes to other processes, and its hash is part of a cache's key: so the function is one of a module of
    jaxtune.data, and the settings are a value that `repr` tells whole.
    """

    function: Callable[[Any, Any, Any], Encoding]
    tokenizer: Any
    settings: Any

    def __call__(self, example: Example) -> Encoding:
        return self.function(example, self.tokenizer, self.settings)

    def fingerprint(self) -> str:
        """A hash of the function's name, the tokenizer and the settings."""
        words = self.tokenizer
        special = {k: str(v) for k, v in words.special_tokens_map.items()}
        name = f"{self.function.__module__}.{self.function.__qualname__}"
        h = hashlib.blake2b(f"{name} {self.settings!r}".encode(), digest_size=16)
        h.update(f"{type(words).__name__} {special} {words.chat_template!r}".encode())
        h.update(words.backend_tokenizer.to_str().encode())
        return h.hexdigest()


def key(encoder: Encoder, examples: Sequence[Example]) -> str:
    """The name under which the tokens of these examples are kept; where the examples stood does not matter."""
    versions = [importlib.metadata.version(p) for p in ("transformers", "tokenizers", "jinja2")]
    h = hashlib.blake2b(f"{encoder.fingerprint()} {versions}".encode(), digest_size=20)
    for file in sorted(Path(__file__).parent.rglob("*.py")):  # our own code: a version that is never forgotten
        h.update(file.read_bytes())
    for e in examples:
        h.update(f"{type(e).__name__} {json.dumps(e._replace(origin=''), default=repr)}\n".encode())
    return h.hexdigest()


def folder() -> Path:
    """Where the files are: in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtune" / "tokens"


def through(name: str, make: Callable[[], list[Encoding]]) -> tuple[list[Encoding], bool]:
    """The encodings kept under `name`, or those that `make` gives, which are then kept; and whether they were there.

    What is damaged is made anew, and where nothing can be kept the run goes on; both with a warning.
    """
    file = folder() / f"{name}.safetensors"
    made: list[Encoding] | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file):
            if (found := _read(file)) is not None:
                return found, True
            made = make()
            _write(file, made)
            _forget(file)
    except OSError as e:
        log.warn(f"{file.parent}: tokens cannot be kept ({e}); make room there, or set data.cache=false")
        return make() if made is None else made, False
    return made, False


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold the lock of a file; after `PATIENCE` go on without it."""
    lock = file.with_suffix(".lock")
    with lock.open("w") as f:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # who waits holds it open, and then finds the tokens


def _write(file: Path, encodings: Sequence[Encoding]) -> None:
    from safetensors.numpy import save_file

    pieces = [p for e in encodings for p in e.pieces]
    outcomes = sorted({e.outcome for e in encodings})
    arrays: dict[str, np.ndarray] = {
        "ids": np.concatenate([p.ids for p in pieces] or [np.zeros(0, np.int32)]),
        "mask": np.concatenate([p.mask for p in pieces] or [np.zeros(0, bool)]),
        "lengths": np.array([len(p.ids) for p in pieces], np.int64),
        "pieces": np.array([len(e.pieces) for e in encodings], np.int64),
        "outcomes": np.array([outcomes.index(e.outcome) for e in encodings], np.int64),
    }
    for column in pieces[0].columns if pieces else ():
        own = [np.asarray(p.columns[column]) for p in pieces]
        arrays[f"column.{column}"] = np.concatenate(own) if column.endswith("_T") else np.stack(own)
    arrays = {k: np.ascontiguousarray(x) for k, x in arrays.items()}
    about = {"outcomes": json.dumps(outcomes), "digest": _digest(arrays)}
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".partial")
    os.close(handle)
    try:
        save_file(arrays, temporary, about)
        Path(temporary).replace(file)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _read(file: Path) -> list[Encoding] | None:
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, framework="numpy") as f:
            arrays, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118 not a dict
        if about["digest"] != _digest(arrays):
            raise ValueError("its contents changed")
    except (SafetensorError, KeyError, TypeError, ValueError) as e:
        log.warn(f"{file}: damaged ({e}); its tokens are made anew")
        return None
    file.touch()  # used last now
    return _encodings(arrays, json.loads(about["outcomes"]))


def _encodings(arrays: Mapping[str, np.ndarray], outcomes: Sequence[str]) -> list[Encoding]:
    ends = np.cumsum(arrays["lengths"])
    columns = {k.removeprefix("column."): x for k, x in arrays.items() if k.startswith("column.")}
    pieces = []
    for i, (start, end) in enumerate(zip((ends - arrays["lengths"]).tolist(), ends.tolist(), strict=True)):
        own = {k: x[start:end] if k.endswith("_T") else x[i] for k, x in columns.items()}
        pieces.append(Encoded(arrays["ids"][start:end], arrays["mask"][start:end], own))
    upto = np.cumsum(arrays["pieces"]).tolist()
    return [
        Encoding(pieces[end - n : end], outcomes[k])
        for end, n, k in zip(upto, arrays["pieces"].tolist(), arrays["outcomes"].tolist(), strict=True)
    ]


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    h = hashlib.blake2b(digest_size=16)
    for k in sorted(arrays):
        h.update(f"{k} {arrays[k].dtype} {arrays[k].shape}".encode())
        h.update(arrays[k].tobytes())
    return h.hexdigest()


def _forget(newest: Path) -> None:
    """Remove what was used longest ago, until no more than `LIMIT` is left, and what a killed process left behind."""
    held = []
    for f in newest.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process removed it
            held.append((f.stat().st_mtime, f.stat().st_size, f))
    total = sum(n for _, n, _ in held)
    day_ago = time.time() - 86400
    for at, n, f in sorted(held):
        if f != newest and (total > LIMIT or (f.suffix != ".safetensors" and at < day_ago)):
            f.unlink(missing_ok=True)
            total -= n
