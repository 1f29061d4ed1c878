"""Training a job: `jaxtune train` is started in its folder, followed, told to stop, and its result written down."""

import contextlib
import hashlib
import shutil
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from jaxtune import config, log
from jaxtune.errors import UserError
from jaxtune.serve.redaction import redacted
from jaxtune.serve.store import ids, leases, states
from jaxtune.serve.store.leases import Lost
from jaxtune.serve.store.tables import Checkpoint, File, Job, Model
from jaxtune.serve.worker import following, recipe
from jaxtune.serve.worker.child import STOP, Child, busy
from jaxtune.serve.worker.following import Metrics
from jaxtune.serve.worker.validating import Failure, fail, place
from jaxtune.serve.worker.worker import Held, Worker

CONFIG, RUN, CHECKPOINTS = "config.yaml", "run", "checkpoints"  # in the job's folder; in the run folder
TRIES = 3  # that a job which breaks down without a step of progress is taken up again
KEPT = 3  # checkpoints of a job that can be called
SAVED = 75  # the exit code of a run that was told to stop, and saved
_BUSY_S = 300.0  # that a process of a worker that was killed may take to leave
_RESULTS = "step_metrics.csv"


def train_one(worker: Worker, stop: threading.Event) -> bool:
    """Train one job until it ends, is told to stop, or is another worker's. Whether there was one."""
    taken = worker.take({states.QUEUED, states.RUNNING}, lambda session, job: _begin(worker, session, job))
    if taken is None:
        return False
    with worker.holding(taken) as held:
        while True:
            try:
                again = _Run(worker, held).train(stop)
            except Lost:
                raise
            except UserError as e:
                why = Failure("training_failed", redacted(str(e)))
                again = worker.write(held, lambda session, job: _end(session, job, held, why))  # noqa: B023 at once
            except Exception as e:  # a job that nobody foresaw does not stop those after it
                traceback.print_exc()
                said = f"{type(e).__name__} in the worker{f' ({e.strerror})' if isinstance(e, OSError) else ''}"
                again = worker.write(held, lambda session, job: _broke(session, job, held, said))  # noqa: B023
            if again is None:
                return True
            if stop.wait(worker.pace.again * 2**again) or held.lost.is_set():
                worker.write(held, lambda session, job: _requeue(session, job, held))
                return True


def _begin(worker: Worker, session: Session, job: Job) -> None:
    """A job becomes `running`; or it was, and its worker is gone."""
    progress = {"told": -1, "failures": 0, "seconds": 0.0, **job.progress}
    tuned = recipe.tuned_of(session, job)
    progress["base"] = base = tuned.base if tuned is not None else job.model
    progress.setdefault("name", ids.model_name(base, worker.settings.organization, job.suffix))
    progress.setdefault("result", ids.new(ids.FILE))
    if job.status == states.QUEUED:
        first = job.started_at is None
        said = "Fine-tuning job started" if first else f"Fine-tuning job goes on after step {max(0, progress['told'])}"
        started = int(time.time()) if first else job.started_at
        states.move(session, job.id, states.RUNNING, said, progress=progress, started_at=started)
    else:
        job.progress = progress
        _count_failure(session, job, "The worker of this job is gone", "worker_lost")
    log.say(f"{job.id}: {job.status}")


def _count_failure(session: Session, job: Job, what: str, code: str) -> int | None:
    """The job broke down. How many times by now, without progress; None if that was too often, and it failed."""
    progress = dict(job.progress)
    failures = progress["failures"] + 1 if progress["told"] <= progress.get("failed_at", -2) else 1
    job.progress = {**progress, "failures": failures, "failed_at": progress["told"]}
    if failures > TRIES:
        fail(session, job, Failure(code, f"{what}; it was taken up again {TRIES} times, and came no further"))
        return None
    words = f"{what}; the job is taken up again from its last checkpoint ({failures} of {TRIES})"
    states.say(session, job.id, words, "warn")
    return failures


def _broke(session: Session, job: Job, held: Held, what: str, code: str = "training_failed") -> int | None:
    if job.status != states.RUNNING or (failures := _count_failure(session, job, what, code)) is None:
        leases.release(session, held.taken)
        return None
    return failures


def _end(session: Session, job: Job, held: Held, why: Failure) -> None:
    if job.status == states.RUNNING:
        fail(session, job, why)
    leases.release(session, held.taken)


def _requeue(session: Session, job: Job, held: Held) -> None:
    if job.status == states.RUNNING:
        said = "The worker stops; the job is saved, and goes on when one is there"
        states.move(session, job.id, states.QUEUED, said, estimated_finish=None)
    leases.release(session, held.taken)


