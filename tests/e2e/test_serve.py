"""A service as its user meets it: README's lines, the verbs, and processes that are killed while a job runs."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

import openai

from tests.test_cli import call

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = 24  # of the sample's 450: four passes of twelve steps
PATIENCE_S = 240


class Service:
    """`jaxtune serve --demo` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.port = folder, folder / "jaxtune-data", "0"
        self.start()

    def start(self) -> None:
        said = self.folder / "said"
        with said.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jaxtune", "serve", "--demo", "--port", self.port],
                cwd=self.folder, stdout=out, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(README.parent)},
            )  # fmt: skip
        found = until(lambda: re.search(r"base_url +(\S+:(\d+)/v1)", said.read_text()), self)
        self.url, self.port = found[1], found[2]

    def worker(self, job: str) -> int:
        """The process that works on a job, by its lease."""
        with contextlib.closing(sqlite3.connect(self.data / "jaxtune.db")) as db:
            ((owner,),) = db.execute("select owner from leases where job_id = ?", (job,)).fetchall()
        return int(owner.split(":")[1])

    def wait_no_lease(self) -> None:
        """As if the half a minute had gone by after which a silent worker's jobs are another's."""
        with contextlib.closing(sqlite3.connect(self.data / "jaxtune.db", timeout=30)) as db, db:
            db.execute("update leases set heartbeat = 0")


def until(what, service, client=None):
    """What a function gives, once it gives something."""
    end = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < end, (service.folder / "said").read_text()
        assert service.process.poll() is None, (service.folder / "said").read_text()
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    made = Service(tmp_path_factory.mktemp("serve"))
    sample = made.data / "demo" / "train.jsonl"
    sample.write_text("".join(sample.read_text().splitlines(keepends=True)[:EXAMPLES]))
    yield made
    made.process.kill()
    made.process.wait()


@pytest.fixture
def client(service):
    with openai.OpenAI(base_url=service.url, api_key="none") as made:
        yield made


def training(client):
    """The job that trains and has told of steps."""
    for job in client.fine_tuning.jobs.list(limit=1).data:
        if job.status == "running" and steps(client, job.id):
            return job.id
    return None


def steps(client, job):
    """The steps that a job's events tell, in their order."""
    events = client.fine_tuning.jobs.list_events(job, limit=100)
    return [e.data["step"] for e in events if e.type == "metrics" and e.data.get("train_loss") is not None][::-1]


def test_the_lines_of_the_readme_run_as_they_stand_though_the_worker_is_killed(service, client):
    (code,) = re.findall(r"```python\n(import time\nfrom openai.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) == 10
    code = code.replace("127.0.0.1:8000", f"127.0.0.1:{service.port}")
    lines = subprocess.Popen(
        [sys.executable, "-W", "ignore::ResourceWarning", "-c", code], cwd=service.folder, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        job = until(lambda: training(client), service)
        os.kill(service.worker(job), signal.SIGKILL)
        service.wait_no_lease()
        said, _ = lines.communicate(timeout=PATIENCE_S)
    finally:
        lines.kill()
        lines.wait()
    assert lines.returncode == 0
    assert said.strip()
    done = client.fine_tuning.jobs.retrieve(job)
    assert (done.status, done.fine_tuned_model.split(":")[:4]) == ("succeeded", ["ft", "demo", "local", "animals"])
    total = max(steps(client, job))
    assert steps(client, job) == list(range(1, total + 1))  # each told once, none left out
    assert "is started again" in (service.folder / "said").read_text()


def test_a_job_is_followed_over_the_end_of_its_service(service, client):
    command = [sys.executable, "-m", "jaxtune", "jobs", "create", "jaxtune-data/demo/train.jsonl", "--model", "demo"]
    command += ["--epochs", "3", "--suffix", "Two", "--yes", "--base-url", service.url, "rank=4"]
    environment = {**os.environ, "PYTHONPATH": str(README.parent)}
    followed = subprocess.Popen(
        command, cwd=service.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        job = until(lambda: training(client), service)
        service.process.kill()  # its worker notices, saves, and leaves
        service.process.wait()
        service.start()
        said, _ = followed.communicate(timeout=PATIENCE_S)
    finally:
        followed.kill()
        followed.wait()
    assert followed.returncode == 0, said
    assert said.count("the connection broke") >= 1
    told = [int(n) for n in re.findall(r"Step (\d+)/36: training loss", said)]
    assert told == list(range(1, 37))
    assert said.count("The job has successfully completed") == 1
    name = client.fine_tuning.jobs.retrieve(job).fine_tuned_model
    assert f"model: {name}" in said


def test_what_a_job_left_is_called_listed_read_and_deleted(service, client, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_BASE_URL", service.url)
    (job,) = [j for j in client.fine_tuning.jobs.list() if j.user_provided_suffix == "Two"]
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [c.step_number for c in checkpoints] == [36, 24, 12]
    question = [{"role": "user", "content": "What does the heron eat?"}]
    for model in (job.fine_tuned_model, checkpoints[-1].fine_tuned_model_checkpoint):
        answer = client.chat.completions.create(model=model, messages=question, max_tokens=8, temperature=0)
        assert answer.choices[0].message.content
    call("jobs", "list")
    call("jobs", "events", job.id)
    call("jobs", "checkpoints", job.id)
    out = capsys.readouterr().out
    assert all(text in out for text in (job.id, "succeeded", "Checkpoint created at step 36", ":ckpt-step-12"))
    call("jobs", "results", job.id, "--out", tmp_path / "r.csv")
    lines = (tmp_path / "r.csv").read_text().splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert len(lines) == 37
    call("models", "delete", job.fine_tuned_model, "--yes")
    call("files", "delete", job.result_files[0])
    call("models", "show", job.fine_tuned_model, code=2)
    call("jobs", "cancel", job.id, code=2)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model=job.fine_tuned_model, messages=question)


def test_ctrl_c_ends_the_service_and_another_address_wants_a_key(service, capsys, monkeypatch):
    service.process.send_signal(signal.SIGINT)
    assert service.process.wait(PATIENCE_S) == 0
    monkeypatch.chdir(service.folder)
    call("serve", "--demo", "--host", "0.0.0.0", code=2)
    assert "make one first: jaxtune keys add NAME" in capsys.readouterr().err
    call("keys", "add", "me", "--project", "birds")
    out = capsys.readouterr().out
    assert re.search(r"key +sk-jaxtune-\w{12}-\w{40}\n", out)
    call("keys", "list")
    listed = capsys.readouterr().out
    assert "birds" in listed
    assert "sk-jaxtune" not in listed
    (key_id,) = re.findall(r"^key_\w+", listed, re.MULTILINE)
    call("keys", "revoke", key_id)
    call("serve", "--demo", "--host", "0.0.0.0", code=2)
