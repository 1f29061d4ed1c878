"""The learning-rate range test: what curves say, and a run that diverges."""

import json
import math
import sys

import numpy as np
import pytest

from jaxtune.errors import UserError
from jaxtune.search.lr_range import judge, range_test, write
from tests.tiny import make_config

RATES = np.geomspace(1e-6, 10, 71).tolist()


def curve(centre, away):
    """Losses after each step: a fall that is steepest at `centre`, and a rise from `away` on."""
    after = [1 + 2 / (1 + (r / centre) ** 2) + (9 * (r / away) ** 2 if r > away / 3 else 0) for r in RATES]
    return [3.0, *after[:-1]]


def test_the_steepest_descent_and_the_rise_are_found():
    found = judge(RATES, curve(1e-3, 1e-1))
    assert 5e-4 < found.steepest < 1e-2  # smoothing is late by some steps
    assert 3e-2 < found.diverged < 3e-1
    assert found.suggested == min(found.steepest, found.diverged / 10)
    assert [p[0] for p in found.points] == RATES[:-1]


def test_a_loss_that_is_not_finite_has_diverged():
    found = judge(RATES[:30], [3.0] * 20 + [math.nan])
    assert (found.steepest, found.diverged) == (None, RATES[19])


@pytest.mark.parametrize("losses", [[math.nan], [3.0, math.inf]])
def test_a_loss_that_is_not_finite_from_the_start_is_told(losses):
    with pytest.raises(UserError, match="not finite from the start, at a learning rate of 1e-06"):
        judge(RATES, losses)


def test_figures_are_drawn_without_optuna(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "jaxtune.search.plots", raising=False)
    write(judge(RATES, curve(1e-3, 1e-1)), tmp_path)
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"


def test_a_flat_loss_says_nothing():
    found = judge(RATES, [3.0] * len(RATES))
    assert (found.steepest, found.diverged, found.suggested) == (None, None, None)


def test_a_run_diverges_and_leaves_no_run_folder(tiny, sums_file, tmp_path):
    c = make_config(tiny, sums_file, tmp_path / "run", train__batch_size=8, tuning={"method": "full"})
    found = range_test(c, low=1e-5, high=30.0, steps=40)
    assert found.diverged is not None
    assert 1e-3 < found.suggested < found.diverged < 30
    assert not (tmp_path / "run").exists()
    write(found, tmp_path / "lr")
    kept = json.loads((tmp_path / "lr" / "lr.json").read_text())
    assert kept["suggested"] == found.suggested
    assert len(kept["points"]) == len(found.points)
    assert (tmp_path / "lr" / "lr.png").read_bytes()[:4] == b"\x89PNG"


def test_limits_that_make_no_sense_are_refused(tiny, sums_file, tmp_path):
    for given in ({"low": 1, "high": 1}, {"low": 0}, {"steps": 3}):
        with pytest.raises(UserError, match="lr-test"):
            range_test(make_config(tiny, sums_file, tmp_path / "run"), **given)
