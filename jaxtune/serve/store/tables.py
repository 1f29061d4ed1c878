"""The tables of the service. Times are Unix seconds; ids are random; every row but a lease's has its project.

A change here wants a migration in `migrations/versions`; a test compares the two.
"""

from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_Big = BigInteger().with_variant(Integer(), "sqlite")  # SQLite numbers rows by INTEGER alone


class Base(DeclarativeBase):
    """What all tables share."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {dict[str, Any]: JSON(none_as_null=True), list[Any]: JSON(none_as_null=True)}  # noqa: RUF012


class _Row(Base):
    """A row that is listed in the order in which it came."""

    __abstract__ = True
    seq: Mapped[int] = mapped_column(_Big, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(128), unique=True)
    created_at: Mapped[int] = mapped_column(_Big)


class Key(_Row):
    """A key; only its hash is kept."""

    __tablename__ = "keys"
    hash: Mapped[str] = mapped_column(String(64), unique=True)  # SHA-256, hex
    name: Mapped[str] = mapped_column(String(255))
    project: Mapped[str] = mapped_column(String(64))
    scope: Mapped[str] = mapped_column(String(16))  # user | admin
    per_minute: Mapped[int | None]
    revoked_at: Mapped[int | None] = mapped_column(_Big)


class File(_Row):
    """A file; its bytes lie in storage under its id."""

    __tablename__ = "files"
    project: Mapped[str] = mapped_column(String(64), index=True)
    bytes: Mapped[int] = mapped_column(_Big)
    filename: Mapped[str] = mapped_column(String(255))  # a label
    purpose: Mapped[str] = mapped_column(String(32))
    status: Mapped[str] = mapped_column(String(16))  # uploaded | processed | error
    status_details: Mapped[str | None] = mapped_column(Text)
    expires_at: Mapped[int | None] = mapped_column(_Big)
    sha256: Mapped[str] = mapped_column(String(64))


class Upload(_Row):
    """A file that comes in parts."""

    __tablename__ = "uploads"
    project: Mapped[str] = mapped_column(String(64), index=True)
    bytes: Mapped[int] = mapped_column(_Big)  # as announced
    filename: Mapped[str] = mapped_column(String(255))
    purpose: Mapped[str] = mapped_column(String(32))
    mime_type: Mapped[str] = mapped_column(String(128))
    status: Mapped[str] = mapped_column(String(16))  # pending | completed | cancelled | expired
    expires_at: Mapped[int] = mapped_column(_Big)
    file_expires: Mapped[int | None] = mapped_column(_Big)  # seconds after the file's creation
    file_id: Mapped[str | None] = mapped_column(String(128))


class Part(_Row):
    """A part of an upload."""

    __tablename__ = "parts"
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    project: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(_Big)
    sha256: Mapped[str] = mapped_column(String(64))


class Job(_Row):
    """A fine-tuning job. `status` changes by `states.move` alone."""

    __tablename__ = "jobs"
    project: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(128))
    status: Mapped[str] = mapped_column(String(24), index=True)
    model: Mapped[str] = mapped_column(String(512))  # as asked for: a base, or a tuned model to go on from
    training_file: Mapped[str] = mapped_column(String(128))
    validation_file: Mapped[str | None] = mapped_column(String(128))
    suffix: Mapped[str | None] = mapped_column(String(64))
    seed: Mapped[int] = mapped_column(_Big)
    method: Mapped[str] = mapped_column(String(24))  # supervised | dpo | reinforcement
    hyperparameters: Mapped[dict[str, Any]]  # n_epochs, batch_size, learning_rate_multiplier …: "auto" until resolved
    knobs: Mapped[dict[str, Any]]  # of extra_body.jaxtune, checked
    labels: Mapped[dict[str, Any] | None]  # `metadata` of the API
    integrations: Mapped[list[Any] | None]  # without secrets
    request_hash: Mapped[str] = mapped_column(String(64))  # of the request that made it
    idempotency_key: Mapped[str | None] = mapped_column(String(255))
    started_at: Mapped[int | None] = mapped_column(_Big)
    finished_at: Mapped[int | None] = mapped_column(_Big)
    estimated_finish: Mapped[int | None] = mapped_column(_Big)
    fine_tuned_model: Mapped[str | None] = mapped_column(String(512))
    trained_tokens: Mapped[int | None] = mapped_column(_Big)
    result_files: Mapped[list[Any]]
    error: Mapped[dict[str, Any] | None]  # code, message, param
    progress: Mapped[dict[str, Any]]  # step, total_steps, tokens_per_second, what the worker has read of the run


class Event(_Row):
    """What became of a job."""

    __tablename__ = "events"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    level: Mapped[str] = mapped_column(String(8))  # info | warn | error
    type: Mapped[str] = mapped_column(String(16))  # message | metrics
    message: Mapped[str] = mapped_column(Text)
    data: Mapped[dict[str, Any] | None]


class Checkpoint(_Row):
    """A step of a job whose model can be called by name."""

    __tablename__ = "checkpoints"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    step_number: Mapped[int]
    metrics: Mapped[dict[str, Any]]
    model: Mapped[str] = mapped_column(String(512))  # its name in `models`


class Model(_Row):
    """A tuned model; `id` is its name."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(String(512), unique=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    job_id: Mapped[str] = mapped_column(String(128), index=True)
    base: Mapped[str] = mapped_column(String(512))  # the name of the base model under it
    kind: Mapped[str] = mapped_column(String(16))  # adapter | whole
    folder: Mapped[str] = mapped_column(String(512))  # relative to the storage folder
    step: Mapped[int | None]  # of a checkpoint; None: the result


class Lease(Base):
    """Who works on a job. A live lease is one whose heartbeat is younger than `leases.EXPIRES_S`."""

    __tablename__ = "leases"
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    owner: Mapped[str] = mapped_column(String(255))
    fence: Mapped[int] = mapped_column(_Big)  # grows with each owner; writes of an older one are refused
    heartbeat: Mapped[float]


class Audit(_Row):
    """Who created, cancelled, downloaded or deleted what; rows are only added."""

    __tablename__ = "audit"
    project: Mapped[str] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(64))
    object_id: Mapped[str] = mapped_column(String(512), index=True)
    request_id: Mapped[str | None] = mapped_column(String(64))
    place: Mapped[int | None] = mapped_column(_Big)  # `seq` of what was deleted: a list goes on from there


Index("ix_events_job_seq", Event.job_id, Event.seq)
Index("ix_jobs_project_seq", Job.project, Job.seq)
