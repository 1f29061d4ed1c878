"""Training: a job goes through the loop with its log, evaluations, checkpoints and signals, and is exported.

`train` is what both the command line and notebooks call.
"""

import contextlib
import errno
import fcntl
import functools
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxtune import (
    chips,
    columns,
    config,
    distributed,
    environment,
    log,
    measuring,
    optim,
    overview,
    rollouts,
    sharding,
    trackers,
    watch,
)
from jaxtune.allocation import Allocation
from jaxtune.best import Best, hopeless
from jaxtune.checkpoint import Checkpoints, start_step
from jaxtune.clock import Clock, carried, shares
from jaxtune.config import Config
from jaxtune.data.batches import Batch, Batches, Rows
from jaxtune.data.streaming import Streamed
from jaxtune.errors import Interrupted, UserError
from jaxtune.export import export, export_step
from jaxtune.guards import Guards
from jaxtune.job import CHECKPOINTS, CONFIG, EXPORT, Job, materialise, prepare, use_compile_cache
from jaxtune.layers import unbox
from jaxtune.planning.counting import flops_per_token
from jaxtune.profiling import Profile
from jaxtune.saving import Saver
from jaxtune.steps import Steps, compile_step, fresh, own_rows, putter
from jaxtune.training import Every, Hooks, State, loop
from jaxtune.tuning import method as tuning_method

Tree = Any
_VISIBLE_S = 60.0  # until other hosts see a new file: network file systems keep what they have seen
SAVE_NOW, STOP = "SAVE_NOW", "STOP"  # files in the run folder: save after this step and go on, or leave
Report = Callable[[int, Mapping[str, float]], None]  # gets a step and its scores


def train(c: Config, report: Report | None = None, exported: bool = True) -> Path:
    """Train as the config says, or go on where the run folder stands, and export. Returns the run folder.

    Args:
      c: the config.
      report: gets the scores of each evaluation after a step, and may end the run by an error of its own; what is saved
        stays.
      exported: whether there is to be an export. A later call for the same folder can still make it.

    Raises:
      UserError: something does not fit; nothing whole is replaced.
      Interrupted: told to stop; saved, to be called again.
    """
    distributed.initialize()
    use_compile_cache()
    trackers.check(c.track)
    clock = Clock()
    out = Path(c.output)
    with _told_to_stop() as told, watch.watching() as watched:
        job = prepare(c)
        _every(job)
        overview.check_disk(job)
        distributed.agree("job", {**job.about, "devices": job.mesh.size})
        with _alone(out):
            try:
                _train(job, out, told, watched, clock, report, exported)
            except OSError as e:
                if distributed.count() > 1:
                    raise  # to look for what is saved is something that all processes do together
                raise UserError(_lost(out, e)) from e
        distributed.wait("all is written")
    return out


def _train(
    job: Job,
    out: Path,
    told: threading.Event,
    watched: Callable[..., Any],
    clock: Clock,
    report: Report | None,
    wanted: bool,
) -> None:
    c = job.config
    micro = c.train.batch_size // c.train.accumulation
    if odd := micro % (shards := sharding.batch_shards(job.mesh)):
        log.warn(
            f"{micro} sequences do not divide over {shards} parts of the batch: {shards - odd} empty ones are added"
        )
    checkpoints = Checkpoints(out / CHECKPOINTS, c.checkpoint.keep)
    about = job.about
    start = start_step(c, checkpoints, about)
    history = [m for m in log.read_metrics(out / "metrics.jsonl") if m["step"] <= start]
    exported = (out / EXPORT).exists()
    there = {"steps": checkpoints.steps, "entries of metrics.jsonl": len(history), "export": exported}
    distributed.agree("start", {f"what is in {out}": there})
    if (start == job.steps or hopeless(c.evaluate, history)) and (exported or not wanted):
        where = f"its result is in {out / EXPORT}" if exported else "without an export"
        log.say(f"{out}: finished already at step {start}; {where}")
        return checkpoints.close()
    log.write_whole(out / CONFIG, config.dump(c))
    environment.record(out / "environment.json", c.train.seed, start)
    with ThreadPoolExecutor(1) as pool, jax.set_mesh(job.mesh), trackers.reporting(c, out, start) as track:
        compiling = pool.submit(compile_step, job)
        columns.write(job, told.is_set)
        boxes = materialise(job)
        with clock.on("compile"):
            compiled = compiling.result()
        trainable, frozen = tuning_method.split(unbox(boxes), job.labels)
        del boxes
        batches = job.data.train.batches(c.train.batch_size, seed=c.train.seed, row_count=job.rows, own=own_rows(job))
        if start:
            del trainable  # not two at once
            restored, position = checkpoints.restore(start, job.state.saved())
            state, batches.state = State(frozen=frozen, **restored), position
            log.say(f"{out}: goes on after step {start}")
        else:
            state = fresh(job, trainable, frozen)
            del trainable
        del frozen
        overview.introduce(job, compiled)
        try:
            with clock.on("steps"):
                steps = Steps(job, compiled, clock)
                weights, unsaved = _loop(
                    job, state, steps, watched, batches, checkpoints, start, about, told, clock, track, report
                )
        finally:
            batches.close()
            with clock.on("checkpoint"):
                checkpoints.close()  # what was being saved is saved, also when the loop ends with an error
        weights = _to_write(job, weights) if wanted else None
    if not wanted and unsaved is not None:
        raise unsaved
    if wanted:
        with clock.on("export"):
            try:
                export(job, weights)
            except (OSError, UserError) as e:
                if unsaved is not None:
                    raise unsaved from e  # which says what is lost
                if isinstance(e, UserError):
                    raise
                raise UserError(
                    f"{out / EXPORT}: {e.strerror or e}; all steps are saved: make room, and run the same command again"
                ) from e
    spent = clock.seconds()
    log.say(f"took {log.duration(sum(spent.values()))}: {shares(spent)}")
    if unsaved is not None:
        distributed.wait("exported")  # an error in one ends the others
        raise UserError(f"{unsaved}; the tuned model itself is whole in {out / EXPORT}")


