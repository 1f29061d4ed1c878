"""Whole sweeps: trials that end early, fail, are broken off, are trained by several processes."""

import json
import os
import signal
import subprocess
import threading
import time

import optuna
import pytest

import jaxtune
from jaxtune import config, distributed, log, run, search
from jaxtune.errors import UserError
from jaxtune.search import study
from tests.tiny import make_config

RATE = "optim.learning_rate"
BASE = {"data__validation": 8, "evaluate__every": 2, "checkpoint__every": 2, "train__steps": 4, "tuning__rank": 2}


def sweep_of(tiny, sums_file, out, keys, **more):
    return make_config(tiny, sums_file, out, **BASE, sweep={"keys": keys, **more})


def trials(out):
    return json.loads((out / "sweep.json").read_text())["trials"]


def evaluations(folder):
    return [(m["step"], m["eval_loss"]) for m in log.read_metrics(folder / "metrics.jsonl") if "eval_loss" in m]


def test_a_sweep_is_broken_off_and_gone_on_with(tiny, sums_file, tmp_path, monkeypatch, capsys):
    """Trials of one program: good ones, one that fails, a poor one that ends early; the second is broken off."""
    rates = [1e-3, 1e-2, 1e38, 1e-9]
    c = sweep_of(tiny, sums_file, tmp_path / "s", {RATE: rates}, sampler="grid", pruner="asha", trials=9)
    step = log.RunLog.step

    def broken(self, n, *rest):
        step(self, n, *rest)
        if self.folder.name == "0001" and n == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(log.RunLog, "step", broken)
        search.sweep(c)
    assert [t["state"] for t in trials(tmp_path / "s")] == ["done", "running"]
    found = search.sweep(c)
    said = capsys.readouterr().out
    assert "trial 1  goes on: optim.learning_rate=0.01" in said

    assert [t["values"] for t in found.trials] == [{RATE: r} for r in rates]
    assert [t["state"] for t in found.trials] == ["done", "done", "failed", "ended early"]
    assert "is not finite" in found.trials[2]["reason"] or "loss nan" in found.trials[2]["reason"]
    assert found.trials[3]["pruned_at"] == 2
    assert "goes on after step 2" in (tmp_path / "s" / "trials" / "0001" / "train.log").read_text()
    assert [n for n, _ in evaluations(tmp_path / "s" / "trials" / "0001")] == [0, 2, 4]  # none twice
    assert json.loads(json.dumps(found.trials)) == trials(tmp_path / "s")

    best = tmp_path / "s" / "trials" / f"{found.best['number']:04}"
    assert found.best["value"] == min(t["value"] for t in found.trials[:2])
    for t in range(4):  # the best alone has weights
        folder = tmp_path / "s" / "trials" / f"{t:04}"
        assert (folder / "export").exists() == (folder / "checkpoints").exists() == (folder == best)
        assert (folder / "config.yaml").exists()
        assert (folder / "metrics.jsonl").exists()
    for name in ("history", "parallel"):
        assert (tmp_path / "s" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "s" / "sweep.html").read_text()
    assert "plotly" in page
    assert '<script src="' not in page

    again = config.load(tmp_path / "s" / "best.yaml")
    assert evaluations(run.train(again)) == evaluations(best)
    weights = "adapter_model.safetensors"
    assert (tmp_path / "s" / "best" / "export" / weights).read_bytes() == (best / "export" / weights).read_bytes()

    search.sweep(c)  # all is done
    assert [t["seconds"] for t in trials(tmp_path / "s")] == [t["seconds"] for t in found.trials]
    other = sweep_of(tiny, sums_file, tmp_path / "s", {RATE: [1e-3]})
    with pytest.raises(UserError, match="the sweep there differs in"):
        search.sweep(other)


