"""A service over a temporary folder, and OpenAI's own client to talk to it. No JAX: the engine is a stand-in."""

import contextlib
import dataclasses
import functools
import http.client
import json
import socket
import tempfile
import threading
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
pytest.importorskip("openai", reason="the extra [serve] is not installed")

import openai
import uvicorn

from jaxtune.serve import starting
from jaxtune.serve.api.app import make_app
from jaxtune.serve.api.service import Service
from jaxtune.serve.inference.asks import Ask, Piece
from jaxtune.serve.settings import Settings
from jaxtune.serve.store import keys
from jaxtune.serve.store.database import Database
from jaxtune.serve.store.storage import Storage

EXAMPLES = [
    {"messages": [{"role": "user", "content": f"{n} + 1 ="}, {"role": "assistant", "content": f"{n + 1}"}]}
    for n in range(12)
]


class FakeEngine:
    """Starts, stops, remembers what it was told to forget, and has one answer to everything."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.asked: Ask | None = None
        self.answers: list[Piece | Exception] = [Piece(0, "So"), Piece(0, " it is.", None, "stop", 4, -1.0)]

    async def start(self) -> None:
        self.told.append("start")

    async def stop(self) -> None:
        self.told.append("stop")

    async def forget(self, folder: Path) -> None:
        self.told.append(folder)

    async def generate(self, ask: Ask, key: str | None = None) -> AsyncGenerator[list[int] | Piece]:
        self.asked = ask
        yield [3]
        for i in range(len(ask.prompts or [0]) * ask.n):
            for piece in self.answers:
                if isinstance(piece, Exception):
                    raise piece
                words = [] if ask.logprobs is not None else None
                yield dataclasses.replace(piece, index=i, words=words)


def jsonl(rows: list[Any] = EXAMPLES) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


@functools.cache
def _empty_database() -> bytes:
    """SQLite's file with the tables in it, made once."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "empty.db"
        database = Database(f"sqlite:///{file}")
        database.upgrade()
        database.close()
        return file.read_bytes()


def make_service(folder: Path, **settings: Any) -> Service:
    """A service of its own folder, with two base models that nobody loads."""
    for name in ("tiny", "meta-llama/Llama-3"):
        (folder / "models" / name).mkdir(parents=True, exist_ok=True)
        (folder / "models" / name / "config.json").write_text("{}")
    s = Settings(models=folder / "models", data=folder / "data", demo=True, **settings)
    s.data.mkdir(exist_ok=True)
    if s.database is None:
        (s.data / "jaxtune.db").write_bytes(_empty_database())
    database = Database(s.database_url)
    if s.database is not None:
        database.upgrade()
    return Service(s, database, Storage(s.data), FakeEngine())  # type: ignore[arg-type]


@contextlib.contextmanager
def serving(service: Service) -> Iterator[str]:
    """The service under uvicorn in a thread; its address."""
    config = starting._uvicorn(make_app(service), service.settings)
    config.timeout_graceful_shutdown = 2
    server = uvicorn.Server(config)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the service did not start")
                thread.join(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """A request as no client of OpenAI's makes it: any path, any header, `_` for `-` in its name."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(body, dict | list):
        body, given = json.dumps(body).encode(), {"Content-Type": "application/json", **given}
    try:
        connection.request(method, path, body, given)
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
    finally:
        connection.close()


def make_key(service: Service, project: str = "default", **more: Any) -> tuple[str, str]:
    """The id and the secret of a new key."""
    with service.database.write() as session:
        key, secret = keys.add(session, project, project, **more)
    return key.id, secret


@contextlib.contextmanager
def talking(url: str, secret: str = "any", **more: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's client; the certificates that it would read each time are for https alone."""
    plain = openai.DefaultHttpxClient(verify=False)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=secret, http_client=plain, **{"max_retries": 0, **more}) as made:
        yield made


def upload(client: openai.OpenAI, content: bytes = b"", name: str = "data.jsonl") -> str:
    """The id of a new training file."""
    return client.files.create(file=(name, content or jsonl()), purpose="fine-tune").id


def multipart(content: bytes, purpose: str = "user_data", header: bytes = b'filename="x"') -> bytes:
    """The body of a form whose boundary is `b`."""
    return (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n' + purpose.encode() + b"\r\n"
        b'--b\r\nContent-Disposition: form-data; name="file"; ' + header + b"\r\n\r\n" + content + b"\r\n--b--\r\n"
    )


FORM = {"Content_Type": "multipart/form-data; boundary=b"}


def chunked(url: str, pieces: Iterable[bytes], path: str = "/v1/files") -> tuple[int, int | None]:
    """A body whose length nobody announces; how much of it was taken, and the status."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as s:
        s.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        sent = 0
        with contextlib.suppress(OSError):  # it is refused before its end
            for piece in pieces:
                s.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent += 1
        try:
            return sent, int(s.recv(1000).split()[1])
        except (OSError, IndexError):
            return sent, None


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """A client of a service that a whole file of tests shares: of requests that are refused, nothing stays."""
    made = make_service(tmp_path_factory.mktemp("standing"))
    with serving(made) as address, talking(address) as client:
        yield client
    made.database.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = make_service(tmp_path)
    yield made
    made.database.close()


@pytest.fixture
def url(service: Service) -> Iterator[str]:
    with serving(service) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with talking(url) as made:
        yield made
