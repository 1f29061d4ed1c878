"""A trace of a few steps for xprof: what the devices did, operation by operation."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxtune import log


class Profile:
    """Writes a trace of some steps while they are taken.

    Args:
      folder: where it goes; `xprof` and TensorBoard's profile plugin open it.
      span: the first and the last step, both of them inclusive, as "10:13".
      start: steps taken so far; a span that is over brings nothing.
      total: steps of the run, where a longer span ends.
    """

    def __init__(self, folder: Path, span: str, start: int, total: int) -> None:
        first, last = map(int, span.split(":"))
        self.folder, self.steps = folder, range(max(first, start + 1), min(last, total) + 1)
        self._taken, self._open = start, False

    def watching(self, step: Callable[[Any, Mapping[str, Any]], Any]) -> Callable[[Any, Mapping[str, Any]], Any]:
        """The same step, traced where it is asked for: from idle devices to idle devices."""

        def traced(state: Any, batches: Mapping[str, Any]) -> Any:
            self._taken += 1
            if not self._open and self._taken in self.steps:
                jax.block_until_ready((state, batches))
                jax.profiler.start_trace(str(self.folder))
                self._open = True
            if not self._open:
                return step(state, batches)
            with jax.profiler.StepTraceAnnotation("train", step_num=self._taken):
                done = step(state, batches)
            if self._taken >= self.steps[-1]:
                jax.block_until_ready(done)
                self.close()
            return done

        return traced

    def close(self) -> None:
        """End a trace that is being written, also one that was interrupted."""
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            traced = f"steps {self.steps[0]} to {min(self._taken, self.steps[-1])}"
            log.say(f"trace of {traced}: xprof --logdir {self.folder}")
