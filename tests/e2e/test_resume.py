"""Killed, told to stop, or starved: a run goes on where it stood, bit by bit."""

import signal

import pytest

from jaxtune import log, run
from jaxtune.errors import Interrupted, UserError
from tests.processes import ended, start
from tests.tiny import make_config

LORA = {"method": "lora", "dropout": 0.1, "rank": 2}
FREEZE = {"method": "freeze", "last": 1}

DIES = """
import os, signal, sys
from pathlib import Path
from jaxtune import log, run
from tests.tiny import make_config
step = log.RunLog.step
def dying(self, n, *rest):
    step(self, n, *rest)
    if n == int(sys.argv[4]):
        os.kill(os.getpid(), getattr(signal, sys.argv[5]))
log.RunLog.step = dying
from tests.e2e.test_resume import settings
model, data, out = (Path(a) for a in sys.argv[1:4])
try:
    run.train(make_config(model, data, out, **settings(sys.argv[6])))
except run.Interrupted:
    sys.exit(75)
"""


def settings(method):
    return {
        "tuning": LORA if method == "lora" else FREEZE, "train__steps": 20, "checkpoint__every": 7,
        "data__validation": 8, "evaluate__every": 5, "train__accumulation": 2,
    }  # fmt: skip


def losses(folder):
    return {m["step"]: m["loss"] for m in log.read_metrics(folder / "metrics.jsonl") if "loss" in m}


def weights(folder):
    return {f.name: f.read_bytes() for f in sorted((folder / "export").glob("*.safetensors"))}


def dies(tiny, sums_file, out, at, signal_name, method="lora"):
    [done] = ended(start(DIES, 1, 1, tiny, sums_file, out, at, signal_name, method))
    return done.code


@pytest.fixture(scope="module")
def straights(tiny, sums_file, tmp_path_factory):
    """Runs that nobody stopped."""
    out = tmp_path_factory.mktemp("straight")
    return {m: run.train(make_config(tiny, sums_file, out / m, **settings(m))) for m in ("lora", "freeze")}


@pytest.mark.parametrize("method", ["lora", "freeze"])
def test_killed_at_ten_it_ends_as_if_it_had_not_been(tiny, sums_file, tmp_path, straights, method):
    straight = straights[method]
    assert dies(tiny, sums_file, tmp_path / "b", 10, "SIGKILL", method) == -signal.SIGKILL
    assert max(losses(tmp_path / "b")) == 10
    assert not (tmp_path / "b" / "export").exists()
    resumed = run.train(make_config(tiny, sums_file, tmp_path / "b", **settings(method)))
    assert losses(resumed) == losses(straight)
    assert weights(resumed) == weights(straight)
    assert len(weights(straight)) == 1


def test_told_to_stop_it_saves_and_says_so(tiny, sums_file, tmp_path, straights):
    assert dies(tiny, sums_file, tmp_path / "b", 4, "SIGTERM") == 75
    stood = max(losses(tmp_path / "b"))
    assert 4 <= stood <= 6
    assert (tmp_path / "b" / "checkpoints" / str(stood)).exists()
    resumed = run.train(make_config(tiny, sums_file, tmp_path / "b", **settings("lora")))
    assert losses(resumed) == losses(straights["lora"])
    assert weights(resumed) == weights(straights["lora"])


def test_a_finished_run_is_left_alone_and_another_is_refused(tiny, sums_file, tmp_path, capsys):
    c = make_config(tiny, sums_file, tmp_path / "r", tuning=LORA)
    run.train(c)
    before = weights(tmp_path / "r")
    run.train(c)
    assert "finished already at step 6" in capsys.readouterr().out
    assert weights(tmp_path / "r") == before
    with pytest.raises(UserError, match=r"the run there differs in .*optim.name \(adamw there, lion now\)"):
        run.train(make_config(tiny, sums_file, tmp_path / "r", tuning=LORA, optim__name="lion"))
    with pytest.raises(UserError, match="checkpoint.resume=never"):
        run.train(make_config(tiny, sums_file, tmp_path / "r", tuning=LORA, checkpoint__resume="never"))


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tiny, sums_file, tmp_path):
    c = make_config(
        tiny, sums_file, tmp_path / "r", tuning={"method": "full"}, train__steps=30, checkpoint__every=2,
        optim__learning_rate=1e30, optim__warmup=0, optim__schedule="constant", optim__clip=0, optim__name="sgd",
    )  # fmt: skip
    with pytest.raises(
        UserError, match=r"step \d+: loss \S+, gradient norm \S+ on rows .*sums.jsonl:\d+.*last checkpoint is kept"
    ):
        run.train(c)
    assert not (tmp_path / "r" / "export").exists()


def test_interrupted_is_no_error():
    assert not issubclass(Interrupted, UserError)
    assert run.Interrupted is Interrupted


def test_a_folder_is_one_process_own(tiny, sums_file, tmp_path):
    import fcntl

    c = make_config(tiny, sums_file, tmp_path / "r", tuning=LORA)
    (tmp_path / "r").mkdir()
    with (tmp_path / "r" / ".lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training there"):
            run.train(c)
    assert run.train(c) == tmp_path / "r"


def test_a_run_on_a_nearly_full_disk_goes_on_in_the_room_that_it_has(tiny, sums_file, tmp_path, monkeypatch):
    from jaxtune import job, overview

    c = make_config(tiny, sums_file, tmp_path / "r", tuning=LORA, checkpoint__every=1)
    run.train(c)
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("Usage", (), {"free": 0}))
    need, there = overview.check_disk(job.prepare(c))
    assert 0 < need <= there
    with pytest.raises(UserError, match="0 B are free; make room"):
        run.train(make_config(tiny, sums_file, tmp_path / "new", tuning=LORA))