def _lost(out: Path, e: OSError) -> str:
    """What an error of the storage leaves, that nobody was prepared for."""
    newest = Checkpoints(out / CHECKPOINTS, read_only=True).newest
    kept = "no step is saved" if newest is None else f"what came after step {newest} could not be saved"
    return f"{e.filename or out}: {e.strerror or e}; {kept}: look at the path and its room, then run it again"


def _every(job: Job) -> Every:
    """Steps between evaluations and between checkpoints, where 0 asks for those of a pass over the data."""
    c = job.config
    evaluate, save = c.evaluate.every, c.checkpoint.every
    if not (evaluate and save) and not isinstance(job.data.train, Rows):
        key = "checkpoint.every" if evaluate else "evaluate.every"
        raise UserError(f"{key}=0 is a pass over the data, and data.streaming does not count its rows; give steps")
    if evaluate and save:
        return Every(evaluate, save)
    epoch = job.data.rows.extent(c.train.batch_size, 1.0, None, c.train.seed)[0]
    return Every(evaluate or epoch, save or epoch)


def _to_write(job: Job, weights: Tree) -> Tree:
    """The weights for `export`: where there are several processes, what trained is gathered for the first to write."""
    if distributed.count() == 1:
        return weights
    trained, frozen = tuning_method.split(weights, job.blueprint.labels)
    return tuning_method.join(distributed.gathered(trained), frozen)


