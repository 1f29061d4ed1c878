"""The database: SQLite with a write-ahead log, or PostgreSQL; brought up to date when it is opened."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from jaxtune.errors import UserError

_BUSY_MS = 30_000
_IDLE_S = 120  # that a transaction may do nothing
_NETWORK = {  # of libpq, in seconds and, the last, milliseconds
    "connect_timeout": 10, "keepalives_idle": 15, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}  # fmt: skip
_MIGRATING = 0x6A61_7874  # PostgreSQL's advisory lock while tables change


class Database:
    """An open database.

    >>> with Database("sqlite://").read() as session:
    ...     session.scalar(sa.text("select 1"))
    1
    """

    def __init__(self, url: str) -> None:
        """Raises: UserError: the URL names no database that can be reached."""
        self.url = url
        try:
            self.engine = sa.create_engine(url, pool_pre_ping=True, hide_parameters=True)  # none in logs
        except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ModuleNotFoundError) as e:
            raise UserError(f"database {_shown(url)}: {e}; give sqlite:///FILE or postgresql+psycopg://…") from e
        if self.engine.dialect.name == "sqlite":
            _as_wanted(self.engine)
        elif self.engine.dialect.name == "postgresql":
            _impatient(self.engine)
        self._writing = self.engine.execution_options(write=True)

    def upgrade(self) -> None:
        """Bring the tables up to date; several processes may do it at once.

        Raises:
          UserError: the database cannot be reached, or was made by a newer jaxtune.
        """
        from alembic import command
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        try:
            with self._writing.begin() as connection:
                if connection.dialect.name == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATING)))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except sa.exc.DBAPIError as e:
            said = " ".join(str(e.orig).split())
            raise UserError(f"database {_shown(self.url)}: cannot be used: {said}") from e
        except CommandError as e:
            raise UserError(f"database {_shown(self.url)}: {e}; was it made by a newer jaxtune?") from e

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A session to read with."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction: all that is written in it is there afterwards, or nothing is. In SQLite one at a time."""
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Let go of all connections."""
        self.engine.dispose()


def _as_wanted(engine: sa.Engine) -> None:
    """SQLite with transactions that begin where they are said to, a log, and patience."""

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"busy_timeout={_BUSY_MS}", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        write = connection.get_execution_options().get("write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _impatient(engine: sa.Engine) -> None:
    """PostgreSQL that a network may part us from: neither side waits long for the other, nor holds its rows locked."""

    @sa.event.listens_for(engine, "do_connect")
    def before(_: object, __: object, ___: object, given: dict[str, Any]) -> None:
        for name, value in _NETWORK.items():
            given.setdefault(name, value)

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: object) -> None:
        connection.execute(f"SET idle_in_transaction_session_timeout = '{_IDLE_S}s'")
        connection.commit()


def _shown(url: str) -> str:
    """A URL without its password."""
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "URL"
