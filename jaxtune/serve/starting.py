"""From settings to a service that runs: its database brought up to date, the API under uvicorn, a worker beside it."""

import asyncio
import contextlib
import logging
import logging.config
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h11
import uvicorn
from pydantic import ValidationError
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxtune import config
from jaxtune.errors import UserError, nearest
from jaxtune.serve.api.app import make_app
from jaxtune.serve.api.auth import is_alone
from jaxtune.serve.api.service import Service
from jaxtune.serve.inference.client import Engine
from jaxtune.serve.settings import DATA, Limits, Settings
from jaxtune.serve.store import keys
from jaxtune.serve.store.database import Database
from jaxtune.serve.store.storage import Storage
from jaxtune.serve.worker.beside import Beside

_KEEP_ALIVE_S = 30
_HEAD_S = 20.0  # that the head of a request may take to arrive
_GRACEFUL_S = 10  # for answers under way when the service stops
_HEADER_BYTES = 32 * 1024
_LOG_BYTES, _LOGS = 10 * 2**20, 3


def read_settings(file: Path | None, *layers: Mapping[str, Any]) -> Settings:
    """Settings of a YAML file and values over it, later ones first; a demo needs no folders to be named.

    >>> read_settings(None, {"models": "m", "data": "d"}, {"limits": {"jobs": 3}}).limits.jobs
    3

    Raises:
      UserError: an unknown key, or a value that does not fit, in one line.
    """
    tree: dict[str, Any] = config.read_yaml(file) if file else {}
    if file:  # paths in a file start at the file
        tree |= {k: file.parent / str(tree[k]) for k in ("models", "data") if k in tree}
    for layer in layers:
        was, now = tree.get("limits"), layer.get("limits")
        tree = {**tree, **layer}
        if isinstance(was, dict) and isinstance(now, dict):
            tree["limits"] = {**was, **now}
    if tree.get("demo"):
        tree.setdefault("data", DATA)
        tree.setdefault("models", Path(tree["data"]) / "models")
    try:
        return Settings.model_validate(tree)
    except ValidationError as e:
        raise UserError(f"{file or 'settings'}: {'; '.join(map(_fault, e.errors()))}") from e


def _fault(error: Mapping[str, Any]) -> str:
    loc = [str(p) for p in error["loc"]]
    if error["type"] == "extra_forbidden":
        model = Limits if loc[0] == "limits" else Settings
        return f"unknown key {'.'.join(loc)}{nearest(loc[-1], list(model.model_fields))}"
    if error["type"] == "missing":
        return f"{loc[0]} is missing; give --{loc[0]} DIR"
    return f"{'.'.join(loc)}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def open_database(s: Settings) -> Database:
    """The service's database, its tables up to date. Raises: UserError: it cannot be reached."""
    s.data.mkdir(parents=True, exist_ok=True, mode=0o700)  # what users upload is nobody else's
    database = Database(s.database_url)
    database.upgrade()
    return database


def serve(s: Settings, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; a job that runs is saved then and waits in the queue.

    Args:
      s: the settings.
      ready: is called with the URL of the page once requests are taken.

    Raises:
      UserError: the address is taken, or others are to reach it while there is no key.
    """
    if s.demo:
        s.data.mkdir(parents=True, exist_ok=True, mode=0o700)
        _put_samples(s)
    if not s.models.is_dir():
        raise UserError(f"models {s.models}: no such folder; name the folder that your base models lie in")
    database = open_database(s)
    try:
        with database.read() as session:
            closed = any(k.revoked_at is None for k in keys.listed(session))
        if not closed and not is_alone(s):
            raise UserError(
                f"host {', '.join(s.hosts) or s.host}: others are to reach the service, and there is no key; "
                f"make one first: jaxtune keys add NAME {'--queue URL' if s.database else f'--data {s.data}'}"
            )
        _log_to(s.data / "serve.log")
        listening = _listen(s)
        host, port = listening.getsockname()[:2]
        s = s.model_copy(update={"port": port})
        app = make_app(Service(s, database, Storage(s.data), Engine(s)))
        worker = Beside(s) if s.worker else None

        def start() -> None:
            if worker:
                worker.start()
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/")

        server = _Server(_uvicorn(app, s), start, worker.leave if worker else lambda: None)
        with contextlib.closing(listening), _signals_return():
            server.run(sockets=[listening])
        if worker:
            worker.join()
        if not server.started:
            raise UserError(f"the service could not start; {s.data / 'serve.log'} says why")
    finally:
        database.close()


def _put_samples(s: Settings) -> None:
    """The questions that the embedded model is tuned on, where a newcomer finds them; a place for other models."""
    import jaxtune

    for folder in (s.data / "demo", s.models):
        folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.jsonl", "validation.jsonl"):
        shutil.copyfile(Path(jaxtune.__file__).parent / "demo" / name, s.data / "demo" / name)


def _listen(s: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in s.host else socket.AF_INET
    try:
        return socket.create_server((s.host, s.port), family=family, backlog=512)
    except OSError as e:
        raise UserError(f"{s.host}:{s.port}: cannot be listened on ({e.strerror}); choose another --port") from e


def _uvicorn(app: Any, s: Settings) -> uvicorn.Config:
    """No header tells what is served with or believes what a client says of itself; nobody holds a connection long."""
    return uvicorn.Config(
        app, http=_Protocol, ws="none", lifespan="on", log_config=None, server_header=False, proxy_headers=False,
        h11_max_incomplete_event_size=_HEADER_BYTES, timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACEFUL_S, limit_concurrency=4 * s.limits.streams + 256,
    )  # fmt: skip


class _Protocol(H11Protocol):
    """Ends a connection on which the head of a request does not come in time; it would take a place for ever."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(_HEAD_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._in_time()
        elif self._late is None:
            self._late = self.loop.call_later(_HEAD_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class _Server(uvicorn.Server):
    """Says when it starts and, before it waits for answers under way, that it stops."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start, self._on_stop = on_start, on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_stop()
        await super().shutdown(sockets)


@contextlib.contextmanager
def _signals_return() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more when it is done; there is more to do then."""
    was = {n: signal.signal(n, lambda *_: None) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in was.items():
            signal.signal(number, handler)


class _NoQuery(logging.Filter):
    """Requests are logged without what stands after the question mark."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Cut the third of uvicorn's arguments: the path."""
        if isinstance(record.args, tuple) and len(record.args) == 5:
            record.args = (*record.args[:2], str(record.args[2]).partition("?")[0], *record.args[3:])
        return True


def _log_to(file: Path) -> None:
    """Requests and all else go to a file that is turned over; warnings and errors also to standard error."""
    logging.config.dictConfig({
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
        "filters": {"no query": {"()": _NoQuery}},
        "handlers": {
            "file": {
                "class": "logging.handlers.RotatingFileHandler", "filename": str(file), "encoding": "utf-8",
                "maxBytes": _LOG_BYTES, "backupCount": _LOGS, "formatter": "line", "filters": ["no query"],
            },
            "stderr": {"class": "logging.StreamHandler", "level": "WARNING", "formatter": "line"},
        },
        "root": {"level": "INFO", "handlers": ["file", "stderr"]},
    })  # fmt: skip
