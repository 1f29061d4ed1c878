"""What could be done to the service, and that it cannot: one test, or some, for each row of OWASP's lists that applies.

Tested elsewhere: the refusal of an open address without a key (test_starting), templates in a sandbox
(data/test_rendering), what a worker's child may do, and what is redacted (test_worker), how the page shows what models
say (test_page), the bounds of answers (api/test_chat). Cells of a result's CSV are numbers alone.
What is sent to be read is in test_threats_read.
"""

import hashlib
import json
import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
import sqlalchemy as sa
from openai.types.fine_tuning import FineTuningJobEvent

import jaxtune.serve
from jaxtune.errors import UserError
from jaxtune.serve.settings import Settings
from jaxtune.serve.store import ids, keys, states
from jaxtune.serve.store.storage import Storage
from jaxtune.serve.store.tables import Audit, File, Job, Key, Model
from tests.serve.conftest import FORM, ask, jsonl, make_key, make_service, multipart, serving, talking, upload

# authentication


def test_with_a_key_there_is_no_way_without(url, service, caplog):
    caplog.set_level(logging.DEBUG)
    assert ask(url, "GET", "/v1/models").status == 200  # loopback, and nobody made a key
    key_id, secret = make_key(service)
    near = secret[:-1] + ("y" if secret.endswith("x") else "x")
    for sent in ({}, {"Authorization": "Bearer any"}, {"Authorization": f"Bearer {near}"},
                 {"Authorization": f"Basic {secret}"}, {"Authorization": secret}):  # fmt: skip
        answer = ask(url, "GET", "/v1/models", **sent)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    for path in ("/v1/files", "/v1/nothing", "/v1/jaxtune/about", "/v1/chat/completions"):
        assert ask(url, "GET", path).status == 401
    assert ask(url, "POST", "/v1/files", multipart(b"x"), **FORM).status == 401
    assert ask(url, "GET", "/").status == 200  # the page, which then asks for the key
    with talking(url) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with talking(url, secret) as client:
        client.models.list()
    with talking(url, secret, project="another") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with service.database.write() as session:
        keys.revoke(session, key_id)
        keys.revoke(session, key_id)
    for sent in ({}, {"Authorization": f"Bearer {secret}"}):  # none is left, and the service does not open again
        assert ask(url, "GET", "/v1/models", **sent).status == 401
    assert secret not in caplog.text


def test_an_open_address_always_wants_a_key(tmp_path):
    service = make_service(tmp_path, host="0.0.0.0")
    with serving(service) as url:
        assert ask(url, "GET", "/v1/models").status == 401
        _, secret = make_key(service)
        assert ask(url, "GET", "/v1/models", Authorization=f"Bearer {secret}").status == 200
        assert ask(url, "GET", "/v1/models", Authorization=f"Bearer {secret}", Host="10.1.2.3:8000").status == 200
        assert ask(url, "GET", "/v1/models", Authorization=f"Bearer {secret}", Host="evil.example").status == 421
    service.database.close()


def test_keys_are_kept_as_hashes_and_made_with_care(service):
    _, secret = make_key(service, per_minute=5)
    assert re.fullmatch(r"sk-jaxtune-[A-Za-z0-9]{12}-[A-Za-z0-9]{40}", secret)
    with service.database.read() as session:
        row = session.scalar(sa.select(Key))
        assert keys.listed(session) == [row]
    assert row.hash == hashlib.sha256(secret.encode()).hexdigest()
    assert secret not in str({c.name: getattr(row, c.name) for c in Key.__table__.columns})
    assert secret.encode() not in (service.settings.data / "jaxtune.db").read_bytes()
    with service.database.write() as session:
        with pytest.raises(UserError, match="jaxtune keys list"):
            keys.revoke(session, "key_unknown")
        with pytest.raises(UserError, match="letters, digits"):
            keys.add(session, "x", project="../x")


