"""Added tokens and padded tables."""

import json

import numpy as np
import pytest

from jaxtune import log, run
from jaxtune.hf import load
from jaxtune.tuned import open_model
from tests.tiny import make_config, write_jsonl, write_tiny

FULL = {"method": "full"}


def losses(folder):
    return [m["loss"] for m in log.read_metrics(folder / "metrics.jsonl") if "loss" in m]


@pytest.mark.parametrize("tied", [True, False])
def test_padding_changes_nothing_and_is_not_exported(tmp_path, sums_file, tied):
    folder = write_tiny(tmp_path / "m", tied=tied)
    a = run.train(make_config(folder, sums_file, tmp_path / "a", tuning=FULL))
    b = run.train(make_config(folder, sums_file, tmp_path / "b", tuning=FULL, vocabulary__multiple=64))
    np.testing.assert_allclose(losses(b), losses(a), rtol=1e-6)
    one, two = (load.read_folder(f / "export") for f in (a, b))
    assert {n: t.shape for n, t in one.items()} == {n: t.shape for n, t in two.items()}
    for n, t in one.items():
        np.testing.assert_allclose(two[n].open(), t.open(), atol=1e-5)
    assert (b / "export/config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.fixture
def spoken(tmp_path):
    rows = [{"prompt": f"<|ask|>{a} + {b} =", "completion": f" {a + b}<|done|>"} for a in range(5) for b in range(4)]
    return write_jsonl(tmp_path / "spoken.jsonl", rows)


ADD = {"vocabulary__add": ["<|ask|>"], "vocabulary__special": ["<|done|>"], "vocabulary__multiple": 16}


def test_added_tokens_start_at_the_mean_and_are_exported(tmp_path, spoken):
    folder = write_tiny(tmp_path / "m", tied=False, vocab=279)
    c = make_config(folder, spoken, tmp_path / "r", tuning=FULL, optim__learning_rate=1e-12, **ADD)
    out = run.train(c)
    assert json.loads((out / "export/config.json").read_text())["vocab_size"] == 281
    before, after = load.read_folder(folder), load.read_folder(out / "export")
    for n in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[n].shape == (281, 32)
        np.testing.assert_allclose(after[n].open()[:279], before[n].open(), atol=1e-6)
        np.testing.assert_allclose(after[n].open()[279:], [before[n].open().mean(0)] * 2, atol=1e-6)
    opened = open_model(str(out))
    assert opened.tokenizer("<|ask|>1", add_special_tokens=False).input_ids[0] == 279
    assert opened.tokenizer.decode([280], skip_special_tokens=True) == ""


def test_an_adapter_brings_the_grown_tables(tmp_path, spoken, capsys):
    folder = write_tiny(tmp_path / "m", tied=False, vocab=279)
    lora = {"method": "lora", "rank": 2, "train": ["embeddings", "head"]}
    out = run.train(make_config(folder, spoken, tmp_path / "r", tuning=lora, **ADD))
    assert "new tokens' embeddings do not all train" not in capsys.readouterr().err
    c = json.loads((out / "export/adapter_config.json").read_text())
    assert c["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    ids = np.array([[279, 5, 6, 280]])
    got = logits(open_model(str(out)), ids)
    assert got.shape[-1] == 281
    pytest.importorskip("peft")
    import peft
    import torch
    import transformers

    base = transformers.LlamaForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(281, mean_resizing=False)
    with torch.no_grad():
        want = peft.PeftModel.from_pretrained(base, out / "export")(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_grew_goes_on_without_being_told_again(tmp_path, spoken):
    """Its tokens and their rows are its own, whatever the base's tokenizer says."""
    folder = write_tiny(tmp_path / "m", tied=False, vocab=279)
    lora = {"method": "lora", "rank": 2, "train": ["embeddings", "head"]}
    first = run.train(make_config(folder, spoken, tmp_path / "r", tuning=lora, **ADD))
    again = {"method": "lora", "adapter": str(first / "export")}
    second = run.train(make_config(folder, spoken, tmp_path / "s", tuning=again, optim__learning_rate=1e-12))
    ids = np.array([[279, 5, 6, 280]])
    one, two = (open_model(str(r)) for r in (first, second))
    np.testing.assert_allclose(logits(two, ids), logits(one, ids), atol=1e-5)
    assert two.tokenizer("<|ask|>1", add_special_tokens=False).input_ids[0] == 279


@pytest.mark.parametrize("twice", [True, False])
def test_a_tied_table_that_is_stored_as_the_head(tmp_path, spoken, twice):
    """An adapter brings it as the embedding."""
    from jaxtune.hf import files

    folder = write_tiny(tmp_path / "m", vocab=279)
    arrays = {n: t.open().copy() for n, t in load.read_folder(folder).items()}
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    if not twice:
        del arrays["model.embed_tokens.weight"]
    files.write_folder(folder, {n: files.Entry(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()})
    lora = {"method": "lora", "rank": 2, "train": ["embeddings"]}
    out = run.train(make_config(folder, spoken, tmp_path / "r", tuning=lora, **ADD))
    c = json.loads((out / "export/adapter_config.json").read_text())
    assert c["modules_to_save"] == ["model.embed_tokens"]
    assert logits(open_model(str(out)), np.array([[279, 280]])).shape[-1] == 281


def test_new_tokens_that_do_not_train_are_told(tmp_path, spoken, capsys):
    folder = write_tiny(tmp_path / "m", tied=False, vocab=279)
    out = run.train(make_config(folder, spoken, tmp_path / "r", **ADD))
    assert "new tokens' embeddings do not all train" in capsys.readouterr().err
    assert logits(open_model(str(out)), np.array([[279, 280]])).shape[-1] == 281


def logits(opened, ids):
    at = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    out = opened.blueprint.model.apply({"params": opened.weights}, ids, np.ones_like(ids), at)[0]
    return np.asarray(out.logits())
