"""Verbs of the service: serve, worker, keys."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxtune import config, log
from jaxtune.cli.common import app, table
from jaxtune.errors import UserError
from jaxtune.serve.settings import DATA

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from jaxtune.serve.settings import Settings

keys = typer.Typer(help="Keys that the service asks for, once there is one.", no_args_is_help=True)
app.add_typer(keys, name="keys")

Models = Annotated[Path | None, typer.Option(metavar="DIR", help="The folder of base models.")]
Data = Annotated[
    Path | None,
    typer.Option(metavar="DIR", envvar="JAXTUNE_DATA", help="The storage folder: files, jobs, tuned models."),
]
Queue = Annotated[
    str | None,
    typer.Option(
        metavar="URL", envvar="JAXTUNE_QUEUE", help="The database; SQLite in the storage folder where not given."
    ),
]
File = Annotated[Path | None, typer.Option("--config", help="A YAML file of settings.")]
Values = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings: organization=acme, limits.epochs=10, …")
]
Place = Annotated[Path, typer.Option("--data", envvar="JAXTUNE_DATA", metavar="DIR", help="The storage folder.")]


@app.command()
def serve(
    values: Values = None,
    models: Models = None,
    data: Data = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on; 127.0.0.1 where not given.")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes any that is free; 8000 where not given.")] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Offer the embedded model, with questions to tune it on.")
    ] = False,
    queue: Queue = None,
    worker: Annotated[bool, typer.Option("--worker/--no-worker", help="Start a worker beside the API.")] = True,
    allow_hub: Annotated[
        bool, typer.Option("--allow-hub", help="Let models be hub ids, which are then fetched.")
    ] = False,
    file: File = None,
) -> None:
    """Serve fine-tuning and answers as OpenAI's client knows them, and a page. Ctrl-C saves what runs."""
    _need_extra()
    from jaxtune.serve import bases, starting

    said = {"host": host, "port": port, "demo": demo or None, "worker": None if worker else False}
    said["hub"] = allow_hub or None
    s = _settings(file, values, models, data, queue, said)

    def ready(url: str) -> None:
        names = ", ".join(bases.found(s)) or f"none; put folders in Hugging Face format into {s.models}"
        log.say("jaxtune serves")
        rows = [("page", url), ("base_url", f"{url}v1"), ("models", names), ("data", f"{s.data}, log in serve.log")]
        if s.demo:
            rows.append(("sample", f"{s.data}/demo/train.jsonl"))
        rows.append(("worker", "beside this process" if s.worker else "none here; start `jaxtune worker` somewhere"))
        log.table(rows)
        log.say("Ctrl-C stops; a job that runs is saved, and goes on at the next start")

    starting.serve(s, ready)


@app.command()
def worker(
    values: Values = None,
    models: Models = None,
    data: Data = None,
    queue: Queue = None,
    file: File = None,
    beside: Annotated[bool, typer.Option("--beside", hidden=True)] = False,
) -> None:
    """Take jobs of a service and train them, here. SIGTERM and Ctrl-C save what runs, for the next worker."""
    _need_extra()
    from jaxtune.serve.worker import beside as work

    if beside:
        return work.work_beside()
    s = _settings(file, values, models, data, queue, {})
    log.say(f"working for {s.data}; Ctrl-C saves what runs and leaves")
    work.work(s)


def _settings(
    file: Path | None,
    values: list[str] | None,
    models: Path | None,
    data: Path | None,
    queue: str | None,
    said: dict[str, Any],
) -> "Settings":
    """Settings of a file, of key=value over it, and of options over both."""
    from jaxtune.serve import starting

    said |= {"models": models, "data": data, "database": queue}
    given = [config.parse_overrides(values or []), {k: v for k, v in said.items() if v is not None}]
    return starting.read_settings(file, *given)


@keys.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose it is, or what for.")],
    data: Place = DATA,
    queue: Queue = None,
    project: Annotated[
        str, typer.Option(help="Files, jobs and models belong to a project; others do not see them.")
    ] = "default",
    admin: Annotated[bool, typer.Option("--admin", help="May also read the audit log.")] = False,
    per_minute: Annotated[
        int | None, typer.Option(min=1, help="Requests a minute; the service's limit where not given.")
    ] = None,
) -> None:
    """Make a key, and print it: it is not kept, and cannot be shown again. From then on the service asks for one."""
    with _keys(data, queue, write=True) as (session, work):
        key, secret = work.add(session, name, project, "admin" if admin else "user", per_minute)
        told = [("id", key.id), ("name", key.name), ("project", key.project), ("scope", key.scope)]
    log.table([*told, ("key", secret)])
    log.say("keep it now: it cannot be shown again")


@keys.command("list")
def keys_list(data: Place = DATA, queue: Queue = None) -> None:
    """List the keys, without what opens."""
    with _keys(data, queue) as (session, work):
        rows = [
            [
                k.id,
                k.name,
                k.project,
                k.scope,
                _day(k.created_at),
                f"revoked {_day(k.revoked_at)}" if k.revoked_at else "",
            ]
            for k in work.listed(session)
        ]
    table(["id", "name", "project", "scope", "made", ""], rows, "no keys: the service answers this machine alone")


@keys.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `jaxtune keys list` says.")],
    data: Place = DATA,
    queue: Queue = None,
) -> None:
    """Let a key open nothing any more, at once."""
    with _keys(data, queue, write=True) as (session, work):
        work.revoke(session, key_id)
    log.say(f"{key_id} is revoked")


@contextmanager
def _keys(data: Path, queue: str | None, write: bool = False) -> Iterator[tuple["Session", Any]]:
    _need_extra()
    from jaxtune.serve import starting
    from jaxtune.serve.store import keys as work

    s = starting.read_settings(None, {"models": data, "data": data, **({"database": queue} if queue else {})})
    if queue is None and not data.is_dir():
        raise UserError(f"data {data}: no such folder; give the --data of your service, or its --queue")
    database = starting.open_database(s)
    try:
        with database.write() if write else database.read() as session:
            yield session, work
    finally:
        database.close()


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _need_extra() -> None:
    """Raises: UserError: what a service needs is not installed."""
    missing = [n for n in ("fastapi", "uvicorn", "sqlalchemy", "alembic", "sse_starlette") if find_spec(n) is None]
    if missing:
        raise UserError(f"{', '.join(missing)}: not installed; run pip install 'jaxtune[serve]'")
