"""Training: a job goes through the loop with its log, evaluations, checkpoints and signals, and is exported.

`train` is what both the command line and notebooks call.
"""

import contextlib
import fcntl
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import blueprint, config, distributed, log, measuring, optim, overview, sharding
from jaxtune.allocation import Allocation
from jaxtune.best import Best, hopeless
from jaxtune.checkpoint import Checkpoints, start_step
from jaxtune.config import Config
from jaxtune.data.batches import Batch, Batches
from jaxtune.data.streaming import Streamed
from jaxtune.errors import Interrupted, UserError
from jaxtune.export import export
from jaxtune.job import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    Job,
    Steps,
    compile_step,
    own_rows,
    prepare,
    putter,
    use_compile_cache,
)
from jaxtune.layers import unbox
from jaxtune.training import Every, Hooks, State, loop
from jaxtune.tuning import method as tuning_method

Tree = Any


def train(c: Config) -> Path:
    """Train as the config says, or go on where the run folder stands, and export. Returns the run folder.

    Raises:
      UserError: something does not fit; nothing whole is replaced.
      Interrupted: told to stop; saved, to be called again.
    """
    distributed.initialize()
    use_compile_cache()
    out = Path(c.output)
    with _told_to_stop() as told, distributed.watching() as watched:
        job = prepare(c)
        overview.check_disk(job)
        distributed.agree("job", {**job.about, "devices": job.mesh.size})
        with _alone(out):
            _train(job, out, told, watched)
        distributed.wait("all is written")
    return out


def _train(job: Job, out: Path, told: threading.Event, watched: Callable[[Any], Any]) -> None:
    c = job.config
    micro = c.train.batch_size // c.train.accumulation
    if odd := micro % (shards := sharding.batch_shards(job.mesh)):
        log.warn(
            f"{micro} sequences do not divide over {shards} parts of the batch: {shards - odd} empty ones are added"
        )
    checkpoints = Checkpoints(out / CHECKPOINTS, c.checkpoint.keep)
    about = job.about
    start = start_step(c, checkpoints, about)
    distributed.agree("start", {f"step of {out}, which all hosts have to see": start})
    history = [m for m in log.read_metrics(out / "metrics.jsonl") if m["step"] <= start]
    if (start == job.steps or hopeless(c.evaluate, history)) and (out / EXPORT).exists():
        log.say(f"{out}: finished already at step {start}; its result is in {out / EXPORT}")
        return checkpoints.close()
    log.write_whole(out / CONFIG, config.dump(c))
    with ThreadPoolExecutor(1) as pool, jax.set_mesh(job.mesh):
        compiling = pool.submit(compile_step, job)
        boxes = blueprint.materialise(job.blueprint, jax.random.key(c.train.seed))
        compiled = compiling.result()
        trainable, frozen = tuning_method.split(unbox(boxes), job.blueprint.labels)
        del boxes
        batches = job.data.train.batches(c.train.batch_size, seed=c.train.seed, row_count=job.rows, own=own_rows(job))
        if start:
            del trainable  # not two at once
            restored, position = checkpoints.restore(start, job.state.saved())
            state, batches.state = State(frozen=frozen, **restored), position
            log.say(f"{out}: goes on after step {start}")
        else:
            where = jax.tree.map(lambda s: s.sharding, job.state.optimiser)
            optimiser = jax.jit(job.tx.init, out_shardings=where)(trainable)
            key = jax.random.key_data(jax.random.key(c.train.seed + 1))
            zero, key = jax.device_put((jnp.int32(0), key), sharding.replicated(job.mesh))
            state = State(trainable, frozen, optimiser, zero, key)
            del trainable
        del frozen
        overview.introduce(job, compiled)
        try:
            weights = _loop(job, state, watched(Steps(job, compiled)), batches, checkpoints, start, about, told)
        finally:
            batches.close()
            checkpoints.close()  # what was being saved is saved, also when the loop ends with an error
        weights = _to_write(job, weights)
    export(job, weights)


def _to_write(job: Job, weights: Tree) -> Tree:
    """The weights for `export`: where there are several processes, what trained is gathered for the first to write."""
    if distributed.count() == 1:
        return weights
    trained, frozen = tuning_method.split(weights, job.blueprint.labels)
    return tuning_method.join(distributed.gathered(trained), frozen)


def _loop(
    job: Job,
    state: State,
    compiled: Any,
    batches: Batches | Streamed,
    checkpoints: Checkpoints,
    start: int,
    about: dict[str, Any],
    told: threading.Event,
) -> Tree:
    """The loop with its log, evaluations, checkpoints and signals. Returns the weights to export."""
    c, held = job.config, job.data.validation
    runlog = log.RunLog(Path(c.output), start, job.steps, c.evaluate.metric)
    rate = optim.schedule(c.optim, job.steps)
    measure = measuring.make(job)
    best = Best(Path(c.output), c.evaluate, runlog.history, start) if held is not None else None

    def on_log(n: int, values: dict[str, float], batch: Batch) -> None:
        write = n % c.train.log_every == 0 or n in (1, job.steps)
        learning_rate = float(rate(n - 1)) if write else 0.0
        runlog.step(n, {**values, "learning_rate": learning_rate}, batch.tokens, write)

    def on_evaluate(n: int, state: State) -> None:
        if best is None or any(m["step"] == n and "eval_loss" in m for m in runlog.history):
            return
        trained = optim.averaged(state.optimiser, state.trainable)
        runlog.evaluation(n, measure(tuning_method.join(trained, state.frozen)))
        best.see(n, trained)

    def on_save(n: int, state: State) -> None:
        checkpoints.save(n, state.saved(), batches.state, about)

    with contextlib.ExitStack() as closing:
        closing.enter_context(contextlib.closing(runlog))
        if best is not None:
            closing.enter_context(contextlib.closing(best))
        if (choice := job.blueprint.method.choice) is not None:
            record = closing.enter_context(contextlib.closing(Allocation(Path(c.output), start, choice)))
            compiled = record.watching(compiled)
        if not start:
            on_evaluate(0, state)
        hooks = Hooks(on_log, on_evaluate, on_save, lambda: told.is_set() or (best is not None and best.hopeless))
        every = Every(c.evaluate.every, c.checkpoint.every)
        put = putter(job.mesh, c.train.accumulation, lambda: distributed.STOP * hooks.stop())
        state, n = loop(
            state,
            compiled,
            batches,
            put,
            start,
            job.steps,
            every,
            hooks,
            lambda b: list(b.origins),
        )
        if n < job.steps and not (best is not None and best.hopeless):
            checkpoints.wait()
            raise Interrupted(f"{c.output}: stopped after step {n} and saved; run the same command again to go on")
        if n < job.steps:
            log.say(f"stopped after step {n}: {c.evaluate.patience} evaluations without a better {c.evaluate.metric}")
        for remark in batches.remarks:
            log.say(remark)
        runlog.summary()
        kept = None if best is None else best.restored(job.state.trainable)
    return measured(state) if kept is None else tuning_method.join(kept, state.frozen)


def measured(state: State) -> Tree:
    """The weights to measure and to export: averages, where the optimiser keeps them."""
    return tuning_method.join(optim.averaged(state.optimiser, state.trainable), state.frozen)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the run folder: two processes would tear each other's checkpoints. The lock goes with the process.

    Raises:
      UserError: another process trains there.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not distributed.first():
        yield
        return
    with (out / ".lock").open("w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{out}: another process is training there; wait for it or choose another output") from e
        yield


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
