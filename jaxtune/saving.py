"""Saving that does not end a run: what cannot be written is said and tried again."""

import time
from collections.abc import Callable

from jaxtune import distributed, log
from jaxtune.checkpoint import Checkpoints
from jaxtune.errors import UserError

PAUSES = (5, 10, 20, 40, 80, 160)  # seconds between tries of the last save
_FIRST, _LONGEST = 30.0, 960.0  # seconds until a save that failed is tried again; each failure doubles them
_PATIENCE = 10.0  # seconds that a save waits for the one before

Save = Callable[[], None]


class Saver:
    """Keeps trying to save, see `Checkpoints`: a full, read-only, slow or vanishing disk does not stop the training.

    Several processes have to save the same steps, so each call here is to be made by all of them.
    """

    def __init__(self, checkpoints: Checkpoints, start: int = 0, again: bool = True) -> None:
        """`start`: the step that is there already; `again`: whether what failed will be tried again."""
        self.checkpoints, self._again = checkpoints, again
        self._last = start or None  # the last step whose save was begun and is not known to have failed
        self.failures, self._next_try = 0, 0.0
        self._left_out = False

    @property
    def overdue(self) -> bool:
        """Whether it is time to try again after a failure, or to make up for a step that was left out."""
        if self._left_out:
            return not self.checkpoints.busy
        return self.failures > 0 and time.monotonic() >= self._next_try

    def save(self, n: int, save: Save) -> None:
        """Begin to save step `n`. Where the save before is still going on after a while, it is put off until that is
        done."""
        self._left_out = distributed.count() == 1 and not self.checkpoints.done(_PATIENCE)
        if self._left_out:
            return log.warn(
                f"step {n}: the save before is still being written, so this one is put off until it is done"
            )
        self.settle()
        self._last = None
        try:
            save()
            self._last = n
        except UserError as e:
            self._failed(n, e)

    def settle(self) -> None:
        """Wait for what is being written."""
        try:
            self.checkpoints.wait()
            if self._last is not None:
                self.failures = 0
        except UserError as e:
            n, self._last = self._last, None
            self._failed(n or 0, e)

    def _failed(self, n: int, e: UserError) -> None:
        self.failures += 1
        wait = min(_FIRST * 2 ** (self.failures - 1), _LONGEST)
        self._next_try = time.monotonic() + wait
        again = f"and saving is tried again, at the latest in {log.duration(wait)}" if self._again else "without it"
        log.warn(f"step {n}: {e}; training goes on, {again}", everywhere=True)

    def finish(self, n: int, save: Save) -> UserError | None:
        """Wait until step `n`, the last, is saved; try again for some minutes. What to say if it cannot be."""
        self.settle()
        for pause in (0, *PAUSES):
            if distributed.everywhere(self._last == n):
                return None
            if pause:
                log.warn(
                    f"step {n}, the last, is not saved; the next try is in {pause} s: make room or mend "
                    f"{self.checkpoints.folder}"
                )
                time.sleep(pause)
            self.save(n, save)
            self.settle()
        if distributed.everywhere(self._last == n):
            return None
        try:
            steps = self.checkpoints.steps
            kept = f"the newest checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint"
        except OSError as e:
            kept = f"which one is there cannot be seen ({e.strerror})"
        return UserError(
            f"{self.checkpoints.folder}: step {n} could not be saved; {kept}: what came after it is lost, and the same "
            "command takes those steps again once there is room"
        )
