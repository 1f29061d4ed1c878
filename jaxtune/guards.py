"""What is made of losses that are not as they should be: not finite, or far above those before."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtune import log
from jaxtune.errors import UserError

IN_A_ROW = {"skip": 20, "rollback": 5}  # steps that are not finite, without one between that is: then the run stops
_WARM_UP, _DECAY = 20, 0.98  # of the running mean: steps before it counts, and what stays of it from step to step


class Spikes:
    """An exponential running mean and variance of the loss, and how far above it one lies.

    It begins anew where a run is resumed. The first steps only fill it, and a spike enters it cut to the threshold.

    >>> s = Spikes(6.0)
    >>> [s.see(2.0 + 0.1 * (n % 2)) for n in range(40)][-1], round(s.see(9.0)) > 6
    (None, True)
    """

    def __init__(self, sigma: float) -> None:
        self.sigma, self.mean, self._variance, self._seen = sigma, 0.0, 0.0, 0

    def see(self, loss: float) -> float | None:
        """How many standard deviations above the mean a loss is, where that is more than allowed."""
        self._seen += 1
        deviation = max(math.sqrt(self._variance), 1e-3 * abs(self.mean), 1e-12)
        above = (loss - self.mean) / deviation
        spike = self._seen > _WARM_UP and above > self.sigma
        if spike:
            loss = self.mean + self.sigma * deviation
        share = max(1 - _DECAY, 1 / self._seen)
        change = loss - self.mean
        self.mean += share * change
        self._variance = (1 - share) * (self._variance + share * change * change)
        return above if spike else None


class Guards:
    """Looks at the numbers of each step as they arrive."""

    def __init__(self, nonfinite: Literal["stop", "skip", "rollback"] = "stop", spike: float | None = None) -> None:
        self.nonfinite, self._spikes, self._bad = nonfinite, Spikes(spike) if spike else None, 0

    def finite(self, n: int, values: Mapping[str, float], rows: Sequence[str]) -> bool:
        """Whether step `n` has a finite loss and gradient. If not, that is said, and the step was left out or is to be.

        Raises:
          UserError: it does not, and the run is to stop, at once or after so many in a row.
        """
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            self._bad = 0
            return True
        self._bad += 1
        what = f"step {n}: loss {values['loss']}, gradient norm {values['grad_norm']} on rows {shown(rows)}"
        limit = IN_A_ROW.get(self.nonfinite, 1)
        if self._bad >= limit:
            many = f"; {limit} in a row are not left out" if limit > 1 else ""
            raise UserError(
                f"{what}{many}; the last checkpoint is kept; lower optim.learning_rate or optim.clip and run again, or "
                "mend these rows and choose another output"
            )
        done = "its update is left out" if self.nonfinite == "skip" else "goes back to the last checkpoint's weights"
        log.warn(f"{what}; {done}")
        return False

    def spike(self, n: int, loss: float, rows: Sequence[str]) -> float | None:
        """By how many standard deviations the loss of step `n` is a spike, which is said; None if it is none."""
        mean = self._spikes.mean if self._spikes else 0.0
        if self._spikes is None or (above := self._spikes.see(loss)) is None:
            return None
        log.warn(f"step {n}: loss {loss:.4f} is {above:.1f} σ above its running mean {mean:.4f} on rows {shown(rows)}")
        return above


def shown(rows: Sequence[str]) -> str:
    """The first of some rows, and how many there are more.

    >>> shown([f"a:{n}" for n in range(10)])
    'a:0, a:1, a:2, a:3, a:4, a:5, a:6, a:7 and 2 more'
    """
    return f"{', '.join(rows[:8])}{f' and {len(rows) - 8} more' if len(rows) > 8 else ''}"
