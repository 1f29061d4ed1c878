"""One run in several processes: the losses of one device, stopped together, gone on with by more, written once."""

import json
import re

import numpy as np
from safetensors.numpy import load_file

from jaxtune import log, run
from tests.processes import TRAIN, ended, start, together
from tests.tiny import make_config

# Ten rows do not divide by four, nor do two rows of a micro-batch over four devices.
SETTINGS = {
    "tuning": {"method": "lora", "dropout": 0.1, "rank": 2}, "train__steps": 20, "train__accumulation": 2,
    "data__validation": 8, "evaluate__every": 10, "checkpoint__every": 8,
}  # fmt: skip
DIES = """
import os, signal
from jaxtune import distributed, log
step = log.RunLog.step
def dying(self, n, *rest):
    step(self, n, *rest)
    if n == 11 and distributed.index() == 1:
        os.kill(os.getpid(), signal.SIG)
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


def test_any_number_of_processes_gives_the_same_run(tiny, sums_file, tmp_path):
    straight, two = tmp_path / "straight", tmp_path / "two"
    run.train(make_config(tiny, sums_file, straight, **SETTINGS))
    assert list(metrics(straight, "loss")) == list(range(1, 21))

    # two processes are told to stop by one of them, at the same step, and four go on
    stopped = ended(start(DIES.replace("SIG)", "SIGTERM)") + TRAIN, 2, 2, tiny, sums_file, two, json.dumps(SETTINGS)))
    assert [d.code for d in stopped] == [75, 75], stopped
    said = {re.search(r"stopped after step (\d+) and saved", d.stderr)[1] for d in stopped}
    assert said == {str(max(metrics(two, "loss")))}
    assert (two / "checkpoints" / said.pop()).is_dir()
    done = together(TRAIN, 4, 1, tiny, sums_file, two, json.dumps(SETTINGS))
    assert "exported to" in done[0].stdout
    assert not any("step" in d.stdout for d in done[1:])
    same(two, straight)


def test_a_killed_process_ends_a_run_in_bounded_time_with_its_name(tiny, sums_file, tmp_path):
    script = DIES.replace("SIG)", "SIGKILL)") + TRAIN
    quick = {"JAXTUNE_LOST_AFTER": "5"}
    left, killed = ended(start(script, 2, 2, tiny, sums_file, tmp_path / "run", json.dumps(SETTINGS), **quick))
    assert (left.code, killed.code) == (75, -9), left.stderr
    assert re.search(r"stopped: process 1 on \S+ is lost: no sign of life for \d+ s; run the same command", left.stderr)
