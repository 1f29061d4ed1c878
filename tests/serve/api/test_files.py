"""Files and uploads through OpenAI's own client."""

import hashlib
import json
import time

import openai
import pytest
import sqlalchemy as sa

from jaxtune.serve.api import sweep
from jaxtune.serve.store import ids
from jaxtune.serve.store.storage import Writing
from jaxtune.serve.store.tables import File, Part, Upload
from tests.serve.conftest import EXAMPLES, jsonl, make_service, serving


def put(client, content=None, name="data.jsonl", **more):
    return client.files.create(file=(name, jsonl() if content is None else content), purpose="fine-tune", **more)


def stored(service):
    return sorted(p.name for p in (service.storage.root / "files").glob("*"))


def test_file_lives_and_dies(client, service):
    made = put(client)
    assert made.id.startswith("file-")
    assert (made.object, made.purpose, made.status, made.filename) == ("file", "fine-tune", "processed", "data.jsonl")
    assert made.bytes == len(jsonl())
    assert client.files.retrieve(made.id) == made
    assert client.files.wait_for_processing(made.id) == made
    answer = client.files.content(made.id)
    assert answer.content == jsonl()
    assert answer.response.headers["content-disposition"] == 'attachment; filename="data.jsonl"'
    assert answer.response.headers["x-content-type-options"] == "nosniff"
    with service.database.read() as session:
        row = session.scalar(sa.select(File))
    assert row.sha256 == hashlib.sha256(jsonl()).hexdigest()
    assert client.files.delete(made.id).deleted
    assert stored(service) == []
    with pytest.raises(openai.NotFoundError, match=f"No such File object: {made.id}") as e:
        client.files.retrieve(made.id)
    assert e.value.param == "id"


def test_list_pages_by_itself(client):
    made = [put(client, name=f"{n}.jsonl").id for n in range(5)]
    client.files.create(file=("x.txt", b"any text"), purpose="user_data")
    assert [f.id for f in client.files.list(limit=2, order="asc", purpose="fine-tune")] == made
    assert [f.id for f in client.files.list(limit=2, purpose="fine-tune")] == made[::-1]
    page = client.files.list(limit=6)
    assert len(page.data) == 6
    assert page.has_more is False
    with pytest.raises(openai.BadRequestError) as e:
        client.files.list(after="file-unknown")
    assert e.value.param == "after"


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_list_goes_on_behind_what_was_deleted(client, service, order):
    made = [put(client, name=f"{n}.jsonl").id for n in range(5)][:: 1 if order == "asc" else -1]
    seen = []
    for file in client.files.list(limit=2, order=order):
        seen.append(file.id)
        client.files.delete(file.id)
    assert seen == made
    left = [put(client, name=f"{n}.jsonl").id for n in range(3)]
    with service.database.write() as session:
        session.execute(sa.update(File).values(expires_at=int(time.time()) - 1).where(File.id == left[1]))
    for _ in range(2):  # it is hidden, then swept
        assert [f.id for f in client.files.list(after=left[1], order=order)] == [left[2 if order == "asc" else 0]]
        sweep.once(service)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "The file is empty"),
        (b'{"a": 1}\n[1]\n', "Line 2 is not a dictionary"),
        (json.dumps(EXAMPLES, indent=1).encode(), "Line 1 is not a dictionary"),
        (b"\x1f\x8b\x08\x00\x00", "Line 1 is not a dictionary"),
        (b'{"a": "\x00"}\n', "Line 1 is not a dictionary"),
        (b'{"a": ' + b"9" * 5000 + b"}\n", "Line 1 is not a dictionary"),
        (b'{"a": ' + b"[" * 100_000, "Line 1 nests deeper than 64 levels"),
    ],
    ids=["empty", "list", "array", "gzip", "nul", "digits", "deep"],
)
def test_what_is_no_jsonl_is_refused_and_leaves_nothing(standing, content, why):
    with pytest.raises(openai.BadRequestError, match="JSONL") as e:
        put(standing, content)
    assert why in e.value.message
    assert e.value.type == "invalid_request_error"
    assert standing.files.list().data == []


def test_byte_order_mark_crlf_and_blank_lines_are_fine(client):
    assert put(client, b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}\r\n\n').status == "processed"


