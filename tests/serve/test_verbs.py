"""The verbs files, jobs and models against a service that is played: what they ask, and what they make of answers."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.test_cli import call

JOB = {
    "id": "ftjob-abcdefgh", "object": "fine_tuning.job", "status": "running", "model": "demo", "created_at": 1,
    "training_file": "file-abcdefgh", "result_files": [], "seed": 1, "organization_id": "o", "hyperparameters": {},
}  # fmt: skip
ENDED = {**JOB, "status": "succeeded", "fine_tuned_model": "ft:demo:local::x", "result_files": ["file-results1"]}


def event(n, message, **data):
    kind = {"type": "metrics", "data": data} if data else {"type": "message"}
    told = {"id": f"ftevent-{n}", "created_at": n, "level": "info", "message": message}
    return {"object": "fine_tuning.job.event", **told, **kind}


EVENTS = [event(1, "Created"), event(2, "Step 1/2: training loss=2.00", step=1, total_steps=2, train_loss=2.0)]
EVENTS += [event(3, "The job has \x1b[31msuccessfully completed")]


def listed(rows):
    return {"object": "list", "data": rows, "has_more": False}


def sse(events, done=True):
    text = "".join(f"id: {e['id']}\ndata: {json.dumps(e)}\n\n" for e in events)
    return "text/event-stream", (text + ("data: [DONE]\n\n" if done else "")).encode()


@pytest.fixture
def service(monkeypatch):
    """A server that answers by a table of functions; it keeps what it was asked."""
    asked, answers = [], {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path, _, query = self.path.partition("?")
            asked.append((self.command, path, query, self.headers, body))
            found = answers.get((self.command, path), lambda *_: (404, error("No such thing")))(query, self.headers)
            status, found = found if isinstance(found[0], int) else (200, found)
            kind, text = found if isinstance(found, tuple) else ("application/json", json.dumps(found).encode())
            self.send_response(status)
            self.send_header("Content-Type", kind)
            cut = text.endswith(b"CUT")
            self.send_header("Content-Length", str(len(text)))
            if status >= 500:
                self.send_header("x-should-retry", "false")
            self.end_headers()
            self.wfile.write(text[:-3] if cut else text)
            if cut:
                self.wfile.flush()
                self.close_connection = True

        do_POST = do_DELETE = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def answer(method, path, *found):
        """Each answer once, the last one for ever."""
        left = list(found)
        answers[method, f"/v1{path}"] = lambda *request: _made(left.pop(0) if len(left) > 1 else left[0], request)

    yield answer, asked
    server.shutdown()
    thread.join()
    server.server_close()


def _made(found, request):
    return (200, found(*request) if callable(found) else found) if not _has_status(found) else found


def _has_status(found):
    return isinstance(found, tuple) and isinstance(found[0], int)


def error(message):
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


@pytest.mark.parametrize(
    ("status", "message", "said"),
    [
        (401, "Incorrect API key.", "Incorrect API key; set OPENAI_API_KEY, or name a file that holds the key"),
        (404, "No such job", "No such job"),
        (500, "It broke", "It broke; its log says more"),
    ],
)
def test_what_a_service_says_is_one_line_with_a_remedy(service, capsys, status, message, said):
    service[0]("GET", "/fine_tuning/jobs/ftjob-x", (status, error(message)))
    call("jobs", "show", "ftjob-x", code=2)
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_service_that_is_not_there(capsys):
    call("jobs", "follow", "ftjob-x", "--base-url", "http://127.0.0.1:9/v1", code=2)
    assert "cannot be reached" in (err := capsys.readouterr().err)
    assert "start `jaxtune serve`" in err


def test_a_key_comes_from_a_file_or_the_environment_and_is_wanted_elsewhere(service, tmp_path, monkeypatch, capsys):
    service[0]("GET", "/models", listed([]))
    (tmp_path / "key").write_text("sk-secret\n")
    call("models", "list", "--key-file", tmp_path / "key")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    call("models", "list")
    assert [a[3]["Authorization"] for a in service[1]] == ["Bearer sk-secret", "Bearer sk-other"]
    monkeypatch.delenv("OPENAI_API_KEY")
    call("models", "list", "--base-url", "https://tune.example.org/v1", code=2)
    assert "no key; set OPENAI_API_KEY" in capsys.readouterr().err
    call("models", "list", "--base-url", "tune.example.org", code=2)
    assert "http://HOST:PORT/v1 was expected" in capsys.readouterr().err


def test_follow_streams_goes_on_after_a_break_and_tells_each_event_once(service, capsys, monkeypatch):
    monkeypatch.setattr("jaxtune.cli.following._AGAIN_S", 0.0)
    answer, asked = service
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}", JOB, JOB, JOB, ENDED)
    kind, text = sse(EVENTS[:2], done=False)
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}/events", (kind, text + b": more to come CUT"), sse(EVENTS[1:]))
    call("jobs", "follow", JOB["id"])
    out = capsys.readouterr().out
    assert [line.partition("  ")[2] for line in out.splitlines() if ":0" in line] == [
        "Created",
        "Step 1/2: training loss=2.00",
        "The job has ?[31msuccessfully completed",
    ]
    assert "the connection broke" in out
    assert "model: ft:demo:local::x" in out
    streams = [headers.get("Last-Event-ID") for _, path, _, headers, _ in asked if path.endswith("/events")]
    assert streams[:2] == [None, "ftevent-2"]


@pytest.mark.parametrize("refusal", [listed(EVENTS[::-1]), (400, error("Unknown parameter: 'stream'."))])
def test_follow_polls_where_nothing_streams(service, capsys, monkeypatch, refusal):
    monkeypatch.setattr("jaxtune.cli.following._POLL_S", 0.0)
    answer, _ = service
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}", JOB, JOB, ENDED)
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}/events", refusal, listed(EVENTS[1::-1]), listed(EVENTS[::-1]))
    call("jobs", "follow", JOB["id"])
    out = capsys.readouterr().out
    assert [out.count(word) for word in ("Created", "Step 1/2", "completed")] == [1, 1, 1]


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ({"status": "failed", "error": {"code": "x", "message": "Bad line 3", "param": None}}, 2, "failed: Bad line 3"),
        ({"status": "cancelled"}, 75, "is cancelled"),
        ({"status": "paused"}, 75, "is paused; go on with `jaxtune jobs resume ftjob-abcdefgh`"),
    ],
)
def test_follow_says_by_its_code_how_a_job_ended(service, capsys, end, code, said):
    answer, _ = service
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}", {**JOB, **end})
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}/events", sse(EVENTS[:1]))
    call("jobs", "follow", JOB["id"], code=code)
    assert said in capsys.readouterr().err


def test_create_uploads_what_is_not_there_and_sends_what_was_chosen(service, capsys, tmp_path):
    answer, asked = service
    answer("GET", "/files", listed([{"id": "file-old", "filename": "a.jsonl", "bytes": 2, "purpose": "fine-tune"}]))
    answer("POST", "/files", {"id": "file-new", "object": "file"})
    answer("POST", "/fine_tuning/jobs", JOB)
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.jsonl").write_text("{}")
    given = [
        "--model",
        "demo",
        "--epochs",
        "2",
        "--suffix",
        "s",
        "--yes",
        "--no-follow",
        "rank=4",
        "learning_rate=1e-3",
    ]
    call("jobs", "create", tmp_path / "a.jsonl", "--validation", tmp_path / "b.jsonl", *given)
    (body,) = [json.loads(b) for method, path, _, _, b in asked if (method, path) == ("POST", "/v1/fine_tuning/jobs")]
    assert body == {
        "model": "demo", "training_file": "file-old", "validation_file": "file-new", "suffix": "s",
        "hyperparameters": {"n_epochs": 2}, "jaxtune": {"rank": 4, "learning_rate": 1e-3},
    }  # fmt: skip
    assert capsys.readouterr().out.split() == [JOB["id"]]
    call("jobs", "create", "nowhere.jsonl", "--model", "demo", code=2)
    assert "nowhere.jsonl: no such file" in capsys.readouterr().err


def test_results_are_written_whole(service, capsys, tmp_path):
    answer, _ = service
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}", ENDED, JOB)
    answer("GET", "/files/file-results1/content", ("text/csv", b"step,train_loss\n1,2.0\n"))
    call("jobs", "results", JOB["id"], "--out", tmp_path / "new" / "r.csv")
    assert (tmp_path / "new" / "r.csv").read_text() == "step,train_loss\n1,2.0\n"
    assert len(list((tmp_path / "new").iterdir())) == 1
    call("jobs", "results", JOB["id"], code=2)
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}", ENDED, JOB)
    call("jobs", "results", JOB["id"], "--out", tmp_path / "new", code=2)  # a folder
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["r.csv"]
    call("jobs", "results", JOB["id"], code=2)
    assert "is running and has no results" in capsys.readouterr().err


def test_tables_are_aligned_and_harmless(service, capsys):
    rows = [
        {"id": "file-a", "filename": "x\x1b]0;evil\x07.jsonl", "bytes": 3, "purpose": "fine-tune", "created_at": 0},
        {
            "id": "file-bcd",
            "filename": "y",
            "bytes": 4000,
            "purpose": "fine-tune",
            "created_at": 0,
            "status": "processed",
        },
    ]
    service[0]("GET", "/files", listed(rows))
    call("files", "list")
    heads, first, second = capsys.readouterr().out.splitlines()
    assert heads.index("size") == first.index("3 B") == second.index("3.9 KiB")
    assert first.endswith("x?]0;evil?.jsonl")


def test_a_model_is_deleted_when_the_user_says_so(service, capsys, monkeypatch):
    answer, asked = service
    answer("DELETE", "/models/ft:demo:local::x", {"id": "x", "object": "model", "deleted": True})
    monkeypatch.setattr("builtins.input", lambda _: "n")
    call("models", "delete", "ft:demo:local::x")
    assert asked == []
    call("models", "delete", "ft:demo:local::x", "--yes")
    assert [(a[0], a[1]) for a in asked] == [("DELETE", "/v1/models/ft:demo:local::x")]


def test_follow_in_a_terminal_moves_one_line(service, capsys, monkeypatch):
    answer, _ = service
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}", ENDED)
    answer("GET", f"/fine_tuning/jobs/{JOB['id']}/events", sse(EVENTS))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    call("jobs", "follow", JOB["id"])
    out = capsys.readouterr().out
    assert "\r\x1b[Kstep 1/2 ████████████············  loss 2.0000\n" in out
    assert "Step 1/2" not in out


def test_ctrl_c_leaves_a_job_running_and_says_how_to_go_on(service, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxtune.cli.following._told", interrupted)
    call("jobs", "follow", JOB["id"])
    out = capsys.readouterr().out
    assert (
        f"{JOB['id']} goes on. To follow it again: jaxtune jobs follow {JOB['id']} --base-url http://127.0.0.1" in out
    )
    assert f"jaxtune jobs cancel {JOB['id']}" in out
    assert service[1] == []


def test_without_the_extra_a_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("jaxtune.cli.serve.find_spec", lambda name: None if name == "fastapi" else name)
    monkeypatch.setattr("jaxtune.cli.client.find_spec", lambda name: None)
    for verb in (("serve", "--demo"), ("worker",), ("keys", "list")):
        call(*verb, code=2)
        assert capsys.readouterr().err == "error: fastapi: not installed; run pip install 'jaxtune[serve]'\n"
    call("jobs", "list", code=2)
    assert "openai: not installed; run pip install 'jaxtune[serve]'" in capsys.readouterr().err


def test_help_waits_for_nothing_that_the_service_needs():
    heavy = {"fastapi", "uvicorn", "sqlalchemy", "openai", "jax"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, jaxtune.cli; print({heavy} & set(sys.modules))"], check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "set()\n"
