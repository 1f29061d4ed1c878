"""Routes: fine-tuning jobs."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response
from sqlalchemy import ColumnElement, func, select

from jaxtune.serve.api import creating, following, paging
from jaxtune.serve.api.audit import note
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.following import job_of, must_have
from jaxtune.serve.api.objects import CheckpointObject, EventObject, JobObject, Page
from jaxtune.serve.api.service import By, Here, Service
from jaxtune.serve.store import states
from jaxtune.serve.store.tables import Checkpoint, Job

router = APIRouter()


@router.post("/v1/fine_tuning/jobs")
def create(
    body: creating.CreateJob,
    request: Request,
    here: Here,
    by: By,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
) -> JobObject:
    """Create a job. Its files are validated afterwards, by a worker."""
    return JobObject.of(creating.create(body, request, here, by, idempotency_key), here.settings.organization)


@router.get("/v1/fine_tuning/jobs")
def listed(
    request: Request, here: Here, by: By, after: paging.After = None, limit: paging.Limit = 20,
    metadata: Annotated[str | None, Query(pattern="^null$")] = None,
) -> Page[JobObject]:  # fmt: skip
    """The project's jobs, the newest first; `metadata[k]=v`: with this pair; `metadata=null`: without any."""
    rows = select(Job).where(Job.project == by.project)
    if metadata is not None:
        rows = rows.where(Job.labels.is_(None))
    for name, value in request.query_params.multi_items():
        if name.startswith("metadata[") and name.endswith("]"):
            rows = rows.where(_labelled(here, name[len("metadata[") : -1], value))
    with here.database.read() as session:
        found, more = paging.page(session, rows, Job, after, limit)
    return Page.of([JobObject.of(j, here.settings.organization) for j in found], more)


def _labelled(here: Service, name: str, value: str) -> ColumnElement[bool]:
    """That a job's metadata has a pair. Not by a JSON path, in which SQLite can write no quote of a name."""
    sqlite = here.database.engine.dialect.name == "sqlite"
    each = func.json_each(Job.labels) if sqlite else func.json_each_text(Job.labels)
    pairs = each.table_valued("key", "value")
    return select(pairs.c.key).where(pairs.c.key == name, pairs.c.value == value).exists()


@router.get("/v1/fine_tuning/jobs/{job_id}")
def retrieve(job_id: str, here: Here, by: By) -> JobObject:
    """A job."""
    with here.database.read() as session:
        return JobObject.of(job_of(session, by, job_id), here.settings.organization)


def _moved(job_id: str, to: str, already: frozenset[str], said: str, request: Request, here: Service) -> JobObject:
    """A job in another state; where it is there already, nothing happens, so that a request may be sent again."""
    by = request.state.caller
    with here.database.write() as session:
        must_have(session, by, job_id)
        row = states.locked(session, job_id)
        if row.status not in already:
            try:
                row = states.move(session, job_id, to, said)
            except states.WrongState as e:
                message = f"Job {job_id} is {row.status}; it cannot become {to}."
                raise ApiError(400, message, "fine_tune_id", "invalid_job_state") from e
            note(session, request, f"job.{to}", job_id)
    return JobObject.of(row, here.settings.organization)


@router.post("/v1/fine_tuning/jobs/{job_id}/cancel")
def cancel(job_id: str, request: Request, here: Here) -> JobObject:
    """Cancel a job; a worker that trains saves first."""
    already = frozenset({states.CANCELLED})
    return _moved(job_id, states.CANCELLED, already, "The job has been cancelled", request, here)


@router.post("/v1/fine_tuning/jobs/{job_id}/pause")
def pause(job_id: str, request: Request, here: Here) -> JobObject:
    """Pause a job; a worker that trains saves first."""
    return _moved(job_id, states.PAUSED, frozenset({states.PAUSED}), "The job has been paused", request, here)


@router.post("/v1/fine_tuning/jobs/{job_id}/resume")
def resume(job_id: str, request: Request, here: Here) -> JobObject:
    """Let a paused job go on from its last checkpoint."""
    already = frozenset({states.VALIDATING, states.QUEUED, states.RUNNING})
    return _moved(job_id, states.QUEUED, already, "The job has been resumed", request, here)


_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page, the newest first; with stream=true the events as they come, the oldest first.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.get("/v1/fine_tuning/jobs/{job_id}/events", response_model=Page[EventObject], responses=_EVENTS)
async def events(
    job_id: str, request: Request, here: Here, by: By, after: paging.After = None, limit: paging.Limit = 20,
    stream: bool = False, last_event_id: Annotated[str | None, Header(max_length=128)] = None,
) -> Page[EventObject] | Response:  # fmt: skip
    """What became of a job."""
    if stream:
        return await following.follow(job_id, request, here, by, last_event_id or after)
    return await following.listed(job_id, here, by, after, limit)


@router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints")
def checkpoints(
    job_id: str, here: Here, by: By, after: paging.After = None, limit: paging.Limit = 10
) -> Page[CheckpointObject]:
    """The steps of a job whose models can be called by name, the newest first."""
    with here.database.read() as session:
        must_have(session, by, job_id)
        rows = select(Checkpoint).where(Checkpoint.job_id == job_id)
        found, more = paging.page(session, rows, Checkpoint, after, limit)
    return Page.of([CheckpointObject.of(c) for c in found], more)
