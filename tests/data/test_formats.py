import json

import pytest

from jaxtune.config import Source
from jaxtune.data import formats
from jaxtune.data.examples import Conversation, Document, Judged, Message
from jaxtune.errors import UserError
from tests.data.formats.rows import TURNS, jsonl, one, read


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


def test_a_label_makes_a_judgement_only_where_it_can_judge(tmp_path):
    for label, kind in ((True, Judged), (0, Judged), ("false", Judged), ("joy", Conversation), (3, Conversation)):
        assert isinstance(one(tmp_path, {"messages": TURNS, "label": label}), kind)
        assert isinstance(one(tmp_path, {"prompt": "a", "completion": "b", "label": label}), kind)
    with pytest.raises(UserError, match="no column 'label', which format 'kto' needs"):
        one(tmp_path, {"messages": TURNS, "label": None})


def test_text_with_labels_is_not_taken_for_plain_text(tmp_path):
    with pytest.raises(UserError, match=r"classification \(with data.columns={label: labels}\) or text.*data.format"):
        one(tmp_path, {"text": "a", "labels": ["b", "c"]})
    e = one(tmp_path, {"text": "a", "labels": ["b", "c"]}, format="classification", columns={"label": "labels"})
    assert e.row["label"] == ["b", "c"]


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
