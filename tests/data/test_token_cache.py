import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxtune.config import Data
from jaxtune.data import encode, pipeline, token_cache
from jaxtune.data.encode import Encoded, Encoding, Settings
from jaxtune.data.examples import Document
from jaxtune.data.token_cache import Encoder
from jaxtune.hf import tokenizer
from tests.tiny import write_jsonl


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return token_cache.folder()


@pytest.fixture(scope="module")
def words(tiny):
    return tokenizer.load(tiny)


def labelled(n, label):
    ids = np.arange(n, dtype=np.int32)
    columns = {"label_S": np.int32(label), "start_S": np.array([1.5, label], np.float32), "tag_T": ids * 2}
    return Encoded(ids, ids % 2 == 0, columns)


MADE = [
    Encoding([labelled(3, 7), labelled(2, 8)], "split"),
    Encoding([], "empty"),
    Encoding([labelled(5, 9)], "whole"),
]


def same(a, b):
    assert [(e.outcome, len(e.pieces)) for e in a] == [(e.outcome, len(e.pieces)) for e in b]
    for x, y in zip([p for e in a for p in e.pieces], [p for e in b for p in e.pieces], strict=True):
        for left, right in ((x.ids, y.ids), (x.mask, y.mask), *((x.columns[k], y.columns[k]) for k in x.columns)):
            np.testing.assert_array_equal(left, right)
            assert np.asarray(left).dtype == np.asarray(right).dtype
        assert [*x.columns] == sorted(y.columns)


def never():
    pytest.fail("the tokens were there")


@pytest.mark.parametrize("made", [MADE, [Encoding([], "long")], []])
def test_what_is_kept_comes_back(folder, made):
    given, there = token_cache.through("k", lambda: made)
    assert not there
    assert given is made
    found, there = token_cache.through("k", never)
    assert there
    same(made, found)
    assert [f.name for f in folder.iterdir()] == ["k.safetensors"]


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:-2] + b"xx", lambda b: b"", lambda b: b"\xff" * 99])
def test_what_is_damaged_is_made_anew(folder, damage, capfd):
    token_cache.through("d", lambda: MADE)
    file = folder / "d.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    log_once_again()
    _, there = token_cache.through("d", lambda: MADE)
    assert not there
    assert "damaged" in capfd.readouterr().err
    same(MADE, token_cache.through("d", never)[0])


def log_once_again():
    from jaxtune import log

    log._WARNED.clear()


def test_where_nothing_can_be_kept_the_run_goes_on(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert token_cache.through("k", lambda: MADE) == (MADE, False)
    assert "tokens cannot be kept" in capfd.readouterr().err


def test_one_makes_the_tokens_and_others_wait(folder):
    begun, calls = threading.Event(), []

    def slow():
        begun.set()
        calls.append(1)
        time.sleep(0.3)
        return MADE

    one = threading.Thread(target=lambda: token_cache.through("k", slow))
    one.start()
    begun.wait()
    found, there = token_cache.through("k", slow)
    one.join()
    assert there
    assert len(calls) == 1
    same(MADE, found)


def test_the_oldest_go(folder, monkeypatch):
    for i in range(4):
        token_cache.through(f"k{i}", lambda: MADE)
        file = folder / f"k{i}.safetensors"
        os.utime(file, (1000 + i, 1000 + i))
    monkeypatch.setattr(token_cache, "LIMIT", 3 * file.stat().st_size)
    token_cache.through("k0", never)  # used again
    token_cache.through("k4", lambda: MADE)
    assert sorted(f.stem for f in folder.iterdir()) == ["k0", "k3", "k4"]


def key(words, text="fox", origin="a:1", **settings):
    return token_cache.key(Encoder(encode.encode, words, Settings(**settings)), [Document(text, origin)])


def test_a_key_is_of_all_that_tokens_depend_on(words, tiny):
    first = key(words)
    assert first == key(words, origin="elsewhere:9")
    others = [
        key(words, "owl"),
        key(words, room=9),
        key(words, template="x"),
        key(words, virtual=(3,)),
    ]
    grown = tokenizer.load(tiny)
    assert key(grown) == first
    tokenizer.add(grown, ["<new>"], [])
    others += [key(grown), token_cache.key(Encoder(encode.tokens, words, Settings()), [Document("fox", "a:1")])]
    assert len({first, *others}) == 1 + len(others)


def test_a_key_is_the_same_in_another_process(words, tiny):
    code = (
        "from pathlib import Path; from jaxtune.data import encode, token_cache; from jaxtune.hf import tokenizer; "
        f"e = token_cache.Encoder(encode.encode, tokenizer.load(Path({str(tiny)!r})), encode.Settings()); "
        "from jaxtune.data.examples import Document; print(token_cache.key(e, [Document('fox', 'a:1')]))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert out.stdout.strip() == key(words)


def test_a_second_run_makes_no_tokens(folder, tmp_path, words, monkeypatch):
    file = write_jsonl(tmp_path / "d.jsonl", [{"text": f"the fox {i}"} for i in range(30)])
    data = Data(train=str(file), validation=5)
    first = pipeline.prepare(data, words, 0)
    monkeypatch.setattr(encode, "encode", never)
    assert first.remarks.count("train: tokens made, and kept for the next run") == 1
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent.parent))
    monkeypatch.setattr(encode, "tokens", never)
    second = pipeline.prepare(data, words, 0)
    assert {"train: tokens from the cache", "validation: tokens from the cache"} <= {*second.remarks}
    assert first.train.digest() == second.train.digest()
    assert first.train.origins == second.train.origins
    with pytest.raises(TypeError):
        pipeline.prepare(data.model_copy(update={"cache": False}), words, 0)
