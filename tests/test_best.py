"""The best weights are exported, and a run without hope ends: by any metric, after a kill too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import log, run
from jaxtune.best import Best, best_step, hopeless
from jaxtune.config import Evaluate
from jaxtune.errors import UserError
from jaxtune.hf import files
from tests.tiny import make_config


def entries(metric, values):
    return [{"step": 10 * i, f"eval_{metric}": v} for i, v in enumerate(values)]


def test_the_first_of_the_best_counts():
    assert best_step(Evaluate(), entries("loss", [3, 1, 2, 1])) == 10
    assert best_step(Evaluate(metric="bleu"), entries("bleu", [3, 1, 5, 5])) == 20
    assert best_step(Evaluate(), []) is None


def test_patience_counts_evaluations_without_a_better_one():
    c = Evaluate(patience=2)
    assert not hopeless(c, entries("loss", [3, 1, 2]))
    assert hopeless(c, entries("loss", [3, 1, 2, 2]))
    assert not hopeless(Evaluate(), entries("loss", [1, 2, 3, 4]))


def test_a_run_that_gets_worse_stops_and_exports_its_best(tiny, sums_file, tmp_path, capsys):
    """A learning rate that ruins the model: the weights of the best evaluation come out, bit by bit."""
    options = {
        "optim__learning_rate": 3.0, "optim__schedule": "constant", "optim__warmup": 0.0, "tuning__method": "full",
        "evaluate__every": 1, "evaluate__best": True, "evaluate__patience": 2, "data__validation": 8, "train__steps": 9,
    }  # fmt: skip
    folder = run.train(make_config(tiny, sums_file, tmp_path / "r", **options))
    said = capsys.readouterr().out
    history = [m for m in log.read_metrics(folder / "metrics.jsonl") if "eval_loss" in m]
    best = min(history, key=lambda m: (m["eval_loss"], m["step"]))["step"]
    assert best < history[-1]["step"] < 9
    assert "2 evaluations without a better loss" in said
    assert f"the best loss was at step {best}" in said
    again = run.train(make_config(tiny, sums_file, tmp_path / "again", **{**options, "train__steps": 9}))
    held = {n: t.open() for n, t in files.read_header(folder / "export" / "model.safetensors").items()}
    for name, t in files.read_header(again / "export" / "model.safetensors").items():
        np.testing.assert_array_equal(t.open(), held[name])
    if best == 0:
        base = {n: t.open() for n, t in files.read_header(tiny / "model.safetensors").items()}
        assert all(np.array_equal(base[n], held[n]) for n in held)
    before = (folder / "metrics.jsonl").read_text()
    run.train(make_config(tiny, sums_file, tmp_path / "r", **options))  # nothing more is to be done
    assert "finished already" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before


def test_a_metric_that_is_not_measured_is_said(tiny, sums_file, tmp_path):
    with pytest.raises(UserError, match="evaluate.metric 'bleu' is a task's, and none is asked for"):
        run.train(make_config(tiny, sums_file, tmp_path / "a", evaluate__metric="bleu", data__validation=8))
    with pytest.raises(UserError, match="evaluate.best looks at the validation set, and there is none"):
        run.train(make_config(tiny, sums_file, tmp_path / "c", evaluate__best=True))
    with pytest.raises(UserError, match="metric 'blue' is not known"):
        run.train(make_config(tiny, sums_file, tmp_path / "b", evaluate__metric="blue", data__validation=8))


def test_damaged_best_weights_do_not_hold_a_run(tmp_path, capsys):
    c = Evaluate(best=True)
    history = [{"step": 0, "eval_loss": 3.0}]
    trained = {"w": jnp.arange(4.0)}
    best = Best(tmp_path, c, history, 0)
    best.see(0, trained)
    best.close()
    next((tmp_path / "best" / "0").rglob("manifest.json")).write_text("{")
    best = Best(tmp_path, c, history, 0)
    said = capsys.readouterr().err
    assert "every checkpoint is damaged" in said
    assert "the run goes on without the best weights so far" in said
    assert best.restored(trained) is None
    history.append({"step": 5, "eval_loss": 2.0})
    best.see(5, trained)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), trained)
    np.testing.assert_array_equal(best.restored(like)["w"], trained["w"])
    best.close()
