"""What is sent to the service to be read: uploads, addresses, templates, bodies, and too much of each."""

import http.server
import json
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxtune.serve
from jaxtune.serve import fetching, starting
from jaxtune.serve.api import forms, guard
from jaxtune.serve.checks.jsonl import too_deep
from tests.serve.conftest import FORM, ask, chunked, jsonl, make_key, make_service, multipart, serving, talking, upload

# uploads


def test_uploads_stop_at_the_limit_whatever_they_announce(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "_LINGER_BYTES", 2**20)
    service = make_service(tmp_path, limits={"file_bytes": 100_000})
    body = multipart(b"x" * 10)
    with serving(service) as url:
        start, end = body.split(b"x" * 10)

        def endless():
            yield start
            for _ in range(2000):
                yield b"x" * 65536

        sent, status = chunked(url, endless())
        assert sent < 2000
        assert status in (413, None)  # the connection may be gone before the answer is read
        assert ask(url, "POST", "/v1/files", start + b"x" * 100_001 + end, **FORM).status == 413
        assert ask(url, "POST", "/v1/files", start + b"x" * 100_000 + end, **FORM).status == 200
        files = list((tmp_path / "data" / "files").iterdir())
        assert [p.stat().st_size for p in files] == [100_000]
    service.database.close()


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (multipart(b"x", header=b'filename="' + b"n" * 100_000 + b'"'), 400),
        (multipart(b"x", header=b'filename="x"\r\n' + b"\r\n".join(b"h%d: x" % n for n in range(500))), 400),
        (multipart(b"x", purpose="p" * 5000), 400),
        (multipart(b"x")[:-20], 400),
        (b"no form at all", 400),
        (multipart(b"x").replace(b"--b--\r\n", multipart(b"y")), 400),
    ],
    ids=["long header", "many headers", "long field", "cut", "no form", "two files"],
)
def test_forms_that_are_made_to_hurt(url, service, body, status):
    answer = ask(url, "POST", "/v1/files", body, **FORM)
    assert answer.status == status, answer.body
    assert not any((service.storage.root / "files").glob("*"))
    assert ask(url, "POST", "/v1/files", body, Content_Type="multipart/form-data").status == 415
    assert ask(url, "POST", "/v1/files", body, Content_Type="text/plain").status == 415


def test_slow_uploads_are_ended_and_places_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "_LINGER_S", 0.1)
    monkeypatch.setattr(forms, "_CHUNK_S", 0.5)
    service = make_service(tmp_path, limits={"uploads_at_once": 1})
    with serving(service) as url:
        seen = []

        def slow():
            yield multipart(b"x")[:-30]
            time.sleep(0.2)  # the place is taken now
            seen.append(ask(url, "POST", "/v1/files", multipart(b"x"), **FORM))

        _, status = chunked(url, slow())
        assert status == 408
        assert seen[0].status == 429
        assert seen[0].headers["retry-after"] == "2"
        monkeypatch.setattr(forms, "_START_S", 0.3)

        def trickling():  # no pause is long
            start = multipart(b"x" * 100)[:-60]
            for n in range(len(start)):
                yield start[n : n + 1]
                time.sleep(0.02)

        begun = time.monotonic()
        sent, status = chunked(url, trickling())
        assert status == 408 or sent < 120, (sent, status, time.monotonic() - begun)
        assert ask(url, "POST", "/v1/files", multipart(b"x"), **FORM).status == 200
    service.database.close()


