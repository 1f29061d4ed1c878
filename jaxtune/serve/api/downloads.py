"""Routes of the page: a tuned model's card, and the model itself as one file to take away."""

import json
import logging
import re
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from jaxtune.serve import bases
from jaxtune.serve.api import audit, models
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.service import By, Caller, Here, Service
from jaxtune.serve.api.turns import Failed, Taking, run
from jaxtune.serve.redaction import redacted
from jaxtune.serve.store.tables import Model

router = APIRouter(prefix="/v1/jaxtune", tags=["jaxtune"])

_log = logging.getLogger("jaxtune.serve")
_CARD = 2**20  # bytes of a model card
_CHUNK = 2**20
_SECONDS = 3600.0  # for merging
_STALE = 86400.0  # seconds after which a merged folder was left behind by a kill


@router.get("/models/{name:path}/card")
def card(service: Here, caller: By, name: str) -> dict[str, Any]:
    """The model card of a tuned model, as Markdown."""
    model = _tuned(service, caller, name)
    if (text := _card(service, model)) is None:
        raise ApiError(404, f"The model '{name}' has no card", "model")
    return {"object": "jaxtune.card", "model": model.id, "text": text}


@router.get("/models/{name:path}/download", response_class=StreamingResponse)
async def download(
    request: Request, service: Here, caller: By, turns: Taking, name: str, form: Literal["adapter", "merged"] = "merged"
) -> StreamingResponse:
    """A tuned model as a zip: the adapter alone, or merged into its base as a whole model."""
    model = await run_in_threadpool(_tuned, service, caller, name)
    folder = service.storage.model(model)
    if not folder.is_dir():
        raise ApiError(404, f"The model '{name}' is not on the disk any more", "model", "model_not_found")
    if form == "adapter" and model.kind != "adapter":
        raise ApiError(400, f"The model '{name}' is a whole model; ask for form=merged", "form")
    await run_in_threadpool(_noted, request, service, model)
    instead = await run_in_threadpool(_as_others_see_it, service, model, form)
    made: Path | None = None
    if form == "merged" and model.kind == "adapter":
        base = bases.found(service.settings).get(model.base)
        if base is None:
            raise ApiError(400, f"The base '{model.base}' of '{name}' is not there to merge with", "model")
        async with turns.turn("merge"):
            made = await run_in_threadpool(_room, service, base)
            try:
                merge = [sys.executable, "-m", "jaxtune", "merge", str(base), str(made / "model")]
                await run("merge", [*merge, "--adapter", str(folder)], b"", _SECONDS)
            except BaseException as e:
                shutil.rmtree(made, ignore_errors=True)
                if isinstance(e, Failed):
                    _log.warning("merging %s failed: %s", model.id, e)
                    raise ApiError(500, f"The model '{name}' could not be merged", type="server_error") from e
                raise
        folder = made / "model"
    return _Zip(folder, _label(model), form, instead, made)


def _label(model: Model) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", model.id)


def _card(service: Service, model: Model) -> str | None:
    """The card of a model, with names in the place of this machine's folders."""
    folder, run = service.storage.model(model), service.storage.job(model.job_id) / "run"
    for path in (folder / "README.md", run / "README.md"):
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as f:
                text = f.read(_CARD)
            base = bases.found(service.settings).get(model.base)
            if base is not None:
                text = text.replace(str(base.resolve()), model.base)
            text = text.replace(str(run / "export"), _label(model)).replace("\n# run\n", f"\n# {model.id}\n")
            return redacted(text.replace("![loss](loss.png)\n\n", ""))
    return None


def _as_others_see_it(service: Service, model: Model, form: str) -> dict[str, bytes]:
    """The files of a model that name folders of this machine, without them; its card beside them."""
    out = {}
    if form == "adapter":
        config = service.storage.model(model) / "adapter_config.json"
        tree = {**json.loads(config.read_bytes()), "base_model_name_or_path": model.base}
        out[config.name] = json.dumps(tree, indent=2).encode()
    if (text := _card(service, model)) is not None:
        out["README.md"] = text.encode()
    return out


def _tuned(service: Service, caller: Caller, name: str) -> Model:
    with service.database.read() as session:
        model = models.tuned_of(session, caller, name)
    if model is None:
        raise models.unknown(name)
    return model


def _room(service: Service, base: Path) -> Path:
    """A folder to merge in. Raises: ApiError: the disk has no room for another whole model."""
    place = service.storage.root / "merging"
    place.mkdir(exist_ok=True)
    for left in place.iterdir():
        if time.time() - left.stat().st_mtime > _STALE:
            shutil.rmtree(left, ignore_errors=True)
    size = sum(p.stat().st_size for p in base.iterdir() if p.is_file())
    if shutil.disk_usage(place).free < 2 * size + service.settings.limits.free_bytes:
        raise ApiError(507, "there is not enough room on the disk to merge; take the adapter", type="server_error")
    return Path(tempfile.mkdtemp(dir=place))


def _noted(request: Request, service: Service, model: Model) -> None:
    with service.database.write() as session:
        audit.note(session, request, "model.download", model.id)


class _Pipe:
    """What a zip file is written to, and read from at once."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    def write(self, data: bytes) -> int:
        self.chunks.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """There is nothing behind."""

    def taken(self) -> bytes:
        out = b"".join(self.chunks)
        self.chunks.clear()
        return out


def _zipped(folder: Path, label: str, instead: Mapping[str, bytes]) -> Iterator[bytes]:
    """The files of a folder, some of them others than there, as a zip; not compressed: weights become no smaller."""
    pipe = _Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as out:  # type: ignore[call-overload]  # it needs no more
        for name, blob in instead.items():
            out.writestr(zipfile.ZipInfo(f"{label}/{name}", time.gmtime()[:6]), blob)
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
            if (short := path.relative_to(folder).as_posix()) in instead:
                continue
            entry = zipfile.ZipInfo(f"{label}/{short}", time.gmtime()[:6])
            with path.open("rb") as f, out.open(entry, "w", force_zip64=True) as member:
                while chunk := f.read(_CHUNK):
                    member.write(chunk)
                    yield pipe.taken()
    yield pipe.taken()


class _Zip(StreamingResponse):
    """A folder as a zip; what was `made` for it goes when it is sent, or when nobody takes it any more."""

    def __init__(self, folder: Path, label: str, form: str, instead: Mapping[str, bytes], made: Path | None) -> None:
        headers = {"Content-Disposition": f'attachment; filename="{label}-{form}.zip"'}
        super().__init__(_zipped(folder, label, instead), media_type="application/zip", headers=headers)
        self._made = made

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._made is not None:
                shutil.rmtree(self._made, ignore_errors=True)
