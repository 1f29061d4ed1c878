"""Answers of a tuned model to a task's questions: what is scored, written and logged; in the loop and by the verb."""

import json

import jax
import pytest

from jaxtune import cli, log, run, scoring, tasks, tuned
from jaxtune.data.examples import Record
from jaxtune.errors import UserError
from jaxtune.tasks import TASKS, Options
from tests.tiny import make_config, write_jsonl

COLOURS = {"sky": "blue", "sea": "blue", "grass": "green", "leaf": "green", "wall": "green grey"}


def call(*arguments) -> None:
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in arguments])
    assert e.value.code == 0


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    rows = [{"prompt": f"{k}:", "completion": f" {v}"} for k, v in COLOURS.items()]
    return write_jsonl(tmp_path_factory.mktemp("colours") / "colours.jsonl", rows)


@pytest.fixture(scope="module")
def done(tiny, colours, tmp_path_factory):
    """A tiny model that has learned the colours by heart, scored on the way."""
    out = tmp_path_factory.mktemp("runs") / "colours"
    keys = {
        "data__validation": str(colours), "tuning__method": "full", "train__steps": 60, "train__batch_size": 5,
        "data__packing": False, "train__log_every": 60, "evaluate__every": 60, "checkpoint__every": 60,
        "evaluate__task": "classification", "evaluate__max_samples": 4,
    }  # fmt: skip
    return run.train(make_config(tiny, colours, out, **keys))


@pytest.fixture(scope="module")
def model(done):
    return tuned.open_model(str(done))


def test_the_validation_set_is_answered_while_training(done):
    held = [m for m in log.read_metrics(done / "metrics.jsonl") if "eval_loss" in m]
    assert [m["step"] for m in held] == [0, 60]
    assert held[0]["eval_accuracy"] < held[-1]["eval_accuracy"] == 1.0
    assert 0.9 < held[-1]["eval_token_accuracy"] <= 1.0
    assert {"eval_f1_macro", "eval_mcc"} <= held[-1].keys()


def test_the_verb_writes_scores_and_answers(done, colours, capsys):
    call("evaluate", done, colours, "--task", "classification", "--batch-size", 4)
    shown = capsys.readouterr().out
    assert "accuracy *" in shown
    assert "5/5 answered" in shown
    scores = json.loads((done / "scores.json").read_text())
    assert (scores["task"], scores["metric"], scores["rows"]) == ("classification", "accuracy", 5)
    assert scores["scores"]["accuracy"] == 1.0
    assert scores["details"]["confusion"]["references"] == [" blue", " green", " green grey"]
    rows = [json.loads(line) for line in (done / "predictions.jsonl").read_text().splitlines()]
    assert [r["prediction"] for r in rows] == [f" {v}" for v in COLOURS.values()]  # also the label that begins another
    assert rows[4]["origin"].endswith("colours.jsonl:5")
    assert (done / "confusion.png").exists()


def test_the_verb_on_another_task(done, colours, tmp_path, capsys):
    out = tmp_path / "out"
    call("evaluate", done, "--data", colours, "--task", "qa", "--max-samples", 2, "--max-new-tokens", 8, "--out", out)
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["rows"], scores["max_new_tokens"]) == (2, 8)
    assert scores["scores"]["exact_match"] == 100.0  # generated, not chosen
    call("evaluate", done, colours, "--task", "dialogue", "--out", out, "--max-new-tokens", 8)
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert 1.0 <= scores["perplexity"] < 1.5
    assert scores["distinct1"] == pytest.approx(3 / 6)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(done), str(colours), "--task", "clasification"])
    assert "did you mean 'classification'" in capsys.readouterr().err


def test_the_verb_on_rows_of_the_task(done, tmp_path):
    rows = [{"text": k, "label": v} for k, v in COLOURS.items()]
    file, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    keys = ("format=classification", "prompt='{text}:'", "--task", "classification")
    call("evaluate", done, file, *keys, "--max-samples", 2, "--out", out)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["rows"] == 2
    assert scores["details"]["confusion"]["references"] == ["blue", "green", "green grey"]  # of all rows
    assert scores["baseline"] == {**scores["baseline"], "name": "always 'blue'", "accuracy": 1.0}
    prompts = [json.loads(line)["prompt"] for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [p.removeprefix("<s>") for p in prompts] == ["sky:", "sea:"]


def test_choices_are_scored_by_likelihood(model):
    rows = [
        Record({"question": f"{k}:", "choices": [" blue", " green"], "answer": int(v != "blue")}, "choice", f"r:{i}")
        for i, (k, v) in enumerate([*COLOURS.items()][:4])
    ]
    with jax.set_mesh(model.mesh):
        asked = scoring.Asked(model.generator, model.template, batch_size=3)
        result = scoring.score(TASKS["choice"], rows, Options(prompt="{question}"), asked)
    assert result.scores.values["acc"] == 1.0
    assert result.baseline[1].values["acc"] == 0.5
    assert [r["prediction"] for r in result.rows] == [0, 0, 1, 1]
    sums = model.generator.judge([result.rows[0]["prompt"]] * 2, [" blue", " green"])
    assert result.rows[0]["logprobs"] == pytest.approx([sum(x.logprobs) for x in sums], abs=1e-4)


def test_long_questions_are_cut_and_counted(model):
    row = {"document": "the fox eats berries " * 40, "summary": "the fox"}
    with jax.set_mesh(model.mesh):
        asked = scoring.Asked(model.generator, model.template, max_new_tokens=4)
        result = scoring.score(TASKS["summarisation"], [Record(row, "summarisation", "d:1")], Options(), asked)
    assert result.remarks[0].startswith("1 of 1 prompts are too long")
    assert len(result.rows) == 1


def test_a_task_without_anything_to_answer_is_refused_before_training(tiny, colours, tmp_path):
    with pytest.raises(UserError, match=r"set data.validation"):
        run.train(make_config(tiny, colours, tmp_path / "a", evaluate__task="classification"))
    keys = {"evaluate__task": "choice", "data__validation": 1}
    with pytest.raises(UserError, match="cannot ask"):
        run.train(make_config(tiny, colours, tmp_path / "b", **keys))
    assert tasks.named("choice").metric == "acc"