def test_audit_is_for_admins_and_tells_who_did_what(url, service):
    _, admin = make_key(service, scope="admin")
    user_id, user = make_key(service)
    with talking(url, user) as client:
        made = client.files.with_raw_response.create(file=("a.jsonl", jsonl()), purpose="fine-tune")
        file_id = made.parse().id
        job = client.fine_tuning.jobs.create(model="demo", training_file=file_id).id
        client.fine_tuning.jobs.cancel(job)
        client.files.content(file_id)
        client.files.delete(file_id)
    assert ask(url, "GET", "/v1/jaxtune/audit", Authorization=f"Bearer {user}").status == 403
    entries = json.loads(ask(url, "GET", "/v1/jaxtune/audit", Authorization=f"Bearer {admin}").body)["data"][::-1]
    assert [(e["action"], e["object_id"]) for e in entries] == [
        ("file.create", file_id), ("job.create", job), ("job.cancelled", job), ("file.download", file_id),
        ("file.delete", file_id),
    ]  # fmt: skip
    assert {e["key_id"] for e in entries} == {user_id}
    assert entries[0]["request_id"] == made.headers["x-request-id"]
    source = "".join(p.read_text() for p in Path(jaxtune.serve.__file__).parent.rglob("*.py"))
    assert not re.search(r"(delete|update)\((tables\.)?Audit", source)


# access to others' objects


def test_others_objects_are_not_there(url, service):
    (_, mine), (_, theirs) = make_key(service, "mine"), make_key(service, "theirs", scope="admin")
    with talking(url, mine) as client:
        file = upload(client)
        job = client.fine_tuning.jobs.create(model="demo", training_file=file).id
        part = client.uploads.create(bytes=5, filename="x", mime_type="text/plain", purpose="user_data").id
    model = ids.model_name("demo", "local", None)
    with service.database.write() as session:
        session.add(
            Model(id=model, created_at=1, project="mine", job_id=job, base="demo", kind="adapter", folder="jobs/x")
        )
    with talking(url, theirs) as client:
        jobs = client.fine_tuning.jobs
        own = upload(client)
        for call, *given in (
            (client.files.retrieve, file), (client.files.content, file), (client.files.delete, file),
            (jobs.retrieve, job), (jobs.cancel, job), (jobs.pause, job), (jobs.resume, job), (jobs.list_events, job),
            (jobs.checkpoints.list, job), (client.uploads.cancel, part), (client.models.retrieve, model),
            (client.models.delete, model),
        ):  # fmt: skip
            with pytest.raises(openai.NotFoundError):
                call(*given)
        with pytest.raises(openai.NotFoundError):
            client.uploads.parts.create(part, data=b"12345")
        with pytest.raises(openai.NotFoundError):
            client.uploads.complete(part, part_ids=["part_x"])
        with pytest.raises(openai.NotFoundError):
            client.get(f"/fine_tuning/jobs/{job}/events?stream=true", cast_to=FineTuningJobEvent)
        with pytest.raises(openai.BadRequestError):
            jobs.create(model="demo", training_file=file)
        with pytest.raises(openai.NotFoundError):
            jobs.create(model=model, training_file=own)
        for listing, cursor in ((client.files.list, file), (jobs.list, job)):
            with pytest.raises(openai.BadRequestError):
                listing(after=cursor)
        assert [f.id for f in client.files.list()] == [own]
        assert jobs.list().data == []
        assert model not in {m.id for m in client.models.list()}
    audit = json.loads(ask(url, "GET", "/v1/jaxtune/audit", Authorization=f"Bearer {theirs}").body)["data"]
    assert [e["object_id"] for e in audit] == [own]
    for made in (file, job, part):
        assert 62 ** len(re.split("[-_]", made)[1]) > 2**96


# paths


@pytest.mark.parametrize("name", ["../../x.jsonl", "/etc/passwd", "..\\..\\x", "a\x00b", "..", "x" * 999, '"; evil="1'])
def test_names_of_files_are_labels(client, service, name):
    made = client.files.create(file=(name, jsonl()), purpose="fine-tune")
    assert "/" not in made.filename
    assert "\\" not in made.filename
    assert len(made.filename) <= 255
    stored = [p for p in service.storage.root.rglob("*") if p.is_file() and "jaxtune.db" not in p.name]
    assert stored == [service.storage.file(made.id)]
    assert client.files.content(made.id).content == jsonl()


def test_ids_in_urls_are_no_paths(url, service, tmp_path):
    (tmp_path / "secret").write_text("secret")
    for prefix in ("/v1/files/", "/v1/models/", "/v1/fine_tuning/jobs/", "/page/"):
        for name in ("..%2f..%2fsecret", "%2e%2e/%2e%2e/secret", "..%5csecret", "file-..%2fsecret", "//etc/passwd"):
            answer = ask(url, "GET", prefix + name)
            assert answer.status == 404
            assert b"secret" not in answer.body.replace(name.encode(), b"").split(b'"message"')[0]
    assert ask(url, "GET", "/v1/files/a%00b").status == 400
    assert ask(url, "GET", "/v1/files?after=%00").status == 400


