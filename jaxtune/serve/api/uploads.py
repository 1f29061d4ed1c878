"""Routes: uploads, which are files that come in parts."""

import time
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import Field
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from jaxtune.serve.api import files, forms
from jaxtune.serve.api.audit import note
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.limits import one_at_a_time
from jaxtune.serve.api.objects import PartObject, UploadObject
from jaxtune.serve.api.service import By, Caller, Here, Service
from jaxtune.serve.bodies import Body, Text
from jaxtune.serve.store import ids
from jaxtune.serve.store.storage import Writing
from jaxtune.serve.store.tables import File, Part, Upload

router = APIRouter()

_LIVES_S = 3600
_COPY = 2**20
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


class Expires(Body):
    """When a file goes."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2592000)


class CreateUpload(Body):
    """A file that will come in parts."""

    bytes: int = Field(ge=1)
    filename: Text = Field(max_length=1024)
    mime_type: Text = Field(max_length=128)
    purpose: files.Purpose
    expires_after: Expires | None = None


class CompleteUpload(Body):
    """Which parts make the file."""

    part_ids: list[Text] = Field(min_length=1, max_length=100_000)
    md5: str | None = Field(None, pattern=r"^[0-9a-fA-F]{32}$")


def upload_of(session: Session, by: Caller, upload_id: str, pending: bool = True) -> Upload:
    """An upload of the caller's, held until the transaction ends. Raises: ApiError: none, or not pending any more."""
    row = session.scalar(select(Upload).where(Upload.project == by.project, Upload.id == upload_id).with_for_update())
    if row is None:
        raise ApiError(404, f"No such Upload object: {upload_id}", "upload_id")
    if pending and (row.status != "pending" or row.expires_at <= time.time()):
        status = "expired" if row.status == "pending" else row.status
        raise ApiError(400, f"Upload {upload_id} is {status}.", "upload_id", "invalid_upload_state")
    return row


@router.post("/v1/uploads")
def create(body: CreateUpload, request: Request, here: Here, by: By) -> UploadObject:
    """Announce a file."""
    if body.bytes > here.settings.limits.upload_bytes:
        message = f"Invalid value for 'bytes': an upload may have {here.settings.limits.upload_bytes}."
        raise ApiError(413, message, "bytes", "file_too_large")
    forms.has_room(here, body.bytes)
    now = int(time.time())
    row = Upload(
        id=ids.new(ids.UPLOAD), created_at=now, project=by.project, bytes=body.bytes,
        filename=ids.label(body.filename), purpose=body.purpose, mime_type=body.mime_type, status="pending",
        expires_at=now + _LIVES_S, file_id=None,
        file_expires=body.expires_after.seconds if body.expires_after else None,
    )  # fmt: skip
    with here.database.write() as session:
        if files.bytes_left(session, here, by.project) < body.bytes:
            raise files.too_much(here)
        session.add(row)
        note(session, request, "upload.create", row.id)
    return UploadObject.of(row)


@router.post("/v1/uploads/{upload_id}/parts", openapi_extra=_FORM)
async def part(upload_id: str, request: Request, here: Here, by: By) -> PartObject:
    """Take a part; parts may come in any order, and at the same time."""
    with request.app.state.uploading.one(by.project):
        return await _part(upload_id, request, here, by)


async def _part(upload_id: str, request: Request, here: Service, by: Caller) -> PartObject:
    limits = here.settings.limits

    def room(session: Session) -> int:
        row = upload_of(session, by, upload_id)
        count, taken = session.execute(
            select(func.count(Part.id), func.coalesce(func.sum(Part.bytes), 0)).where(Part.upload_id == upload_id)
        ).one()
        if count >= limits.parts:
            raise ApiError(400, f"An upload may have {limits.parts} parts.", "data", "too_many_parts")
        return row.bytes - int(taken)

    def before() -> int:
        forms.has_room(here)
        with here.database.write() as session:
            return min(room(session), limits.part_bytes, files.bytes_left(session, here, by.project))

    def keep(writing: Writing) -> Part:
        row = Part(
            id=part_id, created_at=int(time.time()), upload_id=upload_id, project=by.project, bytes=writing.bytes,
            sha256=writing.sha256,
        )  # fmt: skip
        try:
            writing.keep()
        except FileNotFoundError:  # its folder went with the upload
            with here.database.read() as session:
                upload_of(session, by, upload_id)
            raise
        with here.database.write() as session:
            one_at_a_time(session, f"bytes {by.project}")
            if room(session) < writing.bytes:
                raise ApiError(400, "The parts have more bytes than were announced.", "data", "invalid_upload_size")
            if files.bytes_left(session, here, by.project) < writing.bytes:
                raise files.too_much(here)
            session.add(row)
        return row

    left, part_id = await run_in_threadpool(before), ids.new(ids.PART)
    place = here.storage.part(upload_id, part_id)
    with here.storage.writing(place, max(0, left)) as writing:
        await forms.received(request, here, "data", writing)
        row = await run_in_threadpool(keep, writing)
    return PartObject(id=row.id, created_at=row.created_at, upload_id=upload_id)


