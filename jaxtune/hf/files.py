"""Safetensors folders: tensors found in their shards without being read, and written one by one.

The format is eight bytes of header length, a JSON header, and raw little-endian data
(https://huggingface.co/docs/safetensors). Tensors are memory-mapped, so only the bytes asked for are read.
"""

import contextlib
import fcntl
import fnmatch
import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jaxtune.errors import Interrupted, UserError
from jaxtune.hf import layout
from jaxtune.layers import is_weight
from jaxtune.weights import path_name

DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "U16": np.dtype("uint16"),
    "U32": np.dtype("uint32"),
    "U64": np.dtype("uint64"),
    "BOOL": np.dtype("bool"),
}
NAMES = {v: k for k, v in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
LONGEST_HEADER = 100_000_000  # bytes, as the library has it


class Tensor(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes, from the start of the file

    def open(self) -> np.ndarray:
        """A read-only array over the mapped file."""
        if not prod(self.shape):
            return np.zeros(self.shape, self.dtype)
        with self.file.open("rb") as f:
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, self.dtype, prod(self.shape), self.start).reshape(self.shape)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, checked against the file's size.

    Raises:
      UserError: the file is missing, cut short, or its header is damaged.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            head = f.read(8)
            blob = f.read(min(int.from_bytes(head, "little"), LONGEST_HEADER))
    except FileNotFoundError as e:
        raise UserError(f"{file}: no such file; is the folder whole?") from e
    return parse_header(file, head, blob, size)


def parse_header(file: Path, head: bytes, blob: bytes, size: int) -> dict[str, Tensor]:
    """The tensors that a header names: `head` is its length in eight bytes, `blob` its JSON, `size` the file's."""
    remedy = "copy or download the file again"
    length = int.from_bytes(head, "little")
    if size < 8 or length > size - 8 or len(blob) < length:
        raise UserError(f"{file}: not a whole safetensors file (header of {length} bytes, file {size}); {remedy}")
    try:
        header = json.loads(blob)
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{file}: the safetensors header is damaged ({e}); {remedy}") from e
    if not isinstance(header, dict):
        raise UserError(f"{file}: the safetensors header is damaged (no mapping); {remedy}")
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (start, stop) = DTYPES[info["dtype"]], tuple(info["shape"]), info["data_offsets"]
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(f"{file}: the safetensors header is damaged at {name!r} ({e!r}); {remedy}") from e
        if stop - start != prod(shape) * dtype.itemsize or start < 0 or 8 + length + stop > size:
            raise UserError(f"{file}: tensor {name!r} does not fit in the file of {size} bytes; {remedy}")
        tensors[name] = Tensor(file, dtype, shape, 8 + length + start)
    return tensors


def inside(root: Path, name: str) -> Path:
    """`root/name`, refused where it leads out of `root`."""
    if (
        os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == ".."
    ):  # links, as the hub's cache has, are fine
        raise UserError(f"{root}: file name {name!r} leads out of the folder")
    return root / name


# --- out of arrays --------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A tensor to be written: its shape and dtype now, its data when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    data: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def entries(weights: Any, dtype: np.dtype, family: str) -> dict[str, Entry]:
    """The Hugging Face tensors of a tree of `Weight`s with plain arrays: of a model that has no base folder."""
    out = {}
    for path, w in jax.tree_util.tree_leaves_with_path(weights, is_leaf=is_weight):
        for name, at in zip(layout.hf_names(path_name(path), w, family), layout.places(w), strict=True):

            def data(w: Any = w, at: dict[str, int] = at) -> np.ndarray:
                return layout.to_hf(np.asarray(layout.pick(w, at)), w).astype(dtype)

            out[name] = Entry(layout.hf_shape(w), dtype, data)
    return out


def checked(name: str, entry: Entry) -> np.ndarray:
    """The data of an entry.

    Raises:
      UserError: it holds NaN or infinity.
    """
    data = entry.data()
    if data.shape != entry.shape or data.dtype != entry.dtype:
        raise ValueError(f"{name}: made {data.dtype}{data.shape}, announced {entry[:2]}")
    if not finite(data):
        raise UserError(f"{name}: holds NaN or infinity in {data.dtype}; mend the weights, or choose a wider dtype")
    return data


_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


def finite(x: np.ndarray) -> bool:
    """Whether no number is NaN or infinite; other than floats always are.

    >>> finite(np.ones(3, np.float16)), finite(np.array([1.0, np.inf], np.float32))
    (True, False)
    """
    if (mask := _EXPONENTS.get(x.dtype.name)) is not None:  # numpy has no quick test for half precision
        return not bool(((x.view(np.uint16) & mask) == mask).any())
    return bool(np.isfinite(x).all()) if x.dtype.kind == "f" else True


def _header(tensors: Mapping[str, Entry]) -> tuple[bytes, list[str]]:
    """The first bytes of a file of these tensors, and their order in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))  # the library's order: aligned data
    for name in order:
        t = tensors[name]
        header[name] = {
            "dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes],
        }  # fmt: skip
        offset += t.nbytes
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    return len(blob).to_bytes(8, "little") + blob, order


def write(
    file: Path, tensors: Mapping[str, Entry], said: Callable[[int], None] = lambda n: None, keep: bool = False
) -> None:
    """Write one safetensors file as transformers expects it, holding one tensor in memory at a time.

    The file appears when it is whole. `said` is told how many bytes were written. With `keep` a file that is there
    already, with tensors of these names and shapes, is taken to be this one.

    Raises:
      UserError: a tensor holds NaN or infinity.
    """
    head, order = _header(tensors)
    total = sum(t.nbytes for t in tensors.values())
    if keep and file.exists() and file.stat().st_size == len(head) + total:
        with file.open("rb") as f:
            if f.read(len(head)) == head:
                return said(total)
    half = file.with_name(f"{file.name}.part")
    with half.open("wb") as f:
        f.write(head)
        for name in order:
            data = np.asarray(checked(name, tensors[name]), order="C")
            f.write(data.reshape(-1).view(np.uint8).data)
            said(data.nbytes)
        f.flush()
        os.fsync(f.fileno())
    half.rename(file)


def write_folder(
    folder: Path,
    tensors: Mapping[str, Entry],
    shard_bytes: int = SHARD_BYTES,
    said: Callable[[int], None] = lambda n: None,
    keep: bool = False,
) -> None:
    """Write `model.safetensors`, or shards and their index where it would be larger than `shard_bytes`; see `write`."""
    shards: list[dict[str, Entry]] = [{}]
    filled = total = 0
    for name, t in tensors.items():
        if shards[-1] and filled + t.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = t
        filled, total = filled + t.nbytes, total + t.nbytes
    if len(shards) == 1:
        return write(folder / "model.safetensors", shards[0], said, keep)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(folder / file, shard, said, keep)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def refuse_full(folder: Path) -> None:
    """Raises: UserError: the folder exists and holds something, or is a file."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; choose another folder or remove it")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is not empty; choose another folder or remove it")


