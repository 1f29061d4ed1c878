"""Search: trials of other hyper-parameters, as ordinary runs, drawn and judged by optuna; and the range test."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune import config, distributed, log
from jaxtune.config import Config
from jaxtune.errors import Interrupted, UserError
from jaxtune.job import use_compile_cache
from jaxtune.search.space import space

if TYPE_CHECKING:
    from jaxtune.search.study import Store

SETTINGS = "sweep.yaml"  # in the sweep's folder: what it was begun with
_RESUME_ME = 75  # what a worker that was told to stop ends with
_BOUNDS = {1: "1,1,1", 2: "1,2,1", 4: "2,2,1", 8: "2,4,1"}  # of TPU chips that one process sees


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep found."""

    folder: Path
    best: Mapping[str, Any] | None
    """The best trial: its number, value, values, folder."""
    trials: Sequence[Mapping[str, Any]]
    """All trials, in their order."""
    config: Config | None
    """That of the best trial."""


def sweep(c: Config, say: Callable[[str], None] = log.say) -> Sweep:
    """Try other values of keys as the section `sweep` says, or go on with it, and write what was found.

    Trials lie in `OUTPUT/trials` as ordinary run folders; beside them best.yaml, sweep.json, sweep.html and figures.

    Raises:
      UserError: a key or a value does not fit, before any trial; or the first trials all failed.
      Interrupted: told to stop; to be called again.
    """
    store = open_store(c)
    given = c.model_dump(exclude_unset=True)  # a trial's tuning method has defaults of its own
    log.write_whole(store.folder / SETTINGS, config.dump_tree(given))
    assert c.sweep is not None
    done = len(store.trials())
    say(f"{store.folder}: {done} of {c.sweep.trials} trials begun; {c.sweep.sampler}, pruner {c.sweep.pruner}")
    try:
        if c.sweep.workers > 1:
            _workers(c, store.folder, say)
        else:
            one_worker(c, say, store)
    finally:
        show(c, say, store)
    return _export(store, say)


def open_store(c: Config) -> "Store":
    """The store of a config's sweep, after what can be checked before a trial.

    Raises:
      UserError: something does not fit.
    """
    distributed.initialize()
    if distributed.members()[1] > 1:
        raise UserError(
            "sweep: trials train in one process, and this is one of several; start a sweep on each host with the same "
            "sweep.storage instead"
        )
    s = space(c)
    if not c.data.validation and c.data.train != config.DEMO:
        raise UserError("sweep: trials are compared by the validation set, and there is none; set data.validation")
    if importlib.util.find_spec("plotly") is None:
        raise UserError("sweep: plotly is not installed; pip install 'jaxtune[sweep]'")
    from jaxtune.search.study import Store

    return Store(c, s)


def one_worker(c: Config, say: Callable[[str], None] = log.say, store: "Store | None" = None) -> None:
    """Train trials in this process until there are to be no more."""
    from jaxtune.search.trials import work

    store = store or open_store(c)
    use_compile_cache()
    work(store, say)


def show(c: Config, say: Callable[[str], None] = log.say, store: "Store | None" = None) -> None:
    """Write and tell what a sweep found so far."""
    from jaxtune.search import report

    store = store or open_store(c)
    report.write(store)
    for line in report.table(store):
        say(line)


def _export(store: "Store", say: Callable[[str], None]) -> Sweep:
    """Export the best trial, from its checkpoint."""
    from jaxtune import run
    from jaxtune.search import report, trials

    best = store.best()
    facts = [report.facts(store, t) for t in store.trials()]
    if best is None:
        say(f"{store.folder}: no trial was trained to its end")
        return Sweep(store.folder, None, facts, None)
    found = report.facts(store, best)
    c = store.space.config(store.space.named(best.params), str(store.folder_of(best.number)))
    if (folder := report.best_folder(store)) is None:
        say(f"the best trial is at {found['folder']}")
    else:
        with trials.aside(folder / trials.LOG):
            run.train(c)
        say(f"the best trial is exported to {folder / 'export'}")
    say(f"its config is {store.folder / report.BEST_CONFIG}; figures are in {store.folder / report.PAGE}")
    return Sweep(store.folder, found, facts, c)


def _workers(c: Config, folder: Path, say: Callable[[str], None]) -> None:
    """Train trials in processes of their own, which share the store."""
    assert c.sweep is not None
    command = [sys.executable, "-m", "jaxtune", "sweep", str(folder / SETTINGS), "--worker"]
    shared = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the first on a GPU would leave nothing to the others
    with _forwarded() as (children, told):
        for i in range(c.sweep.workers):
            seen = visible(c.sweep.devices[i]) if c.sweep.devices else {}
            # a session of its own: it hears of signals from here alone
            children.append(
                subprocess.Popen(  # noqa: S603  (ourselves)
                    [*command, str(i)], env={**shared, **os.environ, **seen}, stdout=subprocess.PIPE, text=True,
                    start_new_session=True,
                )
            )  # fmt: skip
        readers = [threading.Thread(target=_relay, args=(p, i, say)) for i, p in enumerate(children)]
        for r in readers:
            r.start()
        for r in readers:
            r.join()
        codes = [p.wait() for p in children]
    if told or _RESUME_ME in codes:
        raise Interrupted(f"{folder}: stopped and saved; run the same command again to go on")
    for i, code in enumerate(codes):
        if code:
            log.warn(f"worker {i} ended with code {code}; what it trained is gone on with by the same command")
    if all(codes):
        raise UserError(f"{folder}: all workers ended with errors, see above; mend that and run the same command again")


def visible(devices: str) -> dict[str, str]:
    """The environment in which a process sees these devices alone.

    >>> visible("0,1")["TPU_CHIPS_PER_PROCESS_BOUNDS"]
    '1,2,1'
    """
    seen = {"CUDA_VISIBLE_DEVICES": devices, "TPU_VISIBLE_CHIPS": devices}
    if (bounds := _BOUNDS.get(len(devices.split(",")))) is not None:
        seen |= {"TPU_CHIPS_PER_PROCESS_BOUNDS": bounds, "TPU_PROCESS_BOUNDS": "1,1,1"}
    return seen


def _relay(p: subprocess.Popen, i: int, say: Callable[[str], None]) -> None:
    assert p.stdout is not None
    with p.stdout as lines:
        for line in lines:
            say(f"worker {i}: {line.rstrip()}")


@contextmanager
def _forwarded() -> Iterator[tuple[list[subprocess.Popen], list[int]]]:
    """Processes that are told to stop when this one is, and the signals that came. None of them is left behind."""
    children: list[subprocess.Popen] = []
    told: list[int] = []

    def handler(number: int, frame: Any) -> None:
        told.append(number)
        for p in children:
            if p.poll() is None:
                p.send_signal(signal.SIGTERM if len(told) == 1 else signal.SIGKILL)

    main = threading.current_thread() is threading.main_thread()
    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield children, told
    finally:
        for s, h in old.items():
            signal.signal(s, h)
        for p in children:
            if p.poll() is None:
                p.terminate()
