import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jaxtune.data import encode
from jaxtune.data.encode import Settings
from jaxtune.data.examples import Conversation, Judged, Message, Pair, Record, Segments, Tokens
from jaxtune.data.templates import TEMPLATES
from jaxtune.data.truncation import cut_plain
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer

QUICK = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"


@pytest.fixture(scope="module")
def words(tiny):
    """The tiny tokenizer with ChatML's tokens."""
    tok = tokenizer.load(tiny)
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END]})
    return tok


# Each message's words are its own, so that one can tell where a piece of text came from.
sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5)


def chat(pairs, system=0):
    messages = [Message("system", " ".join(f"s{k}" for k in range(system)))] if system else []
    for i, (q, a) in enumerate(pairs):
        messages.append(Message("user", " ".join(f"q{i}.{k}" for k in range(q))))
        messages.append(Message("assistant", " ".join(f"a{i}.{k}" for k in range(a))))
    return Conversation(tuple(messages), "messages", "f:1")


def cut(words, c, room, where, train_on="assistant"):
    s = Settings(TEMPLATES["chatml"], train_on, room, where)
    return encode.encode(c, words, s), encode.tokens(c, words, s)


@QUICK
@given(
    sizes,
    st.sampled_from([0, 5]),
    st.integers(80, 400),
    st.sampled_from(["right", "left", "middle"]),
    st.sampled_from(["assistant", "last", "all"]),
)
def test_what_is_cut_is_still_a_question_and_an_answer(words, pairs, system, room, where, train_on):
    c = chat(pairs, system)
    (pieces, outcome), whole = cut(words, c, room, where, train_on)
    assert (outcome == "whole") == (len(whole.ids) <= room)
    if outcome == "whole":
        assert np.array_equal(pieces[0].ids, whole.ids)
        assert np.array_equal(pieces[0].mask, whole.mask)
        return
    assume(outcome != "long")  # the header, the system message and a few words of each turn are more than the room
    assert outcome == "cut"
    [e] = pieces
    assert len(e.ids) <= room
    assert e.mask.any()
    text = words.decode(e.ids.tolist())
    assert text.count("<|im_start|>") - text.count(END) in (0, 1)  # at most the last turn has lost its end
    assert text.startswith("<|im_start|>")
    if system:
        assert text.startswith("<|im_start|>system\ns0")
    turns = text.split(HEADER)
    assert len(turns) > 1  # a header of the assistant
    text = text.removesuffix("\n")  # trained on too with train_on=all
    answer = text.split(HEADER)[-1].removesuffix(END)
    i = next(i for i in reversed(range(len(pairs))) if any(w.startswith(f"q{i}.") for w in turns[-2].split()))
    original = c.messages[2 * i + 1 + bool(system)].content
    assert original.startswith(answer.rstrip("�"))
    assert answer
    assert turns[-2].endswith(f"q{i}.{pairs[i][0] - 1}"[-3:] + f"{END}\n")  # the end of the question
    assert not text.endswith(END) or answer == original
    if train_on != "all":
        for run, on in encode.visible(words, e.ids, e.mask):
            if on:
                body = run.removesuffix(END)
                assert any(m.role == "assistant" and m.content.startswith(body.rstrip("�")) for m in c.messages)


@pytest.mark.parametrize("where", ["right", "left", "middle"])
def test_what_each_way_keeps(words, where):
    c = chat([(30, 5), (30, 5), (30, 5)], system=3)
    (pieces, outcome), whole = cut(words, c, 300, where)
    assert len(whole.ids) > 300
    assert outcome == "cut"
    text = words.decode(pieces[0].ids.tolist())
    assert text.startswith("<|im_start|>system\ns0 s1 s2<|im_end|>")
    if where == "right":
        assert "q0.0 " in text
        assert "q2" not in text
    elif where == "left":
        assert "q0" not in text
        assert text.endswith(c.messages[-1].content + END)
    else:
        assert text.endswith(c.messages[-1].content + END)
        for q in ("q0", "q1", "q2"):
            assert f"{q}.0 " in text
            assert f"{q}.29" in text


@pytest.mark.parametrize(("where", "share"), [("right", 4), ("left", 2), ("middle", 2)])
def test_the_answers_share(words, where, share):
    """A question that is far too long leaves the answer its part."""
    (pieces, _), _ = cut(words, chat([(400, 400)]), 200, where)
    assert pieces[0].mask.sum() >= 200 // share
    (pieces, _), _ = cut(words, chat([(400, 3)]), 200, where)
    assert words.decode(pieces[0].ids[pieces[0].mask].tolist()) == "a0.0 a0.1 a0.2" + END


