import json

import pytest

from jaxtune.data.examples import Message
from jaxtune.errors import UserError
from tests.data.formats.rows import TURNS, one

TOOL = {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Oslo"}}}


def turns(conversation):
    return [(m.role, m.content) for m in conversation.messages]


def test_openai_messages(tmp_path):
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Time?", "name": "ann"},
            {"role": "assistant", "content": None, "weight": 0,
             "tool_calls": [{"id": "c1", "function": {"name": "clock", "arguments": '{"city": "Oslo"}'}}]},
            {"role": "tool", "content": "14:05", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Five past two.", "reasoning_content": "easy", "refusal": None},
        ],
        "tools": json.dumps([{"type": "function", "function": TOOL}]),
    }  # fmt: skip
    e = one(tmp_path, row)
    assert turns(e) == [
        ("system", "Be brief."),
        ("user", "Time?"),
        ("assistant", ""),
        ("tool", "14:05"),
        ("assistant", "Five past two."),
    ]
    assert [m.trained for m in e.messages] == [True, True, False, True, True]
    assert [m.extra for m in e.messages] == [
        {},
        {"name": "ann"},
        {"tool_calls": [{"id": "c1", **CALL}]},
        {"tool_call_id": "c1"},
        {"reasoning_content": "easy"},
    ]
    assert e.tools == ({"type": "function", "function": TOOL},)


def test_sharegpt_with_calls_and_tools(tmp_path):
    row = {
        "conversations": [
            {"from": "human", "value": "Time?"},
            {"from": "function_call", "value": '[{"name": "clock", "arguments": {"city": "Oslo"}}, {"name": "stop"}]'},
            {"from": "observation", "value": {"time": "14:05"}},
            {"from": "gpt", "value": "Five past two."},
        ],
        "system": "Be brief.",
        "tools": [TOOL],
    }
    e = one(tmp_path, row)
    assert turns(e)[0] == ("system", "Be brief.")
    assert turns(e)[3] == ("tool", '{"time": "14:05"}')
    stop = {"type": "function", "function": {"name": "stop", "arguments": {}}}
    assert e.messages[2] == Message("assistant", "", True, {"tool_calls": [CALL, stop]})
    assert e.tools == ({"type": "function", "function": TOOL},)


def test_tags(tmp_path):
    row = {"talk": [{"who": "me", "says": "Hi"}, {"who": "bot", "says": "Hello"}]}
    tags = {"role": "who", "content": "says", "user": "me", "assistant": "bot"}
    e = one(tmp_path, row, format="sharegpt", columns={"conversations": "talk"}, tags=tags)
    assert turns(e) == [("user", "Hi"), ("assistant", "Hello")]
    with pytest.raises(UserError, match="unknown tag 'rolle'; did you mean 'role'"):
        one(tmp_path, row, format="sharegpt", columns={"conversations": "talk"}, tags={"rolle": "who"})


def test_lists_as_prompt_and_completion_train_on_the_completion(tmp_path):
    e = one(tmp_path, {"prompt": [*TURNS, {"role": "user", "content": "Bye"}], "completion": TURNS[1:]})
    assert [m.trained for m in e.messages if m.role == "assistant"] == [False, True]


def test_alpaca_history_is_trained_on(tmp_path):
    row = {"instruction": "C", "output": "D", "history": [["A", "B"]], "system": "S"}
    e = one(tmp_path, row)
    assert [m.content for m in e.messages] == ["S", "A", "B", "C", "D"]
    assert all(m.trained for m in e.messages)
    assert one(tmp_path, {**row, "input": "E"}, tags={"separator": "\n"}).messages[3].content == "C\nE"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "is of type 'image_url'; only text"),
        ({"role": "user", "content": None}, "'content' is missing"),
        ({"role": "assistant", "content": "x", "weight": 2}, "messages[0].weight is 2; allowed"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]},
            "tool_calls[0] should be a function",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "tool_calls[0].arguments",
        ),
        ({"role": ["user"], "content": "x"}, "messages[0].role is ['user']; allowed"),
        (7, "messages[0] should have"),
    ],
)
def test_bad_messages(tmp_path, message, words):
    with pytest.raises(UserError) as e:
        one(tmp_path, {"messages": [message]})
    assert words in str(e.value)
    assert "d.jsonl:1: " in str(e.value)