def test_storage_keeps_to_itself(tmp_path):
    storage = Storage(tmp_path / "data")
    for place in (storage.file, storage.upload, storage.job):
        for name in ("../x", "file-../../x", "", "file-", "x" * 40):
            with pytest.raises(ValueError, match="no id"):
                place(name)
    with pytest.raises(ValueError, match="no id"):
        storage.part(ids.new(ids.UPLOAD), "../x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "data" / "jobs").mkdir(parents=True)
    (tmp_path / "data" / "jobs" / "link").symlink_to(tmp_path / "outside")
    for folder in ("../outside", "/etc", "jobs/link", "", "."):
        with pytest.raises(ValueError, match="not in the storage folder"):
            storage.delete_model(Model(id="ft:x", folder=folder))
    place = storage.file(ids.new(ids.FILE))
    place.parent.mkdir()
    place.with_name(place.name + ".part").symlink_to(tmp_path / "outside" / "new")
    with pytest.raises(FileExistsError), storage.writing(place, 10):
        pass
    assert list((tmp_path / "outside").iterdir()) == []
    with storage.writing(storage.file(ids.new(ids.FILE)), 10) as writing:
        writing.write(b"x")
    assert writing.place.stat().st_mode & 0o077 == 0


# injection


def test_what_is_sent_stays_data(client, service):
    evil = "'; DROP TABLE jobs; -- $(touch /tmp/x) `id` \r\nX: y =cmd|'/c'!A1 <script>"
    file = upload(client, name=evil)
    job = client.fine_tuning.jobs.create(model="demo", training_file=file, suffix=evil[:64], metadata={evil[:64]: evil})
    assert client.fine_tuning.jobs.retrieve(job.id).metadata == {evil[:64]: evil}
    assert [j.id for j in client.fine_tuning.jobs.list(metadata={evil[:64]: evil})] == [job.id]
    assert client.files.list(purpose=evil[:60]).data == []
    assert re.fullmatch(r"ft:demo:local:[a-z0-9_-]*:[A-Za-z0-9]{8}", ids.model_name("demo", "local", evil))
    assert "x" not in client.files.content(file).response.headers
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(evil.replace("/", ""))
    with service.database.read() as session:
        assert session.scalar(sa.select(sa.func.count(Job.id))) == 1


# browsers


def test_other_sites_get_nowhere(url, service):
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "169.254.169.254", "", "[::2]"):
        assert ask(url, "GET", "/v1/models", Host=host).status in (400, 421), host
    netloc = url.removeprefix("http://")
    port = netloc.split(":")[1]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert ask(url, "GET", "/v1/models", Host=host).status == 200, host
    job = {"model": "demo", "training_file": "file-x"}
    for origin in ("http://evil.example", "null", f"http://localhost:{int(port) + 1}", "file://", "http://["):
        for method, path in (("POST", "/v1/fine_tuning/jobs"), ("DELETE", "/v1/files/file-x"), ("POST", "/v1/files")):
            answer = ask(url, method, path, job, Origin=origin)
            assert (answer.status, answer.error["code"]) == (403, "cross_origin")
    assert ask(url, "POST", "/v1/fine_tuning/jobs", job, Origin=url).error["param"] == "training_file"
    preflight = ask(
        url, "OPTIONS", "/v1/files", Origin="http://evil.example", Access_Control_Request_Method="POST"
    )  # fmt: skip
    assert preflight.status == 405
    plain = ask(url, "POST", "/v1/fine_tuning/jobs", json.dumps(job).encode(), Content_Type="text/plain")
    assert plain.status == 415
    for answer in (preflight, plain, ask(url, "GET", "/"), ask(url, "GET", "/v1/models"), ask(url, "GET", "/nothing")):
        assert not [h for h in answer.headers if h.startswith("access-control")]
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_names_of_the_service_are_set(tmp_path):
    service = make_service(tmp_path, hosts=["tune.example"])
    with serving(service) as url:
        assert ask(url, "GET", "/v1/models", Host="tune.example:80").status == 401  # by way of a proxy: never open
        key = f"Bearer {make_key(service)[1]}"
        assert ask(url, "GET", "/v1/models", Host="tune.example:80", Authorization=key).status == 200
    service.database.close()


# secrets, data, errors


def test_integrations_bring_no_secrets(client, service):
    file = upload(client)
    wandb = [{"type": "wandb", "wandb": {"project": "p", "api_key": "secret-of-wandb"}}]
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.create(model="demo", training_file=file, integrations=wandb)
    assert b"secret-of-wandb" not in (service.settings.data / "jaxtune.db").read_bytes()