def test_a_cut_answer_does_not_end(words):
    (pieces, outcome), _ = cut(words, chat([(3, 200)]), 100, "right")
    assert outcome == "cut"
    assert len(pieces[0].ids) == 100
    assert words.convert_tokens_to_ids(END) not in pieces[0].ids[pieces[0].mask]


def test_left_out_whole(words):
    assert cut(words, chat([(50, 50)]), 100, "drop")[0] == encode.Encoding([], "long")
    assert cut(words, chat([(1, 1)]), 100, "drop")[0].outcome == "whole"
    system = chat([(1, 1)], system=8)
    stuck = system._replace(tools=({"type": "function", "function": {"name": "f" * 400}},))  # nothing there to cut
    assert cut(words, stuck, 100, "left")[0] == encode.Encoding([], "long")


def test_a_system_message_is_cut_last(words):
    c = chat([(40, 2)], system=40)
    text = words.decode(cut(words, c, 200, "middle")[0].pieces[0].ids.tolist())
    assert c.messages[0].content in text
    text = words.decode(cut(words, c, 110, "middle")[0].pieces[0].ids.tolist())
    assert "s0 " in text
    assert c.messages[0].content not in text


def test_answers_that_were_shortened_are_not_trained_on(words):
    c = chat([(2, 300), (2, 5)])
    (pieces, _), _ = cut(words, c, 150, "middle")
    got = [t for t, on in encode.visible(words, pieces[0].ids, pieces[0].mask) if on]
    assert got == [c.messages[-1].content + END]


@QUICK
@given(
    st.lists(st.booleans(), min_size=1, max_size=60), st.integers(4, 50), st.sampled_from(["right", "left", "middle"])
)
def test_text_without_turns(words, mask, room, where):
    ids = np.arange(len(mask), dtype=np.int32)
    e = Tokens(tuple(ids.tolist()), tuple(mask), "f:1")
    pieces, outcome = encode.encode(e, words, Settings(room=room, truncate=where))
    if len(ids) <= room:
        assert outcome == ("whole" if any(mask[1:]) else "empty")
    for piece in pieces:
        assert len(piece.ids) <= room
        assert (np.diff(piece.ids) > 0).all()
        assert [mask[i] for i in piece.ids] == piece.mask.tolist()
    if where == "right" and len(ids) > room:
        _, kept = cut_plain(ids, np.array(mask), room, where)
        assert kept.any() == any(mask)


def test_segments(words):
    parts = (("<s>Q: the fox?", False), (" A: berries", True), (" not", False), ("</s>", True))
    e = encode.tokens(Segments(parts, "f:1"), words, Settings())
    assert e.ids.tolist() == words("<s>Q: the fox? A: berries not</s>", add_special_tokens=False).input_ids
    assert [t for t, on in encode.visible(words, e.ids, e.mask) if on] == [" A: berries", "</s>"]
    pieces, outcome = encode.encode(Segments((("x" * 90, False), ("yes", True)), "f:1"), words, Settings(room=20))
    assert outcome == "cut"
    assert words.decode(pieces[0].ids[pieces[0].mask].tolist()) == "yes"


def test_tokens_as_they_are(words):
    e = encode.tokens(Tokens((5, 6, 7), (False, True, True), "f:1"), words, Settings())
    assert e.ids.tolist() == [5, 6, 7]
    assert e.mask.tolist() == [False, True, True]
    with pytest.raises(UserError, match=r"f:2: has token ids from 1 to 9999, the tokenizer those from 0 to"):
        encode.tokens(Tokens((1, 9999), (True, True), "f:2"), words, Settings())


def test_rows_of_other_objectives(words):
    m = (Message("user", "q"),)
    with pytest.raises(UserError, match=r"f:1: has two answers.*objective=dpo"):
        encode.encode(Pair(m, m, m, "preference", "f:1"), words, Settings())
    with pytest.raises(UserError, match=r"f:1: has an answer judged.*objective=kto"):
        encode.encode(Judged(Conversation(m, "kto", "f:1"), True, "f:1"), words, Settings())
    with pytest.raises(UserError, match=r"f:1: is a row of qa"):
        encode.encode(Record({}, "qa", "f:1"), words, Settings())
    with pytest.raises(UserError, match=r"f:1: a conversation needs a chat template"):
        encode.encode(Conversation(m, "messages", "f:1"), words, Settings())


def test_virtual_tokens_come_before_what_was_cut(words):
    s = Settings(TEMPLATES["chatml"], room=50, virtual=(7, 8))
    [e] = encode.encode(chat([(40, 40)]), words, s).pieces
    assert e.ids[:2].tolist() == [7, 8]
    assert not e.mask[:2].any()
    assert len(e.ids) <= 52
