"""lm_eval on our models: beside its own adapter of transformers models, and beside our own multiple choice."""

import json
from types import SimpleNamespace

import jax
import pytest

pytest.importorskip("lm_eval")

from jaxtune import harness, scoring, tuned
from jaxtune.data.examples import Record
from jaxtune.errors import UserError
from jaxtune.tasks import TASKS, Options
from tests.tiny import write_jsonl

TASK = """
task: local_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROWS = [
    {"question": f"{a} + {b} =", "choices": [f" {a + b}", f" {a + b + 1}", " no fox"], "answer": b % 3}
    for a in range(3)
    for b in range(4)
]


def asked(*arguments):
    return SimpleNamespace(args=arguments)


@pytest.fixture(scope="module")
def model(tiny):
    return tuned.open_model(str(tiny))


@pytest.fixture(scope="module")
def ours(model):
    return harness.Harness(model)


@pytest.fixture(scope="module")
def theirs(tiny):
    """lm_eval's own adapter of the same folder."""
    pytest.importorskip("torch")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(pretrained=str(tiny), device="cpu", dtype="float32", batch_size=4)


def test_log_likelihoods_are_theirs(ours, theirs):
    long = "the fox eats berries " * 30  # beyond the context of both
    requests = [
        asked("1 + 2 =", " 3"),
        asked("the fox ", "eats berries"),  # the space goes over to the continuation
        asked("", "berries"),
        asked(long, " and the fox"),
        asked("a", "b"),
    ]
    got, want = ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True)
    assert [x for x, _ in got] == pytest.approx([x for x, _ in want], abs=1e-3)
    assert [x for _, x in got] == [x for _, x in want]
    texts = [asked("the fox eats berries"), asked(long)]
    rolled = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(rolled, abs=1e-2)


def test_generated_texts_are_theirs(ours, theirs):
    requests = [asked("1 + 2 =", {"until": ["\n"], "max_gen_toks": 6}), asked("the fox", {"max_gen_toks": 4})]
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_its_multiple_choice_is_ours(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = write_jsonl(tmp_path / "sums.jsonl", ROWS)
    (tmp_path / "local.yaml").write_text(TASK.format(file=file))
    found = harness.evaluate(model, ["local_sums"], tmp_path)
    records = [Record(row, "choice", f"r:{i}") for i, row in enumerate(ROWS)]
    with jax.set_mesh(model.mesh):
        asking = scoring.Asked(model.generator, None)
        own = scoring.score(TASKS["choice"], records, Options(prompt="{question}"), asking).scores.values
    assert found["results"]["local_sums"]["acc,none"] == pytest.approx(own["acc"])
    assert found["results"]["local_sums"]["acc_norm,none"] == pytest.approx(own["acc_norm"])
    assert [name for name, _ in harness.table(found)] == ["local_sums acc", "local_sums acc_norm"]
    json.dumps(found, default=str)
    with pytest.raises(UserError, match="no task 'local_sum'"):
        harness.evaluate(model, ["local_sum"], tmp_path)


def test_what_a_task_may_ask_for(ours):
    s = harness._sampling({"until": "x", "do_sample": True, "temperature": 0.5, "num_beams": None})
    assert (s.temperature, s.stop, s.max_new_tokens) == (0.5, ("x",), 256)
    assert harness._sampling({"temperature": 0.0}).temperature == 0.0
    with pytest.raises(UserError, match="'typical_p'"):
        harness._sampling({"typical_p": 1})
    assert ours.apply_chat_template([{"role": "user", "content": "1 +"}]).endswith("1 +")
    begun = [{"role": "user", "content": "1 +"}, {"role": "assistant", "content": " 2"}]
    assert ours.apply_chat_template(begun, add_generation_prompt=False).endswith("1 + 2")
    assert ours.chat_template(False) is None
