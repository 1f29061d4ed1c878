import json

import pytest

from jaxtune.config import Source
from jaxtune.data import formats
from jaxtune.data.examples import Conversation, Document, Judged, Message, Pair, Record, Segments, Tokens
from jaxtune.errors import UserError


def read(path, **options):
    return formats.read(Source(path=str(path), **options))


def jsonl(tmp_path, *rows):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "kind", "messages"),
    [
        ({"messages": [{"role": "system", "content": "S"}, *TURNS]}, "messages", ["S", "Hi", "Hello"]),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", ["a", "b"]),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca", ["Add.\n\n1 2", "3"]),
        ({"instruction": "Add.", "input": "", "output": "3"}, "alpaca", ["Add.", "3"]),
        ({"instruction": "Add.", "output": "3", "system": "S"}, "alpaca", ["S", "Add.", "3"]),
    ],
)
def test_formats_are_told_by_their_columns(tmp_path, row, kind, messages):
    [e] = read(jsonl(tmp_path, row))
    assert e.format == kind
    assert [m.content for m in e.messages] == messages
    assert e.origin.endswith("d.jsonl:1")


def test_text_is_a_document(tmp_path):
    assert read(jsonl(tmp_path, {"text": "Once"}))[0][0] == "Once"
    assert isinstance(read(jsonl(tmp_path, {"text": "Once"}))[0], Document)


def test_csv_with_named_columns(tmp_path):
    file = tmp_path / "d.csv"
    file.write_text('question,answer\n"What, now?","Yes\nno"\nWho?,Me\n')
    got = read(file, columns={"prompt": "question", "completion": "answer"})
    assert got[0].messages == (Message("user", "What, now?"), Message("assistant", "Yes\nno"))
    assert len(got) == 2


def test_columns_can_swap(tmp_path):
    [e] = read(
        jsonl(tmp_path, {"prompt": "a", "completion": "b"}), columns={"prompt": "completion", "completion": "prompt"}
    )
    assert [m.content for m in e.messages] == ["b", "a"]


def test_max_samples_and_blank_lines(tmp_path):
    file = jsonl(tmp_path, *[{"text": str(i)} for i in range(5)])
    file.write_text(file.read_text().replace("\n", "\n\n", 1))
    got = read(file, max_samples=2)
    assert [e.text for e in got] == ["0", "1"]
    assert got[1].origin.endswith(":3")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", '{"text": "x"}\n{"text": "y', "a.jsonl:2: a JSON object was expected"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: a JSON object was expected, got list"),
        ("a.jsonl", '{"foo": "x"}\n', "columns 'foo' fit no format"),
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', "a.jsonl:2: no column 'text', which format 'text' needs"),
        ("a.jsonl", '{"text": 3}\n', "a.jsonl:1: column 'text' should be text, got int"),
        ("a.jsonl", '{"messages": "x"}\n', "'messages' should be a list"),
        ("a.jsonl", '{"messages": [{"role": "bot", "content": "x"}]}\n', "messages[0].role is 'bot'; allowed"),
        ("a.jsonl", '{"messages": [{"content": "x"}]}\n', "messages[0] should have 'role' and 'content'"),
        ("a.csv", 'text\n"x\n', "not CSV"),
        ("a.csv", "prompt,completion\nx\n", "2 columns were expected"),
        ("a.pdf", "x", "files of type '.pdf' are not read"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as e:
        read(tmp_path / name)
    assert words in str(e.value)
    assert str(tmp_path / name) in str(e.value)


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"no such file; did you mean 'train.jsonl'"):
        read(tmp_path / "trian.jsonl")


def test_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path / "a.jsonl")


def test_system_must_come_first(tmp_path):
    with pytest.raises(UserError, match="it can only come first"):
        read(jsonl(tmp_path, {"messages": [TURNS[0], {"role": "system", "content": "x"}]}))


def test_a_conversation_is_plain_data():
    assert Conversation((Message("user", "x"),), "messages", "f:1").messages[0].role == "user"


# --- chats ------------------------------------------------------------------------------------------------------------

TOOL = {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"city": "Oslo"}}}


def one(tmp_path, row, **options):
    [e] = read(jsonl(tmp_path, row), **options)
    return e


def turns(conversation):
    return [(m.role, m.content) for m in conversation.messages]


