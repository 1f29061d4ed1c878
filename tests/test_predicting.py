"""A teacher's answers as rows to train on; models are asked in `test_cli`."""

import json

import pytest

from jaxtune import config, predicting, tuned
from jaxtune.data import pipeline
from jaxtune.errors import UserError
from jaxtune.generate import Generation, Sampling
from tests.tiny import write_jsonl


def test_answers_are_rows_that_are_read(tiny, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "asked.jsonl", [{"prompt": f"{n} + 1 =", "completion": " no"} for n in range(3)])
    data, model, out = config.Data(train=str(file)), tuned.open_model(str(tiny)), tmp_path / "out.jsonl"

    def ask(finish, **options):
        monkeypatch.setattr(
            predicting,
            "_generate",
            lambda _, prompts, s: [
                [Generation(f" {p.removeprefix('<s>')[:1]}.", [5], finish(p), [-1.0])] for p in prompts
            ],
        )
        return predicting.predict(model, data, out, Sampling(), 2, lambda *_: None, as_data=True, **options)

    with pytest.raises(UserError, match="no answer was finished"):
        ask(lambda _: "length")
    with pytest.raises(UserError, match="leave --logprobs out"):
        ask(lambda _: "stop", logprobs=True)
    assert list(tmp_path.glob("*out.jsonl*")) == []
    assert ask(lambda p: "length" if "1 + 1" in p else "stop") == 2
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{"prompt": f"{n} + 1 =", "completion": f" {n}."} for n in (0, 2)]
    read = pipeline.examples(config.Data(train=str(out)), [])
    assert [e.messages[-1].content for e in read] == [" 0.", " 2."]
