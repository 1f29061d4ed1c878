"""What a run folder tells while `jaxtune train` writes it: steps, each once, and the checkpoints that are whole."""

import csv
import io
import json
import math
import os
from pathlib import Path
from typing import IO, Any

from jaxtune.log import read_metrics

METRICS, EXPORT, EXPORTS = "metrics.jsonl", "export", "exports"
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
_DATA = {  # names of metrics.jsonl, and as OpenAI has them
    "loss": ("train_loss",),
    "accuracy": ("train_mean_token_accuracy",),
    "eval_loss": ("valid_loss", "full_valid_loss"),  # it is measured on all of the validation file
    "eval_accuracy": ("valid_mean_token_accuracy", "full_valid_mean_token_accuracy"),
    "tokens_per_second": ("tokens_per_second",),
}
_SPOKEN = {"train_loss": "training loss", "full_valid_loss": "full validation loss"}


class Metrics:
    """The steps in a metrics.jsonl beyond `told`, as they become complete.

    A step's numbers come in several lines, so it is complete when a later step is there, or when the run has ended. A
    run that is taken up again writes the file anew, without the steps after its checkpoint; those come again, and are
    not told again.
    """

    def __init__(self, file: Path, told: int) -> None:
        self.file, self.told = file, told
        self._before = file.stat().st_ino if file.exists() else None  # what an earlier process wrote
        self._at, self._inode = 0, 0
        self._steps: dict[int, dict[str, Any]] = {}
        self._first: int | None = None
        self._newest = -1

    @property
    def moves(self) -> bool:
        """Whether the process that writes now was seen to take steps."""
        return self._first is not None and self._newest > self._first

    def read(self, ended: bool = False) -> list[dict[str, Any]]:
        """The steps that are complete and not told, in order; they come again until `done` is called."""
        try:
            with self.file.open("rb") as f:
                self._follow(f)
        except FileNotFoundError:
            return []
        ready = [n for n in sorted(self._steps) if n > self.told and (ended or n < self._newest)]
        return [self._steps[n] for n in ready if measured(self._steps[n])]

    def _follow(self, f: IO[bytes]) -> None:
        here = os.fstat(f.fileno())
        if here.st_ino != self._inode or here.st_size < self._at:  # written anew
            self._at, self._inode, self._newest, self._first = 0, here.st_ino, -1, None
            self._steps.clear()
        f.seek(self._at)
        blob = f.read()
        whole = blob[: blob.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            self._newest = max(self._newest, step := entry["step"])
            if step > self.told:
                self._steps.setdefault(step, {}).update(entry)
        if self._first is None and here.st_ino != self._before:
            self._first = self._newest

    def done(self, step: int) -> None:
        """Steps up to this one are told."""
        self.told = step
        self._steps = {n: x for n, x in self._steps.items() if n > step}


def measured(entry: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a step under OpenAI's names.

    >>> measured({"step": 3, "loss": 0.5, "seconds": {}})
    {'train_loss': 0.5}
    """
    return {
        name: entry[key] for key, names in _DATA.items() for name in names if key in entry and math.isfinite(entry[key])
    }


def message(entry: dict[str, Any]) -> str:
    """
    >>> message({"step": 3, "total_steps": 30, "loss": 0.154, "eval_loss": 0.401})
    'Step 3/30: training loss=0.15, full validation loss=0.40'
    >>> message({"step": 4, "total_steps": 30, "loss": math.nan})
    'Step 4/30: the loss is not finite'
    """
    found = measured(entry)
    said = ", ".join(f"{words}={found[name]:.2f}" for name, words in _SPOKEN.items() if name in found)
    return f"Step {entry['step']}/{entry['total_steps']}: {said or 'the loss is not finite'}"


def data(entry: dict[str, Any]) -> dict[str, Any]:
    """The `data` of a step's event."""
    return {"step": entry["step"], "total_steps": entry["total_steps"], **measured(entry)}


def steps(run: Path) -> dict[int, dict[str, Any]]:
    """All that a run has measured, by step."""
    found: dict[int, dict[str, Any]] = {}
    for entry in read_metrics(run / METRICS):
        found.setdefault(entry["step"], {}).update(entry)
    return found


def result_csv(run: Path) -> bytes:
    """The result file: a line a step."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for step, entry in sorted(steps(run).items()):
        found = measured(entry)
        names = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
        if found and step:
            writer.writerow([step, *(found.get(name, "") for name in names)])
    return out.getvalue().encode()


def exported(run: Path) -> list[int]:
    """The steps whose models lie in the run folder, whole, in order."""
    folder = run / EXPORTS
    found = folder.iterdir() if folder.is_dir() else []
    numbers = (f.name.removeprefix("step-") for f in found if f.name.startswith("step-"))
    return sorted(int(n) for n in numbers if n.isdecimal())
