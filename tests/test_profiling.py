"""Traces: which steps are in them, and that there is a file."""

import contextlib

import pytest

from jaxtune import config, profiling
from jaxtune.errors import UserError
from jaxtune.profiling import Profile


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the profiler, and the steps between."""
    calls = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def steps(calls, folder, span, start, total, upto=None):
    """Take the steps that are left of a run, or up to one."""
    profile = Profile(folder, span, start, total)
    with contextlib.closing(profile):
        step = profile.watching(lambda state, batch: calls.append(batch) or state)
        for n in range(start + 1, (upto or total) + 1):
            step(0, n)
    return calls


def test_both_ends_are_in_it(calls, tmp_path, capsys):
    assert steps(calls, tmp_path, "2:3", 0, 5) == [1, "start", 2, 3, "stop", 4, 5]
    assert capsys.readouterr().out.count("trace of steps 2 to 3") == 1


def test_a_run_that_goes_on_past_it_traces_nothing(calls, tmp_path):
    assert steps(calls, tmp_path, "2:3", 3, 5) == [4, 5]


def test_a_run_that_goes_on_within_it_traces_the_rest(calls, tmp_path):
    assert steps(calls, tmp_path, "2:4", 2, 5) == ["start", 3, 4, "stop", 5]


def test_an_end_beyond_the_run_is_cut(calls, tmp_path):
    assert steps(calls, tmp_path, "4:90", 0, 5) == [1, 2, 3, "start", 4, 5, "stop"]


def test_a_run_that_is_stopped_ends_it(calls, tmp_path, capsys):
    assert steps(calls, tmp_path, "2:4", 0, 5, upto=3) == [1, "start", 2, 3, "stop"]
    assert "trace of steps 2 to 3" in capsys.readouterr().out


def test_a_span_beyond_the_run_is_nothing(calls, tmp_path):
    assert steps(calls, tmp_path, "7:9", 0, 2) == [1, 2]


@pytest.mark.parametrize("span", ["3:2", "0:4"])
def test_a_span_that_is_none_is_refused(span):
    with pytest.raises(UserError, match="the first step is 1, and the last not before the first"):
        config.load(None, config.nested({"train.profile": span}))


def test_a_span_is_no_number_of_base_sixty(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {profile: 10:13}\n")
    assert config.load(file).train.profile == "10:13"
    assert config.load(None, config.parse_overrides(["train.profile=1:02"])).train.profile == "1:02"
