"""Routes: files."""

import time
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import StringConstraints
from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from jaxtune.errors import UserError
from jaxtune.serve import fetching
from jaxtune.serve.api import forms, paging
from jaxtune.serve.api.audit import note
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.limits import one_at_a_time
from jaxtune.serve.api.objects import Deleted, FileObject, Page
from jaxtune.serve.api.service import By, Caller, Here, Service
from jaxtune.serve.api.turns import turns_of
from jaxtune.serve.bodies import Body, Text
from jaxtune.serve.checks.jsonl import jsonl_fault
from jaxtune.serve.store import ids
from jaxtune.serve.store.states import FINAL
from jaxtune.serve.store.storage import TooLarge, Writing
from jaxtune.serve.store.tables import Audit, File, Job, Part

router = APIRouter()

TRAINING = "fine-tune"
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
_EXPIRES = range(3600, 2592000 + 1)  # seconds
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(get_args(Purpose))},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
                    },
                }
            }
        },
    }
}


def living(project: str) -> Select[Any]:
    """The files of a project that have not expired."""
    return select(File).where(File.project == project, or_(File.expires_at.is_(None), File.expires_at > time.time()))


def file_of(session: Session, by: Caller, file_id: str) -> File:
    """A file of the caller's. Raises: ApiError: there is none of this id, or it is another project's."""
    row = session.scalar(living(by.project).where(File.id == file_id))
    if row is None:
        raise ApiError(404, f"No such File object: {file_id}", "id")
    return row


def bytes_left(session: Session, service: Service, project: str) -> int:
    """What a project may still store."""
    used = session.scalar(select(func.coalesce(func.sum(File.bytes), 0)).where(File.project == project)) or 0
    parts = select(func.coalesce(func.sum(Part.bytes), 0)).where(Part.project == project)
    return service.settings.limits.project_bytes - int(used) - int(session.scalar(parts) or 0)


def too_much(service: Service) -> ApiError:
    """A project's files would be more than they may."""
    most = service.settings.limits.project_bytes
    return ApiError(413, f"The project's files would take more than {most} bytes; delete some.", code="quota_exceeded")


def check_content(writing: Writing, purpose: str, service: Service) -> None:
    """What is written must be what its purpose wants. Raises: ApiError."""
    path = writing.written()
    fault = jsonl_fault(path, service.settings.limits) if purpose == TRAINING else None
    if fault:
        raise ApiError(400, fault, "file")


def add_file(session: Session, service: Service, row: File) -> None:
    """A row for a file whose bytes are there. Raises: ApiError: the project has no room for it."""
    one_at_a_time(session, f"bytes {row.project}")
    if bytes_left(session, service, row.project) < row.bytes:
        raise too_much(service)
    session.add(row)


@router.post("/v1/files", openapi_extra=_FORM)
async def create(request: Request, here: Here, by: By) -> FileObject:
    """Upload a file. It goes straight to its place in storage, under a running limit."""
    with request.app.state.uploading.one(by.project):
        return await _create(request, here, by)


async def _create(request: Request, here: Service, by: Caller) -> FileObject:
    def taken(form: forms.Form, writing: Writing) -> FileObject:
        purpose = form.fields.get("purpose", "")
        if purpose not in get_args(Purpose):
            message = f"Invalid value for 'purpose': it is one of {', '.join(get_args(Purpose))}."
            raise ApiError(400, message, "purpose", "invalid_value")
        return _keep(request, here, writing, form.filename or "", purpose, _expires(form.fields))

    room = await run_in_threadpool(_room, here, by)
    with here.storage.writing(here.storage.file(ids.new(ids.FILE)), room) as writing:
        form = await forms.received(request, here, "file", writing)
        return await run_in_threadpool(taken, form, writing)


def _room(here: Service, by: Caller) -> int:
    """The bytes that a file may have. Raises: ApiError: none more may come."""
    forms.has_room(here)
    with here.database.read() as session:
        left = bytes_left(session, here, by.project)
    if left <= 0:
        raise too_much(here)
    return min(left, here.settings.limits.file_bytes)


def _keep(
    request: Request, here: Service, writing: Writing, name: str, purpose: str, expires: int | None
) -> FileObject:
    """The row of a file that is written. Raises: ApiError: it is not what its purpose wants."""
    now = int(time.time())
    check_content(writing, purpose, here)
    row = File(
        id=writing.place.name, created_at=now, project=request.state.caller.project, bytes=writing.bytes,
        filename=ids.label(name), purpose=purpose, status="processed", status_details=None,
        expires_at=now + expires if expires else None, sha256=writing.sha256,
    )  # fmt: skip
    writing.keep()
    with here.database.write() as session:
        add_file(session, here, row)
        note(session, request, "file.create", row.id)
    return FileObject.of(row)