def test_workers_share_trials_and_take_over_from_one_that_is_killed(tiny, sums_file, tmp_path, monkeypatch):
    keys = {RATE: {"low": 1e-4, "high": 1e-2, "log": True}}
    c = sweep_of(tiny, sums_file, tmp_path / "s", keys, workers=2, trials=3, sampler="random")
    first = tmp_path / "s" / "trials" / "0000"
    started, popen, ended = [], subprocess.Popen, threading.Event()

    def kept(*args, **kw):
        started.append(popen(*args, **kw))
        return started[-1]

    def kill():
        until = time.monotonic() + 300
        while not list(first.glob("checkpoints/[0-9]")) and time.monotonic() < until and not ended.wait(0.02):
            pass
        for p in started:  # the one that trains it
            if f'"pid": {p.pid}' in (first / ".trial.lock").read_text():
                os.kill(p.pid, signal.SIGKILL)

    monkeypatch.setattr(search.subprocess, "Popen", kept)
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = search.sweep(c)
    finally:
        ended.set()
        killer.join()
    assert sorted(p.returncode for p in started) == [-signal.SIGKILL, 0]
    assert [t["state"] for t in found.trials] == ["done"] * 3
    assert len({t["values"][RATE] for t in found.trials}) == 3
    for t in range(3):
        held = evaluations(tmp_path / "s" / "trials" / f"{t:04}")
        assert [n for n, _ in held] == [0, 2, 4]
    assert "goes on after step" in (first / "train.log").read_text()


def test_three_failures_and_nothing_else_end_a_sweep(tiny, sums_file, tmp_path, monkeypatch):
    """Also those of which the values do not go together."""
    tried = []

    def full(c, *rest, **kw):
        tried.append(c)
        raise UserError("the disk is full; make room")

    monkeypatch.setattr(run, "train", full)
    keys = {"train.accumulation": [3, 4], "train.batch_size": [4, 6, 8]}
    c = sweep_of(tiny, sums_file, tmp_path / "s", keys, sampler="grid")
    with pytest.raises(UserError, match="the first 3 trials failed; the last: .*not a multiple"):
        search.sweep(c)
    assert [(t.train.accumulation, t.train.batch_size) for t in tried] == [(3, 6)]
    assert [t["state"] for t in trials(tmp_path / "s")] == ["failed"] * 3
    with pytest.raises(UserError, match="the first 3 trials failed; the last: .*full"):  # the others are tried
        search.sweep(c)
    assert len(trials(tmp_path / "s")) == 6
    assert search.sweep(c).best is None


def test_a_sweep_is_refused_where_it_cannot_be(tiny, sums_file, tmp_path, monkeypatch):
    c = make_config(tiny, sums_file, tmp_path / "s", sweep={"keys": {RATE: [1e-3]}})
    with pytest.raises(UserError, match="set data.validation"):
        jaxtune.sweep(overrides=config.nested({}), **c.model_dump(exclude_unset=True))
    monkeypatch.setattr(distributed, "members", lambda: (0, 2))
    with pytest.raises(UserError, match="one of several"):
        search.sweep(c)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("sampler", ["tpe", "cmaes"])
def test_drawn_values_go_on_after_a_stop_as_they_would_have(tiny, sums_file, tmp_path, capsys, sampler):
    keys = {RATE: {"low": 1e-4, "high": 1e-2, "log": True}, "optim.warmup": {"low": 0, "high": 0.5}}

    def drawn(name, stops):
        out = []
        for n in stops:
            c = sweep_of(tiny, sums_file, tmp_path / name, keys, sampler=sampler, trials=n, pruner="hyperband")
            store = study.Store(c, search.space(c))
            while True:
                with store.claim() as t:
                    if t is None:
                        break
                    store.finish(t, t.values[RATE], {})
                    out.append(t.values)
        return out, c, store

    values, c, store = drawn("a", [14])
    assert values == drawn("b", [3, 9, 14])[0]
    assert len({v[RATE] for v in values}) == 14
    search.show(c, store=store)
    lines = capsys.readouterr().out.splitlines()
    best = min(values, key=lambda v: v[RATE])
    assert lines[1].startswith(f"{values.index(best)} ")
    assert (tmp_path / "a" / "importance.png").read_bytes()[:4] == b"\x89PNG"
    assert config.load(tmp_path / "a" / "best.yaml").optim.learning_rate == best[RATE]


def test_a_store_that_cannot_be_reached_is_one_line(tiny, sums_file, tmp_path):
    c = sweep_of(tiny, sums_file, tmp_path / "s", {RATE: [1e-3]}, storage="sqlite:////nowhere/at/all.db")
    with pytest.raises(UserError, match=r"sweep.storage: .*unable to open"):
        search.sweep(c)


def test_optuna_is_quiet_of_what_is_told_here():
    assert optuna.logging.get_verbosity() >= optuna.logging.ERROR
