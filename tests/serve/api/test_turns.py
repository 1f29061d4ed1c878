"""Programs that the API starts: one at a time, ended in time, nothing left behind."""

import asyncio
import io
import sys
import time
import zipfile
from pathlib import Path

import openai
import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

from jaxtune.serve.api import downloads
from jaxtune.serve.api.errors import ApiError
from jaxtune.serve.api.service import Service
from jaxtune.serve.api.turns import Failed, Turns, run
from jaxtune.serve.store.tables import Model
from tests.serve import seeded


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_answers_are_kept_until_their_file_is_forgotten(tmp_path: Path):
    seen = tmp_path / "seen"
    program = python(f"import sys; open({str(seen)!r}, 'a').write('x'); print(sys.stdin.read())")

    async def several() -> None:
        turns = Turns()
        asked = [turns.ask("report", ("file-a", b"1"), program, b"hello", 60) for _ in range(3)]
        assert await asyncio.gather(*asked) == [b"hello\n"] * 3
        assert seen.read_text() == "x"
        turns.forget("file-a")
        await turns.ask("report", ("file-a", b"1"), program, b"hello", 60)
        assert seen.read_text() == "xx"

    asyncio.run(several())


def test_queue_is_short_and_slow_programs_end():
    async def crowd() -> None:
        turns = Turns()
        slow = [turns.ask("plan", n, python("import time; time.sleep(60)"), b"", 0.5) for n in range(6)]
        said = await asyncio.gather(*slow, return_exceptions=True)
        assert sorted(e.status for e in said if isinstance(e, ApiError)) == [400, 400, 400, 400, 429, 429]

    asyncio.run(crowd())


@pytest.mark.parametrize(("code", "refused"), [(2, True), (1, False)])
def test_last_line_of_a_failure_is_kept(code: int, refused: bool):
    with pytest.raises(Failed, match="^the end$") as caught:
        asyncio.run(
            run("plan", python(f"import sys; print('x\\nthe end', file=sys.stderr); sys.exit({code})"), b"", 60)
        )
    assert caught.value.refused is refused


def test_programs_get_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    out = asyncio.run(run("plan", python("import os; print(dict(os.environ))"), b"", 60))
    assert b"secret" not in out


@pytest.fixture
def tuned(service: Service) -> str:
    job = seeded.add_job(service, "x")
    with service.database.read() as session:
        return next(m.id for m in session.query(Model) if m.job_id == job and m.step is None)


def merging(monkeypatch, size: int) -> None:
    async def fake(kind: str, arguments: list[str], given: bytes, seconds: float) -> bytes:
        if not size:
            raise Failed(1, "no")
        folder = Path(arguments[5])
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"w" * size)
        return b""

    monkeypatch.setattr(downloads, "run", fake)


def left(service: Service) -> list[Path]:
    """What lies there still; it goes right after the last byte."""
    end = time.monotonic() + 20
    while (found := list((service.storage.root / "merging").iterdir())) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_merged_model_is_taken_away_and_nothing_stays(service: Service, client: openai.OpenAI, tuned, monkeypatch):
    merging(monkeypatch, 3_000_000)
    answer = client._client.get(f"{client.base_url}jaxtune/models/{tuned}/download?form=merged")
    packed = zipfile.ZipFile(io.BytesIO(answer.content))
    assert {i.filename.rpartition("/")[2]: i.file_size for i in packed.infolist()}["model.safetensors"] == 3_000_000
    assert packed.testzip() is None
    assert "attachment" in answer.headers["content-disposition"]
    assert left(service) == []


def test_download_that_is_broken_off_leaves_nothing(service: Service, client: openai.OpenAI, tuned, monkeypatch):
    merging(monkeypatch, 30_000_000)
    with client._client.stream("GET", f"{client.base_url}jaxtune/models/{tuned}/download") as answer:
        next(answer.iter_bytes())
    assert left(service) == []


def test_failed_merge_is_an_envelope_and_leaves_nothing(service: Service, client: openai.OpenAI, tuned, monkeypatch):
    merging(monkeypatch, 0)
    answer = client._client.get(f"{client.base_url}jaxtune/models/{tuned}/download")
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert left(service) == []
