"""What a sweep tries is checked before the first trial."""

import optuna
import pytest

from jaxtune import config
from jaxtune.errors import UserError
from jaxtune.search.space import space


def of(keys, **given):
    sweep = {"keys": keys, **given.pop("sweep", {})}
    return space(config.load(None, config.nested({"data.train": "d.jsonl", **given}), {"sweep": sweep}))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"optim.lerning_rate": [1e-3]}, "did you mean 'learning_rate'"),
        ({"optm.learning_rate": [1e-3]}, "did you mean 'optim'"),
        ({"optim.learning_rate": {"low": 0, "high": 1}}, "optim.learning_rate=0"),
        ({"train.batch_size": {"low": 2.5, "high": 8}}, "batch_size=2.5"),
        ({"train.batch_size": {"low": 8, "high": 64, "step": 0.5}}, "no whole number"),
        ({"optim.name": ["adamw", "adamm"]}, "adamm"),
        ({"tuning.last": [1]}, "unknown key tuning.last"),
        ({"tuning.method": ["lora", "full"], "tuning.last": [1]}, "unknown key tuning.last"),
        ({"train.steps.x": [1]}, "steps"),
        ({"output": ["a", "b"]}, "cannot differ"),
        ({"sweep.trials": [1]}, "cannot differ"),
        ({"evaluate.metric": ["loss"]}, "cannot differ"),
    ],
)
def test_a_key_or_value_that_does_not_fit_is_refused(keys, said):
    with pytest.raises(UserError, match=said):
        of(keys, **{"train.steps": 9})


def test_without_a_sweep_section_it_is_asked_for():
    with pytest.raises(UserError, match="no section `sweep`"):
        space(config.load(None, {}))


def test_values_that_only_fit_beside_others_are_no_mistake():
    s = of({"tuning.rank": [4, 16], "tuning.init_rank": [16, 24]}, **{"tuning.method": "adalora"})
    assert s.config({"tuning.rank": 16, "tuning.init_rank": 24}, "out").tuning.rank == 16
    with pytest.raises(UserError, match="above"):
        of({"tuning.rank": [16]}, **{"tuning.method": "adalora"})


def test_numbers_are_whole_where_the_key_takes_whole_ones():
    keys = {
        "train.batch_size": {"low": 8, "high": 64, "step": 8},
        "optim.warmup": {"low": 0, "high": 1},
        "optim.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
        "tuning.targets": [["q_proj", "v_proj"], "all-linear"],
        "train.steps": [None, 9],
    }
    s = of(keys)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(3))
    drawn = [s.suggest(study.ask()) for _ in range(30)]
    assert {type(d["train.batch_size"]) for d in drawn} == {int}
    assert {d["train.batch_size"] % 8 for d in drawn} == {0}
    assert all(0 < d["optim.warmup"] < 1 and 1e-5 <= d["optim.learning_rate"] <= 1e-3 for d in drawn)
    assert {str(d["tuning.targets"]) for d in drawn} == {"['q_proj', 'v_proj']", "all-linear"}
    assert {d["train.steps"] for d in drawn} == {None, 9}
    for d, t in zip(drawn, study.trials, strict=True):
        assert s.named(t.params) == d
        c = s.config(d, "out")
        assert (c.train.batch_size, c.tuning.targets, c.output) == (d["train.batch_size"], d["tuning.targets"], "out")
        assert c.sweep is None


def test_a_grid_has_each_combination_once_with_the_keys_of_its_method():
    keys = {"tuning.rank": [4, 8], "tuning.method": ["lora", "freeze"], "tuning.last": {"low": 1, "high": 3}}
    s = of(keys, sweep={"sampler": "grid"}, **{"tuning.alpha": 32, "tuning.method": "lora"})
    points = list(s.grid())
    lora = [{"tuning.method": "lora", "tuning.rank": r} for r in (4, 8)]
    freeze = [{"tuning.method": "freeze", "tuning.last": n} for n in (1, 2, 3)]
    assert points == [*lora, *freeze]
    made = [s.config(p, "out").tuning for p in points]
    assert [t.method for t in made] == ["lora"] * 2 + ["freeze"] * 3
    assert made[0].alpha == 32
    over = of({"tuning.method": ["lora", "qlora"]}, **{"tuning.method": "lora", "tuning.rank": 3})
    assert [over.config({"tuning.method": m}, "out").tuning.rank for m in ("lora", "qlora")] == [3, 3]  # as everywhere
    with pytest.raises(UserError, match="needs a list"):
        of({"optim.learning_rate": {"low": 1e-5, "high": 1}}, sweep={"sampler": "grid"})


def test_paths_that_are_tried_start_at_the_file(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "d.jsonl").write_text("")
    file = tmp_path / "c" / "s.yaml"
    file.write_text("sweep:\n  keys:\n    data.train: [../d.jsonl, demo]\n    tuning.rank: [4]\n")
    tried = config.load(file).sweep.keys
    assert tried["data.train"] == [str(tmp_path / "d.jsonl"), "demo"]


def test_a_faulty_section_is_told_by_its_keys():
    for sweep, said in (
        ({"keys": {"a": {"low": 2, "high": 1}}}, "sweep.keys.a: low 2 is above high 1"),
        ({"keys": {"a": {"low": 1, "hig": 2}}}, "unknown key sweep.keys.a.hig; did you mean 'high'"),
        ({"keys": {"a": [1]}, "trails": 3}, "unknown key sweep.trails; did you mean 'trials'"),
        ({"keys": {"a": [1]}, "workers": 2, "devices": ["0"]}, "devices are given for 1 workers, and there are 2"),
        ({"keys": {"a": {"low": 0, "high": 1, "log": True}}}, "log: true needs low above 0"),
    ):
        with pytest.raises(UserError, match=said):
            config.load(None, {"sweep": sweep})