class FetchFile(Body):
    """A file that lies elsewhere."""

    url: Annotated[Text, StringConstraints(min_length=9, max_length=2048)]
    """An https URL, which leads to the file itself."""
    purpose: Purpose


@router.post("/v1/jaxtune/files")
def fetch(body: FetchFile, request: Request, here: Here, by: By) -> FileObject:
    """Fetch a file by its URL, where the host of the service allows it."""
    if not here.settings.urls:
        message = "This service fetches no files; its setting `urls` allows it. Upload the file instead."
        raise ApiError(403, message, "url", "urls_not_allowed")
    with request.app.state.uploading.one(by.project):
        place = here.storage.file(ids.new(ids.FILE))
        with here.storage.writing(place, _room(here, by)) as writing:
            try:
                fetching.fetch(body.url, writing)
            except UserError as e:
                raise ApiError(400, f"Invalid value for 'url': {e}.", "url", "invalid_value") from e
            except TooLarge as e:
                raise ApiError(413, f"The file is too large: {e} are not accepted.", "url", "file_too_large") from e
            return _keep(request, here, writing, urlsplit(body.url).path, body.purpose, None)


@router.get("/v1/files")
def listed(
    here: Here,
    by: By,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
    after: paging.After = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """The project's files."""
    rows = living(by.project)
    if purpose is not None:
        rows = rows.where(File.purpose == purpose)
    expired = select(File.seq).where(File.project == by.project, File.id == after)
    deleted = select(Audit.place).where(
        Audit.project == by.project, Audit.object_id == after, Audit.place.is_not(None)
    )  # fmt: skip
    with here.database.read() as session:
        found, more = paging.page(session, rows, File, after, limit, order == "desc", expired.union_all(deleted))
    return Page.of([FileObject.of(f) for f in found], more)


@router.get("/v1/files/{file_id}")
def retrieve(file_id: str, here: Here, by: By) -> FileObject:
    """A file's description."""
    with here.database.read() as session:
        return FileObject.of(file_of(session, by, file_id))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
def content(file_id: str, request: Request, here: Here, by: By) -> FileResponse:
    """A file's bytes."""
    with here.database.write() as session:
        row = file_of(session, by, file_id)
        path = here.storage.file(row.id)
        if not path.is_file():
            raise ApiError(404, f"No such File object: {file_id}", "id")
        note(session, request, "file.download", row.id)
    return FileResponse(path, media_type="application/octet-stream", filename=row.filename)


@router.delete("/v1/files/{file_id}")
def delete(file_id: str, request: Request, here: Here, by: By) -> Deleted:
    """Delete a file, row and bytes, unless a job that has not ended needs it."""
    with here.database.write() as session:
        file_of(session, by, file_id)
        row = session.scalar(select(File).where(File.id == file_id).with_for_update())
        needs = select(Job.id).where(
            Job.project == by.project, Job.status.not_in(FINAL),
            or_(Job.training_file == file_id, Job.validation_file == file_id),
        )  # fmt: skip
        job = session.scalar(needs.limit(1))
        if job is not None:
            raise ApiError(400, f"File {file_id} is needed by job {job}; cancel the job first.", "id", "file_in_use")
        if row is not None:
            session.delete(row)
            note(session, request, "file.delete", file_id, row.seq)
    here.storage.delete_file(file_id)
    turns_of(request).forget(file_id)
    return Deleted(id=file_id, object="file")


def _expires(fields: dict[str, str]) -> int | None:
    """The form's `expires_after`, in seconds. Raises: ApiError."""
    anchor, seconds = (fields.get(f"expires_after[{k}]") for k in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    return expires_after(anchor, int(seconds) if seconds and len(seconds) < 10 and seconds.isdecimal() else -1)


def expires_after(anchor: str | None, seconds: int) -> int:
    """Seconds after which a file goes. Raises: ApiError: another anchor, or too few or many seconds."""
    if anchor != "created_at":
        raise ApiError(400, "Invalid value for 'expires_after.anchor': it is 'created_at'.", "expires_after.anchor")
    if seconds not in _EXPIRES:
        message = f"Invalid value for 'expires_after.seconds': from {_EXPIRES[0]} to {_EXPIRES[-1]}."
        raise ApiError(400, message, "expires_after.seconds", "invalid_value")
    return seconds
