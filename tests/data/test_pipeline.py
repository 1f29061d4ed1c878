from collections import Counter

import numpy as np
import pytest

from jaxtune.config import Data
from jaxtune.data import pipeline
from jaxtune.data.examples import Document
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer
from tests.tiny import write_jsonl


@pytest.fixture(scope="module")
def words(tiny):
    return tokenizer.load(tiny)


def prepare(tmp_path, words, examples, objective="sft", **options):
    file = write_jsonl(tmp_path / "d.jsonl", examples)
    return pipeline.prepare(Data(train=str(file), **options), words, 0, objective)


def test_the_split_is_seeded_and_disjoint(tmp_path, words):
    examples = [{"text": f"the fox {i}"} for i in range(40)]
    a = prepare(tmp_path, words, examples, validation=0.25)
    b = prepare(tmp_path, words, examples, validation=10)
    assert sorted(a.validation.origins) == sorted(b.validation.origins)
    assert len(a.validation.origins) == 10
    assert not set(a.validation.origins) & set(a.train.origins)
    assert len(a.train.origins) == 30


def test_a_file_of_its_own(tmp_path, words):
    held = write_jsonl(tmp_path / "v.jsonl", [{"text": "owl"}])
    p = prepare(tmp_path, words, [{"text": "fox"}], validation=str(held))
    assert p.validation.origins == [f"{held}:1"]


def test_long_texts_are_cut_into_pieces_and_nothing_is_lost(tmp_path, words):
    p = prepare(tmp_path, words, [{"text": "berries " * 40}], max_length=16)
    ids = [*words("berries " * 40).input_ids, words.eos_token_id]
    assert np.concatenate([e.ids for e in p.train.examples]).tolist() == ids


def test_what_is_cut_or_left_out_is_said(tmp_path, words):
    rows = [{"prompt": "a", "completion": "b " * 60}, {"prompt": "a " * 60, "completion": "b"}]
    p = prepare(tmp_path, words, [*rows, {"prompt": "a", "completion": "b"}], max_length=16)
    assert [len(e.ids) <= 16 for e in p.train.examples] == [True] * 3
    assert "train: 2 of 3 examples are longer than 16 tokens and were cut (right)" in p.remarks
    p = prepare(tmp_path, words, [*rows, {"prompt": "a", "completion": "b"}], max_length=16, truncate="drop")
    assert p.train.origins == [f"{tmp_path / 'd.jsonl'}:3"]
    assert "train: 2 of 3 examples are longer than 16 tokens and were left out" in p.remarks


def test_nothing_left_is_an_error(tmp_path, words):
    with pytest.raises(UserError, match="no example has a token to train on within data.max_length=16"):
        prepare(tmp_path, words, [{"prompt": "a " * 60, "completion": "b"}], max_length=16, truncate="drop")
    with pytest.raises(UserError, match="holds out 5 of 1 examples"):
        prepare(tmp_path, words, [{"text": "a"}], validation=5)


def test_rows_that_cannot_be_read_are_counted_with_their_places(tmp_path, words):
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}, {"text": 1}, *[{"txt": "b"}] * 3, {"text": "c"}])
    with pytest.raises(UserError, match="d.jsonl:2: "):
        pipeline.prepare(Data(train=str(file)), words, 0)
    p = pipeline.prepare(Data(train=str(file), bad_rows="skip"), words, 0)
    assert p.train.origins == [f"{file}:1", f"{file}:6"]
    [told] = [r for r in p.remarks if "could not be read" in r]
    assert told.startswith(f"{file}: 4 of 6 rows could not be read and were left out: {file}:2: ")
    assert f"{file}:4: " in told
    assert f"{file}:5: " not in told


def test_without_packing_each_row_is_one_example_in_a_bucket(tmp_path, words):
    texts = ["fox", "owl eats", "a b " * 30]
    p = prepare(tmp_path, words, [{"text": t} for t in texts], packing=False, max_length=256)
    assert [len(row) for row in p.train.rows] == [1, 1, 1]
    assert p.train.widths.tolist() == [64, 64, p.train.length]
    assert p.train.buckets == (64, p.train.length)


