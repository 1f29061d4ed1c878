"""A disk that fails, steps that are not finite, files that ask: whole runs go on."""

import itertools
import math
import os

import jax
import numpy as np
import pytest

from jaxtune import log, run, saving, training
from jaxtune.checkpoint import Checkpoints
from jaxtune.errors import Interrupted, UserError
from jaxtune.objectives import OBJECTIVES
from tests.e2e.test_resume import losses, weights
from tests.test_training import nan_where_asked
from tests.tiny import make_config


def config_of(tiny, sums_file, out, **changes):
    base = {"tuning": {"method": "lora", "rank": 2}, "train__steps": 8, "checkpoint__every": 2}
    return make_config(tiny, sums_file, out, **{**base, **changes})


@pytest.fixture(scope="module")
def straight(tiny, sums_file, tmp_path_factory):
    return run.train(config_of(tiny, sums_file, tmp_path_factory.mktemp("straight") / "r"))


def at_step(monkeypatch, n, do):
    step = log.RunLog.step

    def stepping(self, at, *rest, **options):
        step(self, at, *rest, **options)
        if at == n:
            do()

    monkeypatch.setattr(log.RunLog, "step", stepping)


def test_a_disk_that_fails_while_training_costs_nothing(tiny, sums_file, tmp_path, monkeypatch, straight, capsys):
    save, opened, left = Checkpoints.save, log.Path.open, {"saves": 2}

    def failing(self, *a, **k):
        if left["saves"] > 0:
            left["saves"] -= 1
            raise UserError("checkpoints: cannot save a checkpoint (No space left on device)")
        save(self, *a, **k)

    def torn(self, mode="r", *rest, **options):
        if self.name == "metrics.jsonl" and mode == "a" and left["saves"] == 1:
            with opened(self, mode) as f:
                f.write('{"step": 3, "lo')
            raise OSError(28, "No space left on device")
        return opened(self, mode, *rest, **options)

    monkeypatch.setattr(Checkpoints, "save", failing)
    monkeypatch.setattr(log.Path, "open", torn)
    monkeypatch.setattr(log, "_WARNED", set())
    done = run.train(config_of(tiny, sums_file, tmp_path / "r"))
    said = capsys.readouterr().err
    assert "step 2: checkpoints: cannot save" in said
    assert "step 4: checkpoints: cannot save" in said
    assert "metrics.jsonl: cannot be written (No space left on device); training goes on" in said
    assert losses(done) == losses(straight)
    assert weights(done) == weights(straight)


def test_a_last_step_that_cannot_be_saved_is_an_error_beside_a_whole_export(
    tiny, sums_file, tmp_path, monkeypatch, straight
):
    save = Checkpoints.save

    def failing(self, step, *a, **k):
        if step == 8:
            raise UserError("no room")
        save(self, step, *a, **k)

    monkeypatch.setattr(Checkpoints, "save", failing)
    monkeypatch.setattr(saving, "PAUSES", (0,))
    c = config_of(tiny, sums_file, tmp_path / "r")
    with pytest.raises(UserError, match=r"step 8 could not be saved; .* of step \d: .* is whole in .*export"):
        run.train(c)
    assert weights(tmp_path / "r") == weights(straight)
    monkeypatch.undo()
    assert losses(run.train(c)) == losses(straight)
    assert weights(tmp_path / "r") == weights(straight)


def test_a_log_that_cannot_be_written_does_not_end_a_run(tiny, sums_file, tmp_path, monkeypatch, straight):
    def refuse(*a, **k):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("jaxtune.events.Events.write", refuse)
    monkeypatch.setattr("jaxtune.log.plot", refuse)
    assert weights(run.train(config_of(tiny, sums_file, tmp_path / "r"))) == weights(straight)


def test_stop_and_save_now(tiny, sums_file, tmp_path, monkeypatch, straight):
    out = tmp_path / "r"
    c = config_of(tiny, sums_file, out, checkpoint__every=100)
    with monkeypatch.context() as m:
        at_step(m, 2, (out / "SAVE_NOW").touch)
        at_step(m, 5, (out / "STOP").touch)
        with pytest.raises(Interrupted, match="and saved; run the same command again"):
            run.train(c)
    steps = Checkpoints(out / "checkpoints", read_only=True).steps
    assert [n <= 4 for n in steps] == [True, False]
    assert not (out / "STOP").exists()
    assert not (out / "SAVE_NOW").exists()
    assert losses(run.train(c)) == losses(straight)
    assert weights(out) == weights(straight)


def bad_at(monkeypatch, *steps):
    """Make the loss of some steps not finite: their masks hold a 7."""
    inner = training.loop

    def loop(state, step, batches, put, *rest):
        taken = itertools.count(1)

        def putting(batch):
            columns = dict(put(batch))
            if next(taken) in steps:
                mask = columns["loss_mask_BT"]
                columns["loss_mask_BT"] = jax.device_put(np.full(mask.shape, 7, mask.dtype), mask.sharding)
            return columns

        return inner(state, step, batches, putting, *rest)

    monkeypatch.setattr(run, "loop", loop)
    monkeypatch.setitem(OBJECTIVES, "sft", nan_where_asked)


@pytest.mark.parametrize("kind", ["skip", "rollback"])
def test_steps_that_are_not_finite(tiny, sums_file, tmp_path, monkeypatch, capsys, kind):
    bad_at(monkeypatch, 3, 4)
    done = run.train(config_of(tiny, sums_file, tmp_path / "r", train__nonfinite=kind))
    history, said = log.read_metrics(done / "metrics.jsonl"), capsys.readouterr().err
    odd = [m["step"] for m in history if kind in m]
    assert odd == ([3, 4] if kind == "skip" else [3])  # the other was on its way from weights that are undone
    assert sorted(losses(done)) == [1, 2, 5, 6, 7, 8]
    assert all(math.isfinite(x) for x in losses(done).values())
    assert "step 3: loss nan" in said
    assert "sums.jsonl:" in said
    assert ("its update is left out" if kind == "skip" else "has the weights of step 2 again") in said
    assert (done / "export" / "adapter_config.json").exists()


def test_rollback_before_the_first_checkpoint_says_what_to_do(tiny, sums_file, tmp_path, monkeypatch):
    bad_at(monkeypatch, 1)
    with pytest.raises(UserError, match="no checkpoint yet to go back to; set checkpoint.every to less"):
        run.train(config_of(tiny, sums_file, tmp_path / "r", train__nonfinite="rollback"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    (tmp_path / "c").mkdir()
    c = Checkpoints(tmp_path / "c")
    (tmp_path / "c").chmod(0o500)
    with pytest.raises(UserError, match="cannot save a checkpoint .*Permission denied"):
        c.save(1, {"trainable": {"x": jax.numpy.zeros(3)}}, {}, {})
    (tmp_path / "c").chmod(0o700)
    c.close()


def test_storage_that_is_away_asks_for_nothing(tmp_path, monkeypatch, capsys):
    def stale(self):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(log, "_WARNED", set())
    monkeypatch.setattr(run.Path, "exists", stale)
    assert [run._asked(tmp_path / "STOP") for _ in range(3)] == [False] * 3
    assert capsys.readouterr().err.count("STOP: cannot be looked for (Stale file handle); until it can") == 1
