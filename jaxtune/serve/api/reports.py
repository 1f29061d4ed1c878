"""Routes of the page: what a file is, what of it is trained on, what training would take."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from jaxtune.serve import bases
from jaxtune.serve.api import files, models
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.service import By, Caller, Here, Service
from jaxtune.serve.api.turns import Failed, Taking, Turns
from jaxtune.serve.redaction import redacted

router = APIRouter(prefix="/v1/jaxtune", tags=["jaxtune"])

_log = logging.getLogger("jaxtune.serve")
_SECONDS = 300.0  # for a look at a file
_LENGTH = 2048  # tokens of an example, where nothing else is said
_MODEL = Query(max_length=512, description="The base or tuned model for whose tokens the file is looked at.")
_MOST = Query(2048, ge=32, le=1_000_000, description="Tokens of an example, from where it is cut.")


@router.get("/files/{file_id}/report")
async def report(
    service: Here, caller: By, turns: Taking, file_id: str, model: Annotated[str, _MODEL], max_length: int = _MOST
) -> dict[str, Any]:
    """What a training file is: its bad lines, tokens and distributions."""
    asked = await _asked(service, caller, file_id, model, max_length)
    answer = await _look(turns, {"what": "report", **asked}, file_id)
    return {"object": "jaxtune.report", "model": model, **answer}


@router.get("/files/{file_id}/preview")
async def preview(
    service: Here, caller: By, turns: Taking, file_id: str, model: Annotated[str, _MODEL], max_length: int = _MOST,
    n: int = Query(5, ge=1, le=50),
) -> dict[str, Any]:  # fmt: skip
    """The first examples as the model reads them: of each, runs of [text, whether it is trained on]."""
    asked = await _asked(service, caller, file_id, model, max_length)
    return {"object": "list", "model": model, "data": await _look(turns, {"what": "preview", "n": n, **asked}, file_id)}


async def _asked(service: Service, caller: Caller, file_id: str, model: str, max_length: int) -> dict[str, Any]:
    path, words = await run_in_threadpool(_places, service, caller, file_id, model)
    limits = service.settings.limits
    length = min(max_length, limits.sequence_length)
    return {"path": str(path), "model": str(words), "limits": limits.model_dump(), "max_length": length}


def _places(service: Service, caller: Caller, file_id: str, model: str) -> tuple[Path, Path]:
    """A file's bytes and the folder of a model's tokenizer. Raises: ApiError: the caller's project has them not."""
    with service.database.read() as session:
        file = files.file_of(session, caller, file_id)
        tuned = models.tuned_of(session, caller, model)
    base = bases.found(service.settings).get(model if tuned is None else tuned.base)
    if base is None:
        raise models.not_here(service, model if tuned is None else tuned.base)
    own = None if tuned is None else service.storage.model(tuned)
    return service.storage.file(file.id), own if own is not None and (own / "tokenizer.json").exists() else base


async def _look(turns: Turns, asked: dict[str, Any], file_id: str) -> Any:
    """Raises: ApiError: what cannot be looked at, in one line."""
    given = json.dumps(asked, sort_keys=True).encode()
    try:
        program = [sys.executable, "-m", "jaxtune.serve.checks.looking"]
        answer = json.loads(await turns.ask(asked["what"], (file_id, given), program, given, _SECONDS))
    except Failed as e:
        _log.warning("a look at %s failed: %s", file_id, e)
        raise ApiError(500, f"the {asked['what']} of {file_id} could not be made", type="server_error") from e
    if isinstance(answer, dict) and "error" in answer:
        raise ApiError(400, redacted(answer["error"]), "model")
    return answer
