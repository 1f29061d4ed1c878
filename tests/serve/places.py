"""What tests of the service share: a database and a storage folder with files and jobs in them."""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import select

from jaxtune.serve.settings import Settings
from jaxtune.serve.store import ids, states
from jaxtune.serve.store.database import Database
from jaxtune.serve.store.storage import Storage
from jaxtune.serve.store.tables import Event, File, Job

PROJECT = "default"


def until(holds: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


class Place:
    """A service's database and storage, and what a user would put there."""

    def __init__(self, root: Path, url: str | None = None, **settings: Any) -> None:
        (root / "models").mkdir(parents=True, exist_ok=True)
        (root / "data").mkdir(exist_ok=True)
        self.settings = Settings(models=root / "models", data=root / "data", database=url, demo=True, **settings)
        self.database = Database(self.settings.database_url)
        self.database.upgrade()
        self.storage = Storage(self.settings.data)

    def add_file(self, rows: list[dict] | bytes) -> str:
        blob = rows if isinstance(rows, bytes) else b"".join(json.dumps(r).encode() + b"\n" for r in rows)
        file = File(
            id=ids.new(ids.FILE), created_at=int(time.time()), project=PROJECT, bytes=len(blob), filename="f.jsonl",
            purpose="fine-tune", status="processed", sha256=hashlib.sha256(blob).hexdigest(),
        )  # fmt: skip
        place = self.storage.file(file.id)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(blob)
        with self.database.write() as session:
            session.add(file)
        return file.id

    def add_job(self, training: str, validation: str | None = None, model: str = "demo", **columns: Any) -> str:
        given = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
        job = Job(
            id=ids.new(ids.JOB), created_at=int(time.time()), project=PROJECT, status=states.VALIDATING, model=model,
            training_file=training, validation_file=validation, seed=1, method="supervised",
            hyperparameters={**given, **columns.pop("hyperparameters", {})}, request_hash="", result_files=[],
            progress={}, **{"knobs": {}, **columns},
        )  # fmt: skip
        with self.database.write() as session:
            session.add(job)
            session.flush()
            states.say(session, job.id, f"Created fine-tuning job: {job.id}")
        return job.id

    def job(self, job_id: str) -> Job:
        with self.database.read() as session:
            return session.scalars(select(Job).where(Job.id == job_id)).one()

    def events(self, job_id: str) -> list[Event]:
        with self.database.read() as session:
            return list(session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.seq)))

    def told(self, job_id: str) -> list[str]:
        return [e.message for e in self.events(job_id)]

    def move(self, job_id: str, to: str, message: str = "as a user says") -> None:
        """What the API does on cancel, pause and resume."""
        with self.database.write() as session:
            states.move(session, job_id, to, message)


def questions(n: int) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"What is {i} + 1?"}, {"role": "assistant", "content": f"{i + 1}."}]}
        for i in range(n)
    ]
