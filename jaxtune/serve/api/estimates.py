"""A route of the page: what training would take, by the rules of `jaxtune plan`."""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field, StringConstraints
from starlette.concurrency import run_in_threadpool

from jaxtune import config
from jaxtune.errors import UserError
from jaxtune.serve import bases
from jaxtune.serve.api import files, models
from jaxtune.serve.api.creating import Hyperparameters, Method
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.service import By, Caller, Here, Service
from jaxtune.serve.api.turns import Failed, Taking
from jaxtune.serve.bodies import Body, Text
from jaxtune.serve.knobs import Knobs
from jaxtune.serve.redaction import redacted
from jaxtune.serve.store import ids
from jaxtune.serve.store.tables import Job
from jaxtune.serve.worker import recipe

router = APIRouter(prefix="/v1/jaxtune", tags=["jaxtune"])

_log = logging.getLogger("jaxtune.serve")
_SECONDS = 60.0
_EXAMPLES = 1000  # where no file is named
_CHUNK = 2**20


class Estimate(Body):
    """A job that is thought about, as the body of its creation says it, and the machine."""

    model: Annotated[Text, StringConstraints(min_length=1, max_length=512)]
    training_file: Annotated[Text, StringConstraints(min_length=1, max_length=128)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    jaxtune: Knobs | None = None
    topology: Annotated[str, Field(pattern=r"^(cpu:1|v[0-9][a-z]{0,2}-[0-9]{1,4})$")] = "cpu:1"


@router.post("/estimate")
async def estimate(body: Estimate, service: Here, caller: By, turns: Taking) -> dict[str, Any]:
    """Memory and speed of a job on a machine, by rule: nothing is compiled and no weight is read."""
    written = await run_in_threadpool(_config, body, service, caller)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(written, encoding="utf-8")
        plan = [sys.executable, "-m", "jaxtune", "plan", str(path), "--how", "rule", "--json", "--no-cache"]
        try:
            out = await turns.ask("plan", (written, body.topology), [*plan, "--topology", body.topology], b"", _SECONDS)
        except Failed as e:
            if e.refused:
                raise ApiError(400, redacted(str(e)).removeprefix("error: "), code="invalid_value") from e
            _log.warning("a plan failed: %s", e)
            raise ApiError(500, "the estimate could not be made", type="server_error") from e
    return {"object": "jaxtune.estimate", **_told(json.loads(out)[0])}


def _told(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without where things lie."""
    settings = {k: v for k, v in plan["settings"].items() if k != "model"}
    kept = ("topology", "chips", "how", "fits", "memory", "seconds", "tokens_per_second_per_chip")
    return {**{k: plan[k] for k in kept}, "settings": settings}


def _config(body: Estimate, service: Service, caller: Caller) -> str:
    """The config that the job would train by. Raises: ApiError: it does not fit together."""
    method = body.method
    given = method.supervised.hyperparameters if method and method.supervised else None
    asked = given or body.hyperparameters or Hyperparameters()
    file_id = body.training_file or ids.new(ids.FILE)
    with service.database.read() as session:
        known = body.training_file is not None and files.file_of(session, caller, file_id)
        path = service.storage.file(file_id)
        examples = _lines(path) if known else _EXAMPLES
        job = Job(
            id=ids.new(ids.JOB), project=caller.project, model=body.model, seed=0, training_file=file_id,
            hyperparameters=recipe.resolved(asked.model_dump(), examples, service.settings.limits),
            progress={"examples": examples},
            knobs=body.jaxtune.given() if body.jaxtune else {},
        )  # fmt: skip
        tuned = models.tuned_of(session, caller, body.model)
        base = tuned.base if tuned else body.model
        if base not in bases.found(service.settings):  # and nothing is fetched for an estimate
            raise models.not_here(service, base)
        try:
            start = recipe.start_of(job, tuned, service.settings, service.storage)
            made = recipe.make(job, start, service.settings, Path("job"), path, None)
        except UserError as e:
            raise ApiError(400, redacted(str(e)), code="invalid_value") from e
    return config.dump(made)


def _lines(path: Path) -> int:
    """Lines of a file: its examples, but for blank ones."""
    with path.open("rb") as f:
        return max(1, sum(chunk.count(b"\n") for chunk in iter(lambda: f.read(_CHUNK), b"")))