def test_expired_files_vanish(client, service):
    made = put(client, expires_after={"anchor": "created_at", "seconds": 3600})
    assert made.expires_at == made.created_at + 3600
    with pytest.raises(openai.BadRequestError) as e:
        put(client, expires_after={"anchor": "created_at", "seconds": 5})
    assert e.value.param == "expires_after.seconds"
    with service.database.write() as session:
        session.execute(sa.update(File).values(expires_at=int(time.time()) - 1))
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    assert client.files.list().data == []
    assert stored(service) == [made.id]
    sweep.once(service)
    assert stored(service) == []


def test_file_of_an_unfinished_job_stays(client, service):
    made = put(client)
    job = client.fine_tuning.jobs.create(model="demo", training_file=made.id)
    with pytest.raises(openai.BadRequestError, match=f"needed by job {job.id}"):
        client.files.delete(made.id)
    with service.database.write() as session:
        session.execute(sa.update(File).values(expires_at=int(time.time()) - 1))
    sweep.once(service)
    assert stored(service) == [made.id]
    with service.database.write() as session:
        session.execute(sa.update(File).values(expires_at=None))
    client.fine_tuning.jobs.cancel(job.id)
    assert client.files.delete(made.id).deleted


def test_bytes_that_a_crash_left_are_swept(service, monkeypatch):
    with service.storage.writing(service.storage.file(ids.new(ids.FILE)), 10) as writing:
        writing.write(b"lost")
    sweep.once(service)
    assert len(stored(service)) == 1  # perhaps its row is about to come
    monkeypatch.setattr("jaxtune.serve.store.storage._LEFT_S", -1)
    sweep.once(service)
    assert stored(service) == []


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, {"file": ("x.jsonl", jsonl())}, "purpose"),
        ({"purpose": "nonsense"}, {"file": ("x.jsonl", jsonl())}, "purpose"),
        ({"purpose": "fine-tune"}, {"other": ("x.jsonl", jsonl())}, None),
        ({f"f{n}": "x" for n in range(20)}, {"file": ("x.jsonl", jsonl())}, None),
    ],
    ids=["no purpose", "wrong purpose", "no file", "many fields"],
)
def test_forms_that_are_wrong(client, service, data, files, param):
    answer = client._client.post(f"{client.base_url}files", data=data, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param or param is None
    assert stored(service) == []


def test_uploads_in_parts(client, service, tmp_path):
    content = jsonl(EXAMPLES * 3)
    half = len(content) // 2
    upload = client.uploads.create(
        bytes=len(content), filename="../big.jsonl", mime_type="text/jsonl", purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )  # fmt: skip
    assert (upload.status, upload.filename, upload.file) == ("pending", "big.jsonl", None)
    second = client.uploads.parts.create(upload.id, data=content[half:])
    first = client.uploads.parts.create(upload.id, data=content[:half])
    assert (first.object, first.upload_id) == ("upload.part", upload.id)
    right, md5 = [first.id, second.id], hashlib.md5(content).hexdigest()
    for parts, sum_, param in (
        ([second.id, first.id], md5, "md5"),
        ([first.id], md5, "part_ids"),
        ([first.id, first.id], md5, "part_ids"),
        (["part_unknown", first.id], md5, "part_ids"),
    ):
        with pytest.raises(openai.BadRequestError) as e:
            client.uploads.complete(upload.id, part_ids=parts, md5=sum_)
        assert e.value.param == param
    done = client.uploads.complete(upload.id, part_ids=right, md5=md5)
    assert done.status == "completed"
    assert client.files.content(done.file.id).content == content
    assert done.file.expires_at == done.file.created_at + 7200
    assert client.uploads.complete(upload.id, part_ids=right) == done  # a client that heard no answer asks again
    assert not service.storage.upload(upload.id).exists()
    with pytest.raises(openai.BadRequestError, match="is completed"):
        client.uploads.cancel(upload.id)
    source = tmp_path / "chunks.jsonl"
    source.write_bytes(content)
    chunked = client.uploads.upload_file_chunked(
        file=source, mime_type="text/jsonl", purpose="fine-tune", part_size=1000
    )
    assert client.files.content(chunked.file.id).content == content


def test_uploads_end(client, service):
    def begin():
        upload = client.uploads.create(bytes=5, filename="x", mime_type="text/plain", purpose="user_data")
        client.uploads.parts.create(upload.id, data=b"123")
        return upload.id

    cancelled, expired = begin(), begin()
    assert [client.uploads.cancel(cancelled).status for _ in range(2)] == ["cancelled"] * 2
    with service.database.write() as session:
        session.execute(sa.update(Upload).values(expires_at=1).where(Upload.id == expired))
    with pytest.raises(openai.BadRequestError, match="is expired"):
        client.uploads.parts.create(expired, data=b"45")
    sweep.once(service)
    with service.database.read() as session:
        assert session.scalar(sa.select(sa.func.count(Part.id))) == 0
        assert session.scalar(sa.select(Upload.status).where(Upload.id == expired)) == "expired"
    assert [p for p in (service.storage.root / "uploads").rglob("*") if p.is_file()] == []
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_unknown")


def test_what_a_completed_or_killed_upload_left_is_swept(client, service):
    begun = client.uploads.create(bytes=5, filename="x", mime_type="text/plain", purpose="user_data").id
    client.uploads.parts.create(begun, data=b"123")
    left = service.storage.upload(ids.new(ids.UPLOAD))  # the service was killed between its row and its parts
    left.mkdir()
    (left / ids.new(ids.PART)).write_bytes(b"left")
    sweep.once(service)
    assert [p.name for p in (service.storage.root / "uploads").iterdir()] == [begun]


def test_an_upload_that_ends_while_a_part_comes_or_is_completed_twice(client, service, monkeypatch):
    def begin():
        upload = client.uploads.create(bytes=3, filename="x", mime_type="text/plain", purpose="user_data").id
        return upload, client.uploads.parts.create(upload, data=b"123").id

    def before(then):  # between the bytes and the row
        was = Writing.keep

        def keep(self):
            monkeypatch.setattr(Writing, "keep", was)
            then()
            self.keep()

        monkeypatch.setattr(Writing, "keep", keep)

    upload, part = begin()
    before(lambda: client.uploads.complete(upload, part_ids=[part]))
    first = client.uploads.complete(upload, part_ids=[part])
    assert first.status == "completed"
    assert stored(service) == [first.file.id]
    upload = client.uploads.create(bytes=3, filename="x", mime_type="text/plain", purpose="user_data").id
    before(lambda: client.uploads.cancel(upload))
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.uploads.parts.create(upload, data=b"123")
    upload, part = begin()
    before(lambda: client.uploads.cancel(upload))
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.uploads.complete(upload, part_ids=[part])
    assert [p for p in (service.storage.root / "uploads").rglob("*") if p.is_file()] == []


def test_limits_of_files(tmp_path):
    limits = {
        "file_bytes": 2000, "upload_bytes": 5000, "part_bytes": 100, "parts": 2, "project_bytes": 3000,
        "line_bytes": 500, "examples": 15,
    }  # fmt: skip
    service = make_service(tmp_path, limits=limits)
    with serving(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        put(client)

        def refused(status, what, *given, **named):
            with pytest.raises(openai.APIStatusError) as e:
                what(*given, **named)
            assert e.value.status_code == status, e.value.message
            return e.value

        assert refused(413, put, client, b'{"a": 1}\n' * 1000).code == "file_too_large"
        assert "more than 500 bytes" in refused(400, put, client, b'{"a": "%s"}' % (b"x" * 600)).message
        assert "more than 15 lines" in refused(400, put, client, b"{}\n" * 16).message
        new = {"filename": "x", "mime_type": "text/plain", "purpose": "user_data"}
        refused(413, client.uploads.create, bytes=6000, **new)
        assert refused(413, client.uploads.create, bytes=2500, **new).code == "quota_exceeded"
        upload = client.uploads.create(bytes=150, **new)
        refused(413, client.uploads.parts.create, upload.id, data=b"x" * 101)
        client.uploads.parts.create(upload.id, data=b"x" * 100)
        refused(413, client.uploads.parts.create, upload.id, data=b"x" * 51)
        client.uploads.parts.create(upload.id, data=b"x")
        assert refused(400, client.uploads.parts.create, upload.id, data=b"x").code == "too_many_parts"
        put(client)
        refused(413, put, client)
        assert len(stored(service)) == 2
    service.database.close()
