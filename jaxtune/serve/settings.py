"""What a service is told when it starts: places, addresses and limits."""

from pathlib import Path

from pydantic import Field

from jaxtune.config.base import Strict

MIB, GIB = 2**20, 2**30
DATA = Path("jaxtune-data")
"""The storage folder of a demo, and of `jaxtune keys`, where none is named."""


class Limits(Strict):
    """What one request, one key or one job may take."""

    file_bytes: int = Field(512 * MIB, ge=1)
    """Of a file that is uploaded whole."""
    upload_bytes: int = Field(8 * GIB, ge=1)
    """Of a file that is uploaded in parts."""
    part_bytes: int = Field(64 * MIB, ge=1)
    """Of one part."""
    parts: int = Field(1000, ge=1)
    """Of one upload."""
    project_bytes: int = Field(64 * GIB, ge=1)
    """Of all files and parts of a project."""
    free_bytes: int = Field(1 * GIB, ge=0)
    """What uploads leave free on the disk."""
    uploads_at_once: int = Field(8, ge=1)
    """Files and parts that come in at the same time, of one project."""
    line_bytes: int = Field(16 * MIB, ge=1)
    """Of one line of a training file."""
    examples: int = Field(2_000_000, ge=1)
    """Lines of a training file."""
    body_bytes: int = Field(4 * MIB, ge=1)
    """Of a request's JSON."""
    json_depth: int = Field(64, ge=1)
    """Of nesting in a request's or a line's JSON."""
    queued_jobs: int = Field(1000, ge=1)
    """Jobs that wait or run, of all projects."""
    jobs: int = Field(250, ge=1)
    """Jobs that wait or run, of one project."""
    epochs: int = Field(50, ge=1)
    batch_size: int = Field(256, ge=1)
    sequence_length: int = Field(8192, ge=32)
    """Tokens of an example; longer ones are cut."""
    model_bytes: int = Field(200 * GIB, ge=1)
    """Of a base model's weights on disk."""
    trained_tokens: int = Field(10**10, ge=1)
    """Of one job, all epochs together."""
    job_seconds: float = Field(7 * 86400.0, gt=0)
    """That a job may train."""
    answer_tokens: int = Field(4096, ge=1)
    """New tokens of one answer."""
    answers: int = Field(8, ge=1)
    """`n` and `best_of` of one request, and prompts of a legacy completion."""
    streams: int = Field(64, ge=1)
    """Answers that are made or wait at the same time, of all projects."""
    key_streams: int = Field(32, ge=1)
    """Answers that are made or wait at the same time, of one key."""
    per_minute: int = Field(600, ge=1)
    """Requests of one key, where the key does not say otherwise."""
    errors_listed: int = Field(100, ge=1)
    """Bad lines of a training file that are told."""


class Settings(Strict):
    """A service."""

    models: Path
    """The folder of base models: each folder in it with a config.json is one, named by its path from here."""
    data: Path
    """The storage folder: files, jobs, tuned models; the database too, where no other is named."""
    database: str | None = None
    """A database URL of SQLAlchemy; SQLite in the storage folder where not given."""
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    organization: str = Field("local", pattern=r"^[a-z0-9-]{1,32}$")
    """The third part of the names of tuned models."""
    hosts: list[str] = []
    """Host names under which the service is reached, beside localhost."""
    demo: bool = False
    """Offer the embedded model, as `demo`."""
    hub: bool = False
    """Let models be hub ids, which are then fetched."""
    urls: bool = False
    """Let files be named by https URLs."""
    cache_bytes: int = Field(8 * GIB, ge=1)
    """Of base models and adapters held in memory for answers."""
    chat_platform: str = ""
    """The JAX platform that answers are made on; empty: JAX's choice, or the CPU where the chips are TPUs, which one
    process alone can hold and a worker needs."""
    worker: bool = True
    """Start a worker beside the API."""
    limits: Limits = Limits()

    @property
    def database_url(self) -> str:
        """The URL of the database."""
        return self.database or f"sqlite:///{self.data.absolute() / 'jaxtune.db'}"
