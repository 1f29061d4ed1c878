"""Calls of tools in texts, and what chat makes of an engine's pieces. The engine is a stand-in."""

import gzip
import shutil
from types import SimpleNamespace

import openai
import pytest

from jaxtune.data import encode, templates
from jaxtune.hf import tokenizer
from jaxtune.serve.api import tool_calls
from jaxtune.serve.api.chat import ChatMessage
from jaxtune.serve.api.tool_calls import Call
from jaxtune.serve.inference.asks import Ask, Failure, Piece

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ADD, SUB = Call("add", '{"a": 1, "b": "<x>"}'), Call("sub", "{}")
ONE = '{"name": "add", "arguments": {"a": 1, "b": "<x>"}}'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<tool_call>\n{ONE}\n</tool_call>", "", [ADD]),
        (f'Well.\n<tool_call>{ONE}</tool_call>\n<tool_call>{{"name": "sub"}}</tool_call>', "Well.", [ADD, SUB]),
        (f"[TOOL_CALLS] [{ONE}]", "", [ADD]),
        (f'[TOOL_CALLS][{ONE}, {{"name": "sub", "arguments": "{{}}"}}]', "", [ADD, SUB]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": "<x>"}}', "", [ADD]),
        (' {"name": "add", "parameters": {"a": 1, "b": "<x>"}}; {"name": "sub", "parameters": {}}', "", [ADD, SUB]),
    ],
)
def test_the_common_formats(text, content, calls):
    assert tool_calls.split(text, {"add", "sub"}) == (content, calls)
    for n in range(len(text)):  # what was told of a stream stays a beginning of the content
        assert content.startswith(text[: tool_calls.begins(text[:n])].rstrip())


@pytest.mark.parametrize(
    "text",
    ["", "4", "{", '{"name": "rm", "arguments": {}}', '{"a": 1}', "[1, 2]", "<tool_call>add(1)</tool_call>", "a < b",
     "<tool_call>", '[TOOL_CALLS] [{"name": ["add"]}]', "{" * 9000],
)  # fmt: skip
def test_what_is_no_call_is_text(text):
    assert tool_calls.split(text, {"add"}) == (text, [])


def answers(service, *texts):
    service.engine.answers = [*(Piece(0, t) for t in texts[:-1]), Piece(0, texts[-1], None, "stop", 9, -1.0)]


def chat(client, **options):
    messages = options.pop("messages", [{"role": "user", "content": "1 + x?"}])
    return client.chat.completions.create(model="demo", messages=messages, tools=TOOLS, **options)


PIECES = ("I add", ".\n\n<to", "ol_call>", ONE[:9], ONE[9:], "</tool_call>")


def test_a_call_is_told_as_one(client, service):
    answers(service, *PIECES)
    [choice] = chat(client).choices
    assert (choice.message.content, choice.finish_reason) == ("I add.", "tool_calls")
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, call.function.arguments) == ("function", *ADD)
    assert call.id.startswith("call_")
    assert service.engine.asked.tools == [TOOLS[0]]
    assert service.engine.asked.specials

    [choice] = chat(client, tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls) == ("".join(PIECES), None)
    assert not service.engine.asked.tools


def test_a_stream_holds_a_call_back_until_it_is_whole(client, service):
    answers(service, *PIECES)
    chunks = list(chat(client, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text.rstrip() == "I add."
    *_, call, last = chunks
    [one] = call.choices[0].delta.tool_calls
    assert (one.index, one.function.name, one.function.arguments) == (0, *ADD)
    assert last.choices[0].finish_reason == "tool_calls"

    answers(service, "{1", ", 2} is ", "a <", "b")
    chunks = list(chat(client, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "{1, 2} is a <b"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_conversation_with_calls_goes_to_the_engine_as_it_is(client, service):
    answers(service, *PIECES)
    said = chat(client).choices[0].message
    history = [
        {"role": "developer", "content": "Add."}, {"role": "user", "content": "1 + x?"}, said,
        {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": [{"type": "text", "text": "2"}]},
    ]  # fmt: skip
    chat(client, messages=history)
    system, _, call, result = service.engine.asked.messages
    assert system == {"role": "system", "content": "Add."}
    assert call["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": "<x>"}}
    assert result == {"role": "tool", "content": "2", "tool_call_id": said.tool_calls[0].id}


@pytest.mark.parametrize(
    ("broken", "words"),
    [(Failure(500, "it broke"), "it broke"), (ValueError("secret"), "The server had an error")],
)
def test_a_stream_that_breaks_ends_with_an_error(client, service, broken, words):
    service.engine.answers = [Piece(0, "So"), broken]
    for stream in (chat(client, stream=True), client.completions.create(model="demo", prompt="x", stream=True)):
        with pytest.raises(openai.APIError, match=words) as e:
            list(stream)
        assert "secret" not in str(e.value)
    with pytest.raises(openai.InternalServerError):
        chat(client)


@pytest.mark.parametrize(
    ("name", "template", "end"),
    [("qwen2.5", None, "<|im_end|>"), ("llama3", "llama3_1", "<|eot_id|>"), ("mistral_v3", "mistral_v3", "</s>")],
)
def test_what_real_templates_write_as_a_call_is_read_as_one(assets, tmp_path, name, template, end):
    """Through the prompts of the engine, with a real tokenizer; the call in between is the model's part."""
    from jaxtune.serve.inference.process import _prompts

    folder = shutil.copytree(assets / "tokenizers" / name, tmp_path / "t")
    if (packed := folder / "tokenizer.json.gz").exists():
        (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
    words = tokenizer.load(folder)
    text = templates.TEMPLATES[template] if template else words.chat_template
    held = SimpleNamespace(tuned=SimpleNamespace(
        tokenizer=words, template=text, asked=lambda c: encode.prompt_text(c, words, text),
        generator=SimpleNamespace(encode=lambda text: words(text, add_special_tokens=False).input_ids),
    ))  # fmt: skip
    call = {"id": "call_1", "type": "function", "function": ADD._asdict()}
    messages = [
        ChatMessage.model_validate(m).seen()
        for m in (
            {"role": "user", "content": "1 + x?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "2"},
        )
    ]
    [before] = _prompts(held, Ask("", messages=messages[:1], tools=TOOLS))
    [after] = _prompts(held, Ask("", messages=messages, tools=TOOLS))
    assert '"add"' in words.decode(before)
    assert after[: len(before)] == before
    said, rest = words.decode(after[len(before) :]).split(end, 1)
    assert '"a": 1' in said  # an object, not a string of one
    assert tool_calls.split(said, {"add"}) == ("", [ADD])
    assert "2" in rest
