"""The named templates against texts that the official ones, or Mistral's own encoder, gave."""

import json
from collections import Counter

import pytest

from jaxtune.data.rendering import render
from jaxtune.data.templates import TEMPLATES, choose
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer
from tests.data.test_encode import whole

ALIASES = {"phi3_5": "phi3", "qwen2.5": "qwen"}
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ASSISTANT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
UNOFFICIAL = {"chatml", "zephyr", "vicuna", "alpaca"}  # rendered by a collection's templates, not by the makers' own


def expected(row):
    """What ours should give: the golden, or what is known to be odd about it put right. None: a refusal."""
    name, case, text = row["template"], row["case"], row["text"]
    if name in UNOFFICIAL and case == "bad_order":
        return ...  # the collection wants user and assistant in turns; the makers' formats take any order
    if text is None:
        return None
    has_system = row["messages"][0]["role"] == "system"
    if name in UNOFFICIAL and case == "whitespace":  # the collection strips what the makers leave as it is
        text = text.replace("padded question", "  padded question \n").replace("padded answer", "\n padded answer  ")
    if name == "alpaca" and not has_system:  # Stanford's preamble was left out
        text = text.replace("<s>", f"<s>{PREAMBLE}\n\n", 1)
    if name == "vicuna":  # FastChat puts spaces where the collection has lines, and a preamble
        text = text.replace("\nASSISTANT:", " ASSISTANT:").replace("</s>\n", "</s>")
        text = text.replace("\n\nUSER", " USER", 1) if has_system else text.replace("<s>", f"<s>{ASSISTANT} ", 1)
    if name == "phi4" and not has_system:  # the collection's is of Phi-4-reasoning, which has a preamble
        text = text[text.index("<|im_end|>") + len("<|im_end|>") :]
    if name.startswith("mistral_v"):  # pieces of sentencepiece: a space in front of a text is not in the text
        text = text.replace("<s>▁", "<s>").replace("</s>▁", "</s>").replace("▁", " ").replace("<0x0A>", "\n")
    return text


def goldens(assets):
    rows = [json.loads(x) for x in (assets / "goldens" / "chat_templates.jsonl").read_text().splitlines()]
    return [r for r in rows if ALIASES.get(r["template"], r["template"]) in TEMPLATES]


def rendered(row, template, **more):
    tokens = {k: row[k] for k in ("bos_token", "eos_token", "tools")}
    turns = [(len(row["messages"]), row["add_generation_prompt"])]
    return render(template, row["messages"], turns, row["case"], {**tokens, **more})[0].text


def test_goldens(assets):
    seen = Counter()
    for row in goldens(assets):
        want, template = expected(row), TEMPLATES[ALIASES.get(row["template"], row["template"])]
        seen[row["template"]] += 1
        if want is None:
            with pytest.raises(UserError, match=f"{row['case']}: the chat template refuses"):
                rendered(row, template)
        elif want is not ...:
            assert rendered(row, template) == want, (row["template"], row["case"])
    assert len(seen) == 17
    assert seen.total() == 192


@pytest.mark.parametrize("family", ["qwen2.5", "minimind", "deepseek_r1"])
def test_goldens_of_tokenizers_with_a_template(assets, tmp_path, family):
    """Their own template through our renderer, in text and ids."""
    tok = tokenizer.load(whole(assets / "tokenizers" / family, tmp_path / "t"))
    rows = [json.loads(x) for x in (assets / "goldens" / "chat_templates.jsonl").read_text().splitlines()]
    rows = [r for r in rows if r["template"] == family]
    assert len(rows) >= 12
    for row in rows:
        text = rendered(row, tok.chat_template)
        assert text == row["text"]
        assert tok(text, add_special_tokens=False).input_ids == row["ids"]


@pytest.mark.parametrize("family", ["qwen2.5", "llama3", "deepseek_r1", "mistral_v1", "mistral_v3"])
def test_ids_of_the_named(assets, tmp_path, family):
    tok = tokenizer.load(whole(assets / "tokenizers" / family, tmp_path / "t"))
    rows = [r for r in goldens(assets) if r["ids_tokenizer"] == family]
    assert rows
    for row in rows:
        ids = tok(rendered(row, TEMPLATES[ALIASES.get(family, family)]), add_special_tokens=False).input_ids
        assert ids == row["ids"], row["case"]


def test_choosing_a_template(tmp_path):
    assert choose("auto", "own", "alpaca") == ("own", "the tokenizer's own")
    assert choose("auto", None, "alpaca")[1] == "alpaca"
    assert choose("auto", None, "sharegpt")[1] == "roles"
    assert choose("chatml", "own", "alpaca")[1] == "chatml"
    (tmp_path / "t.jinja").write_text("x")
    assert choose(str(tmp_path / "t.jinja"), None, "alpaca")[0] == "x"
    with pytest.raises(UserError, match="did you mean 'chatml'"):
        choose("chat_ml", None, "alpaca")
    (tmp_path / "b.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        choose(str(tmp_path / "b.jinja"), None, "alpaca")
    with pytest.raises(UserError, match=r"c.jinja: No such file"):
        choose(str(tmp_path / "c.jinja"), None, "alpaca")
