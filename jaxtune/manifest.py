"""The manifest of a folder: size and hash of each of its files, written last, by which damage is seen.

Orbax says of a folder that its saving was finished, not that its bytes are still those: a bit that flips on the disk
is restored as if nothing were. Hashes are xxh3 (128 bits), which are as fast as the disk; they guard against accidents,
not against forgers.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import xxhash

NAME = "manifest.json"
_CHUNK = 2**22


def write(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a folder's files, and what else it shall remember (plain values)."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != NAME)
    with _pool() as pool:
        found = dict(zip((f.relative_to(folder).as_posix() for f in files), pool.map(_look, files), strict=True))
    body = {"about": dict(about), "files": found}
    text = json.dumps({**body, "self": _digest(body)}, indent=1)
    temporary = folder / f".{NAME}.tmp"
    with temporary.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(folder / NAME)


def read(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """What a manifest remembers besides its files, and what is wrong with the folder, an empty text if nothing is.

    Raises:
      FileNotFoundError: there is no manifest.
      OSError: a file is there and cannot be read, which says nothing of its bytes.
    """
    try:
        whole = json.loads((folder / NAME).read_text())
        body = {"about": whole["about"], "files": whole["files"]}
        if whole["self"] != _digest(body):
            return None, f"{NAME} was changed"
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as e:
        return None, f"{NAME} cannot be read: {type(e).__name__}"

    def wrong(name: str) -> str:
        try:
            size, digest = _look(folder / name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return f"{name} is missing"
        wanted_size, wanted = body["files"][name]
        if size != wanted_size:
            return f"{name} has {size:,} bytes instead of {wanted_size:,}"
        return "" if digest == wanted else f"{name} was changed"

    with _pool() as pool:
        found = [text for text in pool.map(wrong, body["files"]) if text]
    more = f" and {len(found) - 1} more" if len(found) > 1 else ""
    return body["about"], found[0] + more if found else ""


def digest(folder: Path) -> str:
    """A hash of all that a manifest says; nothing where there is none."""
    file = folder / NAME
    return json.loads(file.read_text())["self"] if file.exists() else ""


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


def _look(file: Path) -> tuple[int, str]:
    """Size and hash of a file, which is read piece by piece."""
    h, size = xxhash.xxh3_128(), 0
    with file.open("rb") as f:
        while piece := f.read(_CHUNK):
            h.update(piece)
            size += len(piece)
    return size, h.hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
