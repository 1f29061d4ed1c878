import concurrent.futures
import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path

import jinja2
import pytest

from jaxtune.data import rendering
from jaxtune.data.rendering import render
from jaxtune.data.templates import TEMPLATES
from jaxtune.errors import UserError
from jaxtune.hf import tokenizer

HI = [{"role": "user", "content": "Hi"}]


def text(template, messages=HI, **variables):
    return render(template, messages, [(len(messages), False)], "f:1", variables)[0].text


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 10 ** (10 ** 9) }}",
    ],
)
def test_a_runaway_is_stopped_and_the_next_is_served(monkeypatch, template):
    text("warm")
    monkeypatch.setattr(rendering, "SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(UserError, match="f:1: the chat template takes longer than 1 seconds and was stopped"):
        text(template)
    assert time.monotonic() - began < 10
    monkeypatch.undo()
    assert text("{{ messages[0].content }}") == "Hi"


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ 'a' * 10 ** 10 }}", "refuses the conversation: MemoryError"),
        ("{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}", "writes more than .* characters"),
        ("{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "MemoryError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation: TypeError"),
        ("{% include 'x' %}", "no loader"),
        ("{% for %}", "not valid Jinja: line 1"),
        ("x" * 300_000, "has 300000 characters, at most 262144"),
    ],
)
def test_faulty_templates(template, match):
    with pytest.raises(UserError, match=match):
        text(template)
    assert text("{{ messages[0].content }}") == "Hi"


def test_the_renderer_sees_nothing_of_this_process(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "secret")
    with rendering._lock:
        rendering._stop()
    assert text("x") == "x"
    environment = Path(f"/proc/{rendering._running[0].popen.pid}/environ").read_text()
    assert "PATH" in environment
    assert "SOME_TOKEN" not in environment


def test_several_threads_and_processes():
    def one(i):
        return text("{{ messages[0].content }}", [{"role": "user", "content": f"{i}"}])

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(one, range(200))) == [f"{i}" for i in range(200)]
    mine = rendering._running[0].popen.pid
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe()

    def child():
        send.send((one("child"), rendering._running[0].popen.pid))
        os._exit(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside threads: jax and Python warn of it
        process = context.Process(target=child)
        process.start()
    said, its = receive.recv()
    process.join()
    assert said == "child"
    assert its != mine
    assert one("parent") == "parent"
    assert rendering._running[0].popen.pid == mine


def test_it_renders_as_transformers_does(assets):
    tok = tokenizer.load(assets / "tokenizers" / "qwen2.5")
    rows = [json.loads(x) for x in (assets / "goldens" / "chat_templates.jsonl").read_text().splitlines()]
    cases = {r["case"]: r for r in rows if r["template"] == "qwen2.5"}.values()
    odd = (
        "{%- for m in messages -%}\n  {% if loop.first %}\n x {{ m | tojson(indent=2) }}\n  {% endif %}\n"
        "{% generation %}{{ m.content | trim }}{% endgeneration %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{% endfor %}{{ tools | length if tools else 'none' }}{{ dict(a=1) }} {{ namespace(b=2).b }}\n"
    )
    for template in (odd, *(TEMPLATES[n] for n in ("qwen3", "llama3_1", "deepseek_r1", "mistral_v7"))):
        for row in cases:
            m, tools, prompt = row["messages"], row["tools"], row["add_generation_prompt"]
            try:
                want = tok.apply_chat_template(
                    m, tools=tools, chat_template=template, add_generation_prompt=prompt, tokenize=False
                )
            except (jinja2.TemplateError, TypeError):
                with pytest.raises(UserError, match="refuses"):
                    render(template, m, [(len(m), prompt)], "f:1", {"tools": tools, **tok.special_tokens_map})
                continue
            got = render(template, m, [(len(m), prompt)], "f:1", {"tools": tools, **tok.special_tokens_map})
            assert got[0].text == want


def test_what_a_template_marks_as_the_assistants():
    template = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}"
    both = [*HI, {"role": "assistant", "content": "Hello \ue000"}]
    whole, first = render(template, both, [(2, False), (1, False)], "f:1", {})
    assert [whole.text[a:b] for a, b in whole.marked] == ["Hi", "Hello \ue000"]
    assert first == rendering.Rendered("<Hi>", [(1, 3)])


def test_arguments_of_calls_as_the_template_wants_them():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}
    parsed = {**call, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    written = {**call, "tool_calls": [{"function": {"name": "f", "arguments": "not json"}}]}
    for m in (call, parsed):
        assert text("{{ messages[0].tool_calls[0].function.arguments | tojson }}", [m]) == '{"a": 1}'
        assert text("{{ messages[0].tool_calls[0].function.arguments + '!' }}", [m]) == '{"a": 1}!'
    assert text("{{ messages[0].tool_calls[0].function.arguments }}", [written]) == "not json"


def test_text_of_every_kind_comes_back():
    odd = "\ud800 \x00 \n\r\u2028 😀 \ue000"
    assert text("{{ messages[0].content }}", [{"role": "user", "content": odd}]) == odd


def test_what_is_not_json():
    with pytest.raises(UserError, match=r"f:1: the conversation holds what is not JSON \(.*set"):
        text("x", [{"role": "user", "content": "a", "when": {1}}])
