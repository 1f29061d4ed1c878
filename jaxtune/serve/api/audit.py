"""Who created, cancelled, downloaded or deleted what: rows that are only ever added."""

import time

from fastapi import APIRouter, Request
from sqlalchemy import select
from sqlalchemy.orm import Session

from jaxtune.serve.api import objects, paging
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.service import By, Here, caller_of
from jaxtune.serve.store import ids
from jaxtune.serve.store.tables import Audit

router = APIRouter()


def note(session: Session, request: Request, action: str, object_id: str, place: int | None = None) -> None:
    """Write down what a request's caller does, in the transaction that does it; of what is deleted, also its place."""
    caller = caller_of(request)
    add(session, caller.project, action, object_id, place, caller.key_id, request.state.request_id)


def add(
    session: Session, project: str, action: str, object_id: str, place: int | None = None, key_id: str | None = None,
    request_id: str | None = None,
) -> None:  # fmt: skip
    """Write down what is done, by whoever does it."""
    session.add(
        Audit(
            id=ids.new("audit_"), created_at=int(time.time()), project=project, key_id=key_id, action=action,
            object_id=object_id, request_id=request_id, place=place,
        )
    )  # fmt: skip


@router.get("/v1/jaxtune/audit")
def audit(here: Here, by: By, after: paging.After = None, limit: paging.Limit = 20) -> objects.Page[objects.AuditEntry]:
    """What was done in the caller's project, the newest first; for keys of scope admin."""
    if by.scope != "admin":
        raise ApiError(403, "The audit log is for keys of scope admin.", code="insufficient_permissions")
    with here.database.read() as session:
        rows, more = paging.page(session, select(Audit).where(Audit.project == by.project), Audit, after, limit)
        return objects.Page.of([objects.AuditEntry.of(r) for r in rows], more)
