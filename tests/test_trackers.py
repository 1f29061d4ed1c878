"""Trackers: what they get, that a run goes on in them without a line twice, that their troubles are theirs alone."""

import importlib.machinery
import json
import os
import sys
import types

import pytest

from jaxtune import config, log, overview, run, trackers
from jaxtune.errors import Interrupted, UserError
from tests.tiny import make_config


class Fake:
    """Stands for the package trackio, whose functions it has: init gives a run with log and finish."""

    def __init__(self):
        self.inits, self.lines, self.ends, self.fail = [], [], 0, None

    def init(self, project, name=None, group=None, config=None, resume="never", **others):
        assert others == {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        self.inits.append(types.SimpleNamespace(project=project, name=name, group=group, config=config, resume=resume))
        return self

    def log(self, metrics, step=None):
        if self.fail:
            raise self.fail
        self.lines.append((step, metrics))

    def finish(self):
        self.ends += 1


@pytest.fixture
def fake(monkeypatch):
    fake = Fake()
    module = types.ModuleType("trackio")
    module.__spec__ = importlib.machinery.ModuleSpec("trackio", None, origin="here")
    module.init = lambda *given, **named: fake.init(*given, **named)
    monkeypatch.setitem(sys.modules, "trackio", module)
    return fake


def made(tmp_path, *to, **keys):
    return config.load(None, config.nested({"output": str(tmp_path), "track": {"to": list(to), **keys}}))


def lines(folder, n, values):
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": n, "total_steps": 9, **values}) + "\n")


def told(c, folder, start, values):
    """A run from `start` on, with a line of metrics.jsonl and of the trackers for each of `values`."""
    with trackers.reporting(c, folder, start) as report:
        runlog = log.RunLog(folder, start, 9, also=report)
        for n, v in values:
            runlog.write(n, v)
        runlog.close()


def test_a_run_reports_its_lines_and_goes_on_after_a_stop(tiny, sums_file, tmp_path, fake, monkeypatch):
    track = {"to": ["trackio"], "project": "sums", "group": "all", "tags": ["x"]}
    c = make_config(
        tiny, sums_file, tmp_path / "r", track=track, data__validation=4, checkpoint__every=2, evaluate__every=2
    )
    stops = iter([False] * 3 + [True] * 9)
    monkeypatch.setattr(run, "_asked", lambda file: file.name == run.STOP and next(stops))
    with pytest.raises(Interrupted):
        run.train(c)
    monkeypatch.setattr(run, "_asked", lambda file: False)
    lines(tmp_path / "r", 5, {"loss": 1.0})  # as if more had been told than was saved
    out = run.train(c)
    first, again = fake.inits
    assert (first.project, first.group, first.resume) == ("sums", "all", "allow")
    assert first.name.startswith("r-")
    assert first.name == again.name
    assert first.config["tuning"]["method"] == "lora"
    assert first.config["tags"] == ["x"]
    assert fake.ends == 2
    entries = [(m["step"], log.scalars(m)) for m in log.read_metrics(out / "metrics.jsonl") if len(log.scalars(m))]
    seen = [(n, k) for n, values in fake.lines for k in values]
    assert len(seen) == len(set(seen))
    missing = {(n, k) for n, values in entries for k in values} - set(seen)
    assert missing == {(5, "train/loss")}  # which it was taken to have got
    assert [v["eval/loss"] for _, v in fake.lines if "eval/loss" in v] == pytest.approx(
        [m["eval_loss"] for m in log.read_metrics(out / "metrics.jsonl") if "eval_loss" in m]
    )


def test_what_one_kill_hid_the_next_does_not_send_again(tmp_path, fake):
    c = made(tmp_path, "trackio")
    told(c, tmp_path, 0, [(1, {"loss": 1.0}), (2, {"loss": 2.0}), (2, {"eval_loss": 3.0}), (3, {"loss": 4.0})])
    told(c, tmp_path, 1, [(2, {"loss": 2.0})])  # from an early checkpoint, and not far
    told(c, tmp_path, 1, [(3, {"loss": 4.0}), (3, {"eval_loss": 5.0}), (4, {"loss": 6.0})])
    assert [(n, *v) for n, v in fake.lines] == [
        (1, "train/loss"), (2, "train/loss"), (2, "eval/loss"), (3, "train/loss"), (3, "eval/loss"), (4, "train/loss"),
    ]  # fmt: skip


def test_a_tracker_that_comes_later_gets_what_was_before(tmp_path, fake):
    lines(tmp_path, 1, {"loss": 1.0, "seconds": {"input": 2.0}})
    lines(tmp_path, 2, {"loss": 0.5})
    told(made(tmp_path, "trackio"), tmp_path, 1, [(2, {"loss": 0.5})])
    assert fake.lines == [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})]


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(tmp_path, fake, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")
    fake.fail = ConnectionError("no route to http://me:pass@host for s3cret")
    told(made(tmp_path, "trackio"), tmp_path, 0, [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    said = capsys.readouterr().err
    assert said.count("trackio: a line is not sent (ConnectionError: no route to http://…@host for …)") == 1
    assert fake.ends == 1


def test_a_tracker_that_hangs_ends_nothing(tmp_path, fake, capsys, monkeypatch):
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.05)
    waiting = trackers.threading.Event()
    fake.log = lambda metrics, step: waiting.wait(30)
    told(made(tmp_path, "trackio"), tmp_path, 0, [(1, {"loss": 1.0})])
    waiting.set()
    assert "trackio: the last lines are not sent yet" in capsys.readouterr().err


def test_a_tracker_that_does_not_begin_ends_a_new_run_only(tmp_path, fake, capsys):
    def refuse(*given, **named):
        raise ValueError("nobody is signed in")

    fake.init = refuse
    with pytest.raises(UserError, match=r"trackio does not begin \(ValueError: nobody is signed in\); look at TRACKIO"):
        told(made(tmp_path, "trackio"), tmp_path, 0, [])
    told(made(tmp_path, "trackio"), tmp_path, 3, [(4, {"loss": 1.0})])
    assert "trackio: does not go on (ValueError: nobody is signed in)" in capsys.readouterr().err


def test_passwords_stay_here(tmp_path, fake):
    c = made(tmp_path, "trackio").model_copy(update={"model": "https://me:pass@host/model"})
    told(c, tmp_path, 0, [])
    assert fake.inits[0].config["model"] == "https://…@host/model"


def test_other_processes_and_other_runs_report_nothing(tmp_path, fake, monkeypatch):
    told(made(tmp_path), tmp_path, 0, [(1, {"loss": 1.0})])
    monkeypatch.setattr(log, "_HUSHED", True)
    told(made(tmp_path, "trackio"), tmp_path, 0, [(1, {"loss": 1.0})])
    assert not fake.inits
    assert not (tmp_path / trackers.FILE).exists()


@pytest.mark.parametrize("found", [None, importlib.machinery.ModuleSpec("wandb", None)])  # the latter of a folder
def test_a_package_that_is_missing_is_said_before_anything_is_read(tmp_path, monkeypatch, found):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: found)
    for verb in (run.train, overview.validate):
        with pytest.raises(UserError, match=r"track.to: wandb is not installed; pip install 'jaxtune\[wandb\]'"):
            verb(made(tmp_path / "no", "wandb").model_copy(update={"model": "there/is-none"}))
    assert not (tmp_path / "no").exists()


def test_weights_and_biases_writes_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "s3cret" * 7)
    c = made(tmp_path, "wandb", project="sums", group="g")
    told(c, tmp_path, 0, [(1, {"loss": 1.0}), (2, {"loss": 2.0}), (2, {"eval_loss": 3.0})])
    [file] = tmp_path.rglob("*.wandb")
    data, at, seen, about = file.read_bytes(), 7, {}, None
    while at < len(data):  # checksum, length, kind; as LevelDB's logs
        size = int.from_bytes(data[at + 4 : at + 6], "little")
        (record := Record()).ParseFromString(data[at + 7 : (at := at + 7 + size)])
        if record.WhichOneof("record_type") == "history":
            row = {i.nested_key[0] if i.nested_key else i.key: json.loads(i.value_json) for i in record.history.item}
            seen.setdefault(row["_step"], {}).update({k: v for k, v in row.items() if "/" in k})
        about = record.run if record.WhichOneof("record_type") == "run" else about
    assert seen == {1: {"train/loss": 1.0}, 2: {"train/loss": 2.0, "eval/loss": 3.0}}
    assert (about.project, about.run_group, about.display_name) == ("sums", "g", tmp_path.name)
    assert about.run_id == json.loads((tmp_path / trackers.FILE).read_text())["wandb"]["id"]
    for f in tmp_path.rglob("*"):
        assert not f.is_file() or b"s3cret" not in f.read_bytes()


def test_mlflow_has_one_run_of_two_parts(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    c = made(tmp_path, "mlflow", project="sums", tags=["x"])
    with pytest.raises(Interrupted), trackers.reporting(c, tmp_path, 0) as report:
        lines(tmp_path, 1, {"loss": 1.0})
        report(1, {"train/loss": 1.0})
        raise Interrupted
    told(c, tmp_path, 1, [(1, {"loss": 1.0}), (2, {"loss": 0.5})])
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    [found] = client.search_runs([client.get_experiment_by_name("sums").experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "train/loss")] == [(1, 1), (2, 0.5)]
    assert found.info.status == "FINISHED"
    assert found.data.params["train.batch_size"] == "32"
    assert found.data.tags["x"] == "true"
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