def test_openai_messages(tmp_path):
    row = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Time?", "name": "ann"},
            {"role": "assistant", "content": None, "weight": 0,
             "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "clock", "arguments": '{"city": "Oslo"}'}}]},
            {"role": "tool", "content": "14:05", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Five past two.", "reasoning_content": "easy", "weight": 1, "refusal": None},
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


# --- text without a template ------------------------------------------------------------------------------------------


def test_segments_and_tokens(tmp_path):
    e = one(tmp_path, {"segments": [{"text": "a", "label": False}, {"text": "b", "label": True}]})
    assert e == Segments((("a", False), ("b", True)), e.origin)
    e = one(tmp_path, {"input_ids": [1, 2, 3, 0], "labels": [-100, 2, 3, -100], "attention_mask": [1, 1, 1, 0]})
    assert e == Tokens((1, 2, 3), (False, True, True), e.origin)
    assert one(tmp_path, {"input_ids": [1, 2]}).mask == (True, True)
    for row, words in (
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids, 1 labels"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, r"labels\[1\] is 3; allowed: input_ids\[1\], 2, or -100"),
        ({"input_ids": [1, -2]}, "should be token ids"),
        ({"input_ids": [1, True]}, "should be a whole number"),
        ({"segments": [{"text": "a"}]}, r"segments\[0\] should have 'text' and 'label'"),
    ):
        with pytest.raises(UserError, match=words):
            one(tmp_path, row)


# --- preferences ------------------------------------------------------------------------------------------------------

GOOD, BAD = [{"role": "assistant", "content": "Yes"}], [{"role": "assistant", "content": "No"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "Yes", "rejected": "No"},
        {"prompt": TURNS[:1], "chosen": GOOD, "rejected": BAD},
        {"chosen": [*TURNS[:1], *GOOD], "rejected": [*TURNS[:1], *BAD]},
        {"prompt": "Hi", "chosen": [*TURNS[:1], *GOOD], "rejected": [*TURNS[:1], *BAD], "messages": [*TURNS[:1], *GOOD]},
        {"chosen": "Well, then: Yes", "rejected": "Well, then: No"},
        {"input": {"messages": TURNS[:1]}, "preferred_output": GOOD, "non_preferred_output": BAD},
        {"instruction": "Hi", "input": "", "chosen": "Yes", "rejected": "No"},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yes"},
         "rejected": {"from": "gpt", "value": "No"}},
    ],
)  # fmt: skip
def test_preferences(tmp_path, row):
    p = one(tmp_path, row)
    assert isinstance(p, Pair)
    assert [m.role for m in p.prompt] == ["user"]
    assert [(m.role, m.content) for m in (*p.chosen, *p.rejected)] == [("assistant", "Yes"), ("assistant", "No")]


def test_preferences_that_are_none(tmp_path):
    for row, words in (
        ({"chosen": "Yes", "rejected": "No"}, "has no prompt"),
        ({"prompt": "Q", "chosen": TURNS[:1], "rejected": BAD}, "'chosen' does not end with an assistant's message"),
        ({"prompt": "Q", "chosen": "Yes", "rejected": None}, "no column 'rejected'"),
        ({"preferred_output": GOOD, "non_preferred_output": BAD}, "'input' with 'messages'"),
    ):
        with pytest.raises(UserError, match=words):
            one(tmp_path, row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "completion": "A", "label": True},
        {"prompt": TURNS[:1], "completion": TURNS[1:], "label": 1},
        {"messages": TURNS, "label": "True"},
        {"instruction": "Q", "output": "A", "kto_tag": True},
    ],
)
def test_kto(tmp_path, row):
    j = one(tmp_path, row)
    assert isinstance(j, Judged)
    assert j.good
    assert [m.role for m in j.conversation.messages] == ["user", "assistant"]


def test_kto_trains_on_what_was_judged(tmp_path):
    j = one(tmp_path, {"messages": [*TURNS, *TURNS], "label": False})
    assert [m.trained for m in j.conversation.messages] == [False, False, False, True]
    with pytest.raises(UserError, match="nothing that the label judges"):
        one(tmp_path, {"messages": TURNS[:1], "label": False})
    with pytest.raises(UserError, match="column 'label' should be true or false, got 'maybe'"):
        one(tmp_path, {"messages": TURNS, "label": "maybe"})


# --- records ----------------------------------------------------------------------------------------------------------

