"""Whole runs: the loss falls, a run that was broken off ends as a straight one, averages are what is measured."""

import math
import shutil

import jax
import numpy as np
import pytest

from jaxtune import log, optim, run
from jaxtune.errors import UserError
from jaxtune.job import prepare
from jaxtune.layers import unbox
from jaxtune.tuned import open_weights
from tests.tiny import make_config

FULL, CONSTANT = {"method": "full"}, {"optim__schedule": "constant"}
GALORE = {"method": "galore", "rank": 4, "every": 2, "scale": 1.0}
CASES = {
    "adamw8bit": {"optim__name": "adamw8bit"},
    "muon": {"optim__name": "muon"},
    "schedule_free": {"optim__name": "schedule_free", **CONSTANT},
    "galore8bit": {"tuning": GALORE, "optim__name": "adamw8bit"},
    "own": {
        "train__ema": 0.5, "train__neftune": 5.0, "optim__layer_decay": 0.8, "optim__weight_decay": 0.1,
        "optim__groups": [{"match": "norms", "learning_rate": 0.02}],
    },
}  # fmt: skip


def weights(out):
    return {f.name: f.read_bytes() for f in sorted((out / "export").glob("*.safetensors"))}


def config(tiny, sums_file, out, given):
    return make_config(tiny, sums_file, out, **{"tuning": FULL, "data__validation": 8, "checkpoint__every": 3, **given})


@pytest.mark.parametrize("case", CASES)
def test_the_loss_falls_and_broken_off_runs_end_as_straight_ones(tiny, sums_file, tmp_path, capsys, case):
    c = config(tiny, sums_file, tmp_path / "r", CASES[case])
    out = run.train(c)
    held = [m["eval_loss"] for m in log.read_metrics(out / "metrics.jsonl") if "eval_loss" in m]
    assert held[-1] < held[0] - 0.05
    straight = weights(out)
    shutil.rmtree(out / "export")  # as if it had ended after step 3
    shutil.rmtree(out / run.CHECKPOINTS / "6")
    if case in ("own", "schedule_free"):  # what is opened is the average
        boxes = open_weights(str(out), None, None, prepare(c).mesh).weights
        now = unbox(boxes)["norm"]["weight"]
        saved = run.Checkpoints(out / run.CHECKPOINTS, read_only=True)
        state, _ = saved.restore(3, prepare(c).state.saved())
        saved.close()
        want = optim.averaged(state["optimiser"], state["trainable"])["norm"]["weight"]
        np.testing.assert_array_equal(now, want)
        assert np.abs(now - state["trainable"]["norm"]["weight"]).max() > 1e-5
    run.train(c)
    assert "goes on after step 3" in capsys.readouterr().out
    assert weights(out) == straight


def test_weights_and_moments_take_half_in_bfloat16(tiny, sums_file, tmp_path):
    """And what is exported is in the base's dtype."""

    def held(**given):
        job = prepare(config(tiny, sums_file, tmp_path / "r", given))
        return [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(t)) for t in job.state[::2][:2]]

    wide, narrow = held(), held(train__param_dtype="bfloat16")
    assert narrow[0] * 2 == wide[0]
    assert narrow[1] * 2 == pytest.approx(wide[1], abs=64)


def test_noise_and_average_cost_no_evaluation(tiny, sums_file, tmp_path):
    """Before the first step both are what they are without."""
    first = []
    for given in ({}, {"train__neftune": 15.0, "train__ema": 0.9}):
        out = run.train(config(tiny, sums_file, tmp_path / f"r{len(given)}", {"train__steps": 1, **given}))
        metrics = log.read_metrics(out / "metrics.jsonl")
        first.append([next(m[k] for m in metrics if k in m) for k in ("eval_loss", "loss")])
    assert first[0][0] == first[1][0]
    assert not math.isclose(first[0][1], first[1][1], rel_tol=1e-6)


@pytest.mark.parametrize("name", ["muon", "adafactor", "schedule_free"])
def test_galore_refuses_what_looks_at_whole_weights(tiny, sums_file, tmp_path, name):
    given = {"tuning": GALORE, "optim__name": name, **CONSTANT}
    with pytest.raises(UserError, match=f"optim.name={name} does not go with projected gradients; take adamw,"):
        prepare(config(tiny, sums_file, tmp_path / "r", given))
