"""A worker over processes that look like training, and over training itself, killed on its way."""

import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import select

from jaxtune.serve.redaction import redacted
from jaxtune.serve.store import states
from jaxtune.serve.store.tables import Checkpoint, File, Model
from jaxtune.serve.worker import running, validating
from jaxtune.serve.worker.child import TRAIN, Child, environment
from jaxtune.serve.worker.worker import Pace, Worker
from tests.serve.fake_train import STEPS
from tests.serve.places import Place, questions, until
from tests.serve.postgres import postgres, postgres_server  # noqa: F401  (fixtures)

FAKE = (sys.executable, str(Path(__file__).parents[1] / "fake_train.py"))
QUICK = Pace(look=0.05, beat=0.5, expires=20, grace=5, again=0.01, save=0)


class Working:
    """A worker in a thread."""

    def __init__(self, place: Place, *command: str, pace: Pace = QUICK, **limits: object) -> None:
        s = place.settings
        if limits:
            s = s.model_copy(update={"limits": s.limits.model_copy(update=limits)})
        self.worker = Worker(s, place.database, place.storage, pace=pace, command=command)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.worker.run, args=(self.stop,))

    def __enter__(self) -> "Working":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


@pytest.fixture
def place(tmp_path):
    made = Place(tmp_path)
    yield made
    made.database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def either(request, tmp_path):
    made = Place(tmp_path, request.getfixturevalue("postgres") if request.param == "postgresql" else None)
    yield made
    made.database.close()


def _status(place: Place, job_id: str) -> str:
    return place.job(job_id).status


def _steps(place: Place, job_id: str) -> list[int]:
    return [e.data["step"] for e in place.events(job_id) if e.type == "metrics"]


