"""`jaxtune train` as a process beside a worker: its own session, no secrets in its environment, a log in its folder."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

LOG, STOP, LOCK = "log.txt", "STOP", ".lock"  # of a job's folder; of its run folder
TRAIN = (sys.executable, "-P", "-m", "jaxtune", "train")
_KEPT = {
    "HOME", "PATH", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONWARNINGS", "VIRTUAL_ENV",
    "XDG_CACHE_HOME", "TOKENIZERS_PARALLELISM",
}  # fmt: skip
_KEPT_PREFIXES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "CUDA_", "NVIDIA_", "NCCL_", "LC_", "OMP_", "MEGASCALE_")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")
_TAIL = 4096  # bytes of the log in which the last line is looked for


class Child:
    """A training process of a job."""

    def __init__(self, folder: Path, config: Path, command: Sequence[str] = TRAIN) -> None:
        """Start it in the job's folder."""
        self.folder = folder
        with contextlib.suppress(FileNotFoundError):
            (folder / "run" / STOP).unlink()  # of a time before
        with (folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 a list of arguments, no shell
                [sys.executable, "-P", str(Path(__file__).with_name("starter.py")), str(os.getpid()), *command, config],
                cwd=folder,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        return self._process.poll()

    def ask(self) -> None:
        """To save after the step that it is at, and leave."""
        try:
            (self.folder / "run" / STOP).touch()
        except OSError:  # a disk that is full
            self.terminate()

    def terminate(self) -> None:
        """The same by SIGTERM, which is seen where the storage is not."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """At once, with all that it started, and wait for the end."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def last_line(self) -> str:
        """The last line of its log."""
        with (self.folder / LOG).open("rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - _TAIL))
            said = f.read().decode(errors="replace").strip()
        return said.splitlines()[-1] if said else ""


def environment() -> dict[str, str]:
    """What of this environment training sees: no keys, no tokens, no database."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if (k in _KEPT or k.startswith(_KEPT_PREFIXES)) and not any(s in k for s in _SECRET)
    }
    ours = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}  # the same jaxtune, wherever it starts
    return {**kept, **ours, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def busy(run: Path) -> bool:
    """Whether a process trains in a run folder: one of a worker that was killed may still be saving."""
    try:
        with (run / LOCK).open("r+") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file yet, or storage without locks
        return False
    return False