@pytest.mark.parametrize("before", [b"", b"GET /v1 HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["first", "later"])
@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nX: "], ids=["nothing", "half a head"])
def test_connections_on_which_nothing_is_asked_are_ended(tmp_path, monkeypatch, before, sent):
    monkeypatch.setattr(starting, "_HEAD_S", 0.3)
    monkeypatch.setattr(starting, "_KEEP_ALIVE_S", 0.3 if not sent else 60)
    service = make_service(tmp_path)
    with serving(service) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as s:
            if before:
                s.sendall(before)
                while not s.recv(65536).endswith(b"}"):  # the envelope, to its end
                    pass
            s.sendall(sent)
            while s.recv(65536):
                pass
    service.database.close()


def test_a_full_disk_takes_no_uploads(tmp_path):
    service = make_service(tmp_path, limits={"free_bytes": shutil.disk_usage(tmp_path).total * 2})
    with serving(service) as url:
        answer = ask(url, "POST", "/v1/files", multipart(b"x"), **FORM)
        assert (answer.status, answer.error["code"]) == (507, "disk_full")
        assert answer.headers["x-should-retry"] == "false"
    service.database.close()


def test_a_client_that_leaves_leaves_nothing(url, service):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as s:
        s.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
            b"Content-Length: 100000\r\n\r\n" + multipart(b"x")[:-30]
        )
        files = service.storage.root / "files"
        while not any(files.glob("*.part")):
            time.sleep(0.01)
    while any(files.glob("*")):
        time.sleep(0.01)


# what is read


def test_no_archives_no_pickles_no_code_of_models():
    source = "\n".join(p.read_text() for p in Path(jaxtune.serve.__file__).parent.rglob("*.py"))
    for word in ("import pickle", "pickle.load", "joblib", "torch.load", "yaml.load(", "allow_pickle=True", "eval(",
                 "exec(", "trust_remote_code=True", "tarfile", "gzip.", "shell=True", "os.system"):  # fmt: skip
        assert not re.search(rf"(?<![\w.]){re.escape(word)}", source), word


def test_addresses_are_no_files_and_no_models(client):
    file = upload(client)
    for address in ("http://169.254.169.254/computeMetadata/v1/", "https://example.com/x.jsonl", "hf://owner/name",
                    "file:///etc/passwd", "/etc/passwd", "gs://bucket/x"):  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            client.fine_tuning.jobs.create(model="demo", training_file=address)
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.create(model=address, training_file=file)


class Elsewhere(http.server.BaseHTTPRequestHandler):
    """A host that has a file, a redirect, and something endless."""

    def do_GET(self):
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/")
            self.end_headers()
            return
        body = jsonl() if self.path.startswith("/data.jsonl") else b"x" * 50_000
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:100] if self.path == "/cut" else body)

    def log_message(self, *given):
        pass


@pytest.fixture
def elsewhere(monkeypatch):
    """Reached by any public name, without TLS; gives the addresses that connections went to."""
    gone_to = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()

        def connect(self):
            gone_to.append(self._address)
            self.sock = socket.create_connection(server.server_address)

        monkeypatch.setattr(fetching._Pinned, "connect", connect)
        yield gone_to
        server.shutdown()
        thread.join()


def test_files_are_fetched_from_public_hosts_alone_and_only_where_allowed(tmp_path, elsewhere, monkeypatch):
    names = {
        "good.example": {"8.8.8.8"}, "metadata.google.internal": {"169.254.169.254"}, "inner": {"10.0.0.7"},
        "half": {"8.8.8.8", "127.0.0.1"}, "shared": {"100.64.0.1"},
    }  # fmt: skip
    monkeypatch.setattr(fetching, "_addresses", names.__getitem__)
    service = make_service(tmp_path, urls=True, limits={"file_bytes": 20_000})
    with serving(service) as url:

        def fetched(address, **more):
            return ask(url, "POST", "/v1/jaxtune/files", {"url": address, "purpose": "fine-tune", **more})

        made = json.loads(fetched("https://good.example/data.jsonl?x=1").body)
        assert (made["filename"], made["bytes"]) == ("data.jsonl", len(jsonl()))
        assert elsewhere == ["8.8.8.8"]
        for address, why in (
            ("https://metadata.google.internal/computeMetadata/v1/", "not a public one"),
            ("https://inner/", "not a public one"),
            ("https://half/", "not a public one"),
            ("https://shared/", "not a public one"),
            ("http://good.example/data.jsonl", "give https"),
            ("https://good.example:22/", "give https"),
            ("https://user:password@good.example/", "give https"),
            ("https://good.example/a\r\nX: y", "give https"),
            ("file:///etc/passwd", "give https"),
        ):
            answer = fetched(address)
            assert (answer.status, answer.error["param"]) == (400, "url")
            assert why in answer.error["message"]
        assert elsewhere == ["8.8.8.8"]
        assert "redirects are not followed" in fetched("https://good.example/away").error["message"]
        assert fetched("https://good.example/large").status == 413
        assert "broke off" in fetched("https://good.example/cut").error["message"]
        assert [p.name for p in (tmp_path / "data" / "files").iterdir()] == [made["id"]]
    service.database.close()


def test_files_are_not_fetched_by_default(url):
    answer = ask(url, "POST", "/v1/jaxtune/files", {"url": "https://example.com/x", "purpose": "fine-tune"})
    assert (answer.status, answer.error["code"]) == (403, "urls_not_allowed")


