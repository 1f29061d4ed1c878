"""Model folders in object stores (`gs://bucket/model`), by fsspec: tensors are read range by range, where they lie.

The small files (config, tokenizer, index) are copied to a local folder; `remote.json` in it says where the shards are,
of which each process reads the bytes of its own devices' parts only.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import UserError
from jaxtune.hf import files, layout
from jaxtune.layers import Weight

MARK = "remote.json"
_SMALL = (*files.SIDE_FILES, *files.LICENCE_FILES, files.INDEX)


class Remote:
    """A tensor in a safetensors file of an object store."""

    def __init__(self, store: Any, file: str, at: files.Tensor) -> None:
        self.dtype, self.shape = at.dtype, at.shape
        self._store, self._file, self._start = store, file, at.start

    def _rows(self, first: int, last: int) -> np.ndarray:
        each = prod(self.shape[1:]) * self.dtype.itemsize
        with _told(self._file):
            blob = self._store.cat_file(self._file, self._start + first * each, self._start + last * each)
        return np.frombuffer(blob, self.dtype).reshape(last - first, *self.shape[1:])

    def open(self) -> np.ndarray:
        return self._rows(0, self.shape[0]) if self.shape else self._rows(0, 1).reshape(())

    def part(self, w: Weight, rest: tuple[slice, ...]) -> np.ndarray:
        """Slices of the tensor in our layout; of its rows only those are read that they need."""
        body = layout.body(w)
        axis = w.n_in if layout.transposed(w) else 0  # ours that is split over the rows
        first, last, _ = rest[axis].indices(body[axis])
        each = self.shape[0] // body[axis]
        view = layout.from_hf(self._rows(first * each, last * each), w, {axis: last - first})
        return view[tuple(slice(None) if a == axis else s for a, s in enumerate(rest))]


@contextlib.contextmanager
def _told(place: str) -> Iterator[None]:
    """What an object store raises, as one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as e:
        reason = " ".join(str(e).split())[:200]
        raise UserError(
            f"{place}: cannot be read ({type(e).__name__}: {reason}); look at the name and your rights, and that the "
            "store's package (gcsfs for gs://) is installed"
        ) from e


def fetch(url: str) -> Path:
    """A local folder with the small files of a remote model folder.

    Raises:
      UserError: the store cannot be read.
    """
    import fsspec

    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtune" / "models"
    folder = root / hashlib.blake2b(url.encode(), digest_size=12).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    with _told(url):
        store, path = fsspec.core.url_to_fs(url)
        listed = {f["name"].rsplit("/", 1)[-1]: f for f in store.ls(path, detail=True)}
        small = {n for n in listed if any(fnmatch.fnmatchcase(n, p) for p in _SMALL)}
        for name in small:
            half = folder / f".{name}.{os.getpid()}"
            half.write_bytes(store.cat_file(f"{path}/{name}"))
            half.rename(folder / name)
    for gone in {f.name for f in folder.iterdir()} - small:
        (folder / gone).unlink()
    seen = {n: [f.get("size"), str(f.get("etag") or f.get("mtime") or f.get("created"))] for n, f in listed.items()}
    (folder / MARK).write_text(json.dumps({"url": url, "files": seen}, sort_keys=True))
    return folder


def reader(folder: Path) -> Callable[[Path], Mapping[str, Remote]]:
    """What reads the header of a shard of a fetched folder."""
    import fsspec

    url = json.loads((folder / MARK).read_text())["url"]
    store, path = fsspec.core.url_to_fs(url)

    def read(file: Path) -> dict[str, Remote]:
        place = f"{path}/{file.name}"
        with _told(f"{url}/{file.name}"):
            size = store.size(place)
            head = store.cat_file(place, 0, 8)
            blob = store.cat_file(place, 8, 8 + min(int.from_bytes(head, "little"), files.LONGEST_HEADER))
        found = files.parse_header(Path(f"{url}/{file.name}"), head, blob, size)
        return {name: Remote(store, place, t) for name, t in found.items()}

    return read