class _Run:
    """One process of a job, from its start to its end."""

    def __init__(self, worker: Worker, held: Held) -> None:
        self.worker, self.held = worker, held
        self.folder = worker.storage.job(held.taken.job_id)
        self.run = self.folder / RUN
        self.began = time.monotonic()
        self.first: tuple[float, int] | None = None  # when which step was seen first
        self.written: set[int] = set()  # checkpoints that were told

    def train(self, stop: threading.Event) -> int | None:
        """Train. How many times it broke down, if it is to be taken up again."""
        job, file = self._prepared()
        if job.status != states.RUNNING:
            self._write(lambda session, job: leases.release(session, self.held.taken))
            return None
        if not self._alone(stop):
            self._write(lambda session, job: _requeue(session, job, self.held))
            return None
        metrics = Metrics(self.run / following.METRICS, job.progress["told"])
        self.began = time.monotonic()
        started = Child(self.folder, file, self.worker.command)
        self.held.child = started
        try:
            code, asked, why = self._follow(started, metrics, stop, job.progress["seconds"])
        finally:
            started.kill()
        if code == 0:
            self._write_results()
        line = redacted(started.last_line())
        again, status = self._write(
            lambda session, job: (self._ended(session, job, code, asked, why, line), job.status)
        )
        if status == states.SUCCEEDED:  # the result is written down: nobody goes on from there
            shutil.rmtree(self.run / CHECKPOINTS, ignore_errors=True)
        return again

    def _write(self, change: Any) -> Any:
        return self.worker.write(self.held, change)

    def _now(self) -> Job:
        return self.worker.read(self.held, lambda session, job: job)

    def _prepared(self) -> tuple[Job, Path]:
        """The job, and its config written."""
        w = self.worker
        job, tuned = w.read(self.held, lambda session, job: (job, recipe.tuned_of(session, job)))
        start = recipe.start_of(job, tuned, w.settings, w.storage)
        self.folder.mkdir(parents=True, exist_ok=True)
        linked = {}
        for name, file_id in (("training", job.training_file), ("validation", job.validation_file)):
            if file_id is not None:
                linked[name] = self.folder / f"{name}.jsonl"
                linked[name].unlink(missing_ok=True)
                linked[name].symlink_to(w.storage.file(file_id))
        made = recipe.make(job, start, w.settings, self.folder, linked["training"], linked.get("validation"))
        place(self.folder / CONFIG, config.dump(made).encode())
        return job, self.folder / CONFIG

    def _alone(self, stop: threading.Event) -> bool:
        """Have a process of a worker that is gone save and leave. Whether it did before this worker is told to stop."""
        deadline = time.monotonic() + _BUSY_S
        while busy(self.run):
            if stop.is_set():
                return False
            (self.run / STOP).touch()  # it may be on another machine
            if self.held.lost.wait(self.worker.pace.look):
                raise Lost(self.held.taken.job_id)
            if time.monotonic() > deadline:
                raise TimeoutError("an earlier process still trains in the run folder")
        return True

    def _follow(
        self, started: Child, metrics: Metrics, stop: threading.Event, seconds: float
    ) -> tuple[int, bool, Failure | None]:
        """Tell what the process does until it has ended; its exit code, whether it was told to leave, and why it is the
        job's failure."""
        pace, why = self.worker.pace, None
        asked: float | None = None
        saved = time.monotonic()
        while True:
            code = started.poll()
            job = self._tell(metrics, code in (0, SAVED), seconds)
            if self.held.lost.is_set():
                raise Lost(self.held.taken.job_id)
            if code is not None:
                return code, asked is not None, why
            now = time.monotonic()
            if asked is None:
                if seconds + now - self.began > self.worker.settings.limits.job_seconds:
                    said = f"The job trained for longer than {self.worker.settings.limits.job_seconds:g} seconds"
                    why = Failure("time_limit", f"{said}, which is the limit; its checkpoints are there")
                if why is not None or stop.is_set() or job.status != states.RUNNING:
                    asked = now
                    if metrics.moves:
                        started.ask()
                    else:  # nothing is there to be saved, beyond what is
                        started.kill()
            elif now - asked > 2 * pace.grace:
                started.kill()
            elif now - asked > pace.grace:
                started.terminate()
            if now - saved > pace.save and asked is None and metrics.moves:
                with contextlib.suppress(OSError):  # a disk that is full: it is asked for the next time
                    (self.run / "SAVE_NOW").touch()
                saved = now
            self.held.lost.wait(pace.look if asked is None else pace.look / 2)

    def _tell(self, metrics: Metrics, ended: bool, seconds: float) -> Job:
        """Write down what is new, and look what has become of the job."""
        entries = metrics.read(ended)
        told = entries[-1]["step"] if entries else metrics.told
        exported = [n for n in following.exported(self.run) if n <= told and n not in self.written]
        if not entries and not exported:
            return self._now()

        def change(session: Session, job: Job) -> Job:
            if job.status in states.FINAL:
                return job
            due = list(exported)
            for entry in entries:
                if entry["step"] > job.progress["told"]:  # an answer to a commit may get lost, and all comes again
                    states.say(session, job.id, following.message(entry), data=following.data(entry))
                while due and due[0] <= entry["step"]:
                    self._checkpoint(session, job, due.pop(0))
            for n in due:
                self._checkpoint(session, job, n)
            if exported:
                _forget_old(session, job)
            if entries:
                self._progress(job, entries[-1], seconds)
            return job

        job: Job = self._write(change)
        metrics.done(told)
        self.written.update(exported)
        return job

    def _progress(self, job: Job, entry: Mapping[str, Any], seconds: float) -> None:
        now, step, total = time.monotonic(), entry["step"], entry["total_steps"]
        job.progress = {
            **job.progress, "told": step, "step": step, "total_steps": total,
            "tokens_per_second": round(entry.get("tokens_per_second", 0.0), 1) or None,
            "seconds": round(seconds + now - self.began, 1),
        }  # fmt: skip
        if self.first is None:
            self.first = now, step
        elif step > self.first[1] and job.status == states.RUNNING:
            left = (now - self.first[0]) / (step - self.first[1]) * (total - step)
            job.estimated_finish = int(time.time() + left) + 1

    def _checkpoint(self, session: Session, job: Job, step: int) -> None:
        """Rows of a checkpoint whose model is whole, once."""
        if not states.say_once(session, job.id, f"Checkpoint created at step {step}"):
            return
        name = f"{job.progress['name']}:ckpt-step-{step}"
        found = following.measured(following.steps(self.run).get(step, {}))
        session.add(
            Checkpoint(
                id=ids.new(ids.CHECKPOINT), created_at=int(time.time()), job_id=job.id, step_number=step,
                metrics={"step": step, **found}, model=name,
            )
        )  # fmt: skip
        self._add_model(session, job, name, self.run / following.EXPORTS / f"step-{step}", step)

    def _add_model(self, session: Session, job: Job, name: str, folder: Path, step: int | None) -> None:
        session.add(
            Model(
                id=name, created_at=int(time.time()), project=job.project, job_id=job.id, base=job.progress["base"],
                kind="adapter" if (folder / "adapter_config.json").is_file() else "whole",
                folder=folder.relative_to(self.worker.storage.root).as_posix(), step=step,
            )
        )  # fmt: skip

    def _write_results(self) -> None:
        """The result file, before the row that tells of it."""
        target = self.worker.storage.file(self._now().progress["result"])
        target.parent.mkdir(parents=True, exist_ok=True)
        place(target, following.result_csv(self.run))

    def _ended(self, session: Session, job: Job, code: int, asked: bool, why: Failure | None, line: str) -> int | None:
        """What the end of the process makes of the job. How many times it broke down, if it is taken up again."""
        if job.status != states.RUNNING:  # paused or cancelled: it is as it was asked to be
            leases.release(session, self.held.taken)
            return None
        if code == 0:
            self._succeed(session, job)
            leases.release(session, self.held.taken)
            return None
        if why is not None or code == 2:
            said = line.removeprefix("error: ") or "training ended without a reason"
            _end(session, job, self.held, why or Failure("training_failed", said))
            return None
        if code == SAVED or asked:
            _requeue(session, job, self.held)
            return None
        what = f"Training ended unexpectedly ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
        return _broke(session, job, self.held, what)

    def _succeed(self, session: Session, job: Job) -> None:
        now, progress, name = int(time.time()), job.progress, job.progress["name"]
        result = self.worker.storage.file(progress["result"])
        blob = result.read_bytes()
        session.add(
            File(
                id=progress["result"], created_at=now, project=job.project, bytes=len(blob), filename=_RESULTS,
                purpose="fine-tune-results", status="processed", sha256=hashlib.sha256(blob).hexdigest(),
            )
        )  # fmt: skip
        self._add_model(session, job, name, self.run / following.EXPORT, None)
        states.say(session, job.id, f"New fine-tuned model created: {name}")
        states.move(
            session, job.id, states.SUCCEEDED, "The job has successfully completed", fine_tuned_model=name,
            result_files=[progress["result"]], trained_tokens=progress["tokens"],
        )  # fmt: skip
        log.say(f"{job.id}: {job.status}")


def _forget_old(session: Session, job: Job) -> None:
    """Rows of checkpoints but the last; the run removes their folders itself."""
    rows = session.scalars(
        select(Checkpoint).where(Checkpoint.job_id == job.id).order_by(Checkpoint.step_number.desc())
    )
    for old in rows.all()[KEPT:]:
        session.execute(delete(Model).where(Model.id == old.model))
        session.delete(old)