@router.post("/v1/uploads/{upload_id}/complete")
def complete(upload_id: str, body: CompleteUpload, request: Request, here: Here, by: By) -> UploadObject:
    """Make the file of its parts, in the order given. Asked again, the answer is the same."""
    if done := _done(upload_id, here, by):
        return done
    with here.database.write() as session:
        upload = upload_of(session, by, upload_id)
        parts = {p.id: p for p in session.scalars(select(Part).where(Part.upload_id == upload_id))}
    if len(set(body.part_ids)) != len(body.part_ids) or not parts.keys() >= set(body.part_ids):
        message = "Invalid value for 'part_ids': each is a part of this upload, and named once."
        raise ApiError(400, message, "part_ids", "invalid_value")
    total = sum(parts[p].bytes for p in body.part_ids)
    if total != upload.bytes:
        message = f"The parts have {total} bytes together; {upload.bytes} were announced."
        raise ApiError(400, message, "part_ids", "invalid_upload_size")
    forms.has_room(here, total)
    with request.app.state.uploading.one(by.project):
        try:
            file = _join(upload, body, request, here, by)
        except (ApiError, FileNotFoundError):  # perhaps a request that was sent before has completed it meanwhile
            if done := _done(upload_id, here, by):
                return done
            raise
    here.storage.delete_upload(upload_id)
    return UploadObject.of(upload, file)


def _done(upload_id: str, here: Service, by: Caller) -> UploadObject | None:
    """The upload if it is completed, None if it is pending. Raises: ApiError: none, or it ended otherwise."""
    with here.database.read() as session:
        row = upload_of(session, by, upload_id, pending=False)
        if row.status == "completed":
            return UploadObject.of(row, session.scalar(select(File).where(File.id == row.file_id)))
        upload_of(session, by, upload_id)
    return None


def _join(upload: Upload, body: CompleteUpload, request: Request, here: Service, by: Caller) -> File:
    file_id, now = ids.new(ids.FILE), int(time.time())
    with here.storage.writing(here.storage.file(file_id), upload.bytes) as writing:
        for part_id in body.part_ids:
            with here.storage.part(upload.id, part_id).open("rb") as f:
                while piece := f.read(_COPY):
                    writing.write(piece)
        if body.md5 and writing.md5 != body.md5.lower():
            message = f"Invalid value for 'md5': the parts together have {writing.md5}."
            raise ApiError(400, message, "md5", "invalid_value")
        files.check_content(writing, upload.purpose, here)
        file = File(
            id=file_id, created_at=now, project=by.project, bytes=writing.bytes, filename=upload.filename,
            purpose=upload.purpose, status="processed", status_details=None,
            expires_at=now + upload.file_expires if upload.file_expires else None, sha256=writing.sha256,
        )  # fmt: skip
        writing.keep()
        with here.database.write() as session:
            row = upload_of(session, by, upload.id)  # nobody else completed or cancelled it meanwhile
            for part in session.scalars(select(Part).where(Part.upload_id == row.id)):
                session.delete(part)
            session.flush()
            files.add_file(session, here, file)
            row.status, row.file_id = upload.status, upload.file_id = "completed", file_id
            note(session, request, "upload.complete", row.id)
    return file


@router.post("/v1/uploads/{upload_id}/cancel")
def cancel(upload_id: str, request: Request, here: Here, by: By) -> UploadObject:
    """Let go of an upload and its parts; once more does nothing more."""
    with here.database.write() as session:
        row = upload_of(session, by, upload_id, pending=False)
        if row.status != "cancelled":
            upload_of(session, by, upload_id)
            row.status = "cancelled"
            for part in session.scalars(select(Part).where(Part.upload_id == upload_id)):
                session.delete(part)
            note(session, request, "upload.cancel", upload_id)
    here.storage.delete_upload(upload_id)
    return UploadObject.of(row)