def sources(tmp_path, **options):
    """Two files, of 4 and 12 rows."""
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": f"fox {i}"} for i in range(4)])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": f"owl {i}"} for i in range(12)])
    return [{"path": str(a), "weight": 2}, {"path": str(b), "weight": 0.5}], a, b


def test_sets_are_mixed_by_weight_and_told(tmp_path, words):
    given, a, b = sources(tmp_path)
    p = pipeline.prepare(Data(train=given), words, 0)
    files = Counter(o.rpartition(":")[0] for o in p.train.origins)
    assert files == {str(a): 8, str(b): 6}
    assert any(r == f"train: concat of 8 of {a} (4, weight 2); 6 of {b} (12, weight 0.5)" for r in p.remarks)


def test_nothing_held_out_is_trained_on_however_often_a_set_counts(tmp_path, words):
    given, *_ = sources(tmp_path)
    for mix in ("concat", "interleave_under", "interleave_over"):
        p = pipeline.prepare(Data(train=given, validation=0.25, mix=mix), words, 0)
        assert len(p.validation.origins) == 4
        assert not {*p.validation.origins} & {*p.train.origins}


def test_a_set_that_is_all_held_out_is_an_error(tmp_path, words):
    given, a, _ = sources(tmp_path)
    with pytest.raises(UserError, match="no example is left to train on, all are held out"):
        pipeline.prepare(Data(train=[{"path": str(a), "max_samples": 1}, given[1]], validation=12), words, 0)


@pytest.mark.parametrize("mix", ["concat", "interleave_under"])
def test_a_stream_refuses_what_needs_counted_rows(tmp_path, words, mix):
    given, *_ = sources(tmp_path)
    with pytest.raises(UserError, match="nothing can be held out of a stream"):
        pipeline.prepare(Data(train=given, streaming=True, validation=0.1, mix=mix), words, 0)
    with pytest.raises(UserError, match="goes with objective sft and pretrain, not classification"):
        pipeline.prepare(Data(train=given, streaming=True), words, 0, "classification")
    p = pipeline.prepare(Data(train=given, streaming=True, workers=0), words, 0, "pretrain")
    with pytest.raises(UserError, match="say how long to train with train.steps"):
        p.train.extent(4, 1.0, None, 0)
    with pytest.raises(UserError, match="data.streaming is for training only"):
        _ = p.rows


def test_demo_conversations_fill_rows(assets):
    words = tokenizer.load(assets / "tokenizers" / "llama3")
    file = str(assets / "data" / "alpaca_en_demo" / "train.jsonl")
    rows = pipeline.prepare(Data(train=file, template="chatml", max_length=1024), words, 0).rows
    assert rows.full >= 0.97
    assert len(rows.examples) == 886


def test_a_digest_tells_data_apart(tmp_path, words):
    a = prepare(tmp_path, words, [{"text": "fox"}]).train.digest()
    assert a == prepare(tmp_path, words, [{"text": "fox"}]).train.digest()
    assert a != prepare(tmp_path, words, [{"text": "fax"}]).train.digest()
    assert a != prepare(tmp_path, words, [{"text": "fox"}], max_length=64).train.digest()


def test_a_tokenizer_that_loses_letters_is_told(tmp_path, words):
    p = prepare(tmp_path, words, [{"prompt": "the fox", "completion": "eats"}])
    assert not any("loses" in r for r in p.remarks)

    class Deaf:
        """Hears no vowel."""

        def __call__(self, text):
            return words("".join(c for c in text if c not in "aeiou"))

        decode = staticmethod(words.decode)

    [remark] = pipeline.lost([Document("the fox eats", "f:1")], Deaf(), "train")
    assert "loses 40 % of the letters of the first examples, such as e o a" in remark
