"""The storage folder: where the bytes of files, uploads, jobs and models lie, all of them by id.

data/
  files/<file id>          uploaded and result files
  uploads/<upload id>/<part id>
  jobs/<job id>/           config.yaml (what `jaxtune train` is given), log.txt, run/ (its run folder)
"""

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from jaxtune.serve.store import ids
from jaxtune.serve.store.tables import Model

_UNFINISHED = ".part"
_LEFT_S = 86400  # after which bytes that nobody knows are swept away


class TooLarge(ValueError):
    """More bytes came than may."""


class Writing:
    """Bytes on their way to a place: counted, hashed, and there under their name only when all of them are."""

    def __init__(self, place: Path, limit: int) -> None:
        self.place, self.limit = place, limit
        self.bytes, self._sha256, self._md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self._kept = False
        self.path = place.with_name(place.name + _UNFINISHED)
        self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb")

    def write(self, data: bytes) -> None:
        """Raises: TooLarge: the limit is passed."""
        self.bytes += len(data)
        if self.bytes > self.limit:
            raise TooLarge(f"more than {self.limit} bytes")
        self._sha256.update(data)
        self._md5.update(data)
        self._file.write(data)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def md5(self) -> str:
        return self._md5.hexdigest()

    def written(self) -> Path:
        """All is written: onto the disk with it, still under the name of something unfinished."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return self.path

    def keep(self) -> None:
        """Give it its name; once more does nothing more."""
        if self._kept:
            return
        self.written().rename(self.place)
        self._kept = True
        folder = os.open(self.place.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def drop(self) -> None:
        """Leave nothing, whether it was kept or not."""
        self._file.close()
        self.path.unlink(missing_ok=True)
        self.place.unlink(missing_ok=True)


class Storage:
    """Places in the storage folder. Only ids become paths, and only those of the form of an id."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @contextlib.contextmanager
    def writing(self, place: Path, limit: int) -> Iterator[Writing]:
        """Write to a place of this storage; where the block fails, nothing is left of it.

        Raises:
          TooLarge: more than `limit` bytes came.
        """
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        writing = Writing(place, limit)
        try:
            yield writing
            writing.keep()
        except BaseException:
            writing.drop()
            raise

    def free_bytes(self) -> int:
        """What the disk has left."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        return shutil.disk_usage(self.root).free

    def delete_file(self, file_id: str) -> None:
        """A file's bytes, if they are still there."""
        self.file(file_id).unlink(missing_ok=True)

    def delete_upload(self, upload_id: str) -> None:
        """The parts of an upload."""
        shutil.rmtree(self.upload(upload_id), ignore_errors=True)

    def delete_model(self, model: Model) -> None:
        """A model's folder. Raises: ValueError: as `model`; OSError: the disk does not let it go."""
        folder = self.model(model)
        if folder.exists():
            shutil.rmtree(folder)

    def strays(self) -> Iterator[tuple[str, Path]]:
        """Ids and paths of files' bytes that are a day old or more, whoever they belong to, and of unfinished ones."""
        folder, before = self.root / "files", time.time() - _LEFT_S
        for path in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                if path.lstat().st_mtime < before:
                    yield path.name, path

    def uploads(self) -> list[str]:
        """Uploads that have a folder for their parts."""
        folder = self.root / "uploads"
        return [p.name for p in folder.iterdir() if ids.is_id(p.name, ids.UPLOAD)] if folder.is_dir() else []

    def file(self, file_id: str) -> Path:
        """Where a file's bytes lie."""
        return self._place("files", file_id, ids.FILE)

    def upload(self, upload_id: str) -> Path:
        """The folder of an upload's parts."""
        return self._place("uploads", upload_id, ids.UPLOAD)

    def part(self, upload_id: str, part_id: str) -> Path:
        """Where a part's bytes lie."""
        if not ids.is_id(part_id, ids.PART):
            raise ValueError(f"{part_id!r} is no id")
        return self.upload(upload_id) / part_id

    def job(self, job_id: str) -> Path:
        """The folder of a job; `run/` in it is its run folder."""
        return self._place("jobs", job_id, ids.JOB)

    def model(self, model: Model) -> Path:
        """The folder of a tuned model: a PEFT adapter or a whole model.

        Raises:
          ValueError: its row leads out of the storage folder.
        """
        folder = (self.root / model.folder).resolve()
        root = self.root.resolve()
        if folder == root or not folder.is_relative_to(root):
            raise ValueError(f"model {model.id}: its folder is not in the storage folder")
        return folder

    def _place(self, kind: str, name: str, prefix: str) -> Path:
        if not ids.is_id(name, prefix):
            raise ValueError(f"{name!r} is no id")
        return self.root / kind / name
