"""Checkpoints of torch.save, read without torch and without running anything that they hold.

Since torch 1.6 such a file (`pytorch_model.bin`, `consolidated.00.pth`) is a zip archive: `data.pkl` is a pickle of the
names, shapes and strides, and each storage is an uncompressed entry `data/<key>`
(https://docs.pytorch.org/docs/main/notes/serialization.html). So every tensor is a stretch of the file.

A pickle is a program that may call whatever it can name. Here it can name the few things that torch writes for a
mapping of tensors, each replaced by a stand-in that only notes what it is given.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf.files import DTYPES, Tensor

_STORAGES = {
    "BFloat16Storage": "BF16",
    "BoolStorage": "BOOL",
    "ByteStorage": "U8",
    "CharStorage": "I8",
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "ShortStorage": "I16",
}
_LATER = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}  # dtypes without a storage class of their own
_AGAIN = "copy or download the file again"
_CONVERT = "convert it to safetensors where it was made"
_LONGEST = 2**28  # bytes of data.pkl; that of the largest LLaMA has less than 2**18


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint that torch (1.6 or later) saved: a flat mapping of names to tensors.

    No tensor is read yet, no code of the file is run, and torch is not needed.

    Raises:
      UserError: the file is missing, damaged or older than torch 1.6, its pickle asks for more than tensors, or a
        tensor is not contiguous.
    """
    try:
        with file.open("rb") as f:
            if (magic := f.read(4)) != b"PK\3\4":
                what = "no zip archive, as torch saves since 1.6" if magic else "empty"
                raise UserError(f"{file}: {what}; {_AGAIN}, or, if torch reads it, {_CONVERT}")
            with zipfile.ZipFile(f) as archive:
                found = _Archive(file, f, archive).load()
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(f"{file}: no such file; is the folder whole?") from e
    except Exception as e:  # what zipfile and pickle raise on damage is no closed list
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{file}: the checkpoint is damaged ({reason}); {_AGAIN}") from e
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds no mapping of names to tensors; save model.state_dict(), or {_CONVERT}")
    for name, value in found.items():
        if isinstance(value, _Strided):
            raise UserError(
                f"{file}: tensor {name!r} is not contiguous (strides {list(value.strides)}); save it as "
                "tensor.contiguous(), or convert it to safetensors where it was made"
            )
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = "another mapping" if isinstance(value, dict) else f"a value of type {type(value).__name__}"
            raise UserError(
                f"{file}: {str(name)[:80]!r} holds {kind}, not a tensor; save model.state_dict() alone, or {_CONVERT}"
            )
    return dict(found)


# Stand-ins are tuples, so that a pickle can set no attribute of them; and no call hands out one of their fields.


class _Kind(NamedTuple):
    """Stands for a storage class or a dtype of torch."""

    dtype: np.dtype | None  # None: bytes, of a dtype that comes with the tensor


class _Storage(NamedTuple):
    """A stretch of the file."""

    start: int
    size: int  # bytes
    dtype: np.dtype | None


class _Strided(NamedTuple):
    """A tensor that is not contiguous."""

    strides: tuple[int, ...]


class _Call(NamedTuple):
    """Stands for a function of torch."""

    make: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)