CONTEXT = "Oslo is in Norway. Norway is cold."


@pytest.mark.parametrize(
    ("task", "row", "want"),
    [
        ("classification", {"text": "x", "label": 1}, {"label": "1"}),
        ("classification", {"text": "x", "label": 2.0}, {"label": "2"}),
        ("classification", {"text": "x", "label": ["a", 3]}, {"label": ["a", "3"]}),
        ("classification", {"text": "x", "label": '["a", "b"]'}, {"label": ["a", "b"]}),
        ("classification", {"text": "x", "label": "[a]"}, {"label": "[a]"}),
        ("regression", {"text": "x", "label": "3.5"}, {"label": 3.5}),
        ("maths", {"question": "q", "answer": 42}, {"answer": "42"}),
        ("summarisation", {"document": "d", "summary": "s", "summaries": ["s", "t"]}, {"summaries": ["s", "t"]}),
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": 1}, {"answer": 1}),
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": "B"}, {"answer": 1}),
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": "b"}, {"answer": 1}),
        ("choice", {"question": "q", "choices": '["a", "b"]', "answer": "1"}, {"answer": 1}),
        ("choice", {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answer": "2"}, {"answer": 1}),
        ("token_classification", {"tokens": ["a", "b"], "tags": ["O", 3]}, {"tags": ["O", "3"]}),
        ("token_classification", {"text": "to Oslo", "spans": [{"start": 3, "end": 7, "label": "c"}]}, {"text": "to Oslo"}),
        ("qa", {"context": CONTEXT, "question": "q", "answers": {"text": ["Norway"], "answer_start": [11]}},
         {"answers": {"text": ["Norway"], "answer_start": [11]}}),
        ("qa", {"context": CONTEXT, "question": "q", "answers": [{"text": "Norway", "answer_start": 17}]},
         {"answers": {"text": ["Norway"], "answer_start": [19]}}),
        ("qa", {"context": CONTEXT, "question": "q", "answers": "Oslo", "id": 7},
         {"answers": {"text": ["Oslo"], "answer_start": [0]}, "id": "7"}),
        ("qa", {"context": CONTEXT, "question": "q", "answers": {"text": [], "answer_start": []}},
         {"answers": {"text": [], "answer_start": []}}),
        ("qa", {"context": CONTEXT, "question": "q", "answers": ["Bergen"]},
         {"answers": {"text": ["Bergen"], "answer_start": [-1]}}),
    ],
)  # fmt: skip
def test_records(tmp_path, task, row, want):
    e = one(tmp_path, {**row, "more": 1}, format=task)
    assert isinstance(e, Record)
    assert e.task == task
    assert {k: e.row[k] for k in want} == want
    assert e.row["more"] == 1


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("classification", {"text": "x", "label": None}, "no column 'label'"),
        ("classification", {"text": "x", "label": {}}, "should be a label"),
        ("regression", {"text": "x", "label": "many"}, "should be a number, got 'many'"),
        ("regression", {"text": "x", "label": 10**400}, "should be a number"),
        ("choice", {"question": "q", "choices": ["1", "2"], "answer": "1"}, "names more than one"),
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": 2}, "names none of 2 choices"),
        ("choice", {"question": "q", "choices": ["a"], "answer": 0}, "a list of two texts or more"),
        ("token_classification", {"tokens": ["a"], "tags": []}, "1 tokens and 0 tags"),
        ("token_classification", {"text": "ab", "spans": [{"start": 1, "end": 3, "label": "c"}]}, "1 to 3 of a text of 2"),
        ("token_classification", {"text": "ab", "slots": [{"entity": "c", "value": "z"}]}, "the text has no 'z'"),
        ("qa", {"context": "c", "question": "q", "answers": {"text": ["c"], "answer_start": []}}, "1 texts and 0 starts"),
        ("translation", {"translation": {"en": "a", "de": "b"}}, "no column 'source'.*{source: en}"),
    ],
)  # fmt: skip
def test_bad_records(tmp_path, task, row, words):
    with pytest.raises(UserError, match=words):
        one(tmp_path, row, format=task)


def test_translation_pairs(tmp_path):
    row = {"translation": {"en": "cat", "de": "Katze"}}
    e = one(tmp_path, row, columns={"source": "en", "target": "de"})
    assert (e.task, e.row["source"], e.row["target"]) == ("translation", "cat", "Katze")