@contextlib.contextmanager
def whole(folder: Path, replace: bool = False) -> Iterator[Path]:
    """A folder that appears by rename when it is complete, or not at all.

    Raises:
      UserError: it exists already (and `replace` is not set), or the disk is full.
    """
    if not replace:
        refuse_full(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    for stale in folder.parent.glob(f".{folder.name}.*.*"):
        if re.fullmatch(r".*\.(\d+)\.(tmp|old)", stale.name) and not _alive(int(stale.name.split(".")[-2])):
            if stale.suffix == ".old" and not folder.exists():  # killed between the two renames
                stale.rename(folder)
            shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as e:
        raise UserError(f"{folder}: cannot write ({e.strerror or e}); what was there before is kept") from e
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def partial(folder: Path) -> Path:
    """Where a folder is written until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


@contextlib.contextmanager
def resumable(folder: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    """As `whole`, but what is there stays when the process is killed, and is gone on with when `about` is the same.

    Raises:
      UserError: the folder exists already, another process writes it, or the disk is full (what is there stays).
    """
    refuse_full(folder)
    half = partial(folder)
    half.mkdir(parents=True, exist_ok=True)
    note = half / ".about.json"
    with (half / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{folder}: another process writes it; wait for it or choose another folder") from e
        wanted = json.dumps(about, sort_keys=True)
        if not note.exists() or note.read_text() != wanted:  # begun from something else
            for stale in half.iterdir():
                if stale.name != ".lock":
                    shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            note.write_text(wanted)
        try:
            yield half
        except OSError as e:
            place = f"what is written stays in {half.name}"
            raise UserError(f"{folder}: cannot write ({e.strerror or e}); {place}, run it again to go on") from e
        except Interrupted:
            raise
        except Exception:
            shutil.rmtree(half)
            raise
        note.unlink()
        (half / ".lock").unlink()
        if folder.exists():
            folder.rmdir()
        half.rename(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def copy_files(source: Path, target: Path, patterns: Iterable[str]) -> None:
    """Copy the files whose names fit a pattern, byte for byte."""
    patterns = list(patterns)
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch.fnmatchcase(file.name, p) for p in patterns):
            shutil.copyfile(file, target / file.name)


SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
LICENCE_FILES = ("[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*", "NOTICE*", "Notice*", "USE_POLICY*", "ACCEPTABLE_USE*")
