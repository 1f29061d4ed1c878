"""Routes beyond OpenAI's, under /v1/jaxtune: what the page shows that a client does not ask for."""

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Query
from sqlalchemy import select

import jaxtune
from jaxtune.serve import bases
from jaxtune.serve.api import following
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.objects import EventObject
from jaxtune.serve.api.service import By, Here
from jaxtune.serve.redaction import redacted
from jaxtune.serve.store import keys
from jaxtune.serve.store.tables import Event, Model

router = APIRouter(prefix="/v1/jaxtune", tags=["jaxtune"])

_EVENTS = 5000  # that one answer holds
_LOG = 65536  # bytes of a log that one answer holds


@router.get("/about")
def about(service: Here, caller: By) -> dict[str, Any]:
    """What the service is, what it allows, and which models there are."""
    s = service.settings
    with service.database.read() as session:
        wanted = keys.wanted(session)
        tuned = session.scalars(select(Model).where(Model.project == caller.project).order_by(Model.seq.desc())).all()
    return {
        "object": "jaxtune.about",
        "version": jaxtune.__version__,
        "organization": s.organization,
        "project": caller.project,
        "keys": wanted,
        "limits": s.limits.model_dump(),
        "bases": [_base(name, folder) for name, folder in bases.found(s).items()],
        "tuned": [
            {"id": m.id, "base": m.base, "kind": m.kind, "job": m.job_id, "step": m.step, "created": m.created_at}
            for m in tuned
        ],
    }


def _base(name: str, folder: Path) -> dict[str, Any]:
    """What a base model's folder says of it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    config = config if isinstance(config, dict) else {}
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    kept = {k: config.get(k) for k in ("model_type", "num_hidden_layers", "hidden_size", "max_position_embeddings")}
    return {"id": name, "bytes": size, **kept}


@router.get("/jobs/{job_id}/metrics")
def metrics(service: Here, caller: By, job_id: str, after: str | None = Query(None, max_length=128)) -> dict[str, Any]:
    """The measurements of a job, oldest first; `after` is the `last_id` of an earlier answer."""
    with service.database.read() as session:
        following.must_have(session, caller, job_id)
        query = select(Event).where(Event.job_id == job_id, Event.type == "metrics").order_by(Event.seq).limit(_EVENTS)
        if after is not None:
            seq = session.scalar(select(Event.seq).where(Event.id == after, Event.job_id == job_id))
            if seq is None:
                raise ApiError(400, f"job {job_id} has no event {after!r}", "after")
            query = query.where(Event.seq > seq)
        found = session.scalars(query).all()
    return {
        "object": "list",
        "data": [{"created_at": e.created_at, **(e.data or {})} for e in found],
        "last_id": found[-1].id if found else after,
        "has_more": len(found) == _EVENTS,
    }


@router.get("/jobs/{job_id}/messages")
def messages(service: Here, caller: By, job_id: str, limit: int = Query(100, ge=1, le=1000)) -> dict[str, Any]:
    """The events of a job that are no measurements, the newest first."""
    query = select(Event).where(Event.job_id == job_id, Event.type == "message").order_by(Event.seq.desc())
    with service.database.read() as session:
        following.must_have(session, caller, job_id)
        found = session.scalars(query.limit(limit + 1)).all()
    data = [EventObject.of(e).model_dump() for e in found[:limit]]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.get("/jobs/{job_id}/log")
def log(service: Here, caller: By, job_id: str, after: int | None = Query(None, ge=0)) -> dict[str, Any]:
    """What the training said: whole lines after so many bytes, else the last ones; `next` is where to go on."""
    with service.database.read() as session:
        following.must_have(session, caller, job_id)
    path = service.storage.job(job_id) / "log.txt"
    size = path.stat().st_size if path.is_file() else 0
    start = max(0, size - _LOG) if after is None else min(after, size)
    lines = b""
    if size:
        with path.open("rb") as f:
            f.seek(start)
            lines = f.read(_LOG)
    whole = lines.rfind(b"\n") + 1  # the last may be half written
    if whole or len(lines) < _LOG:
        lines = lines[:whole]
    text = redacted(lines.decode(errors="replace"))
    return {"object": "jaxtune.log", "text": text, "next": start + len(lines), "size": size}
