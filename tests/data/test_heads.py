"""Rows for heads: labels, words and tags, windows over long contexts, answers read from logits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data import heads
from jaxtune.data.examples import Record
from jaxtune.data.heads import HeadSettings
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer


@pytest.fixture(scope="module")
def words(tiny):
    return tokenizer.load(tiny)


def settings_of(objective, labels=("a", "b"), multi=False, **more):
    return HeadSettings(objective, labels, multi, **{"room": 32, **more})


def classified(text, label=None, **more):
    return Record({"text": text, "label": label, **more}, "classification", "f:1")


def test_labels_are_those_of_the_data_in_order():
    rows = [classified("x", "10"), classified("y", "9"), classified("z", "-1")]
    assert heads.label_names(rows, "classification", []) == (("-1", "9", "10"), False)
    assert heads.label_names(rows, "classification", ["x", "y"])[0] == ("x", "y")
    several = [classified("x", ["b", "a"]), classified("y", [])]
    assert heads.label_names(several, "classification", []) == (("a", "b"), True)
    tagged = [Record({"tokens": ["x", "y"], "tags": ["B-c", "O"]}, "token_classification", "f:1")]
    assert heads.label_names(tagged, "token_classification", [])[0] == ("O", "B-c")
    with pytest.raises(UserError, match="needs two labels or more, the data has a"):
        heads.label_names([classified("x", "a")], "classification", [])


def test_the_last_token_is_no_padding_and_carries_the_label(words):
    e = heads.encode(classified("the fox", "b"), words, settings_of("classification")).pieces[0]
    assert e.ids.tolist() == words("the fox").input_ids
    assert e.columns["label_S"] == 1
    several = heads.encode(classified("the fox", ["a", "b"]), words, settings_of("classification", multi=True))
    np.testing.assert_array_equal(several.pieces[0].columns["label_S"], [1, 1])
    pair = heads.encode(classified("the", "a", text_pair="fox"), words, settings_of("classification")).pieces[0]
    assert words.decode(pair.ids.tolist(), skip_special_tokens=True) == "the\nfox"
    asked = settings_of("classification", prompt="Is {text} good?")
    assert "Is the fox good?" in words.decode(heads.encode(classified("the fox", "a"), words, asked).pieces[0].ids)


@pytest.mark.parametrize(
    ("example", "objective", "message"),
    [
        (classified("x", "c"), "classification", "f:1: label 'c' is not among 2 known ones"),
        (classified("x", ["a", "b"]), "classification", "has 2 labels where every other row has one"),
        (classified("x", "a"), "span_qa", "objective span_qa wants rows of format 'qa'"),
        (Record({"tokens": ["x"], "tags": ["B-z"]}, "token_classification", "f:1"), "token_classification", "'B-z'"),
        (Record({"question": "x", "context": ""}, "qa", "f:1"), "span_qa", "f:1: the context is empty"),
    ],
)
def test_what_does_not_fit_is_said(words, example, objective, message):
    with pytest.raises(UserError, match=message):
        heads.encode(example, words, settings_of(objective))


@settings(max_examples=30, deadline=None)
@given(text=st.text(min_size=0, max_size=80), how=st.sampled_from(["right", "left", "middle", "drop"]))
def test_texts_fit_whatever_they_are(words, text, how):
    found = heads.encode(classified(text, "a"), words, settings_of("classification", room=12, truncate=how))
    whole = words(text).input_ids
    if len(whole) <= 12:
        assert found.outcome == "whole"
    assert (found.pieces == []) == (found.outcome == "long") == (how == "drop" and len(whole) > 12)
    for piece in found.pieces:
        assert 0 < len(piece.ids) <= 12
        if how == "left" and len(whole) > 12:
            assert piece.ids.tolist()[-5:] == whole[-5:]


@settings(max_examples=30, deadline=None)
@given(tokens=st.lists(st.text("abxyzäß ,", min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=8))
def test_every_word_within_the_room_is_tagged_once(words, tokens):
    tags = ["B-a" if i % 2 else "O" for i in range(len(tokens))]
    record = Record({"tokens": tokens, "tags": tags}, "token_classification", "f:1")
    s = settings_of("token_classification", ("O", "B-a"), room=1000)
    _, firsts = heads.first_tokens(record, words, s)
    there = [at for at in firsts if at >= 0]
    assert there == sorted(set(there))
    e = heads.encode(record, words, s).pieces[0]
    assert np.flatnonzero(e.mask).tolist() == there
    assert [s.labels[k] for k in e.columns["label_T"][e.mask]] == [
        t for t, at in zip(tags, firsts, strict=True) if at >= 0
    ]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60), start=st.integers(0, 59), room=st.integers(16, 48), stride=st.integers(0, 20),
    question=st.text("abc?", min_size=1, max_size=40),
)  # fmt: skip
def test_windows_cover_the_context_and_find_the_answer(words, n, start, room, stride, question):
    """All of the context is seen, in windows that fit; an answer that a window holds whole is read back from it."""
    context = " ".join(f"w{i}" for i in range(n))
    said = f"w{min(start, n - 1)}"
    a = context.index(said + " ") if f"{said} " in context else context.rindex(said)
    record = Record(
        {"question": question, "context": context, "answers": {"text": [said], "answer_start": [a]}}, "qa", "f:1"
    )
    s = settings_of("span_qa", ("answer",), room=room, stride=stride)
    found = heads.windows(record, words, s)
    assert all(len(w.ids) <= room for w in found)
    seen = {c for w in found for p in w.places if p for c in range(*p)}
    assert {i for i, c in enumerate(context) if c != " "} <= seen
    pieces = heads.encode(record, words, s).pieces
    hits = 0
    for w, e in zip(found, pieces, strict=True):
        i, j = int(e.columns["start_S"]), int(e.columns["end_S"])
        if i:
            assert said in context[w.places[i][0] : w.places[j][1]]
            logits_n2 = np.zeros((len(w.ids), 2), np.float32)
            logits_n2[i, 0] = logits_n2[j, 1] = 5
            assert said in heads.answer(record, [w], [logits_n2], null=True)[0]
            hits += 1
    assert hits or stride < 6  # a window holds it whole where they overlap by more than an answer


def test_no_answer_is_said_where_it_is_likelier(words):
    record = Record({"question": "who?", "context": "the fox eats"}, "qa", "f:1")
    found = heads.windows(record, words, settings_of("span_qa"))
    logits_n2 = np.zeros((len(found[0].ids), 2), np.float32)
    logits_n2[0] = 3
    assert heads.answer(record, found, [logits_n2], null=True)[0] == ""
    assert heads.answer(record, found, [logits_n2], null=False)[0] != ""
    logits_n2[-1] = 4
    assert heads.answer(record, found, [logits_n2], null=True)[0].endswith("s")
