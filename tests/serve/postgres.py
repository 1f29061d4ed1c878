"""Debian's PostgreSQL for tests: a server in a temporary folder, reached over loopback; skipped where it is absent."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve import places

USER = "postgres"


def binaries() -> Path | None:
    """The folder of the newest server that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3].split(".")[0]))
    return found[-1].parent if found else None


def why_not() -> str | None:
    """Why there can be no server here."""
    if binaries() is None:
        return "no PostgreSQL server is installed (apt-get install postgresql)"
    if os.geteuid() == 0 and subprocess.run(["id", USER], capture_output=True, check=False).returncode:
        return f"PostgreSQL refuses root, and there is no user {USER}"
    return None


@contextlib.contextmanager
def server() -> Iterator[str]:
    """A running server; gives the URL of its first database without the name: append one."""
    bin_ = binaries()
    assert bin_ is not None
    as_user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"] if os.geteuid() == 0 else []
    root = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path is short
    data = root / "data"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = None
    try:
        if as_user:
            shutil.chown(root, USER, USER)
        root.chmod(0o700)
        init = [*as_user, str(bin_ / "initdb"), "-D", str(data), "-A", "trust", "-U", USER, "-E", "UTF8", "--no-sync"]
        subprocess.run(init, check=True, capture_output=True, cwd="/", env={"PATH": os.environ["PATH"], "LC_ALL": "C"})
        options = ["-c", "listen_addresses=127.0.0.1", "-p", str(port), "-k", str(root), "-c", "fsync=off"]
        with (root / "log").open("wb") as log:
            process = subprocess.Popen(
                [*as_user, str(bin_ / "postgres"), "-D", str(data), *options], stdout=log, stderr=log, cwd="/"
            )
        url = f"postgresql+psycopg://{USER}@127.0.0.1:{port}/"
        places.until(lambda: _answers(url + "postgres"), 30)
        yield url
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # fast shutdown
            process.wait(20)
        shutil.rmtree(root, ignore_errors=True)


def _answers(url: str) -> bool:
    import sqlalchemy as sa

    engine = sa.create_engine(url, poolclass=sa.NullPool)
    try:
        with engine.connect() as c:
            c.execute(sa.text("select 1"))
        return True
    except sa.exc.OperationalError:
        return False


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with server() as url:
        yield url


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """The URL of an empty database of its own."""
    import secrets

    import sqlalchemy as sa

    name = f"t{secrets.token_hex(6)}"
    engine = sa.create_engine(postgres_server + "postgres", poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as c:
        c.execute(sa.text(f'create database "{name}"'))
    return postgres_server + name