def _loop(
    job: Job,
    state: State,
    compiled: Steps,
    watched: Callable[..., Any],
    batches: Batches | Streamed,
    checkpoints: Checkpoints,
    start: int,
    about: dict[str, Any],
    told: threading.Event,
    clock: Clock,
    track: Report,
    report: Report | None,
) -> tuple[Tree, UserError | None]:
    """The loop with its log, evaluations, checkpoints and signals.

    Returns: the weights to export, and what is to be said if the last step could not be saved.
    """
    c, held, out = job.config, job.data.validation, Path(job.config.output)
    clock.add(carried(log.read_metrics(out / "metrics.jsonl"), start))
    chip = chips.of(job.mesh.devices.flat[0].device_kind)
    peak = chip.rate("bfloat16") * job.mesh.size if chip is not None else None
    runlog = log.RunLog(out, start, job.steps, c.evaluate.metric, job.mesh.size, peak, track)
    if start:
        runlog.write(start, {}, clock.seconds())
    cost = functools.cache(lambda length: flops_per_token(job, length))
    saver = Saver(checkpoints, start)
    rate = optim.schedule(c.optim, job.steps)
    measure = measuring.make(job)
    best = Best(out, c.evaluate, runlog.history, start) if held is not None else None
    every = _every(job)

    def on_log(n: int, values: dict[str, float], batch: Batch) -> None:
        write = n % c.train.log_every == 0 or n in (1, job.steps)
        learning_rate = float(rate(n - 1)) if write else 0.0
        flops = batch.tokens * cost(batch.columns["ids_BT"].shape[1]) if chip is not None else 0.0
        values = {**values, "learning_rate": learning_rate}
        runlog.step(n, values, batch.tokens, write, flops, clock.seconds())

    def on_evaluate(n: int, state: State) -> None:
        if best is None or any(m["step"] == n and "eval_loss" in m for m in runlog.history):
            return
        with clock.on("evaluate"):
            trained = optim.averaged(state.optimiser, state.trainable)
            runlog.evaluation(n, scores := measure(tuning_method.join(trained, state.frozen)))
            best.see(n, trained)
        if report is not None and n:
            report(n, scores)

    def save(n: int, state: State) -> None:
        answered = functools.partial(_remove, out / SAVE_NOW) if _asked(out / SAVE_NOW) else None
        checkpoints.save(n, state.saved(), batches.state, about, answered)

    def on_save(n: int, state: State) -> None:
        if c.checkpoint.export and (n == job.steps or n % every.save == 0):
            with clock.on("export"):
                export_step(job, _to_write(job, tuning_method.student(measured(state))), n)
        if n < job.steps:  # the last one is waited for, see below
            with clock.on("checkpoint"):
                saver.save(n, lambda: save(n, state))
            runlog.write(n, {}, clock.seconds())

    def waited() -> Iterator[Batch]:
        while True:
            with clock.on("input", unless=compiled.busy):
                batch = next(batches)
            yield batch

    def save_now() -> bool:
        return saver.overdue or (not saver.failures and not checkpoints.busy and _asked(out / SAVE_NOW))

    def stop() -> bool:
        return told.is_set() or _asked(out / STOP) or (best is not None and best.hopeless)

    def on_back(n: int, state: State) -> State:
        saver.settle()
        if (newest := checkpoints.newest) is None:
            raise UserError(
                f"step {n}: is not finite, and there is no checkpoint yet to go back to; set checkpoint.every to less, "
                "or train.nonfinite=skip"
            )
        for x in jax.tree.leaves((state.trainable, state.optimiser)):
            x.delete()  # not two at once
        restored, _ = checkpoints.restore(newest, job.state.saved())
        log.warn(f"step {n}: has the weights of step {newest} again; the rows since are not taken a second time")
        return State(frozen=state.frozen, **restored)._replace(step=state.step)

    with contextlib.ExitStack() as closing:
        step: Any = watched(compiled, compiled.prepare)
        closing.enter_context(contextlib.closing(runlog))
        if best is not None:
            closing.enter_context(contextlib.closing(best))
        if (choice := job.blueprint.method.choice) is not None:
            record = closing.enter_context(contextlib.closing(Allocation(out, start, choice)))
            step = record.watching(step)
        if c.train.profile is not None:
            profile = Profile(out / "profile", c.train.profile, start, job.steps)
            step = closing.enter_context(contextlib.closing(profile)).watching(step)
        if not start:
            on_evaluate(0, state)
        hooks = Hooks(on_log, on_evaluate, on_save, stop, save_now, runlog.write, on_back, rollouts.source(job))
        put = putter(job.mesh, c.train.accumulation, lambda: distributed.STOP * stop() | distributed.SAVE * save_now())
        state, n = loop(
            state,
            step,
            waited(),
            put,
            start,
            job.steps,
            every,
            hooks,
            lambda b: list(b.origins),
            Guards(c.train.nonfinite, c.train.spike),
        )
        with clock.on("checkpoint"):
            unsaved = saver.finish(n, lambda: save(n, state))
        if _asked(out / STOP):
            _remove(out / STOP)
        if n < job.steps and not (best is not None and best.hopeless):
            raise unsaved or Interrupted(
                f"{out}: stopped after step {n} and saved; run the same command again to go on"
            )
        if n < job.steps:
            log.say(f"stopped after step {n}: {c.evaluate.patience} evaluations without a better {c.evaluate.metric}")
        for remark in batches.remarks:
            log.say(remark)
        runlog.summary()
        kept = None if best is None else best.restored(job.state.trainable)
    weights = measured(state) if kept is None else tuning_method.join(kept, state.frozen)
    return tuning_method.student(weights), unsaved


def measured(state: State) -> Tree:
    """The weights to measure and to export: averages, where the optimiser keeps them."""
    return tuning_method.join(optim.averaged(state.optimiser, state.trainable), state.frozen)


def _asked(file: Path) -> bool:
    """Whether a user asks for something by a file; one process of several looks."""
    try:
        return distributed.first() and file.exists()
    except OSError as e:  # storage that is away for a while
        log.warn(f"{file}: cannot be looked for ({e.strerror}); until it can, nobody asks")
        return False


def _remove(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as e:
        log.warn(f"{file}: cannot be removed ({e.strerror}); remove it, or it counts again")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the run folder: two runs would tear each other's checkpoints. The lock goes with the process.

    Raises:
      UserError: another run trains there, or it is not the same folder on all hosts.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = out / ".lock"
    with contextlib.ExitStack() as held:
        if distributed.first():
            f = held.enter_context(lock.open("w"))
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise UserError(
                    f"{out}: another process is training there; wait for it or choose another output"
                ) from e
            except OSError as e:
                if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
                log.warn(f"{out}: its storage has no locks ({e.strerror}); see that no other run uses it")
            f.write(token := uuid.uuid4().hex)
            f.flush()
            distributed.from_first(token)
        seen = distributed.first() or _shows(lock, distributed.from_first(""))
        if not distributed.everywhere(seen):
            raise UserError(f"{out}: not all hosts see what is written there; choose an output on storage of all hosts")
        yield


def _shows(file: Path, text: str) -> bool:
    """Whether a file holds a text, or does so soon."""
    deadline = time.monotonic() + _VISIBLE_S
    while not (shown := file.is_file() and file.read_text() == text) and time.monotonic() < deadline:
        time.sleep(0.2)
    return shown


@contextlib.contextmanager
def _told_to_stop() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set an event while this is open; a second Ctrl-C interrupts at once."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def handler(number: int, frame: Any) -> None:
        if told.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.set()
        log.warn(f"{signal.Signals(number).name}: saves after this step and leaves")

    old = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for s, h in old.items():
            signal.signal(s, h)