def test_rows_and_requests_stay_out_of_logs(client, service, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(openai.BadRequestError) as e:
        upload(client, jsonl() + b"a private row\n")
    assert "private" not in e.value.message
    with service.database.write() as session, pytest.raises(sa.exc.IntegrityError) as wrong:
        row = {"created_at": 1, "project": "p", "bytes": 1, "purpose": "p", "status": "s", "sha256": "x"}
        session.add_all([File(id="file-a", filename="private", **row), File(id="file-a", filename="private", **row)])
        session.flush()
    assert "private" not in str(wrong.value)
    assert "private" not in caplog.text


def test_deleted_is_deleted(client, service):
    content = jsonl() + b'{"private": "row"}\n'
    file = upload(client, content)
    client.files.delete(file)
    left = [p for p in service.storage.root.rglob("*") if p.is_file()]
    assert not [p for p in left if b"private" in p.read_bytes()]


def test_faults_tell_nothing_of_the_inside(url, service, caplog, monkeypatch):
    def broken():
        raise RuntimeError(f"no {service.storage.root}")

    monkeypatch.setattr(service.storage, "free_bytes", broken)
    answer = ask(url, "POST", "/v1/files", multipart(b"x"), **FORM)
    assert answer.status == 500
    assert answer.error == {
        "message": "The server had an error while processing your request. Its log has more, under this request's id.",
        "type": "server_error", "param": None, "code": None,
    }  # fmt: skip
    assert answer.headers["x-request-id"] in caplog.text
    assert "RuntimeError" in caplog.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    with talking(url, max_retries=0) as client, pytest.raises(openai.InternalServerError) as e:
        upload(client)
    assert e.value.request_id.startswith("req_")


def test_every_answer_has_an_id_and_every_error_an_envelope(url):
    for method, path, status in (
        ("GET", "/v1/embeddings", 404), ("POST", "/v1/responses", 404), ("GET", "/v1", 404), ("GET", "/v1/", 404),
        ("PUT", "/v1/files", 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/files/file-x", 404),
        ("GET", "/v1/files?limit=x", 400), ("GET", "/docs", 404), ("GET", "/v1/fine_tuning/jobs?limit=0", 400),
        ("POST", "/v1/fine_tuning/jobs", 400),
    ):  # fmt: skip
        answer = ask(url, method, path)
        assert answer.status == status, path
        assert set(answer.error) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"].startswith("req_")
    assert ask(url, "GET", "/v1/models").headers["x-request-id"].startswith("req_")


# isolation, models


def test_the_api_has_no_jax():
    code = "import sys, jaxtune.serve.api.app; print(sorted({'jax', 'flax', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_bases_cannot_be_taken(client, service):
    file = upload(client)
    job = client.fine_tuning.jobs.create(model="demo", training_file=file)
    with service.database.write() as session:
        session.add(
            Model(id="demo", created_at=1, project="default", job_id=job.id, base="demo", kind="whole", folder="jobs/x")
        )
    assert client.models.retrieve("demo").owned_by == "system"
    assert ids.model_name("demo", "local", "demo").startswith("ft:")


def test_links_out_of_the_folder_of_models_are_no_models(client, service, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    (tmp_path / "models" / "link").symlink_to(tmp_path / "outside")
    assert "link" not in {m.id for m in client.models.list()}


def test_a_folder_that_cannot_be_read_has_no_models_and_hides_no_others(client, service, monkeypatch):
    (service.settings.models / "lost+found").mkdir()
    was = Path.iterdir

    def iterdir(self):
        if self.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return was(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert "demo" in {m.id for m in client.models.list()}


def test_a_service_listens_on_this_machine_alone():
    assert Settings(models=Path("m"), data=Path("d")).host == "127.0.0.1"


def test_two_cancels_at_once_are_one(client, service):
    job = client.fine_tuning.jobs.create(model="demo", training_file=upload(client)).id
    threads = [threading.Thread(target=client.fine_tuning.jobs.cancel, args=(job,)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    with service.database.read() as session:
        assert session.scalar(sa.select(sa.func.count(Audit.id)).where(Audit.action == "job.cancelled")) == 1
    said = [e.message for e in client.fine_tuning.jobs.list_events(job)]
    assert said.count("The job has been cancelled") == 1
    assert client.fine_tuning.jobs.retrieve(job).status == states.CANCELLED
