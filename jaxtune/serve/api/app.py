"""The FastAPI application, put together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from jaxtune.serve.api import (
    audit,
    chat,
    completions,
    downloads,
    errors,
    estimates,
    extras,
    files,
    jobs,
    models,
    page,
    reports,
    sweep,
    uploads,
)
from jaxtune.serve.api.guard import Guard
from jaxtune.serve.api.limits import Slots
from jaxtune.serve.api.objects import Envelope
from jaxtune.serve.api.service import Service


def make_app(service: Service) -> FastAPI:
    """The application over a service; it starts and stops the inference process with itself."""

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        await service.engine.start()
        sweeping = asyncio.create_task(sweep.for_ever(service))
        try:
            yield
        finally:
            sweeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeping
            await service.engine.stop()

    app = FastAPI(
        title="jaxtune", lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False,
        responses={"4XX": {"model": Envelope}, "5XX": {"model": Envelope}},
    )  # fmt: skip
    limits = service.settings.limits
    app.state.service = service
    app.state.uploading = Slots("uploads", limits.uploads_at_once)
    app.state.following = Slots("event streams", limits.key_streams, limits.streams)
    app.add_middleware(Guard, service=service)
    errors.add_handlers(app)
    for part in (files, uploads, jobs, models, chat, completions, extras, reports, estimates, downloads, audit, page):
        app.include_router(part.router)
    return app
