import pytest

from jaxtune import tuned
from jaxtune.data import encode
from jaxtune.data.examples import Conversation, Message
from jaxtune.errors import UserError
from jaxtune.explaining import questions
from tests.explaining.test_attributions import ask
from tests.tiny import write_tiny


def test_words_hold_all_tokens_in_order(reader, words):
    for r, label in ((reader, "day"), (words, " 3")):
        q = ask(r, "the fox, 太陽 eats 12", label)
        named = q.text.words(r.tuned.tokenizer)
        assert [i for _, tokens in named for i in tokens] == [*range(len(q.text.ids))]
        assert [w for w, _ in named if w.isalnum()][:2] == ["the", "fox"]
        assert {"太", "陽", "12"} <= {w for w, _ in named}
        assert "".join(q.text.pieces(r.tuned.tokenizer)).replace(" ", "").startswith(("thefox,", "<s>thefox,"))


def test_what_cannot_be_asked_says_why(reader, words):
    with pytest.raises(UserError, match="no label is named 'nigth'; did you mean 'night'"):
        ask(reader, "moon", "nigth")
    with pytest.raises(UserError, match="input 1: is empty"):
        ask(words, " ", " 3")
    with pytest.raises(UserError, match="adds no token"):
        ask(words, "1 + 2 =", "")
    long = questions.example_of(reader.tuned, "moon " * 40, "input 1")
    with pytest.raises(UserError, match="tokens are more than --max-tokens 16; shorten it, or raise that"):
        questions.text_of(reader.tuned, long, 16)
    with pytest.raises(UserError, match="more than the model's context of 128; shorten it"):
        questions.text_of(reader.tuned, questions.example_of(reader.tuned, "moon " * 100, "input 1"), 999)


def test_an_answer_has_the_tokens_that_it_is_trained_with(tmp_path):
    m = tuned.open_model(str(write_tiny(tmp_path / "chat", template=True)))
    c = Conversation((Message("user", "1 + 2 ="), Message("assistant", "the fox")), "messages", "a.jsonl:1")
    wanted = encode.tokens(c, m.tokenizer, encode.Settings(m.template)).ids.tolist()
    text = questions.text_of(m, c, 99)
    assert text.answer == "the fox"
    for answer in ("the fox", text.lead + "the fox"):
        q = questions.answered(m, text, answer)
        whole = [*q.ids, q.target[-1]]
        assert whole == wanted[: len(whole)]
        assert m.tokenizer.decode(q.target).strip() == "the fox"
