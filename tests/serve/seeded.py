"""A service with something in it: rows as a worker would have left them, and answers that come word by word."""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse

from jaxtune.serve.api.service import Service
from jaxtune.serve.store import ids, states
from jaxtune.serve.store.tables import Checkpoint, File, Job, Model

PROJECT = "default"
BASE = "demo"


def add_job(service: Service, suffix: str, status: str = states.SUCCEEDED, steps: int = 120, **columns: Any) -> str:
    """A job on the demo model, with measurements of `steps` of 120 steps."""
    now, total = int(time.time()), 120
    job_id = ids.new(ids.JOB)
    done = status == states.SUCCEEDED
    name = ids.model_name(BASE, "local", suffix) if done else None
    rate = columns.pop("rate", 1.0)
    with service.database.write() as session:
        session.add(Job(
            id=job_id, created_at=now - 900, project=PROJECT, key_id=None, status=status, model=BASE,
            training_file=ids.new(ids.FILE), validation_file=None, suffix=suffix, seed=7, method="supervised",
            hyperparameters={"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": rate}, knobs={"rank": 16},
            labels=None, integrations=None, request_hash="", idempotency_key=None, started_at=now - 840,
            finished_at=now - 60 if status in states.FINAL else None,
            estimated_finish=now + 95 if status == states.RUNNING else None, fine_tuned_model=name,
            trained_tokens=48210 if done else None, result_files=[], error=columns.get("error"),
            progress={"step": steps, "total_steps": total, "tokens_per_second": 5230.0} if steps else {},
        ))  # fmt: skip
        session.flush()
        states.say(session, job_id, f"Created fine-tuning job: {job_id}")
        states.say(session, job_id, "Files validated, moving job to queued state")
        states.say(session, job_id, "Fine-tuning job started")
        for step in range(1, steps + 1):
            loss = 0.12 + 2.1 * math.exp(-step * rate / 22) + 0.05 * math.sin(step * 1.7) * math.exp(-step / 80)
            data = {"step": step, "total_steps": total, "train_loss": loss, "train_mean_token_accuracy": 1 - loss / 3}
            if step % 10 == 0:
                data |= {"valid_loss": loss + 0.06, "valid_mean_token_accuracy": 0.97 - loss / 3}
            states.say(session, job_id, f"Step {step}/{total}: training loss={loss:.2f}", data=data)
        if done:
            states.say(session, job_id, f"New fine-tuned model created: {name}")
            states.say(session, job_id, "The job has successfully completed")
            _add_models(session, service, job_id, str(name), total)
    (service.storage.job(job_id)).mkdir(parents=True, exist_ok=True)
    (service.storage.job(job_id) / "log.txt").write_text("step 1  loss 2.05\nstep 2  loss 1.98\n")
    return job_id


def _add_models(session: Any, service: Service, job_id: str, name: str, total: int) -> None:
    for step in (40, 80, 120, None):
        folder = service.storage.job(job_id) / ("run/export" if step is None else f"run/exports/step-{step}")
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "README.md").write_text("# A tuned model\n\nLoRA, rank 16, over demo. <b>Not bold</b>.\n")
        model = name if step is None else f"{name}:ckpt-step-{step}"
        session.add(Model(
            id=model, created_at=int(time.time()), project=PROJECT, job_id=job_id, base=BASE, kind="adapter",
            folder=folder.relative_to(service.storage.root).as_posix(), step=step,
        ))  # fmt: skip
        if step is not None:
            session.add(Checkpoint(
                id=ids.new(ids.CHECKPOINT), created_at=int(time.time()), job_id=job_id, step_number=step,
                metrics={"step": step, "train_loss": 0.5 - step / 400, "valid_loss": 0.55 - step / 400}, model=model,
            ))  # fmt: skip


def add_file(service: Service, name: str, content: bytes) -> str:
    """A training file."""
    file_id = ids.new(ids.FILE)
    path = service.storage.file(file_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    with service.database.write() as session:
        session.add(File(
            id=file_id, created_at=int(time.time()), project=PROJECT, bytes=len(content), filename=name,
            purpose="fine-tune", status="processed", status_details=None, expires_at=None, sha256="",
        ))  # fmt: skip
    return file_id


chat = APIRouter()


@chat.post("/v1/chat/completions")
async def answers(request: Request) -> StreamingResponse:
    """An answer that says which model gave it, a word at a time."""
    body = await request.json()
    tuned = body["model"].startswith("ft:")
    text = "The heron eats fish. <img src=x>" if tuned else "I do not know what you mean, but it is a long story."

    async def events() -> AsyncIterator[str]:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}
        words = text.split(" ")
        slow = "slowly" in body["messages"][-1]["content"]
        for i, word in enumerate(words * 50 if slow else words):
            delta = {"content": word if i == 0 else f" {word}"}
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            yield f"data: {json.dumps({**head, 'choices': [choice], 'usage': None})}\n\n"
            await asyncio.sleep(0.02)
            if "break" in body["messages"][-1]["content"] and i == 2:
                said = {"message": "the model was unloaded", "type": "server_error", "param": None, "code": None}
                yield f"data: {json.dumps({'error': said})}\n\n"
                return
        usage = {"prompt_tokens": 9, "completion_tokens": len(words), "total_tokens": 9 + len(words)}
        last = {"index": 0, "delta": {}, "finish_reason": "stop"}
        yield f"data: {json.dumps({**head, 'choices': [last], 'usage': None})}\n\n"
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def chatting(make_app: Callable[[Service], FastAPI]) -> Callable[[Service], FastAPI]:
    """The application with these answers in the place of a model's."""

    def made(service: Service) -> FastAPI:
        app = make_app(service)
        app.router.routes[:0] = chat.routes
        return app

    return made


def fill(service: Service) -> dict[str, str]:
    """Jobs in several states."""
    return {
        "first": add_job(service, "animals"),
        "second": add_job(service, "animals-slower", rate=0.5),
        "running": add_job(service, "tone-of-voice", states.RUNNING, 47),
        "failed": add_job(
            service, "broken", states.FAILED, 0,
            error={"code": "invalid_training_file", "message": "The job failed due to an invalid training file. "
                   "Line 7: messages[1].role is missing.", "param": "training_file"},
        ),
    }  # fmt: skip
