"""Where the time of a run goes, and how much of it went into steps that count (goodput).

Each second belongs to one part:

- start: before the first step, all that is not compiling: reading data and weights, restoring a checkpoint
- compile: waiting for the compiler of the step
- input: waiting for a batch and for its way onto the devices, while these had nothing to do
- evaluate: measuring on the validation set, and keeping the best weights
- checkpoint: handing a checkpoint over to be written, and waiting for the last one
- export: writing the result
- lost: what earlier attempts did after the step that was gone on from, as far as their last line tells
- steps: the rest of the loop. Steps are dispatched ahead of what the devices do, so only a remainder can be taken
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class Clock:
    """Seconds by part. A part within another is counted once, as the inner one. For one thread."""

    def __init__(self, part: str = "start") -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._open, self._since = [part], time.perf_counter()

    @contextlib.contextmanager
    def on(self, part: str, unless: Callable[[], bool] | None = None) -> Iterator[None]:
        """Count the time within as this part's; as the part's around it where `unless` says so at the end."""
        self._count()
        self._open.append(part)
        try:
            yield
        finally:
            around = self._open[-2]
            self._count(around if unless is not None and unless() else part)
            self._open.pop()

    def _count(self, part: str | None = None) -> None:
        now = time.perf_counter()
        self._spent[part or self._open[-1]] += now - self._since
        self._since = now

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what earlier attempts spent."""
        for part, n in seconds.items():
            self._spent[part] += n

    def seconds(self) -> dict[str, float]:
        """Seconds so far, by part."""
        self._count()
        return {part: round(n, 2) for part, n in self._spent.items()}


def carried(entries: Sequence[Mapping[str, Any]], start: int) -> dict[str, float]:
    """What earlier attempts spent by the entries of their metrics.jsonl, where a run goes on after step `start`.

    >>> carried([{"step": 5, "seconds": {"steps": 3.0}}, {"step": 9, "seconds": {"steps": 7.0}}], 5)
    {'steps': 3.0, 'lost': 4.0}
    """
    told = [e for e in entries if "seconds" in e]
    if not told:
        return {}
    kept: dict[str, float] = next((e["seconds"] for e in reversed(told) if e["step"] <= start), {})
    lost = sum(told[-1]["seconds"].values()) - sum(kept.values())
    return {**kept, "lost": round(kept.get("lost", 0.0) + lost, 2)} if lost > 0 else dict(kept)


def shares(seconds: Mapping[str, float]) -> str:
    """Parts as shares of the whole, the greatest first; those below half a percent are left out.

    >>> shares({"steps": 96.0, "input": 3.0, "start": 1.0, "lost": 0.1})
    '96 % steps, 3 % input, 1 % start'
    """
    whole = max(sum(seconds.values()), 1e-9)
    ordered = sorted(((100 * n / whole, part) for part, n in seconds.items()), reverse=True)
    return ", ".join(f"{share:.0f} % {part}" for share, part in ordered if share >= 0.5)
