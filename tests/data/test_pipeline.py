import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config import Data
from jaxtune.data import pipeline
from jaxtune.data.encode import Encoded
from jaxtune.data.pipeline import Batches, Rows, extent
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer
from tests.tiny import write_jsonl


def rows(n, length=4):
    examples = [Encoded(np.full(3, i + 3, np.int32), np.ones(3, bool)) for i in range(n)]
    return Rows(examples, [f"f:{i}" for i in range(n)], [[i] for i in range(n)], length)


def seen(batches):
    return [b.rows.tolist() for b in batches]


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_each_pass_sees_every_row_once(n, batch_size, passes, seed):
    flat = [i for b in seen(Batches(rows(n), batch_size, seed=seed, row_count=n * passes)) for i in b]
    real = [i for i in flat if i >= 0]
    for p in range(passes):
        assert sorted(real[p * n : (p + 1) * n]) == list(range(n))
    assert len(flat) % batch_size == 0
    assert len(flat) - len(real) < batch_size


def test_passes_differ_and_seeds_repeat():
    def order(seed):
        return [i for b in seen(Batches(rows(32), 8, seed=seed, row_count=64)) for i in b]

    assert order(1)[:32] != order(1)[32:]
    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_state_resumes_exactly():
    whole = seen(Batches(rows(10), 3, seed=0, row_count=25))
    first = Batches(rows(10), 3, seed=0, row_count=25)
    head = [next(first).rows.tolist() for _ in range(4)]
    second = Batches(rows(10), 3, seed=0, row_count=25)
    second.state = first.state
    assert head + seen(second) == whole


def test_fill_up_rows_are_empty():
    last = list(Batches(rows(5), 4, seed=None, row_count=5))[-1]
    assert last.rows.tolist() == [4, -1, -1, -1]
    assert last.tokens == 3
    assert not last.columns["segment_BT"][1:].any()


@given(st.integers(1, 99), st.integers(1, 40), st.floats(0.01, 4))
def test_there_is_a_batch_for_every_step(n, batch_size, epochs):
    steps, taken = extent(n, batch_size, epochs, None)
    assert (steps - 1) * batch_size < taken <= steps * batch_size
    assert extent(n, batch_size, epochs, 7) == (7, 7 * batch_size)


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


def test_long_examples_are_cut_or_left_out_and_said(tmp_path, words):
    rows = [{"prompt": "a", "completion": "b " * 60}, {"prompt": "a " * 60, "completion": "b"}]
    p = prepare(tmp_path, words, rows, max_length=16)
    assert [len(e.ids) for e in p.train.examples] == [16, 16]
    assert any("2 of 2 examples are longer than 16 tokens and were cut (right)" in r for r in p.remarks)
    p = prepare(tmp_path, words, [*rows, {"prompt": "a", "completion": "b"}], max_length=16, truncate="drop")
    assert any("2 of 3 examples are longer than 16 tokens and were left out" in r for r in p.remarks)


def test_nothing_left_is_an_error(tmp_path, words):
    with pytest.raises(UserError, match="no example has a token to train on within data.max_length=16"):
        prepare(tmp_path, words, [{"prompt": "a " * 60, "completion": "b"}], max_length=16, truncate="drop")
    with pytest.raises(UserError, match="holds out 5 of 1 examples"):
        prepare(tmp_path, words, [{"text": "a"}], validation=5)


def test_without_packing_each_row_is_one_example(tmp_path, words):
    p = prepare(tmp_path, words, [{"text": "fox"}, {"text": "owl eats"}], packing=False, max_length=128)
    assert len(p.train) == 2
    assert p.train.length == 32


def test_a_digest_tells_data_apart(tmp_path, words):
    a = prepare(tmp_path, words, [{"text": "fox"}]).train.digest()
    assert a == prepare(tmp_path, words, [{"text": "fox"}]).train.digest()
    assert a != prepare(tmp_path, words, [{"text": "fax"}]).train.digest()
    assert a != prepare(tmp_path, words, [{"text": "fox"}], max_length=64).train.digest()
