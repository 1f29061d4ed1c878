"""The states of a job, and how one becomes another: each change is one transaction together with its event.

`validating_files` → `queued` → `running` → `succeeded`; a pause leads aside, a cancel or a failure out. A worker that
dies leaves a job `running` without a live lease, and the next worker takes it up from its last checkpoint.
"""

import time
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from jaxtune.serve.store import ids
from jaxtune.serve.store.tables import Event, Job

VALIDATING, QUEUED, RUNNING, PAUSED = "validating_files", "queued", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"

TRANSITIONS: dict[str, frozenset[str]] = {
    VALIDATING: frozenset({QUEUED, FAILED, CANCELLED}),
    QUEUED: frozenset({RUNNING, PAUSED, FAILED, CANCELLED}),
    RUNNING: frozenset({SUCCEEDED, QUEUED, PAUSED, FAILED, CANCELLED}),  # queued: its worker leaves, and saved
    PAUSED: frozenset({QUEUED, CANCELLED}),
    SUCCEEDED: frozenset(),
    FAILED: frozenset(),
    CANCELLED: frozenset(),
}
FINAL = frozenset(s for s, following in TRANSITIONS.items() if not following)


class WrongState(ValueError):
    """A job cannot go from where it is to where it was told to."""


def move(session: Session, job_id: str, to: str, message: str, level: str = "info", **columns: Any) -> Job:
    """Change a job's status, and say so in an event of the same transaction.

    Args:
      session: of `Database.write`.
      job_id: which.
      to: the state wanted.
      message: of the event.
      level: of the event: info, warn, error.
      columns: values of other columns of the job that change with it.

    Raises:
      WrongState: the table of transitions does not have it.
      LookupError: no such job.
    """
    job = locked(session, job_id)
    if to not in TRANSITIONS[job.status]:
        raise WrongState(f"job {job_id} is {job.status}; it cannot become {to}")
    job.status = to
    if to in FINAL:
        job.finished_at = int(time.time())
    if to != RUNNING:
        job.estimated_finish = None
    for name, value in columns.items():
        setattr(job, name, value)
    say(session, job_id, message, level)
    return job


def locked(session: Session, job_id: str) -> Job:
    """A job that nobody else changes until the transaction ends. Raises: LookupError: no such job."""
    job = session.scalar(select(Job).where(Job.id == job_id).with_for_update())
    if job is None:
        raise LookupError(job_id)
    return job


def say(session: Session, job_id: str, message: str, level: str = "info", data: dict[str, Any] | None = None) -> Event:
    """Add an event; one with `data` is of type metrics. Users' characters that a database does not take are escaped."""
    message = message.replace("\0", "\\0").encode(errors="backslashreplace").decode()
    event = Event(
        id=ids.new(ids.EVENT), created_at=int(time.time()), job_id=job_id, level=level,
        type="message" if data is None else "metrics", message=message, data=data,
    )  # fmt: skip
    session.add(event)
    return event


def say_once(session: Session, job_id: str, message: str, level: str = "info") -> bool:
    """Add an event unless the job has one of these words: what is done again after a kill is told once.

    Returns: whether it was added.
    """
    if session.scalar(select(Event.seq).where(Event.job_id == job_id, Event.message == message).limit(1)) is not None:
        return False
    say(session, job_id, message, level)
    return True
