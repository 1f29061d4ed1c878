"""Creating a job: what a request may say, and what must be true before there is a row."""

import hashlib
import json
import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field, StringConstraints, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError, ValidationError
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jaxtune.data.templates import TEMPLATES
from jaxtune.serve import bases
from jaxtune.serve.api import files, models
from jaxtune.serve.api.audit import note
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.limits import one_at_a_time
from jaxtune.serve.api.service import Caller, Service
from jaxtune.serve.bodies import Body, Text
from jaxtune.serve.knobs import Knobs
from jaxtune.serve.store import ids, states
from jaxtune.serve.store.tables import Job

_TWICE_S = 10  # within which an identical request is taken for the same one, sent again


def _auto(what: str) -> WrapValidator:
    """One message for "auto" and numbers, where a union would tell of each of its members."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError as e:
            raise PydanticCustomError("auto_or_number", "it is 'auto' or {what}", {"what": what}) from e

    return WrapValidator(check)


class Hyperparameters(Body):
    """How long and how fast."""

    n_epochs: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], _auto("a whole number from 1")] = "auto"
    batch_size: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], _auto("a whole number from 1")] = "auto"
    learning_rate_multiplier: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0, le=1e4)], _auto("a number above 0, up to 10000")
    ] = "auto"


class Supervised(Body):
    """Learning from answers."""

    hyperparameters: Hyperparameters | None = None


class Method(Body):
    """What a job learns from."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = None
    reinforcement: dict[str, Any] | None = None


Label = Annotated[Text, StringConstraints(max_length=64)]
Value = Annotated[Text, StringConstraints(max_length=512)]


class CreateJob(Body):
    """A job that is wanted."""

    model: Annotated[Text, StringConstraints(min_length=1, max_length=512)]
    training_file: Annotated[Text, StringConstraints(min_length=1, max_length=128)]
    validation_file: Annotated[Text, StringConstraints(min_length=1, max_length=128)] | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Annotated[Text, StringConstraints(min_length=1, max_length=64)] | None = None
    seed: int | None = Field(None, ge=0, lt=2**32)
    metadata: Annotated[dict[Label, Value], Field(max_length=16)] | None = None
    integrations: list[dict[str, Any]] | None = None
    jaxtune: Knobs | None = None


def create(body: CreateJob, request: Request, here: Service, by: Caller, idempotency_key: str | None) -> Job:
    """A new job, or the one that the same request made before.

    Raises:
      ApiError: what is wrong with the request, or that too many jobs wait.
    """
    asked = _hyperparameters(body)
    _check(body, asked, here)
    request_hash = hashlib.sha256(json.dumps(body.model_dump(), sort_keys=True).encode()).hexdigest()
    with here.database.write() as session:
        one_at_a_time(session, "create job")
        before = _before(session, by, request_hash, idempotency_key)
        if before is not None:
            return before
        _check_model(session, body.model, here, by)
        _check_file(session, by, "training_file", body.training_file)
        if body.validation_file is not None:
            _check_file(session, by, "validation_file", body.validation_file)
        _check_queue(session, here, by)
        job = Job(
            id=ids.new(ids.JOB), created_at=int(time.time()), project=by.project, key_id=by.key_id,
            status=states.VALIDATING, model=body.model, training_file=body.training_file,
            validation_file=body.validation_file, suffix=body.suffix,
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed, method="supervised",
            hyperparameters=asked.model_dump(), knobs=body.jaxtune.given() if body.jaxtune else {},
            labels=body.metadata or None, integrations=None, request_hash=request_hash, idempotency_key=idempotency_key,
            started_at=None, finished_at=None, estimated_finish=None, fine_tuned_model=None, trained_tokens=None,
            result_files=[], error=None, progress={},
        )  # fmt: skip
        session.add(job)
        session.flush()
        states.say(session, job.id, f"Created fine-tuning job: {job.id}")
        note(session, request, "job.create", job.id)
    return job


