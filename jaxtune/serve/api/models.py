"""Routes: models."""

from pathlib import Path

from fastapi import APIRouter, Request
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from jaxtune.serve import bases
from jaxtune.serve.api.audit import note
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.objects import Deleted, ModelList, ModelObject
from jaxtune.serve.api.service import By, Caller, Here, Service
from jaxtune.serve.store.states import FINAL
from jaxtune.serve.store.tables import Checkpoint, Job, Model

router = APIRouter()


def unknown(model: str) -> ApiError:
    """There is no such model, or it is another project's."""
    message = f"The model `{model}` does not exist or you do not have access to it."
    return ApiError(404, message, "model", "model_not_found")


def not_here(here: Service, base: str) -> ApiError:
    """A base that has no folder on this machine: a hub model, which workers fetch, or none at all."""
    if not bases.of_hub(here.settings, base):
        return unknown(base)
    message = f"`{base}` is a model of the hub, which workers fetch; put its folder under `models` to look at it here."
    return ApiError(400, message, "model", "model_not_here")


def tuned_of(session: Session, by: Caller, name: str) -> Model | None:
    """A tuned model of the caller's."""
    return session.scalar(select(Model).where(Model.project == by.project, Model.id == name))


@router.get("/v1/models")
def listed(here: Here, by: By) -> ModelList:
    """Base models, and the project's tuned ones, the newest first."""
    with here.database.read() as session:
        rows = session.scalars(select(Model).where(Model.project == by.project).order_by(Model.seq.desc()))
        tuned = [_tuned(here, m) for m in rows]
    return ModelList(data=[_base(n, p) for n, p in bases.found(here.settings).items()] + tuned)


@router.get("/v1/models/{model:path}")
def retrieve(model: str, here: Here, by: By) -> ModelObject:
    """A model; names with slashes and colons are fine."""
    folder = bases.found(here.settings).get(model)
    if folder is not None:
        return _base(model, folder)
    with here.database.read() as session:
        row = tuned_of(session, by, model)
    if row is None:
        raise unknown(model)
    return _tuned(here, row)


@router.delete("/v1/models/{model:path}")
async def delete(model: str, request: Request, here: Here, by: By) -> Deleted:
    """Delete a tuned model: what the engine holds of it, its folder, its row. The job that made it stays."""

    def found() -> Model:
        with here.database.read() as session:
            row = tuned_of(session, by, model)
            if row is None and model in bases.found(here.settings):
                raise ApiError(403, f"`{model}` is a base model; only tuned models can be deleted.", "model")
            if row is None:
                raise unknown(model)
            waiting = select(Job.id).where(Job.project == by.project, Job.model == model, Job.status.not_in(FINAL))
            job = session.scalar(waiting.limit(1))
        if job is not None:
            raise ApiError(400, f"`{model}` is tuned further by job {job}; cancel the job first.", "model", "in_use")
        return row

    def gone(row: Model) -> None:
        here.storage.delete_model(row)  # before its row, so that after a crash one can ask again
        with here.database.write() as session:
            for each in session.scalars(select(Model).where(Model.id == model)):
                session.delete(each)
            for step in session.scalars(select(Checkpoint).where(Checkpoint.model == model)):
                session.delete(step)
            note(session, request, "model.delete", model)

    row = await run_in_threadpool(found)
    await here.engine.forget(here.storage.model(row))
    await run_in_threadpool(gone, row)
    return Deleted(id=model, object="model")


def _base(name: str, folder: Path) -> ModelObject:
    return ModelObject(id=name, created=int((folder / "config.json").stat().st_mtime), owned_by="system")


def _tuned(here: Service, row: Model) -> ModelObject:
    return ModelObject(id=row.id, created=row.created_at, owned_by=here.settings.organization)
