"""Answers, as OpenAI's clients expect them; made from rows."""

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from jaxtune.serve.store import tables

T = TypeVar("T", bound=Any)


class Fault(BaseModel):
    """What went wrong; all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class Envelope(BaseModel):
    """Every answer that is no success."""

    error: Fault


class Page(BaseModel, Generic[T]):
    """A page of a list."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def of(cls, data: list[T], more: bool) -> "Page[T]":
        """A page of these objects."""
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=data, first_id=first, last_id=last, has_more=more)


class Deleted(BaseModel):
    """Something is gone."""

    id: str
    object: str
    deleted: bool = True


class FileObject(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None

    @classmethod
    def of(cls, row: tables.File) -> "FileObject":
        """A file of the table."""
        return cls(
            id=row.id, bytes=row.bytes, created_at=row.created_at, expires_at=row.expires_at, filename=row.filename,
            purpose=row.purpose, status=row.status, status_details=row.status_details,
        )  # fmt: skip


class UploadObject(BaseModel):
    """A file that comes in parts."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: str
    file: FileObject | None

    @classmethod
    def of(cls, row: tables.Upload, file: tables.File | None = None) -> "UploadObject":
        """An upload of the table, with the file that it became."""
        return cls(
            id=row.id, bytes=row.bytes, created_at=row.created_at, expires_at=row.expires_at, filename=row.filename,
            purpose=row.purpose, status=row.status, file=FileObject.of(file) if file else None,
        )  # fmt: skip


class PartObject(BaseModel):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None


class JobObject(BaseModel):
    """A fine-tuning job."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    seed: int
    integrations: list[Any]
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    jaxtune: dict[str, Any]

    @classmethod
    def of(cls, row: tables.Job, organization: str) -> "JobObject":
        """A job of the table. Of its progress only what a caller has a use for is told."""
        told = {k: row.progress[k] for k in ("step", "total_steps", "epoch", "tokens_per_second") if k in row.progress}
        return cls(
            id=row.id, created_at=row.created_at, finished_at=row.finished_at, estimated_finish=row.estimated_finish,
            model=row.model, fine_tuned_model=row.fine_tuned_model, organization_id=organization, status=row.status,
            hyperparameters=row.hyperparameters,
            method={"type": row.method, row.method: {"hyperparameters": row.hyperparameters}},
            training_file=row.training_file, validation_file=row.validation_file, result_files=row.result_files,
            trained_tokens=row.trained_tokens, error=JobError(**row.error) if row.error else None, seed=row.seed,
            integrations=row.integrations or [], metadata=row.labels, user_provided_suffix=row.suffix,
            jaxtune={"knobs": row.knobs, "progress": told, "started_at": row.started_at},
        )  # fmt: skip


class EventObject(BaseModel):
    """What became of a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any]

    @classmethod
    def of(cls, row: tables.Event) -> "EventObject":
        """An event of the table."""
        return cls(
            id=row.id, created_at=row.created_at, level=row.level, message=row.message, type=row.type,
            data=row.data or {},
        )  # fmt: skip


class CheckpointObject(BaseModel):
    """A step whose model can be called by name."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, Any]

    @classmethod
    def of(cls, row: tables.Checkpoint) -> "CheckpointObject":
        """A checkpoint of the table."""
        return cls(
            id=row.id, created_at=row.created_at, fine_tuning_job_id=row.job_id,
            fine_tuned_model_checkpoint=row.model, step_number=row.step_number, metrics=row.metrics,
        )  # fmt: skip


class ModelObject(BaseModel):
    """A model that answers."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shutdown_date: int | None = None


class ModelList(BaseModel):
    """All models; never in pages."""

    object: Literal["list"] = "list"
    data: list[ModelObject]


class AuditEntry(BaseModel):
    """Who did what."""

    id: str
    object: Literal["audit"] = "audit"
    created_at: int
    key_id: str | None
    action: str
    object_id: str
    request_id: str | None

    @classmethod
    def of(cls, row: tables.Audit) -> "AuditEntry":
        """A row of the log."""
        return cls(
            id=row.id, created_at=row.created_at, key_id=row.key_id, action=row.action, object_id=row.object_id,
            request_id=row.request_id,
        )  # fmt: skip