def _hyperparameters(body: CreateJob) -> Hyperparameters:
    """Those of `method`, else the older ones. Raises: ApiError: a method that there is not."""
    method = body.method
    if method is not None and method.type != "supervised":
        message = f"The method '{method.type}' is not supported yet; use 'supervised'."
        raise ApiError(400, message, "method.type", "unsupported_value")
    given = method.supervised.hyperparameters if method and method.supervised else None
    return given or body.hyperparameters or Hyperparameters()


def _check(body: CreateJob, asked: Hyperparameters, here: Service) -> None:
    limits = here.settings.limits
    length = body.jaxtune.max_length if body.jaxtune else None
    for name, value, most in (
        ("hyperparameters.n_epochs", asked.n_epochs, limits.epochs),
        ("hyperparameters.batch_size", asked.batch_size, limits.batch_size),
        ("jaxtune.max_length", length, limits.sequence_length),
    ):
        if isinstance(value, int) and value > most:
            raise ApiError(400, f"Invalid value for {name!r}: {value} is above {most}.", name, "invalid_value")
    template = body.jaxtune.template if body.jaxtune else None
    if template not in (None, "auto", *TEMPLATES):
        message = f"Invalid value for 'jaxtune.template': it is one of auto, {', '.join(TEMPLATES)}."
        raise ApiError(400, message, "jaxtune.template", "invalid_value")
    if body.integrations:
        message = "Integrations are not supported; the events of a job and its result file have its metrics."
        raise ApiError(400, message, "integrations", "unsupported_value")


def _before(session: Session, by: Caller, request_hash: str, idempotency_key: str | None) -> Job | None:
    """The job that this very request made before. Raises: ApiError: its idempotency key belongs to another request."""
    mine = select(Job).where(Job.project == by.project, Job.key_id == by.key_id).order_by(Job.seq.desc()).limit(1)
    if idempotency_key is not None:
        job = session.scalar(mine.where(Job.idempotency_key == idempotency_key))
        if job is not None and job.request_hash != request_hash:
            message = "This Idempotency-Key was used with another request; take a new one."
            raise ApiError(400, message, code="idempotency_key_reused")
        return job
    same = mine.where(
        Job.request_hash == request_hash, Job.created_at > int(time.time()) - _TWICE_S,
        Job.idempotency_key.is_(None), Job.status.not_in((states.CANCELLED, states.FAILED)),
    )  # fmt: skip
    return session.scalar(same)


def _check_model(session: Session, name: str, here: Service, by: Caller) -> None:
    """Raises: ApiError: no such model, or one that is too large."""
    folder = bases.found(here.settings).get(name)
    if folder is None:
        if not bases.of_hub(here.settings, name) and models.tuned_of(session, by, name) is None:
            raise models.unknown(name)
        return
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    if size > here.settings.limits.model_bytes:
        message = f"The weights of `{name}` have {size} bytes; models may have {here.settings.limits.model_bytes}."
        raise ApiError(400, message, "model", "model_too_large")


def _check_file(session: Session, by: Caller, param: str, file_id: str) -> None:
    """Raises: ApiError: no such file, or one for another purpose."""
    row = session.scalar(files.living(by.project).where(files.File.id == file_id).with_for_update())
    if row is None:
        raise ApiError(400, f"No such File object: {file_id}", param, "invalid_file")
    if row.purpose != files.TRAINING:
        message = f"File {file_id} has the purpose '{row.purpose}'; upload it with purpose '{files.TRAINING}'."
        raise ApiError(400, message, param, "invalid_file_purpose")


def _check_queue(session: Session, here: Service, by: Caller) -> None:
    """Raises: ApiError: too many jobs wait or run."""
    waiting = select(func.count(Job.id)).where(Job.status.not_in(states.FINAL))
    limits = here.settings.limits
    for rows, most, whose in (
        (waiting.where(Job.project == by.project), limits.jobs, "of this project"),
        (waiting, limits.queued_jobs, "of all projects"),
    ):
        if (session.scalar(rows) or 0) >= most:
            message = f"{most} jobs {whose} wait or run already. Create this one when some have ended."
            headers = {"Retry-After": "60", "x-should-retry": "false"}
            raise ApiError(429, message, code="queue_full", type="requests", headers=headers)
