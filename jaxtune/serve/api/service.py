"""What routes share: the settings, the database, storage, the inference process; and who is calling."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

from fastapi import Depends, Request

from jaxtune.serve.settings import Settings
from jaxtune.serve.store.database import Database
from jaxtune.serve.store.storage import Storage

if TYPE_CHECKING:
    from jaxtune.serve.inference.client import Engine


@dataclass
class Service:
    """What a running API has."""

    settings: Settings
    database: Database
    storage: Storage
    engine: "Engine"


class Caller(NamedTuple):
    """Who is calling: every query is filtered by the project."""

    project: str
    key_id: str | None  # None: no keys are asked for
    scope: str  # user | admin


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    return request.app.state.service


def caller_of(request: Request) -> Caller:
    """Who is calling, as the middleware found out."""
    return request.state.caller


Here = Annotated[Service, Depends(service_of)]
By = Annotated[Caller, Depends(caller_of)]