class _Archive:
    """The entries of an open checkpoint."""

    def __init__(self, file: Path, raw: BinaryIO, archive: zipfile.ZipFile) -> None:
        self.file, self.raw, self.archive = file, raw, archive
        self.entries = {i.filename: i for i in archive.infolist()}
        roots = [n.removesuffix("data.pkl") for n in self.entries if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UserError(f"{file}: a zip archive, but not of torch.save: it has no data.pkl; {_CONVERT}")
        self.root = roots[0]

    def load(self) -> Any:
        """What the pickle holds, of stand-ins."""
        if (name := self.root + "byteorder") in self.entries and self.small(name) != b"little":
            raise UserError(f"{self.file}: written on a big-endian machine; {_CONVERT}")
        return _Unpickler(self).load()

    def small(self, name: str) -> bytes:
        """The content of an entry; the archive's checksum of it is checked."""
        size = self.place(name)[1]
        if size > _LONGEST:
            raise UserError(f"{self.file}: {name!r} has {size} bytes, more than any model needs; {_CONVERT}")
        return self.archive.read(name)

    def place(self, name: str) -> tuple[int, int]:
        """Where an entry's bytes start in the file, and how many they are."""
        if (entry := self.entries.get(name)) is None:
            raise UserError(f"{self.file}: has no entry {name!r}; {_AGAIN}")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise UserError(f"{self.file}: {name!r} is compressed, which torch.save never does; {_CONVERT}")
        # The entry's own header has a name and padding of its own lengths. What follows the data starts with PK too.
        self.raw.seek(entry.header_offset)
        header = self.raw.read(30)
        start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little")
        self.raw.seek(start + entry.file_size)
        if header[:4] != b"PK\3\4" or self.raw.read(2) != b"PK":
            raise UserError(f"{self.file}: {name!r} is not where the archive says; {_AGAIN}")
        return start, entry.file_size


class _Unpickler(
    pickle._Unpickler
):  # the one in C makes its memo as long as the pickle says: gigabytes from a few bytes
    """Makes `Tensor`s, refuses the rest."""

    def __init__(self, archive: _Archive) -> None:
        super().__init__(io.BytesIO(archive.small(archive.root + "data.pkl")))
        self.archive, self.place = archive, archive.file
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _Call(self.tensor),
            ("torch._utils", "_rebuild_tensor_v3"): _Call(self.later_tensor),
            ("torch._utils", "_rebuild_parameter"): _Call(self.parameter),
            ("torch.storage", "UntypedStorage"): _Kind(None),
            **{("torch", n): _Kind(DTYPES[d]) for n, d in (_STORAGES | _LATER).items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a global.

        Raises:
          UserError: the pickle names anything but the parts of a tensor.
        """
        if (found := self.known.get((module, name))) is None:
            raise UserError(
                f"{self.place}: refuses to load {f'{module}.{name}'[:120]!r}, which is no part of a tensor and may run "
                f"code; if you trust the file, {_CONVERT}"
            )
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        """The place of a storage that the pickle refers to."""
        tag, kind, key, _, count = pid
        if tag != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str) or type(count) is not int:
            raise ValueError(f"no storage: {pid!r}")
        start, size = self.archive.place(f"{self.archive.root}data/{key}")
        if count * (kind.dtype.itemsize if kind.dtype else 1) != size:
            raise UserError(f"{self.place}: storage {key!r} should have {count} elements, has {size} bytes; {_AGAIN}")
        return _Storage(start, size, kind.dtype)

    def tensor(self, storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Any:
        """In the place of torch's function; what follows the strides (gradients, hooks) is of no use here."""
        if not isinstance(storage, _Storage) or storage.dtype is None:
            raise ValueError("a tensor without a storage")
        return self._view(storage, storage.dtype, offset, shape, strides)

    def later_tensor(
        self, storage: _Storage, offset: int, shape: Any, strides: Any, grad: Any, hooks: Any, kind: _Kind, *_: Any
    ) -> Any:
        """The same for dtypes that have no storage class."""
        if not isinstance(storage, _Storage) or not isinstance(kind, _Kind) or kind.dtype is None:
            raise ValueError("a tensor without a storage or a dtype")
        return self._view(storage, kind.dtype, offset, shape, strides)

    def parameter(self, data: Any, *_: Any) -> Any:
        """A parameter is the tensor in it. Nothing else comes back, or `*tensor` would yield its path."""
        if not isinstance(data, Tensor | _Strided):
            raise ValueError("a parameter without a tensor")
        return data

    def _view(self, storage: _Storage, dtype: np.dtype, offset: int, shape: Any, strides: Any) -> Any:
        for sizes in (shape, strides, (offset,)):
            if type(sizes) is not tuple or not all(type(n) is int and n >= 0 for n in sizes):
                raise ValueError(f"a tensor of shape {shape!r}, strides {strides!r}, offset {offset!r}")
        if len(shape) > 32 or (offset + prod(shape)) * dtype.itemsize > storage.size:
            raise ValueError(f"a tensor of shape {list(shape)} at {offset} leaves its storage of {storage.size} bytes")
        packed = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        if prod(shape) and any(n > 1 and a != b for n, a, b in zip(shape, strides, packed, strict=True)):
            return _Strided(strides)  # refused where its name is known
        return Tensor(self.place, dtype, shape, storage.start + offset * dtype.itemsize)
