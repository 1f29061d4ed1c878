import gzip
import json
import shutil

import numpy as np
import pytest

from jaxtune.data import encode
from jaxtune.data.encode import Settings
from jaxtune.data.examples import Conversation, Document, Message
from jaxtune.data.templates import TEMPLATES
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer

CHAT = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "Hi there"),
        Message("assistant", "Hello!"),
        Message("user", "How are you?"),
        Message("assistant", "Fine, thanks."),
    ),
    "messages",
    "f:1",
)


@pytest.fixture(scope="module")
def words(tiny):
    return tokenizer.load(tiny)


def trained(tok, e):
    return [t for t, on in encode.visible(tok, e.ids, e.mask) if on]


# What they cannot do with this conversation: a system message; or one turn as it was once another follows.
REFUSE_SYSTEM = {"gemma"}
REWRITE = {"qwen3", "mistral_v3", "mistral_v3_tekken"}
ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>\n", "<end_of_turn>", "<|end|>\n</s>", "<|end|>")


def words_of(text):
    for end in sorted(ENDS, key=len, reverse=True):
        text = text.removesuffix(end)
    return text.strip()


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_loss_falls_on_the_assistants_words_alone(words, name):
    c = CHAT._replace(messages=CHAT.messages[1:]) if name in REFUSE_SYSTEM else CHAT
    s = Settings(TEMPLATES[name], "last")
    assert words_of("".join(trained(words, encode.tokens(c, words, s)))).endswith("Fine, thanks.")
    assert encode.tokens(c, words, s._replace(train_on="all")).mask.all()
    if name in REWRITE:
        with pytest.raises(UserError, match="rewrites turn 2"):
            encode.tokens(c, words, s._replace(train_on="assistant"))
    else:
        got = trained(words, encode.tokens(c, words, s._replace(train_on="assistant")))
        assert [words_of(t) for t in got] == ["Hello!", "Fine, thanks."]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_prompt_of_a_turn_is_what_comes_before_its_answer(words, name):
    c = CHAT._replace(messages=CHAT.messages[1:]) if name in REFUSE_SYSTEM else CHAT
    prompt, answer = encode.prompt_text(c, words, TEMPLATES[name])
    e = encode.tokens(c, words, Settings(TEMPLATES[name], "last"))
    assert answer == "Fine, thanks."
    assert words.decode(e.ids[: e.mask.argmax()].tolist()) == prompt


@pytest.mark.parametrize("family", ["qwen2.5", "minimind", "deepseek_r1"])
def test_templates_of_real_tokenizers(assets, tmp_path, family):
    folder = assets / "tokenizers" / family
    for f in folder.iterdir():
        if f.suffix == ".gz":
            (tmp_path / f.stem).write_bytes(gzip.decompress(f.read_bytes()))
        else:
            shutil.copyfile(f, tmp_path / f.name)
    tok = tokenizer.load(tmp_path)
    assert tok.chat_template
    e = encode.tokens(CHAT, tok, Settings(tok.chat_template))
    got = "".join(trained(tok, e))
    assert "Hello!" in got
    assert "Fine, thanks." in got
    assert "Hi there" not in got
    assert "brief" not in got
    whole = tok.apply_chat_template([m._asdict() for m in CHAT.messages], tokenize=True, return_dict=False)
    assert e.ids.tolist() == list(whole)


SENTENCEPIECE = {"llama2", "mistral_v1", "mistral_v3", "llama3"}  # or tiktoken: they have a tokenizer.model


def whole(source, target):
    """A tokenizer folder of the assets, unpacked."""
    target.mkdir()
    for f in source.iterdir():
        if f.suffix == ".gz":
            (target / f.stem).write_bytes(gzip.decompress(f.read_bytes()))
        else:
            shutil.copyfile(f, target / f.name.removesuffix(".v3"))
    return target


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    "family", ["deepseek_r1", "gpt2", "llama2", "llama3", "minimind", "mistral_v1", "mistral_v3", "qwen2.5"]
)
def test_goldens_of_tokenizers(assets, tmp_path, family, alone):
    """The ids that the reference programs give, from the same files; also from a tokenizer.model alone."""
    folder = whole(assets / "tokenizers" / family, tmp_path / "t")
    if alone:
        if family not in SENTENCEPIECE:
            pytest.skip("has no tokenizer.model")
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    tok = tokenizer.load(folder)
    rows = [json.loads(x) for x in (assets / "goldens" / "tokenization.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["tokenizer"] == family]
    assert len(rows) == 32
    for row in rows:
        if alone and family != "llama3" and "<s>" in row["text"]:  # text to sentencepiece, a token to Hugging Face
            continue
        if not alone and type(tok).__name__ == "LlamaTokenizer" and row["text"].startswith(" "):
            continue  # transformers 5 drops a space in front, there as here
        assert tok(row["text"], add_special_tokens=False).input_ids == row["ids"], row["text"]


def test_published_encodings(assets, tmp_path):
    rows = [json.loads(x) for x in (assets / "goldens" / "published_encodings.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        family = {"llama3.2": "llama3"}.get(row["tokenizer"], row["tokenizer"])
        tok = tokenizer.load(whole(assets / "tokenizers" / family, tmp_path / str(i)))
        assert tok(row["text"], add_special_tokens=row["add_special"]).input_ids == row["ids"]


def test_a_document_is_closed_and_trained_on_throughout(words):
    e = encode.tokens(Document("the fox", "f:1"), words, Settings())
    assert e.ids[0] == words.bos_token_id
    assert e.ids[-1] == words.eos_token_id
    assert e.mask.all()


def test_a_template_that_rewrites_history_is_refused(words):
    forgetful = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}|{% endfor %}"
    with pytest.raises(UserError, match=r"f:1: the chat template rewrites turn 2.*train_on=last"):
        encode.tokens(CHAT, words, Settings(forgetful))
    encode.tokens(CHAT, words, Settings(forgetful, "last"))


def test_a_template_that_raises_is_reported(words):
    with pytest.raises(UserError, match=r"f:1: the chat template refuses the conversation: no"):
        encode.tokens(CHAT, words, Settings("{{ raise_exception('no') }}"))


def test_a_conversation_without_an_answer(words):
    alone = Conversation((Message("user", "x"),), "messages", "f:3")
    with pytest.raises(UserError, match="f:3: has no assistant turn"):
        encode.tokens(alone, words, Settings(TEMPLATES["plain"]))


def test_tokens_that_straddle_the_border_are_trained(words):
    asked = Conversation((Message("user", "the f"), Message("assistant", "ox")), "x", "f:1")
    e = encode.tokens(asked, words, Settings(TEMPLATES["plain"]))
    covered = words.decode(np.array(e.ids)[e.mask].tolist())
    assert covered.endswith("ox</s>")


def test_the_token_that_ends_a_turn(assets, words):
    qwen = tokenizer.load(assets / "tokenizers" / "qwen2.5")
    assert qwen.convert_ids_to_tokens(encode.turn_end(qwen, qwen.chat_template)) == ["<|im_end|>"]
    assert encode.turn_end(words, TEMPLATES["plain"]) == [words.eos_token_id]
    assert encode.turn_end(words, TEMPLATES["chatml"]) == []  # several tokens here


def test_today_does_not_change_the_data(words):
    dated = "{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    assert words.decode(encode.tokens(CHAT, words, Settings(dated, "all")).ids.tolist()).startswith("2024-07-26")