def squad(*qas):
    return {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": CONTEXT, "qas": list(qas)}]}]}


ASKED = [
    {"id": "a", "question": "Where?", "answers": [{"text": "Norway", "answer_start": 11}], "is_impossible": False},
    {"id": "b", "question": "Why?", "answers": [], "is_impossible": True,
     "plausible_answers": [{"text": "cold", "answer_start": 29}]},
    {"id": "c", "question": "How?", "answers": [{"text": "cold", "answer_start": 29}]},
]  # fmt: skip


def test_squad_files(tmp_path):
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(squad(*ASKED)))
    got = read(file)
    assert [(e.row["id"], e.row["answers"]["text"], e.row["title"]) for e in got] == [
        ("a", ["Norway"], "T"),
        ("b", [], "T"),
        ("c", ["cold"], "T"),
    ]
    assert got[1].origin == f"{file}:1, paragraphs[0].qas[1]"
    for k in range(4):
        first = formats.Examples(Source(path=str(file)))
        begun = [next(first) for _ in range(k)]
        again = formats.Examples(Source(path=str(file)))
        again.state = json.loads(json.dumps(first.state))
        assert begun + list(again) == got


def test_bad_questions_are_counted(tmp_path):
    file = tmp_path / "squad.json"
    file.write_text(json.dumps(squad({"id": "x"}, ASKED[0], {"question": "q", "answers": 3}, ASKED[2])))
    with pytest.raises(UserError, match=r"squad.json:1, paragraphs\[0\]: qas\[0\] should be an object with 'question'"):
        read(file)
    skipped = []
    got = formats.read(Source(path=str(file)), bad_rows="skip", skipped=skipped)
    assert [e.row["id"] for e in got] == ["a", "c"]
    assert len(skipped) == 2


# --- what holds for all -----------------------------------------------------------------------------------------------


def test_bad_rows_are_left_out_and_told(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n{"text": 3}\nnonsense\n{"text": "y"}\n')
    skipped = []
    got = formats.read(Source(path=str(file)), bad_rows="skip", skipped=skipped)
    assert [e.text for e in got] == ["x", "y"]
    assert sorted(s.partition(": ")[0] for s in skipped) == [f"{file}:2", f"{file}:3"]
    file.write_text("nonsense\n")
    with pytest.raises(UserError, match="none of its 1 rows can be read; the first: .*a.jsonl:1: a JSON object"):
        formats.read(Source(path=str(file)), bad_rows="skip")


def test_rows_of_which_only_some_have_a_column(tmp_path):
    file = jsonl(tmp_path, {"q": "a", "completion": "b"}, {"q": "a", "completion": "b", "s": "S"})
    got = read(file, columns={"prompt": "q", "system": "s"})
    assert [len(e.messages) for e in got] == [2, 3]
    with pytest.raises(UserError, match="no row has a column 'sys', which data.columns names for 'system'"):
        read(file, columns={"prompt": "q", "system": "sys"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "x", "label": 1}, "classification, regression or text"),
        ({"question": "x", "answer": "y"}, "maths, or map them"),
        ({"source": "x", "target": "y"}, "translation or summarisation"),
    ],
)
def test_columns_that_may_be_several_formats(tmp_path, row, words):
    with pytest.raises(UserError) as e:
        one(tmp_path, row)
    assert words in str(e.value)
    assert "data.format" in str(e.value)


def test_detection_is_decided_by_its_table():
    for columns, kind in formats.DETECTED:
        if kind is not None:
            assert formats.detect(dict.fromkeys(columns.split()), "x:1") == kind
    assert formats.detect({"prompt": ""}, "x:1", answers=False) == "prompt_completion"
    documented = {line.split("|")[2].strip() for line in formats.__doc__.splitlines() if line.startswith("| ")}
    assert {kind for _, kind in formats.DETECTED if kind} <= documented


def test_max_samples_and_state(tmp_path):
    source = Source(path=str(jsonl(tmp_path, *[{"text": str(i)} for i in range(9)])), max_samples=5)
    it = formats.Examples(source)
    begun = [next(it).text for _ in range(3)]
    again = formats.Examples(source)
    again.state = json.loads(json.dumps(it.state))
    assert begun + [e.text for e in again] == ["0", "1", "2", "3", "4"]
