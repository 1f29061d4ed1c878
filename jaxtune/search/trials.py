"""Training the trials of a sweep in this process, one after the other, each in a run folder of its own."""

import contextlib
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import optuna

from jaxtune import log, run
from jaxtune.best import FOLDER as BEST
from jaxtune.best import best_step
from jaxtune.config import Config
from jaxtune.errors import UserError
from jaxtune.job import CHECKPOINTS, EXPORTS
from jaxtune.search.study import Claimed, Store

LOG = "train.log"  # what a trial says while it trains
Say = Callable[[str], None]


def work(store: Store, say: Say = log.say) -> None:
    """Train trials until there are to be no more.

    Raises:
      UserError: the first ones all failed.
      Interrupted: told to stop; the trial is saved, and gone on with by the next call.
    """
    terminal = sys.stdout

    def tell(text: str) -> None:
        with contextlib.redirect_stdout(terminal):  # while a trial's own words go to its file
            say(text)

    while True:
        with store.claim() as claimed:
            if claimed is None:
                return
            _train(store, claimed, tell)


def _train(store: Store, t: Claimed, say: Say) -> None:
    name = f"trial {t.trial.number}"
    say(f"{name}  {'goes on: ' if t.again else ''}{shown(t.values)}")
    began, reason, value = time.perf_counter(), "", None
    about: dict[str, Any] = {}
    try:
        c = store.space.config(t.values, str(t.folder))
        with aside(t.folder / LOG):
            run.train(c, _reporter(store, t, say), exported=store.sweep.keep == "all")
        value = value_of(c)
    except optuna.TrialPruned as e:
        about["pruned_at"] = e.args[0]
    except (UserError, jax.errors.JaxRuntimeError) as e:
        if isinstance(e, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(e):
            raise
        reason = " ".join(str(e).split())[:500]
    took = time.perf_counter() - began
    spent: dict[str, float] = next(
        (m["seconds"] for m in reversed(log.read_metrics(t.folder / "metrics.jsonl")) if "seconds" in m), {}
    )
    about |= {"seconds": round(took, 2), "compile_seconds": spent.get("compile", 0.0)}
    store.finish(t, value, about, reason)
    best = store.best()
    if store.sweep.keep == "best":
        _tidy(store)
    if reason:
        how = f"failed: {reason}"
    elif value is None:
        how = f"ended early at step {about['pruned_at']}"
    else:
        how = f"{store.config.evaluate.metric} {value:.4f}"
    so_far = f"; best so far {best.value:.4f}, trial {best.number}" if best is not None else ""
    say(f"{name}  {how}  {log.duration(took)}{so_far}")


def _reporter(store: Store, t: Claimed, say: Say) -> Callable[[int, Mapping[str, float]], None]:
    """Tells the store of each evaluation, and ends a trial of which it thinks little."""
    metric = store.config.evaluate.metric

    def report(n: int, scores: Mapping[str, float]) -> None:
        if metric not in scores:
            return  # which the run itself says
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a step that was reported before a kill
            t.trial.report(scores[metric], n)
        say(f"trial {t.trial.number}  step {n}  {metric} {scores[metric]:.4f}")
        if t.trial.should_prune():
            raise optuna.TrialPruned(n)

    return report


@contextlib.contextmanager
def aside(file: Path) -> Iterator[None]:
    """What is printed goes to a file, after what stands there."""
    with file.open("a", encoding="utf-8") as f, contextlib.redirect_stdout(f):
        yield


def value_of(c: Config) -> float:
    """What a finished run is judged by: its last evaluation, or its best where that is exported.

    Raises:
      UserError: there is none.
    """
    key = f"eval_{c.evaluate.metric}"
    history = log.read_metrics(Path(c.output) / "metrics.jsonl")
    held = {m["step"]: m[key] for m in history if key in m}
    step = best_step(c.evaluate, history) if c.evaluate.best else max(held, default=None)
    if step is None or not math.isfinite(held[step]):
        raise UserError(f"{c.output}: evaluations gave no {c.evaluate.metric}")
    return held[step]


def _tidy(store: Store) -> None:
    """Remove the checkpoints of finished trials in this folder, but the best one's."""
    trials = store.trials()
    best = store.best(trials)
    for t in trials:
        mine = t.state.is_finished() and t.user_attrs.get("place") == store.place
        for part in (CHECKPOINTS, BEST, EXPORTS) if mine and t is not best else ():
            shutil.rmtree(store.folder_of(t.number) / part, ignore_errors=True)


def shown(values: Mapping[str, Any]) -> str:
    """Values in a line.

    >>> shown({"optim.learning_rate": 0.00012345, "tuning.rank": 8})
    'optim.learning_rate=0.0001234 tuning.rank=8'
    """
    return " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
