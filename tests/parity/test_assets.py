"""Real trained LLaMAs give their reference outputs."""

import dataclasses
import json

import numpy as np
import pytest

from jaxtune.config import Data
from jaxtune.data import pipeline
from jaxtune.generate import Sampling
from jaxtune.tuned import open_model

MODELS = ["stories260K", "stories656K"]


@pytest.fixture(scope="module", params=MODELS)
def case(request, assets):
    folder = assets / "models" / request.param
    return open_model(str(folder)), json.loads((folder / "reference_outputs.json").read_text())


def test_logits(case):
    model, reference = case
    check = reference["logits_check"]
    ids = np.array([check["input_ids"]], np.int32)
    outputs, _ = model.blueprint.model.apply(
        {"params": model.weights}, ids, np.ones_like(ids), np.arange(ids.shape[1])[None]
    )
    logits = np.asarray(outputs.logits())
    top = [(i, float(logits[0, -1, i])) for i in np.argsort(-logits[0, -1])[:5]]
    assert [i for i, _ in top] == [i for i, _ in check["last_position_top5"]]
    np.testing.assert_allclose([v for _, v in top], [v for _, v in check["last_position_top5"]], atol=1e-4)
    assert logits.sum() == pytest.approx(check["logits_sum"], rel=1e-5)


def test_greedy_text_letter_for_letter(case):
    model, reference = case
    for g in reference["greedy"]:
        new = len(g["output_ids"]) - len(g["prompt_ids"])
        assert model.tokenizer(g["prompt"]).input_ids == g["prompt_ids"]
        prompt = model.tokenizer.decode(g["prompt_ids"])
        [got] = model.generator.generate([prompt], Sampling(new))
        ended = g["output_ids"][-1] in model.eos  # the reference keeps the token that ends a text
        assert g["prompt_ids"] + got.ids == g["output_ids"][: -1 if ended else None]
        assert model.tokenizer.decode(g["prompt_ids"] + got.ids, skip_special_tokens=True) == g["text"]


def test_loss_on_stories(case, assets):
    """The reference: the first 100 stories, their first 512 tokens, a mean over all tokens."""
    model, reference = case
    key = next(k for k in reference if "validation_loss" in k)
    data = Data(train=[{"path": str(assets / "data/tinystories/validation.jsonl"), "max_samples": 100}], max_length=512)
    prepared = pipeline.prepare(data, model.tokenizer, 0, "pretrain")
    first = [i for i, o in enumerate(prepared.train.origins) if i == 0 or prepared.train.origins[i - 1] != o]
    cut = [prepared.train.examples[i] for i in first]
    bare = [
        e._replace(ids=e.ids[:-1], mask=e.mask[:-1]) if e.ids[-1] == model.tokenizer.eos_token_id else e for e in cut
    ]
    rows = dataclasses.replace(prepared.train, examples=bare, rows=[[i] for i in range(len(bare))])
    assert len(bare) == 100
    assert model.scores(rows, 10, "pretrain")["loss"] == pytest.approx(reference[key], abs=1e-4)