def test_a_job_goes_from_its_files_to_a_model(either) -> None:
    file, held = either.add_file(questions(40)), either.add_file(questions(3))
    job_id = either.add_job(file, held, suffix="My bot")
    with Working(either, *FAKE, "0.01"):
        until(lambda: _status(either, job_id) == states.SUCCEEDED)
    job, told = either.job(job_id), either.told(job_id)
    assert [m for m in told if not m.startswith("Step")] == [
        f"Created fine-tuning job: {job_id}",
        f"Validating training file: {file} and validation file: {held}",
        "3 of 40 examples are in the validation file too, so its loss will look too good",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        *[f"Checkpoint created at step {n}" for n in (4, 8, 12)],
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    at = told.index("Step 12/12: training loss=0.08, full validation loss=1.00")
    assert told[at + 1] == "Checkpoint created at step 12"
    assert _steps(either, job_id) == list(range(STEPS + 1))
    assert job.hyperparameters == {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.0}
    assert job.fine_tuned_model.startswith("ft:demo:local:my-bot:")
    assert job.error is None
    assert job.trained_tokens == job.progress["tokens"]
    assert job.progress["total_steps"] == STEPS
    assert job.started_at <= job.finished_at
    assert job.estimated_finish is None
    with either.database.read() as session:
        [result] = session.scalars(select(File).where(File.purpose == "fine-tune-results"))
        models = {m.id: m for m in session.scalars(select(Model))}
        checkpoints = session.scalars(select(Checkpoint).order_by(Checkpoint.step_number)).all()
    assert job.result_files == [result.id]
    lines = either.storage.file(result.id).read_text().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert lines[1] == "1,1.0,0.5,,"
    assert lines[4] == "4,0.25,0.5,1.0,0.5"
    assert len(lines) == STEPS + 1
    assert [c.model for c in checkpoints] == [f"{job.fine_tuned_model}:ckpt-step-{n}" for n in (4, 8, 12)]
    assert checkpoints[0].metrics["full_valid_loss"] == 1.0
    assert set(models) == {job.fine_tuned_model, *[c.model for c in checkpoints]}
    assert models[job.fine_tuned_model].folder == f"jobs/{job_id}/run/export"
    assert {(m.kind, m.base) for m in models.values()} == {("adapter", "demo")}
    assert (either.storage.job(job_id) / "validation.json").is_file()


def test_a_bad_file_fails_its_job_while_another_trains(place) -> None:
    bad = place.add_file(questions(3))
    good = place.add_job(place.add_file(questions(12)))
    with Working(place, *FAKE, "0.2"):
        until(lambda: _status(place, good) == states.RUNNING)
        jobs = [place.add_job(bad), place.add_job("file-" + "x" * 24), place.add_job(bad, model="nobody")]
        until(lambda: all(_status(place, j) == states.FAILED for j in jobs))
        assert _status(place, good) == states.RUNNING
        errors = [place.job(j).error for j in jobs]
    assert (errors[0]["code"], errors[0]["param"]) == ("invalid_n_examples", "training_file")
    assert errors[1]["message"] == f"No such File object: file-{'x' * 24}"
    assert errors[2]["message"].startswith("model nobody: is not there any more")
    assert _status(place, good) == states.QUEUED  # the worker stopped, and what trained is saved
    assert place.told(good)[-1] == "The worker stops; the job is saved, and goes on when one is there"


def test_a_job_is_paused_resumed_and_cancelled(place) -> None:
    job_id = place.add_job(place.add_file(questions(12)))
    with Working(place, *FAKE, "0.15"):
        until(lambda: 2 in _steps(place, job_id))
        place.move(job_id, states.PAUSED)
        saved = place.storage.job(job_id) / "run" / "saved"
        until(lambda: saved.exists() and (at := int(saved.read_text())) and _steps(place, job_id)[-1] == at)
        assert _steps(place, job_id)[-1] < STEPS
        assert place.job(job_id).estimated_finish is None
        place.move(job_id, states.QUEUED)
        until(lambda: _steps(place, job_id)[-1] > int(saved.read_text()))
        place.move(job_id, states.CANCELLED)
        other = place.add_job(place.add_file(questions(12)))
        until(lambda: _status(place, other) == states.RUNNING)  # the worker is free again
        place.move(other, states.CANCELLED)
    told = place.told(job_id)
    assert any(m.startswith("Fine-tuning job goes on after step") for m in told)
    assert _steps(place, job_id) == list(range(len(_steps(place, job_id))))
    assert _status(place, job_id) == "cancelled"


def test_characters_that_postgresql_does_not_take_are_told_all_the_same(either) -> None:
    rows = questions(12)
    rows[3]["messages"][0]["a\0b"] = "c"
    job_id = either.add_job(either.add_file(rows))
    with Working(either, *FAKE, "0"):
        until(lambda: _status(either, job_id) == states.FAILED)
    assert "messages[0].a\\0b: is no key" in either.told(job_id)[-1]


def test_what_nobody_foresaw_ends_no_thread(place, monkeypatch, capsys) -> None:
    begin, raised = running._begin, []

    def begins(*given) -> None:
        if not raised:
            raised.append(1)
            raise ZeroDivisionError("nobody thought of it")
        begin(*given)

    monkeypatch.setattr(running, "_begin", begins)
    job_id = place.add_job(place.add_file(questions(12)))
    with Working(place, *FAKE, "0"):
        until(lambda: _status(place, job_id) == states.SUCCEEDED)
    assert "nobody thought of it" in capsys.readouterr().err


def test_files_over_which_workers_died_are_looked_at_no_more(place) -> None:
    job_id = place.add_job(place.add_file(questions(12)))
    with place.database.write() as session:
        states.locked(session, job_id).progress = {"looks": validating.LOOKS}
    with Working(place, *FAKE, "0"):
        until(lambda: _status(place, job_id) == states.FAILED)
    assert place.told(job_id)[-1] == "The worker ended 4 times while it looked through the files"


def test_a_process_of_another_machine_is_asked_to_leave_first(place) -> None:
    job_id = place.add_job(place.add_file(questions(12)))
    run = place.storage.job(job_id) / "run"
    run.mkdir(parents=True)
    with (run / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with Working(place, *FAKE, "0"):
            until((run / "STOP").exists)
            assert not (run / "metrics.jsonl").exists()
            fcntl.flock(other, fcntl.LOCK_UN)
            until(lambda: _status(place, job_id) == states.SUCCEEDED)
    assert not [m for m in place.told(job_id) if "taken up again" in m]


def test_what_training_says_of_a_mistake_is_the_jobs_error(place) -> None:
    job_id = place.add_job(place.add_file(questions(12)))
    with Working(place, *FAKE, "0", "error: /srv/data/jobs/x: no room; token hf_abcdefghijkl", "2"):
        until(lambda: _status(place, job_id) == states.FAILED)
    assert place.job(job_id).error == {
        "code": "training_failed",
        "message": "x: no room; token [secret]",
        "param": None,
    }


def test_a_run_that_breaks_down_is_taken_up_three_times(place) -> None:
    job_id = place.add_job(place.add_file(questions(12)))
    with Working(place, *FAKE, "0", "boom", "1"):
        until(lambda: _status(place, job_id) == states.FAILED)
    again = [m for m in place.told(job_id) if "is taken up again" in m]
    assert [m[-8:] for m in again] == ["(1 of 3)", "(2 of 3)", "(3 of 3)"]
    assert place.job(job_id).error["message"].startswith("Training ended unexpectedly (exit code 1); it was taken up")


def test_limits_of_time_and_tokens_fail_a_job(place) -> None:
    job_id = place.add_job(place.add_file(questions(12)))
    with Working(place, *FAKE, "0.2", job_seconds=0.3):
        until(lambda: _status(place, job_id) == states.FAILED)
    assert place.job(job_id).error["code"] == "time_limit"
    job_id = place.add_job(place.add_file(questions(12)))
    with Working(place, *FAKE, "0.2", trained_tokens=100):
        until(lambda: _status(place, job_id) == states.FAILED)
    assert place.job(job_id).error["code"] == "too_many_tokens"


def test_a_worker_that_lost_its_lease_ends_what_trains_and_writes_nothing_more(place) -> None:
    job_id = place.add_job(place.add_file(questions(12)))
    with Working(place, *FAKE, "0.2", pace=dataclasses.replace(QUICK, beat=0.05)) as working:
        until(lambda: 1 in _steps(place, job_id))
        [held] = working.worker._all()
        with place.database.write() as session:
            from jaxtune.serve.store.tables import Lease

            lease = session.get(Lease, job_id)
            lease.owner, lease.fence, lease.heartbeat = "another", lease.fence + 1, lease.heartbeat + 1000
        until(lambda: held.child.poll() is not None)
        told = place.told(job_id)
    assert held.lost.is_set()
    assert place.told(job_id) == told
    assert _status(place, job_id) == states.RUNNING


def test_training_sees_no_secrets_and_no_database(monkeypatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "DATABASE_URL", "JAX_SECRET", "PGPASSWORD"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("XLA_FLAGS", "--y")
    seen = environment()
    assert seen["XLA_FLAGS"] == "--y"
    assert "x" not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == "1"


def test_training_ends_with_its_worker(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text(f"output: {tmp_path / 'run'}")
    script = (
        "import sys, time; from pathlib import Path; from jaxtune.serve.worker.child import Child; "
        "Child(Path(sys.argv[1]), Path(sys.argv[1], 'c.yaml'), sys.argv[2:]); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), *FAKE, "0.05"])
    try:
        until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    until(lambda: (tmp_path / "run" / "saved").exists())  # SIGTERM came, and it saved


def test_a_process_that_does_not_listen_is_killed(tmp_path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(99)"
    (tmp_path / "run").mkdir()
    child = Child(tmp_path, tmp_path / "c", (sys.executable, "-c", deaf))
    until(lambda: child.last_line() == "on")
    child.ask()
    child.terminate()
    assert child.poll() is None
    child.kill()
    assert child.poll() == -signal.SIGKILL


def test_two_workers_share_the_jobs_of_one_database(tmp_path, postgres) -> None:  # noqa: F811
    place = Place(tmp_path, postgres)
    file = place.add_file(questions(12))
    jobs = [place.add_job(file) for _ in range(4)]
    with Working(place, *FAKE, "0.1") as one, Working(place, *FAKE, "0.1") as other:
        until(lambda: {len(one.worker._all()) > 0, len(other.worker._all()) > 0} == {True})
        until(lambda: all(_status(place, j) == states.SUCCEEDED for j in jobs))
    for job_id in jobs:
        assert _steps(place, job_id) == list(range(STEPS + 1))
        assert max(Counter(place.told(job_id)).values()) == 1
    place.database.close()


def test_paths_and_secrets_are_not_told() -> None:
    assert redacted("/a/b/c.yaml: 3/4 of and/or in https://x.org/y/z") == "c.yaml: 3/4 of and/or in https://x.org/y/z"
    assert redacted("postgresql://me:pw@host/db") == "postgresql://[secret]@host/db"


_WORKER = """
import sys, threading
from pathlib import Path
from jaxtune.serve.store.database import Database
from jaxtune.serve.settings import Settings
from jaxtune.serve.store.storage import Storage
from jaxtune.serve.worker.worker import Pace, Worker
s = Settings(models=Path(sys.argv[1]), data=Path(sys.argv[2]), demo=True)
pace = Pace(look=0.1, beat=0.3, expires=3, again=0.1)
Worker(s, Database(s.database_url), Storage(s.data), pace=pace).run(threading.Event())
"""


def test_training_is_taken_up_again_after_kills_and_ends_whole(place) -> None:
    """The demo model, `jaxtune train` itself: worker and training are killed at once, then the job is paused."""
    held = place.add_file(questions(4))
    job_id = place.add_job(place.add_file(questions(40)), held, hyperparameters={"n_epochs": 4, "batch_size": 1})
    folder = place.storage.job(job_id)

    def step() -> int:
        return max(_steps(place, job_id), default=-1)

    given = [sys.executable, "-c", _WORKER, str(place.settings.models), str(place.settings.data)]
    process = subprocess.Popen(given, stdout=subprocess.DEVNULL)
    try:
        until(lambda: step() >= 45, 120)
        [training] = _children(process.pid)
        process.kill()
        os.killpg(training, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    with Working(place, *TRAIN, pace=Pace(look=0.1, beat=0.3, expires=3)):
        until(lambda: any("worker of this job is gone" in m for m in place.told(job_id)), 60)
        at = step()
        until(lambda: step() > at + 10, 120)
        place.move(job_id, states.PAUSED, "paused")
        until(lambda: not _children(os.getpid()), 60)
        assert "saved; run the same command again" in (folder / "log.txt").read_text().splitlines()[-1]
        place.move(job_id, states.QUEUED, "resumed")
        until(lambda: _status(place, job_id) in states.FINAL, 120)
        until(lambda: not (folder / "run" / running.CHECKPOINTS).exists())
    job, told = place.job(job_id), place.told(job_id)
    assert job.status == states.SUCCEEDED, job.error
    assert _steps(place, job_id) == list(range(161))
    assert job.progress["step"] == 160
    assert [m for m, n in Counter(told).items() if n > 1] == []
    with place.database.read() as session:
        models = session.scalars(select(Model).where(Model.job_id == job_id)).all()
    assert sorted(m.step or 0 for m in models) == [0, 80, 120, 160]
    assert all((place.storage.model(m) / "adapter_model.safetensors").is_file() for m in models)
    assert len(place.storage.file(job.result_files[0]).read_text().splitlines()) == 161


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(c) for f in found for c in f.read_text().split() if b"jaxtune\0train" in _command(int(c))]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
