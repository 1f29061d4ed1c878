"""The store of a sweep's trials: who takes which, what is gone on with after a kill, and what is told of each.

A trial that is trained holds a lock on a file in its run folder, which goes with its process. So one that the store
says is running, and whose lock is free, was killed, and is gone on with. Trials in folders of other machines are
theirs.
"""

import contextlib
import fcntl
import itertools
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import yaml

from jaxtune import config, distributed, log
from jaxtune.config import Config, Range
from jaxtune.errors import UserError
from jaxtune.metrics.base import better
from jaxtune.search.space import Space, Values

try:
    import optuna
    from optuna.exceptions import StorageInternalError
    from optuna.trial import FrozenTrial, TrialState
except ModuleNotFoundError as e:
    raise UserError("sweep: optuna is not installed; pip install 'jaxtune[sweep]'") from e

TRIALS, STORE = "trials", "sweep.db"
FAILURES = 3  # the first of a session: so many, and no other, end it
_FREE = ("checkpoint", "mesh", "output", "track")  # of the config: what may change while a sweep goes on
_WAIT_S = 120  # for another process that writes to a SQLite store


class Claimed(NamedTuple):
    """A trial that is this process's to train."""

    trial: optuna.trial.Trial
    values: Values
    folder: Path
    again: bool  # gone on with


