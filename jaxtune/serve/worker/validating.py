"""Looking through a job's files: to the queue, or failed with what is wrong and where."""

import json
import os
import threading
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from jaxtune import log
from jaxtune.errors import UserError
from jaxtune.serve.checks.validation import Report, Role, inspect
from jaxtune.serve.redaction import redacted
from jaxtune.serve.store import leases, states
from jaxtune.serve.store.leases import Lost
from jaxtune.serve.store.tables import File, Job, Model
from jaxtune.serve.worker import recipe
from jaxtune.serve.worker.worker import Held, Worker

REPORT = "validation.json"  # in the job's folder
LOOKS = 4  # at the files of a job, whose workers died over them
_QUIET = ("missing_system", "missing_user")  # remarks that are in the report alone


class Failure(NamedTuple):
    """Why a job fails, as its `error` says it."""

    code: str
    message: str
    param: str | None = None


class _Stopped(Exception):
    """The worker is to leave."""


def validate_one(worker: Worker, stop: threading.Event) -> bool:
    """Look through the files of one job. Whether there was one."""
    taken = worker.take({states.VALIDATING}, _begin)
    if taken is None:
        return False
    with worker.holding(taken) as held:
        try:
            found = _look(worker, held, stop)
        except _Stopped:
            worker.write(held, lambda session, job: _leave(session, job, held))
            return True
        except UserError as e:
            found = Failure("invalid_job", redacted(str(e)))
        except Lost:
            raise
        except Exception:  # a job that nobody foresaw does not stop those after it
            traceback.print_exc()
            found = Failure("internal_error", "The files could not be validated; the service's log has the reason")
        worker.write(held, lambda session, job: _settle(session, job, held, found))
    return True


def _begin(session: Session, job: Job) -> None:
    beside = f" and validation file: {job.validation_file}" if job.validation_file else ""
    states.say_once(session, job.id, f"Validating training file: {job.training_file}{beside}")
    job.progress = {**job.progress, "looks": job.progress.get("looks", 0) + 1}


def _leave(session: Session, job: Job, held: Held) -> None:
    job.progress = {**job.progress, "looks": 0}
    leases.release(session, held.taken)


def _look(worker: Worker, held: Held, stop: threading.Event) -> Failure | dict[str, Any]:
    """What the job's columns become, or why it fails."""

    def leave() -> None:
        if held.lost.is_set():
            raise Lost(held.taken.job_id)
        if stop.is_set():
            raise _Stopped

    s, storage = worker.settings, worker.storage

    def read(session: Session, job: Job) -> tuple[Job, Model | None, set[str]]:
        wanted = (File.id.in_([job.training_file, job.validation_file]), File.project == job.project)
        known = set(session.scalars(select(File.id).where(*wanted)))
        return job, recipe.tuned_of(session, job), known

    job, tuned, known = worker.read(held, read)
    if job.progress["looks"] > LOOKS:
        return Failure("internal_error", f"The worker ended {LOOKS} times while it looked through the files")
    start = recipe.start_of(job, tuned, s, storage)
    ids: dict[Role, str] = {"training_file": job.training_file}
    if job.validation_file:
        ids["validation_file"] = job.validation_file
    for role, file_id in ids.items():
        if file_id not in known or not storage.file(file_id).is_file():
            return Failure(f"invalid_{role}", f"No such File object: {file_id}", role)
    length, template = recipe.max_length(job.knobs, start.folder, s.limits), recipe.template(job.knobs)
    reports: dict[Role, Report] = {}
    for role, file_id in ids.items():
        other = job.validation_file if role == "training_file" else None
        reports[role] = inspect(
            storage.file(file_id), start.words, s.limits, length, role, storage.file(other) if other else None,
            template=template, stop=leave,
        )  # fmt: skip
    folder = storage.job(job.id)
    folder.mkdir(parents=True, exist_ok=True)
    written = json.dumps({role: report.to_dict() for role, report in reports.items()})
    place(folder / REPORT, written.encode())
    for report in reports.values():
        if (failure := report.failure(job.method)) is not None:
            return Failure(*failure)
    training = reports["training_file"]
    assert training.tokens is not None
    hyperparameters = recipe.resolved(job.hyperparameters, training.examples, s.limits)
    tokens = training.tokens.total * hyperparameters["n_epochs"]
    if tokens > s.limits.trained_tokens:
        said = f"The job would train on {tokens} tokens, and {s.limits.trained_tokens} are allowed"
        return Failure("too_many_tokens", f"{said}; lower n_epochs, or shorten the file", "training_file")
    job.hyperparameters = hyperparameters
    job.progress = {**job.progress, "examples": training.examples, "tokens": tokens}
    recipe.make(job, start, s, folder, folder / "t.jsonl", None)  # so that what does not fit is said now
    warnings = [r.message for report in reports.values() for r in report.remarks if r.check not in _QUIET]
    columns = {"hyperparameters": hyperparameters, "progress": job.progress}
    return {"columns": columns, "warnings": warnings}


def _settle(session: Session, job: Job, held: Held, found: Failure | dict[str, Any]) -> None:
    if job.status == states.VALIDATING and isinstance(found, Failure):
        fail(session, job, found)
    elif job.status == states.VALIDATING and not isinstance(found, Failure):
        for warning in found["warnings"]:
            states.say_once(session, job.id, warning, "warn")
        states.move(session, job.id, states.QUEUED, "Files validated, moving job to queued state", **found["columns"])
    leases.release(session, held.taken)
    log.say(f"{job.id}: {job.status}")


def fail(session: Session, job: Job, why: Failure) -> None:
    """The job failed."""
    states.move(session, job.id, states.FAILED, why.message, "error", error=why._asdict())


def place(file: Path, blob: bytes) -> None:
    """Write a file that is there whole, also after a loss of power, or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as f:
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
