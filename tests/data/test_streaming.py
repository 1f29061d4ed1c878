import itertools
import json
from collections import Counter

import numpy as np
import pytest

from jaxtune.config import Data
from jaxtune.data import formats, pipeline, streaming
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer
from tests.tiny import write_jsonl


@pytest.fixture(scope="module")
def words(tiny):
    return tokenizer.load(tiny)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", 5)
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 2)


@pytest.fixture
def files(tmp_path):
    """Three files, of 50, 20 and 8 rows."""
    sizes = {"a": 50, "b": 20, "c": 8}
    return [
        write_jsonl(tmp_path / f"{k}.jsonl", [{"text": f"{k} {i} " + "fox " * (i % 5)} for i in range(n)])
        for k, n in sizes.items()
    ]


def stream(words, files, weights=(1, 1, 1), **options):
    given = [{"path": str(f), "weight": w} for f, w in zip(files, weights, strict=False)]
    options = {"max_length": 32, "shuffle_buffer": 20, "workers": 0, "streaming": True, **options}
    return pipeline.prepare(Data(train=given, **options), words, 0, "pretrain").train


def first(batches, n):
    return list(itertools.islice(batches, n))


def equal(xs, ys):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert x.origins == y.origins
        np.testing.assert_array_equal(x.rows, y.rows)
        for name in x.columns:
            np.testing.assert_array_equal(x.columns[name], y.columns[name])


def seen(batches, n):
    """The origins of the first n examples or a few more."""
    out = []
    while len(out) < n:
        out += next(batches).origins
    return out


def test_each_pass_gives_every_example_once(words, files):
    batches = stream(words, files, shuffle_buffer=78).batches(2, seed=0)
    origins = Counter(itertools.islice(seen(batches, 2 * 78), 2 * 78))
    assert sorted(origins) == sorted(f"{f}:{i + 1}" for f, n in zip(files, (50, 20, 8), strict=True) for i in range(n))
    assert {*origins.values()} == {2}
    batches.close()


@pytest.mark.parametrize("mix", ["concat", "interleave_under", "interleave_over"])
@pytest.mark.parametrize("packing", [True, False])
def test_it_goes_on_exactly_and_reads_no_more_than_a_block_again(words, files, mix, packing, monkeypatch):
    made = stream(words, files, (1, 0.5, 2), mix=mix, packing=packing)
    whole = first(made.batches(3, seed=4), 45)
    read = Counter()
    one = formats.Examples.__next__
    monkeypatch.setattr(formats.Examples, "__next__", lambda self: (read.update(n=1), one(self))[1])
    for k in (1, 2, 11, 40):
        begun = made.batches(3, seed=4)
        equal(first(begun, k), whole[:k])
        state = json.loads(json.dumps(begun.state))
        begun.close()
        assert len(json.dumps(state)) < 2000
        again = made.batches(3, seed=4)
        read.clear()
        again.state = state
        assert read["n"] <= 2 * 20  # of a block; some of them are not drawn
        equal(first(again, 45 - k), whole[k:])
        assert again.remarks == whole_remarks(made, 45)
        again.close()


def whole_remarks(made, n):
    batches = made.batches(3, seed=4)
    first(batches, n)
    batches.close()
    return batches.remarks


def test_processes_encode_the_same(words, files):
    made = [stream(words, files[2:], workers=n).batches(2, seed=0) for n in (0, 1)]
    equal(*(first(batches, 4) for batches in made))
    for batches in made:
        batches.close()


def test_processes_lay_out_their_own_rows(words, files):
    made = [stream(words, files).batches(2, seed=0, own=own) for own in (None, {0}, {1})]
    for whole, *shares in zip(*(first(m, 5) for m in made), strict=True):
        for name, x in whole.columns.items():
            np.testing.assert_array_equal(sum(s.columns[name] for s in shares), x)
        assert {s.tokens for s in shares} == {whole.tokens}


def test_a_state_can_be_set_on_a_stream_that_has_run(words, files):
    batches = stream(words, files).batches(2, seed=0)
    start = batches.state
    head = first(batches, 5)
    batches.state = start
    equal(first(batches, 5), head)
    batches.close()


def test_seeds_draw_anew(words, files):
    made = stream(words, files)
    orders = [[o for b in first(made.batches(2, seed=s), 6) for o in b.origins] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(("mix", "weights", "shares"), [
    ("concat", (1, 2, 1), (50, 40, 8)),
    ("interleave_over", (1, 1, 2), (25, 25, 50)),
    ("interleave_under", (3, 1, 1), (60, 20, 20)),
])  # fmt: skip
def test_sets_count_by_weight(words, files, mix, weights, shares):
    batches = stream(words, files, weights, mix=mix, shuffle_buffer=200).batches(2, seed=0)
    n = 2000
    counts = Counter(o.rpartition(":")[0] for o in seen(batches, n)[:n])
    for f, share in zip(files, shares, strict=True):
        assert counts[str(f)] / n == pytest.approx(share / sum(shares), abs=0.04)
    batches.close()


def test_rows_are_full_and_what_is_cut_is_counted(words, tmp_path):
    rows = [{"prompt": "a", "completion": "b " * (60 if i % 4 == 0 else 3)} for i in range(40)]
    file = write_jsonl(tmp_path / "d.jsonl", rows)
    batches = pipeline.prepare(
        Data(train=str(file), streaming=True, workers=0, max_length=64, shuffle_buffer=40), words, 0
    ).train.batches(2, seed=0)
    seen(batches, 40)
    assert batches.remarks == ["train: 10 of 40 examples are longer than 64 tokens and were cut (right)"]
    batches.close()


def test_nothing_to_train_on_is_an_error(words, tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a " * 60, "completion": "b"}] * 30)
    data = Data(train=str(file), streaming=True, workers=0, max_length=16, shuffle_buffer=20, truncate="drop")
    made = pipeline.prepare(data, words, 0).train
    with pytest.raises(UserError, match="none of 20 examples has a token to train on within data.max_length=16"):
        next(made.batches(2, seed=0))
    with pytest.raises(UserError, match="none of the first 5 examples has a token"):
        _ = made.sample


def test_a_bad_row_ends_the_run_with_its_place(words, tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": f"fox {i}"} for i in range(30)])
    made = stream(words, [file], shuffle_buffer=10)
    batches = made.batches(2, seed=0)
    next(batches)
    with file.open("a") as f:
        f.write('{"text": 5}\n')
    with pytest.raises(UserError, match=r"d.jsonl:31: column 'text' should be text"):
        seen(made.batches(2, seed=0), 100)
    batches.close()


def test_a_digest_tells_files_and_settings_apart(words, files):
    made = stream(words, files).digest()
    assert made == stream(words, files).digest()
    with files[1].open("a") as f:
        f.write('{"text": "one more"}\n')
    more = stream(words, files).digest()
    others = [stream(words, files, shuffle_buffer=9), stream(words, files, (2, 1, 1)), stream(words, files[:2])]
    assert len({made, more, *(s.digest() for s in others)}) == 5
