"""The learning-rate range test: one short run whose rate rises from step to step, until the loss goes up.

Smith, 2017, Cyclical learning rates for training neural networks.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtune import columns, distributed, log
from jaxtune.clock import Clock
from jaxtune.config import Config
from jaxtune.errors import UserError
from jaxtune.job import materialise, prepare, use_compile_cache
from jaxtune.layers import unbox
from jaxtune.sharding import replicated
from jaxtune.steps import Step, Steps, compile_step, fresh, putter
from jaxtune.tuning import method as tuning_method

_SMOOTH = 0.9  # of the moving average of losses
_DIVERGED = 1.5  # a smoothed loss so many times the least one
_FEWEST = 10  # steps


class Found(NamedTuple):
    """What the test says; rates are None where it could not be seen."""

    steepest: float | None
    """Where the loss falls fastest."""
    diverged: float | None
    """Where it goes up and away."""
    points: list[tuple[float, float, float]]
    """Learning rate, loss, smoothed loss, by step."""

    @property
    def suggested(self) -> float | None:
        """The lower of the steepest descent and a tenth of where it diverges."""
        both = [self.steepest, self.diverged and self.diverged / 10]
        return min((x for x in both if x is not None), default=None)


def range_test(c: Config, low: float = 1e-7, high: float = 10.0, steps: int = 100) -> Found:
    """Train for some steps with a rate that rises from `low` to `high`, and leave no trace but what is returned.

    The step is that of `run.train`: only the rates that it takes are others. Groups' rates rise in step.

    Raises:
      UserError: the config does not fit, there are several processes, or the loss is not finite from the start.
    """
    distributed.initialize()
    if distributed.members()[1] > 1:
        raise UserError("lr-test: trains in one process, and this is one of several; run it on one host")
    if not 0 < low < high or steps < _FEWEST:
        raise UserError(
            f"lr-test: from {low:g} to {high:g} in {steps} steps; give --low above 0, --high above it, and at least "
            f"{_FEWEST} --steps"
        )
    use_compile_cache()
    optim = c.optim.model_copy(update={"warmup": 0.0, "schedule": "constant"})
    job = prepare(c.model_copy(update={"train": c.train.model_copy(update={"steps": steps}), "optim": optim}))
    rate_S = np.geomspace(low, high, steps).astype(np.float32)
    with jax.set_mesh(job.mesh):
        compiled = compile_step(job)
        columns.write(job)
        weights = unbox(materialise(job))
        state = fresh(job, *tuning_method.split(weights, job.labels))
        del weights
        risen = {**compiled.knobs, "rate_S": distributed.put(rate_S, replicated(job.mesh))}
        step, put = Steps(job, Step(compiled.compiled, risen), Clock()), putter(job.mesh, c.train.accumulation)
        batches = job.data.train.batches(c.train.batch_size, seed=c.train.seed, row_count=job.rows)
        losses: list[float] = []
        try:
            for n in range(steps):
                state, report = step(state, put(next(batches)))
                losses.append(float(report["loss"]))
                log.say(f"step {n + 1}/{steps}  learning rate {rate_S[n]:.3g}  loss {losses[-1]:.4f}")
                if not math.isfinite(losses[-1]) or _gone(losses):
                    break
        finally:
            batches.close()
    return judge(rate_S.tolist(), losses)


def _gone(losses: Sequence[float]) -> bool:
    smooth = smoothed(losses)
    return len(losses) > _FEWEST and smooth[-1] > 2 * _DIVERGED * min(smooth)


def smoothed(losses: Sequence[float]) -> list[float]:
    """The moving average, without the pull of its start.

    >>> smoothed([2.0, 2.0, 2.0])
    [2.0, 2.0, 2.0]
    """
    mean, out = 0.0, []
    for i, x in enumerate(losses, 1):
        mean = _SMOOTH * mean + (1 - _SMOOTH) * x
        out.append(mean / (1 - _SMOOTH**i))
    return out


def judge(rates: Sequence[float], losses: Sequence[float]) -> Found:
    """What losses at rising rates say; a last one that is not finite has diverged.

    The loss before step n+1 is that after step n's update, so it belongs to that step's rate.

    Raises:
      UserError: it is not finite from the start.
    """
    finite = [x for x in losses if math.isfinite(x)]
    if len(finite) < 2:
        raise UserError(
            f"lr-test: the loss is not finite from the start, at a learning rate of {rates[0]:g}; look at the model "
            "and the data, or give a lower --low"
        )
    smooth = smoothed(finite)
    points = list(zip(rates[: max(len(finite) - 1, 0)], finite[1:], smooth[1:], strict=True))
    least = int(np.argmin(smooth))
    diverged = next((r for r, _, s in points[least:] if s > _DIVERGED * smooth[least]), None)
    if diverged is None and len(finite) < len(losses):
        diverged = rates[len(finite) - 1]
    before = [s for _, _, s in points[: max(least, 1)]]
    steepest = None
    if len(before) > 2 and smooth[0] - smooth[least] > 0.01 * abs(smooth[0]):
        slope = np.gradient(before, np.log(rates[: len(before)]))
        steepest = float(rates[int(np.argmin(slope))])
    return Found(steepest, diverged, points)


def write(found: Found, folder: Path) -> None:
    """Write lr.json and lr.png."""
    from jaxtune.search import plots

    folder.mkdir(parents=True, exist_ok=True)
    marks: dict[str, Any] = {"steepest": found.steepest, "diverged": found.diverged, "suggested": found.suggested}
    kept = {**marks, "points": [dict(zip(("rate", "loss", "smoothed"), p, strict=True)) for p in found.points]}
    log.write_whole(folder / "lr.json", json.dumps(kept, indent=1) + "\n")
    plots.rates(found.points, {k: v for k, v in marks.items() if v is not None}, folder / "lr.png")
