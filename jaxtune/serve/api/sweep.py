"""What time takes away: expired files and uploads, and bytes that a crash left behind."""

import asyncio
import logging
import time

from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from jaxtune.serve.api import audit
from jaxtune.serve.api.service import Service
from jaxtune.serve.store.states import FINAL
from jaxtune.serve.store.tables import File, Job, Part, Upload

_EVERY_S = 60.0
_log = logging.getLogger("jaxtune.serve")


async def for_ever(service: Service) -> None:
    """Sweep now and then, until cancelled."""
    while True:
        try:
            await run_in_threadpool(once, service)
        except Exception:
            _log.exception("sweeping of expired files failed; it is tried again")
        await asyncio.sleep(_EVERY_S)


def once(service: Service) -> None:
    """Sweep. Rows go first: bytes without a row are swept the next day, a row without bytes would promise them."""
    now = int(time.time())
    with service.database.write() as session:
        needed = select(Job.training_file).where(Job.status.not_in(FINAL))
        needed_too = select(Job.validation_file).where(Job.status.not_in(FINAL), Job.validation_file.is_not(None))
        old = select(File).where(File.expires_at <= now, File.id.not_in(needed), File.id.not_in(needed_too))
        files = list(session.scalars(old))
        for file in files:
            session.delete(file)
            audit.add(session, file.project, "file.expire", file.id, file.seq)
        uploads = list(session.scalars(select(Upload).where(Upload.status == "pending", Upload.expires_at <= now)))
        for upload in uploads:
            upload.status = "expired"
            for part in session.scalars(select(Part).where(Part.upload_id == upload.id)):
                session.delete(part)
    for file in files:
        service.storage.delete_file(file.id)
    for upload in uploads:
        service.storage.delete_upload(upload.id)
    strays = dict(service.storage.strays())
    if strays:
        with service.database.read() as session:
            known = set(session.scalars(select(File.id)))
        for name in strays.keys() - known:
            strays[name].unlink(missing_ok=True)
    ended = set(service.storage.uploads())
    if ended:
        with service.database.read() as session:
            ended -= set(session.scalars(select(Upload.id).where(Upload.status == "pending")))
        for name in ended:
            service.storage.delete_upload(name)