class Store:
    """The trials of a sweep."""

    def __init__(self, c: Config, space: Space) -> None:
        """Open or begin it.

        Raises:
          UserError: the store cannot be reached, or holds another sweep.
        """
        assert c.sweep is not None
        self.config, self.space, self.sweep = c, space, c.sweep
        self.folder = Path(c.output).resolve()
        self.place = f"{socket.gethostname()}:{self.folder}"
        (self.folder / TRIALS).mkdir(parents=True, exist_ok=True)
        self._began, self._failed, self._other = time.monotonic(), 0, 0
        self.reason = ""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        url = self.sweep.storage or f"sqlite:///{self.folder / STORE}"
        waits = {"connect_args": {"timeout": _WAIT_S}} if url.startswith("sqlite") else {"pool_pre_ping": True}
        with self._alone(), _reached():
            self.study = optuna.create_study(
                storage=optuna.storages.RDBStorage(url, engine_kwargs=waits),
                study_name=self.folder.name,
                direction="maximize" if better(c.evaluate.metric) == "max" else "minimize",
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(self.sweep.seed),
                pruner=_pruner(c),
            )
            self._agree()

    def _agree(self) -> None:
        """Raises: UserError: the trials there are of another sweep."""
        tree = yaml.safe_load(config.dump(self.config))  # paths are whole there
        mine = {"keys": tree.pop("sweep")["keys"], "config": {k: v for k, v in tree.items() if k not in _FREE}}
        there = self.study.user_attrs.get("about")
        if there is None:
            return self.study.set_user_attr("about", mine)
        if differing := distributed.differing(there, mine):
            named = ", ".join(d.removeprefix("config.") for d in differing[:5])
            raise UserError(
                f"{self.folder}: the sweep there differs in {named}; choose another output, or give the same"
            )

    # --- taking trials ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the processes that share the folder, one at a time."""
        with (self.folder / ".sweep.lock").open("w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def claim(self) -> Iterator[Claimed | None]:
        """A trial to train: one that was broken off, else a new one; None where there are to be no more.

        Raises:
          UserError: the first ones all failed.
        """
        if self._failed >= FAILURES and not self._other:
            raise UserError(f"{self.folder}: the first {self._failed} trials failed; the last: {self.reason}")
        with contextlib.ExitStack() as held:
            with self._alone(), _reached():
                claimed = self._broken_off(held) or self._new(held)
            yield claimed

    def _broken_off(self, held: contextlib.ExitStack) -> Claimed | None:
        for t in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            place = t.user_attrs.get("place")
            if place != self.place and not (place is None and self.sweep.storage is None):
                continue
            folder = self.folder_of(t.number)
            if (lock := _locked(folder)) is None:
                continue
            held.enter_context(lock)
            self.study.sampler = _sampler(self.config, t.number)
            return self._begun(optuna.trial.Trial(self.study, t._trial_id), folder, True)
        return None

    def _new(self, held: contextlib.ExitStack) -> Claimed | None:
        states = [t.state for t in self.study.get_trials(deepcopy=False)]
        waiting = states.count(TrialState.WAITING)
        begun = len(states) - waiting
        if begun >= self.sweep.trials or self._late():
            return None
        if self.sweep.sampler == "grid" and not waiting:
            if (point := next(itertools.islice(self.space.grid(), begun, None), None)) is None:
                return None
            self.study.enqueue_trial(point)
        self.study.sampler = _sampler(self.config, begun)
        trial = self.study.ask()
        self.study.sampler = _sampler(self.config, trial.number)  # another machine's may be between
        lock = _locked(folder := self.folder_of(trial.number))
        assert lock is not None, folder
        held.enter_context(lock)
        trial.set_user_attr("place", self.place)
        return self._begun(trial, folder, False)

    def _begun(self, trial: optuna.trial.Trial, folder: Path, again: bool) -> Claimed:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # of ranges that steps do not fill
            return Claimed(trial, self.space.suggest(trial), folder, again)

    def _late(self) -> bool:
        return self.sweep.timeout is not None and time.monotonic() - self._began > self.sweep.timeout

    def folder_of(self, number: int) -> Path:
        """A trial's run folder."""
        return self.folder / TRIALS / f"{number:04}"

    # --- telling ------------------------------------------------------------------------------------------------------

    def finish(self, c: Claimed, value: float | None, about: Mapping[str, Any], reason: str = "") -> None:
        """A trial has this value; or it failed, for a reason; or without one it was ended early."""
        with _reached():
            for name, x in ({**about, "reason": reason} if reason else about).items():
                c.trial.set_user_attr(name, x)
            if reason:
                self._failed, self.reason = self._failed + 1, reason
                self.study.tell(c.trial, state=TrialState.FAIL)
                return
            self._other += 1
            if value is None:
                self.study.tell(c.trial, state=TrialState.PRUNED)
            else:
                self.study.tell(c.trial, value)

    def trials(self) -> list[FrozenTrial]:
        """All that were begun, in their order."""
        with _reached():
            return [t for t in self.study.get_trials(deepcopy=False) if t.state != TrialState.WAITING]

    def best(self, trials: Sequence[FrozenTrial] | None = None) -> FrozenTrial | None:
        """The best of those that were trained to their end; the first of equals."""
        sign = 1 if better(self.config.evaluate.metric) == "min" else -1
        done = [
            t
            for t in (self.trials() if trials is None else trials)
            if t.state == TrialState.COMPLETE and t.value is not None
        ]
        return min(done, key=lambda t: (sign * (t.value or 0.0), t.number), default=None)


def _locked(folder: Path) -> IO[str] | None:
    """A hold on a trial's folder; None where a living process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    f = (folder / ".trial.lock").open("a")
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        return None
    f.truncate(0)
    f.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    f.flush()
    return f


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """Raises: UserError: the store cannot be reached."""
    import sqlalchemy.exc

    try:
        yield
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, ModuleNotFoundError) as e:
        reason = " ".join(str(e.__cause__ or e).split())[:200]
        raise UserError(
            f"sweep.storage: the database of the trials cannot be used ({reason}); look at its address and its driver; "
            "the same command goes on"
        ) from e


def _sampler(c: Config, number: int) -> optuna.samplers.BaseSampler:
    """What draws the values of the trial of a number: others after a kill, and by other workers."""
    assert c.sweep is not None
    seed = int(np.random.SeedSequence([c.sweep.seed, number]).generate_state(1)[0])
    if c.sweep.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    if c.sweep.sampler == "cmaes":
        if lists := [k for k, v in c.sweep.keys.items() if not isinstance(v, Range)]:
            log.warn(f"sweep.sampler=cmaes draws from ranges; {', '.join(lists)} are drawn at random")
        try:
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        except ModuleNotFoundError as e:
            raise UserError("sweep.sampler=cmaes: cmaes is not installed; pip install 'jaxtune[sweep]'") from e
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(c: Config) -> optuna.pruners.BasePruner:
    """Resources are steps; the least is that of the first evaluation."""
    assert c.sweep is not None
    least = c.evaluate.every or 1
    if c.sweep.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=least)
    if c.sweep.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=least)
    return optuna.pruners.MedianPruner() if c.sweep.pruner == "median" else optuna.pruners.NopPruner()