def test_models_of_the_hub_only_where_the_host_allows_it(tmp_path):
    service = make_service(tmp_path, hub=True)
    with serving(service) as url, talking(url) as client:
        file = upload(client)
        assert client.fine_tuning.jobs.create(model="owner/name", training_file=file).model == "owner/name"
        for ask_for in ("/jaxtune/estimate", f"/jaxtune/files/{file}/report?model=owner/name"):
            method, body = (client.get, None) if "report" in ask_for else (client.post, {"model": "owner/name"})
            with pytest.raises(openai.BadRequestError, match="which workers fetch") as e:  # nothing is fetched here
                method(ask_for, cast_to=dict, **({"body": body} if body else {}))
            assert e.value.code == "model_not_here"
        for address in ("../name", "https://example.com/x", "owner/name/more", "name"):
            with pytest.raises(openai.NotFoundError):
                client.fine_tuning.jobs.create(model=address, training_file=file)
    service.database.close()


def test_templates_are_named_never_sent(client):
    file = upload(client)
    for template in ("{{ 1 }}", "/tmp/evil.jinja", "../x"):
        with pytest.raises(openai.BadRequestError) as e:
            client.fine_tuning.jobs.create(
                model="demo", training_file=file, extra_body={"jaxtune": {"template": template}}
            )
        assert e.value.param == "jaxtune.template"


# exhaustion


def test_bodies_are_bounded_and_not_deep(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "_LINGER_BYTES", 2**20)
    service = make_service(tmp_path, limits={"body_bytes": 10_000})
    path = "/v1/fine_tuning/jobs"
    with serving(service) as url:
        assert ask(url, "POST", path, {"model": "x" * 10_000}).status == 413
        assert ask(url, "POST", path, b'{"a":' * 1000, Content_Type="application/json").error["code"] == "too_deep"
        assert ask(url, "POST", path, b"[" * 9999, Content_Type="application/json").error["code"] == "too_deep"
        assert ask(url, "POST", path, b'{"a": NaN', Content_Type="application/json").status == 400
        assert ask(url, "POST", path, b"9" * 5000, Content_Type="application/json").status == 400
        assert ask(url, "POST", path, b"\xff\xfe{", Content_Type="application/json").status == 400
        assert ask(url, "POST", path, multipart(b"x" * 20_000), **FORM).status == 413
        assert ask(url, "POST", path, multipart(b"x"), **FORM).status == 415
        assert chunked(url, (b"x" * 65536 for _ in range(500)), path)[1] in (413, None)
        monkeypatch.setattr(guard, "_BODY_S", 0.1)
        monkeypatch.setattr(guard, "_LINGER_S", 0.1)
        assert chunked(url, [b"{"], path)[1] == 408
    service.database.close()


_JSON = st.recursive(
    st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=20
)


@settings(max_examples=50, deadline=None)
@given(_JSON, st.integers(0, 6), st.booleans())
def test_depth_is_that_of_the_parsed_value(value, limit, ascii_):
    def depth(v):
        inner = v.values() if isinstance(v, dict) else v if isinstance(v, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert too_deep(json.dumps(value, ensure_ascii=ascii_).encode(), limit) == (depth(value) > limit)


def test_depth_is_seen_in_time_that_grows_with_length_alone():
    for evil in (b'"' + b'\\"' * 200_000 + b"\\", b'"' * 200_001, b"[{" * 100_000, b'["' * 100_000, b"\\" * 300_000):
        too_deep(evil + b"[" * 65 + b"]" * 65, 64)  # anything quadratic would not end


def test_requests_are_counted_by_key(tmp_path):
    service = make_service(tmp_path)
    with serving(service) as url:
        _, few = make_key(service, per_minute=2)
        _, other = make_key(service)
        answers = [ask(url, "GET", "/v1/models", Authorization=f"Bearer {few}") for _ in range(3)]
        assert [a.status for a in answers] == [200, 200, 429]
        assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
        assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["1", "0", "0"]
        assert 0 < int(answers[2].headers["retry-after"]) <= 31
        assert answers[2].error["code"] == "rate_limit_exceeded"
        assert ask(url, "GET", "/v1/models", Authorization=f"Bearer {other}").status == 200
        assert ask(url, "GET", "/v1/models", Authorization="Bearer wrong").status == 401
    service.database.close()


def test_the_queue_of_all_is_bounded(tmp_path):
    service = make_service(tmp_path, limits={"queued_jobs": 1})
    with serving(service) as url:
        for project, expected in (("one", None), ("two", openai.RateLimitError)):
            with talking(url, make_key(service, project)[1]) as client:
                file = upload(client)
                if expected is None:
                    client.fine_tuning.jobs.create(model="demo", training_file=file)
                else:
                    with pytest.raises(expected, match="of all projects"):
                        client.fine_tuning.jobs.create(model="demo", training_file=file)
    service.database.close()
