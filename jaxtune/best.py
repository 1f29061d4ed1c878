"""The best weights of a run by a score of its evaluations, and when there is no hope of better ones."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune import distributed, log
from jaxtune.checkpoint import Checkpoints
from jaxtune.config import Evaluate
from jaxtune.errors import UserError
from jaxtune.metrics.base import better
from jaxtune.saving import Saver

FOLDER = "best"


History = Sequence[Mapping[str, Any]]


def _scores(c: Evaluate, history: History) -> list[tuple[int, float]]:
    """Steps and scores, of which the greatest is the best."""
    key, sign = f"eval_{c.metric}", 1.0 if better(c.metric) == "max" else -1.0
    return [(m["step"], sign * m[key]) for m in history if key in m]


def best_step(c: Evaluate, history: History) -> int | None:
    """The step of the best evaluation; the first of equals.

    >>> best_step(Evaluate(metric="accuracy"), [{"step": 0, "eval_accuracy": 0.5}, {"step": 9, "eval_accuracy": 0.7}])
    9
    """
    return max(_scores(c, history), key=lambda s: (s[1], -s[0]), default=(None, 0.0))[0]


def hopeless(c: Evaluate, history: History) -> bool:
    """Whether `evaluate.patience` evaluations brought nothing better."""
    best = best_step(c, history)
    if c.patience is None or best is None:
        return False
    return sum(step > best for step, _ in _scores(c, history)) >= c.patience


class Best:
    """Which evaluation was the best so far, and its weights if they are to be exported."""

    def __init__(self, folder: Path, c: Evaluate, history: History, start: int) -> None:
        """`history` holds the entries of metrics.jsonl up to the step `start`; it grows as the run goes on."""
        self.c, self.history = c, history
        self._checkpoints = Checkpoints(folder / FOLDER, keep=1) if c.best else None
        self._held = self._newest()
        if self._checkpoints is not None and (self._held or 0) > start:  # the run was killed behind it
            self._checkpoints.close()
            if distributed.first():
                shutil.rmtree(folder / FOLDER)
            distributed.wait("best is removed")
            self._checkpoints, self._held = Checkpoints(folder / FOLDER, keep=1), None
        self._saver = Saver(self._checkpoints, again=False) if self._checkpoints is not None else None

    def _newest(self) -> int | None:
        """The step of the weights that are kept; a run needs none of them to go on."""
        try:
            return None if self._checkpoints is None else self._checkpoints.newest
        except UserError as e:
            log.warn(f"{e}; the run goes on without the best weights so far")
            return None

    @property
    def hopeless(self) -> bool:
        return hopeless(self.c, self.history)

    def see(self, n: int, trained: Any) -> None:
        """After the evaluation of step `n` stands in the history: keep its weights if it is the best.

        Raises:
          UserError: the evaluation gives no such score.
        """
        if not any(step == n for step, _ in _scores(self.c, self.history)):
            there = sorted({k[5:] for m in self.history for k in m if k.startswith("eval_")})
            raise UserError(f"evaluate.metric {self.c.metric!r} is not among the scores: {', '.join(there)}")
        checkpoints, saver = self._checkpoints, self._saver
        if checkpoints is not None and saver and best_step(self.c, self.history) == n and self._held != n:
            saver.save(n, lambda: checkpoints.save(n, {"trainable": trained}, {}, {"metric": self.c.metric}))

    def restored(self, like: Any) -> Any:
        """The best weights, of the form of `like`; None where none are kept."""
        if self._saver is not None:
            self._saver.settle()
        if self._checkpoints is None or (newest := self._newest()) is None:
            if self.c.best:
                log.warn("no weights of an evaluation are kept: the last ones are exported")
            return None
        if newest != (best := best_step(self.c, self.history)):
            log.warn(
                f"the weights of step {best}, which were the best, are not whole on the disk: an earlier best is taken"
            )
        log.say(f"the best {self.c.metric} was at step {newest}: its weights are exported")
        return self._checkpoints.restore(newest, {"trainable": like})[0]["trainable"]

    def close(self) -> None:
        if self._checkpoints is not None:
            self._checkpoints.close()
