"""What a service is started with, and the worker beside it."""

import logging
import os
import sys
import time

import pytest

from jaxtune.errors import UserError
from jaxtune.serve import starting
from jaxtune.serve.settings import Settings
from jaxtune.serve.worker.beside import Beside


def test_settings_come_from_a_file_values_and_options_later_ones_first(tmp_path):
    (tmp_path / "serve.yaml").write_text("models: base\ndata: /d\nport: 1\nlimits: {jobs: 3, parts: 4}\n")
    s = starting.read_settings(tmp_path / "serve.yaml", {"port": 2, "limits": {"jobs": 5}}, {"port": 3})
    assert (s.models, str(s.data), s.port) == (tmp_path / "base", "/d", 3)
    assert (s.limits.jobs, s.limits.parts) == (5, 4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prot": 1}, "settings: unknown key prot; did you mean 'port'?"),
        ({"limits": {"epoch": 1}}, "settings: unknown key limits.epoch; did you mean 'epochs'?"),
        ({"limits": None}, "settings: limits: input should be a valid dictionary"),
        ({"port": 70000}, "settings: port: input should be less than or equal to 65535, got 70000"),
        ({"organization": "A B"}, "got 'A B'"),
    ],
)
def test_settings_that_do_not_fit_are_named(given, said):
    with pytest.raises(UserError) as e:
        starting.read_settings(None, {"models": "m", "data": "d"}, given)
    assert said in str(e.value)


def test_a_service_wants_its_folders_and_a_demo_has_its_own(tmp_path):
    with pytest.raises(UserError, match="models is missing; give --models DIR"):
        starting.read_settings(None, {"data": "d"})
    s = starting.read_settings(None, {"demo": True, "data": tmp_path})
    assert s.models == tmp_path / "models"
    with pytest.raises(UserError, match="no such folder; name the folder that your base models lie in"):
        starting.serve(Settings(models=tmp_path / "nowhere", data=tmp_path), print)


@pytest.mark.parametrize("given", [{"host": "0.0.0.0"}, {"hosts": ["tune.example"]}])
def test_a_service_that_others_reach_wants_a_key_first(tmp_path, given):
    with pytest.raises(UserError, match="others are to reach the service, and there is no key; .*jaxtune keys add"):
        starting.serve(Settings(models=tmp_path, data=tmp_path, **given), print)


def test_an_address_that_is_taken_is_said(tmp_path):
    taken = starting._listen(Settings(models=tmp_path, data=tmp_path, port=0))
    port = taken.getsockname()[1]
    with taken, pytest.raises(UserError, match=rf"127.0.0.1:{port}: cannot be listened on .*choose another --port"):
        starting._listen(Settings(models=tmp_path, data=tmp_path, port=port))


def test_what_stands_after_a_question_mark_is_not_logged():
    args = ("127.0.0.1:1", "GET", "/v1/files?key=sk-secret", "1.1", 200)
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', args, None)
    assert starting._NoQuery().filter(record)
    assert record.getMessage() == '127.0.0.1:1 - "GET /v1/files HTTP/1.1" 200'


# A worker: notes its settings' port, dies at its first start, then works until its input ends or it is told to stop.
WORKER = """
import os, signal, sys
from jaxtune.serve.settings import Settings
s = Settings.model_validate_json(sys.stdin.readline())
notes = s.data / "notes"
with notes.open("a") as f:
    f.write(f"{os.getpid()} {s.port}\\n")
if len(notes.read_text().splitlines()) == 1:
    sys.exit(3)
def told(*_):
    (s.data / "saved").write_text("told")
    sys.exit(0)
signal.signal(signal.SIGTERM, told)
sys.stdin.read()
(s.data / "saved").write_text("left alone")
"""


def until(what):
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def notes(folder):
    file = folder / "notes"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def test_a_worker_that_dies_is_started_again_and_saves_when_the_service_stops(tmp_path, capsys):
    worker = Beside(Settings(models=tmp_path, data=tmp_path, port=7), [sys.executable, "-c", WORKER])
    worker.start()
    until(lambda: len(notes(tmp_path)) == 2)
    worker.join()
    assert [port for _, port in notes(tmp_path)] == ["7", "7"]
    assert "the worker ended with 3; it is started again" in capsys.readouterr().err
    assert not os.path.exists(f"/proc/{notes(tmp_path)[1][0]}")
    worker.join()  # twice is as once


def test_a_worker_notices_that_its_service_is_gone(tmp_path):
    (tmp_path / "notes").write_text("0 0\n")
    script = (
        "import os, sys, time; from pathlib import Path; from jaxtune.serve.worker.beside import Beside;"
        "from jaxtune.serve.settings import Settings; d = Path(sys.argv[1]);"
        "Beside(Settings(models=d, data=d), [sys.executable, '-c', sys.argv[2]]).start()\n"
        "while len((d / 'notes').read_text().splitlines()) < 2: time.sleep(0.05)\n"
        "os.kill(os.getpid(), 9)"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script, str(tmp_path), WORKER]) == -9
    until(lambda: (tmp_path / "saved").exists() and (tmp_path / "saved").read_text() == "left alone")
