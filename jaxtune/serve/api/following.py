"""A job's events, a page at a time or as they come."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from sqlalchemy import select
from sqlalchemy.orm import Session
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from jaxtune.serve.api import errors, paging
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.objects import EventObject, Page
from jaxtune.serve.api.service import Caller, Service
from jaxtune.serve.store.states import FINAL
from jaxtune.serve.store.tables import Event, Job

_LOOK_S = 0.5
_AT_ONCE = 500
_PING_S = 15
_PING: Any = b": ping\r\n"  # no empty line after it: OpenAI's client would take that for an event, once ids were sent
_log = logging.getLogger("jaxtune.serve")


def not_found(job_id: str) -> ApiError:
    """There is no such job, or it is another project's."""
    return ApiError(404, f"Could not find fine tune: {job_id}", "fine_tune_id", "fine_tune_not_found")


def job_of(session: Session, by: Caller, job_id: str) -> Job:
    """A job of the caller's. Raises: ApiError: there is none of this id, or it is another project's."""
    row = session.scalar(select(Job).where(Job.project == by.project, Job.id == job_id))
    if row is None:
        raise not_found(job_id)
    return row


def must_have(session: Session, by: Caller, job_id: str) -> None:
    """Raises: ApiError: the caller has no such job; without reading the whole of it."""
    if session.scalar(select(Job.seq).where(Job.project == by.project, Job.id == job_id)) is None:
        raise not_found(job_id)


async def listed(job_id: str, here: Service, by: Caller, after: str | None, limit: int) -> Page[EventObject]:
    """A page of events, the newest first."""

    def read() -> Page[EventObject]:
        with here.database.read() as session:
            must_have(session, by, job_id)
            found, more = paging.page(session, select(Event).where(Event.job_id == job_id), Event, after, limit)
        return Page.of([EventObject.of(e) for e in found], more)

    return await run_in_threadpool(read)


async def follow(job_id: str, request: Request, here: Service, by: Caller, after: str | None) -> EventSourceResponse:
    """Events as they come, the oldest first, from the one after `after` on; `[DONE]` once the job has ended."""

    def read(last: str | None) -> tuple[list[EventObject], bool]:
        """What is new, and whether nothing more will be: the status is read first, its event came with it."""
        with here.database.read() as session:
            ended = job_of(session, by, job_id).status in FINAL
            rows = select(Event).where(Event.job_id == job_id)
            found, more = paging.page(session, rows, Event, last, _AT_ONCE, newest_first=False)
        return [EventObject.of(e) for e in found], ended and not more

    async def told(first: list[EventObject], ended: bool) -> AsyncIterator[dict[str, str]]:
        with place:
            news, last = first, after
            try:
                while True:
                    for event in news:
                        yield {"id": event.id, "data": event.model_dump_json()}
                        last = event.id
                    if ended:
                        yield {"data": "[DONE]"}
                        return
                    if len(news) < _AT_ONCE:
                        await asyncio.sleep(_LOOK_S)
                    news, ended = await run_in_threadpool(read, last)
            except ApiError as e:
                yield {"data": json.dumps(e.envelope())}
            except Exception:  # a stream that is merely cut would look like one that has ended
                _log.exception("%s: events of %s", request.state.request_id, job_id)
                yield {"data": json.dumps(errors.internal().envelope())}

    news, ended = await run_in_threadpool(read, after)
    place = contextlib.ExitStack()
    place.enter_context(request.app.state.following.one(by.key_id))
    return EventSourceResponse(
        told(news, ended), ping=_PING_S, ping_message_factory=lambda: _PING, headers={"X-Accel-Buffering": "no"}
    )
