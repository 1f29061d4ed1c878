"""Modelfiles: Go templates that write what the chat templates write."""

import re

import pytest
from tokenizers import processors

from jaxtune.compress import ollama
from jaxtune.data.templates import TEMPLATES
from tests.tiny import write_tiny

KNOWN = (
    "chatml deepseek_r1 gemma gemma3 llama2 llama3 mistral_v1 mistral_v3 mistral_v3_tekken mistral_v7 "
    "mistral_v7_tekken phi phi3 phi4 plain qwen3 roles zephyr"
).split()
TALKS = [
    [("user", "Why?")],
    [("user", "Why?"), ("assistant", "So."), ("user", "And then?")],
    [("system", "Be brief."), ("user", "Why?")],
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    from jaxtune.hf import tokenizer

    return tokenizer.load(write_tiny(tmp_path_factory.mktemp("words") / "m"))


def written_by_go(template, messages):
    """What Go makes of a template of this module's kind: a loop over messages, with conditions and fields."""
    first, body, last = re.fullmatch(
        r"(.*?)\{\{ range \$i, \$m := \.Messages \}\}(.*)\{\{ end \}\}(.*?)", template, re.S
    ).groups()
    system, out = "".join(x for r, x in messages if r == "system"), first
    for i, (role, text) in enumerate(messages):
        inner = re.sub(
            r"\{\{ if and \$\.System \(le \$i 1\) \}\}(.*?)\{\{ \$\.System \}\}(.*?)\{\{ end \}\}",
            lambda m, here=bool(system) and i <= 1: m[1] + system + m[2] if here else "",
            body,
            flags=re.S,
        )
        for r, text_of in re.findall(r'\{\{ if eq \$m\.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', inner, re.S):
            if r == role:
                out += text_of.replace("{{ $m.Content }}", text)
    return out + last


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_what_go_writes_is_what_jinja_writes(words, name):
    text, _ = ollama.modelfile("model.gguf", words, TEMPLATES[name], ["</s>"])
    found = re.search(r'^TEMPLATE """(.*)"""$', text, re.S | re.M)
    assert bool(found) == (name in KNOWN), text
    assert 'PARAMETER stop "</s>"' in text
    for talk in TALKS if found else []:
        if talk[0][0] == "system" and "System" not in found[1] and '"system"' not in found[1]:
            continue
        rows = [{"role": r, "content": x} for r, x in talk]
        asked = {"chat_template": TEMPLATES[name], "tokenize": False, "add_generation_prompt": True}
        jinja = words.apply_chat_template(rows, **asked).removeprefix(words.bos_token)
        assert written_by_go(found[1], talk) == jinja


def test_a_first_token_that_the_tokenizer_does_not_add_is_in_the_template(words):
    def made():
        return ollama.modelfile("m.gguf", words, TEMPLATES["llama3"], [])[0].split('"""')[1]

    own, bos = words.backend_tokenizer.post_processor, words.bos_token
    adding = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words.bos_token_id)])
    found = []
    for each in (None, adding):
        words.backend_tokenizer.post_processor = each
        found.append(made())
    words.backend_tokenizer.post_processor = own
    assert found[0] == bos + found[1]
    assert found[1].startswith("{{ range")


def test_what_is_missing_is_said(words):
    text, remark = ollama.modelfile("m.gguf", words, None, [], "Be kind.")
    assert text == 'FROM ./m.gguf\nSYSTEM """Be kind."""\n'
    assert "no chat template" in remark
    text, remark = ollama.modelfile("m.gguf", words, TEMPLATES["vicuna"], [])
    assert text == "FROM ./m.gguf\n"
    assert "not written in Go" in remark
