"""Where the time of a run goes."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator


class Clock:
    """Seconds by what they were spent on: step, input, compile, checkpoint, evaluate, start, lost."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count the time within as this part's."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spent[part] += time.perf_counter() - begin
