import json

import pytest

from jaxtune.config import Source
from jaxtune.data import formats
from jaxtune.data.examples import Record
from jaxtune.errors import UserError
from tests.data.formats.rows import jsonl, one, read

LABELLED = {"text": ["a", "b"], "label": ["1", "2"]}
CONTEXT = "Oslo is in Norway. Norway is cold."


@pytest.mark.parametrize(
    ("task", "row", "want"),
    [
        ("classification", {"text": "x", "label": 1}, {"label": "1"}),
        ("classification", {"text": "x", "label": 2.0}, {"label": "2"}),
        ("classification", {"text": "x", "label": ["a", 3]}, {"label": ["a", "3"]}),
        ("classification", {"text": "x", "label": '["a", "b"]'}, {"label": ["a", "b"]}),
        ("classification", {"text": "x", "label": "[a]"}, {"label": "[a]"}),
        ("classification", {"text": "x", "label": " ['a', 'b '] "}, {"label": ["a", "b"]}),
        ("classification", {"text": "x", "label": "[1, 2]"}, {"label": ["1", "2"]}),
        ("classification", {"text": "x", "label": " a "}, {"label": "a"}),
        ("translation", {"source": "a", "target": ["b", "c"]}, {"target": ["b", "c"]}),
        ("regression", {"text": "x", "label": "3.5"}, {"label": 3.5}),
        ("maths", {"question": "q", "answer": 42}, {"answer": "42"}),
        ("summarisation", {"document": "d", "summary": "s", "summaries": ["s", "t"]}, {"summaries": ["s", "t"]}),
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": 1}, {"answer": 1}),
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": "B"}, {"answer": 1}),
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": "b"}, {"answer": 1}),
        ("choice", {"question": "q", "choices": '["a", "b"]', "answer": "1"}, {"answer": 1}),
        ("choice", {"question": "q", "choices": LABELLED, "answer": "2"}, {"answer": 1}),
        ("token_classification", {"tokens": ["a", "b"], "tags": ["O", 3]}, {"tags": ["O", "3"]}),
        ("token_classification", {"text": "ab", "spans": [{"start": 1, "end": 2, "label": "c"}]}, {"text": "ab"}),
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
        ("classification", {"text": "x", "label": " "}, "d.jsonl:1: column 'label' is empty"),
        ("classification", {"text": "x", "label": ["a", ""]}, "holds an empty label"),
        ("regression", {"text": "x", "label": ""}, "column 'label' is empty"),
        ("translation", {"source": "a", "target": []}, "'target' is an empty list"),
        ("translation", {"source": ["a"], "target": "b"}, "'source' should be text"),
        ("token_classification", {"text": "ab"}, "no column 'spans'.*has 'text'"),
        ("token_classification", {"text": "ab", "tags": ["O"]}, "no column 'spans'"),
        ("token_classification", {"tokens": ["a"], "ner_tags": ["O"]},
         "no column 'tags'.*'tokens', 'ner_tags'.*{tags: ner_tags}"),
        ("token_classification", {"tokens": ["a"], "spans": []}, "no column 'tags'"),
        ("regression", {"text": "x", "label": "many"}, "should be a number, got 'many'"),
        ("regression", {"text": "x", "label": 10**400}, "should be a number"),
        ("choice", {"question": "q", "choices": ["1", "2"], "answer": "1"}, "names more than one"),
        ("choice", {"question": "q", "choices": ["a", "b"], "answer": 2}, "names none of 2 choices"),
        ("choice", {"question": "q", "choices": ["a"], "answer": 0}, "a list of two texts or more"),
        ("token_classification", {"tokens": ["a"], "tags": []}, "1 tokens and 0 tags"),
        ("token_classification", {"text": "ab", "spans": [{"start": 1, "end": 3, "label": "c"}]}, "1 to 3 of a text"),
        ("token_classification", {"text": "ab", "slots": [{"entity": "c", "value": "z"}]}, "the text has no 'z'"),
        ("qa", {"context": "c", "question": "q", "answers": {"text": ["c"], "answer_start": []}}, "1 texts and 0"),
        ("translation", {"translation": {"en": "a", "de": "b"}}, "no column 'source'.*{source: en}"),
    ],
)  # fmt: skip
def test_bad_records(tmp_path, task, row, words):
    with pytest.raises(UserError, match=words):
        one(tmp_path, row, format=task)


def test_answers_may_be_missing_where_none_are_wanted(tmp_path):
    for task, row in (
        ("classification", {"text": "x", "label": ""}),
        ("token_classification", {"text": "x"}),
        ("token_classification", {"tokens": ["x"]}),
    ):
        [e] = formats.read(Source(path=str(jsonl(tmp_path, row)), format=task), answers=False)
        assert e.row == {k: v for k, v in row.items() if v}


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
