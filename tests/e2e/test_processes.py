"""One run in several processes: the losses of one device, stopped together, gone on with by others, written once."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxtune import log, run
from jaxtune.errors import Interrupted
from tests.processes import TRAIN, ended, start, together
from tests.tiny import make_config

# Ten rows do not divide by four, nor do two rows of a micro-batch over four devices.
SETTINGS = {
    "tuning": {"method": "lora", "dropout": 0.1, "rank": 2}, "train__steps": 20, "train__accumulation": 2,
    "data__validation": 8, "evaluate__every": 10, "checkpoint__every": 8,
}  # fmt: skip
TERM = """
import os, signal
from jaxtune import distributed, log
step = log.RunLog.step
def dying(self, n, *rest):
    step(self, n, *rest)
    if n == 9 and distributed.index() == distributed.count() - 1:
        os.kill(os.getpid(), signal.SIGTERM)
log.RunLog.step = dying
"""


def metrics(folder, key):
    return {m["step"]: m[key] for m in log.read_metrics(folder / "metrics.jsonl") if key in m}


def same(folder, straight):
    for key in ("loss", "eval_loss"):
        got, want = metrics(folder, key), metrics(straight, key)
        assert got.keys() == want.keys()
        np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5)
    got, want = (load_file(f / "export" / "adapter_model.safetensors") for f in (folder, straight))
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-3, atol=1e-5)


def test_any_number_of_processes_gives_the_same_run(tiny, sums_file, tmp_path, monkeypatch):
    straight, two, one = (tmp_path / n for n in ("straight", "two", "one"))
    run.train(make_config(tiny, sums_file, straight, **SETTINGS))
    assert list(metrics(straight, "loss")) == list(range(1, 21))

    # two processes are told to stop by one of them, at the same step, and four go on
    stopped = ended(start(TERM + TRAIN, 2, 2, tiny, sums_file, two, json.dumps(SETTINGS)))
    assert [d.code for d in stopped] == [75, 75], stopped
    said = {re.search(r"stopped after step (\d+) and saved", d.stderr)[1] for d in stopped}
    assert said == {str(max(metrics(two, "loss")))}
    assert (two / "checkpoints" / said.pop()).is_dir()
    done = together(TRAIN, 4, 1, tiny, sums_file, two, json.dumps(SETTINGS))
    assert "exported to" in done[0].stdout
    assert not any("step" in d.stdout for d in done[1:])
    same(two, straight)

    # one is told to stop, and two go on
    step = log.RunLog.step

    def dying(self, n, *rest):
        step(self, n, *rest)
        if n == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(log.RunLog, "step", dying)
    with pytest.raises(Interrupted):
        run.train(make_config(tiny, sums_file, one, **SETTINGS))
    monkeypatch.undo()
    together(TRAIN, 2, 2, tiny, sums_file, one, json.dumps(SETTINGS))
    same(one, straight)


def test_a_killed_process_ends_a_run_in_bounded_time_with_its_name(tiny, sums_file, tmp_path):
    settings = {**SETTINGS, "train__steps": 5000, "checkpoint__every": 5000, "evaluate__every": 5000}
    quick = {"JAXTUNE_LOST_AFTER": "5"}
    left, killed = start(TRAIN, 2, 1, tiny, sums_file, tmp_path / "run", json.dumps(settings), **quick)
    until = time.monotonic() + 200
    while len(metrics(tmp_path / "run", "loss")) < 3 and time.monotonic() < until and left.poll() is None:
        time.sleep(0.2)
    killed.kill()
    (done,) = ended([left])
    ended([killed])
    assert done.code == 75, done.stderr
    assert re.search(
        r"stopped: process 1 on \S+ is lost: no sign of life for \d+ s; run the same command again", done.stderr
    )
