"""Where the time of a run goes: parts that add up, and what a kill loses."""

import json

import pytest

from jaxtune import clock as clocks
from jaxtune import log, run
from jaxtune.clock import Clock, carried, shares
from tests.tiny import make_config


@pytest.fixture
def hands(monkeypatch):
    """A clock's hands, moved by hand."""
    hands = {"now": 0.0}
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: hands["now"])
    return hands


def test_each_second_is_counted_once_as_the_innermost_part(hands):
    c = Clock()
    hands["now"] = 2
    with c.on("steps"):
        hands["now"] = 5
        with c.on("evaluate"):
            hands["now"] = 6
            with c.on("checkpoint"):
                hands["now"] = 10
        hands["now"] = 12
    assert c.seconds() == {"start": 2, "steps": 5, "evaluate": 1, "checkpoint": 4}


def test_waiting_beside_busy_devices_is_no_waiting(hands):
    c = Clock()
    for busy in (True, False):
        with c.on("steps"), c.on("input", unless=lambda busy=busy: busy):
            hands["now"] += 3
    assert c.seconds() == {"start": 0, "steps": 3, "input": 3}


def test_a_part_ends_with_an_error_too(hands):
    c = Clock()
    with pytest.raises(KeyError), c.on("evaluate"):
        hands["now"] = 1
        raise KeyError
    hands["now"] = 3
    assert c.seconds() == {"evaluate": 1, "start": 2}


def test_what_came_after_the_step_that_is_gone_on_from_is_lost():
    entries = [
        {"step": 1, "loss": 2.0},
        {"step": 4, "seconds": {"start": 5.0, "steps": 4.0, "lost": 1.0}},
        {"step": 4, "eval_loss": 2.0},
        {"step": 7, "seconds": {"start": 5.0, "steps": 9.0, "input": 2.0, "lost": 1.0}},
    ]
    assert carried(entries, 7) == entries[-1]["seconds"]
    assert carried(entries, 5) == {"start": 5.0, "steps": 4.0, "lost": 8.0}
    assert carried(entries, 0) == {"lost": 17.0}
    assert carried(entries[:1], 0) == {}


def test_shares_leave_out_what_is_next_to_nothing():
    assert shares({"steps": 99.7, "export": 0.3}) == "100 % steps"
    assert shares({}) == ""


def test_a_run_tells_where_its_time_went_and_goes_on_counting(tiny, sums_file, tmp_path, capsys):
    c = make_config(
        tiny, sums_file, tmp_path / "r", tuning={"method": "lora"}, data__validation=8, checkpoint__every=2,
        train__log_every=2,
    )  # fmt: skip
    out = run.train(c)
    assert "took " in (said := capsys.readouterr().out)
    assert "% start" in said
    told = [m for m in log.read_metrics(out / "metrics.jsonl") if "seconds" in m]
    assert {m["step"] for m in told} == {1, 2, 4, 6}
    last = told[-1]["seconds"]
    assert {"start", "compile", "steps", "evaluate", "checkpoint"} <= set(last) <= {*last, "input"}
    assert all(n >= 0 for n in last.values())

    # as if it had been killed at step 5, a while after the checkpoint at 4
    entries = [m for m in log.read_metrics(out / "metrics.jsonl") if m["step"] <= 4]
    spent = next(m["seconds"] for m in reversed(entries) if "seconds" in m)
    entries.append({"step": 5, "seconds": {**spent, "steps": spent["steps"] + 1000}})
    (out / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in entries))
    (out / "checkpoints" / "6").rename(tmp_path / "gone")
    run.train(c)
    again = [m for m in log.read_metrics(out / "metrics.jsonl") if "seconds" in m]
    assert again[-1]["step"] == 6
    assert again[-1]["seconds"]["lost"] == pytest.approx(1000, abs=0.1)
    assert again[-1]["seconds"]["steps"] < 900
    assert again[-1]["seconds"]["start"] > spent["start"]
    assert "% lost" in capsys.readouterr().out
