"""Tasks: how rows are asked and trained on, what is scored against, baselines."""

import pytest

from jaxtune import tasks
from jaxtune.config import Data, Source
from jaxtune.data.examples import RECORDS, Conversation, Document, Message, Record
from jaxtune.errors import UserError
from jaxtune.metrics.base import better
from jaxtune.metrics.choice import Choice
from jaxtune.tasks import TASKS, Options

ROWS = {
    "classification": {"text": "the best of films", "label": "good", "text_pair": None},
    "qa": {
        "context": "Rollo came in 911.",
        "question": "When?",
        "answers": {"text": ["911", "in 911"], "answer_start": [14, 11]},
    },
    "translation": {"source": "A cat.", "target": "Eine Katze."},
    "summarisation": {"document": "It rained. We slept.", "summary": "Rain.", "summaries": ["Rain.", "A wet day."]},
    "maths": {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"},
    "choice": {"question": "The sky is", "choices": ["blue", "a soup"], "answer": 0},
}
SAID = {"classification": "good", "qa": "911", "translation": "Eine Katze.", "summarisation": "Rain.",
        "maths": "1 + 1 = 2\n#### 2", "choice": "blue"}  # fmt: skip


def record(name, **changes):
    return Record({**ROWS[name], **changes}, name, "rows.jsonl:3")


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_conversations(name):
    c = tasks.asking(Data())(record(name))
    assert [m.role for m in c.messages] == ["user", "assistant"]
    assert c.messages[1].content == SAID[name]
    assert c.origin == "rows.jsonl:3"
    asked = [ROWS[name][k] for k in RECORDS[name].needed if k != "choices"]
    assert all(x in c.messages[0].content for x in asked)
    assert SAID[name] not in c.messages[0].content.replace(ROWS[name].get("context", ""), "")
    [q] = tasks.questions(TASKS[name], [record(name)], Options())
    assert q.conversation.messages == c.messages[:1]  # asked as it is trained


@pytest.mark.parametrize("name", ROWS)
def test_the_right_answer_has_the_best_score(name):
    task = TASKS[name]
    [q] = tasks.questions(task, [record(name)], Options())
    said = [Choice("blue", -1.0, 1), Choice("a soup", -9.0, 2)] if name == "choice" else SAID[name]
    scores = task.score([said], [q.reference], Options())
    value = scores.values[task.metric]
    assert better(task.metric) == "max"
    assert value >= 1.0 or (name == "translation" and scores.values["chrf"] == 100.0)
    assert all(len(v) == 1 for v in scores.rows.values())
    if task.baseline is not None:
        title, base = task.baseline([q.row], [q.reference], Options())
        assert title
        assert base.values.keys() >= {task.metric}


def test_every_score_has_a_direction():
    for name, row in ROWS.items():
        task = TASKS[name]
        said = [Choice("x", -1.0, 1)] * 2 if name == "choice" else "x"
        for k in task.score([said], [task.reference(row)], Options()).values:
            assert better(k) in ("max", "min")


def test_prompts_of_a_config():
    data = Data(prompt="Is '{text}' one of {labels}? {{no column}}", labels=["good", "bad"])
    asked = tasks.asking(data)(record("classification")).messages[0].content
    assert asked == "Is 'the best of films' one of good, bad? {{no column}}"
    with pytest.raises(UserError, match=r"rows.jsonl:3: data.prompt names \{txt\}.*it has text, label"):
        tasks.asking(Data(prompt="{txt}"))(record("classification"))
    assert (
        "Labels: good, bad" in tasks.asking(Data(labels=["good", "bad"]))(record("classification")).messages[0].content
    )


def test_the_target_column_names_the_language():
    data = Data(train=[Source(path="f.jsonl", columns={"source": "en", "target": "zh"})])
    options = tasks.options_of(data)
    assert options.language == "zh"
    assert "into Chinese" in tasks.asking(data)(record("translation")).messages[0].content
    assert TASKS["translation"].score(["猫"], ["猫"], options).details["language"] == "zh"


def test_questions_without_an_answer():
    empty = record("qa", answers={"text": [], "answer_start": []})
    assert tasks.asking(Data())(empty).messages[1].content == "unanswerable"
    [q] = tasks.questions(TASKS["qa"], [empty], Options())
    scores = TASKS["qa"].score(["Unanswerable.", "911"], [q.reference, ["911"]], Options())
    assert scores.values["exact_match"] == scores.values["no_answer_exact_match"] == 100.0


def test_several_labels():
    both = record("classification", label=["b", "a"])
    assert tasks.asking(Data())(both).messages[1].content == "b, a"
    scores = TASKS["classification"].score(["a,b", "a"], [["b", "a"], ["b"]], Options())
    assert scores.values["exact_match"] == 0.5
    with pytest.raises(UserError, match="comma"):
        tasks.asking(Data())(record("classification", label=["a, b", "c"]))


def test_conversations_are_asked_turn_by_turn():
    turns = ("system", "user", "assistant", "user", "assistant", "user")
    c = Conversation(tuple(Message(r, f"{r} {i}") for i, r in enumerate(turns)), "messages", "chat.jsonl:1")
    every = tasks.questions(TASKS["dialogue"], [c], Options())
    assert [q.reference for q in every] == ["assistant 2", "assistant 4"]
    assert [len(q.conversation.messages) for q in every] == [2, 4]
    [last] = tasks.questions(TASKS["dialogue"], [c], Options(train_on="last"))
    [as_task] = tasks.questions(TASKS["translation"], [c], Options())
    assert last == as_task == every[1]


@pytest.mark.parametrize(
    ("task", "example", "message"),
    [
        ("maths", record("qa"), "rows.jsonl:3: the row is of format qa, which task maths cannot ask"),
        ("maths", Document("x", "d.txt:1"), "d.txt:1: the row is a document"),
        ("maths", record("maths", answer=None), "rows.jsonl:3: the row has no answer"),
        ("dialogue", Conversation((Message("user", "x"),), "messages", "c:1"), "c:1: has no assistant turn"),
        ("choice", Conversation((Message("user", "x"),), "messages", "c:1"), "cannot ask"),
    ],
)
def test_what_cannot_be_asked(task, example, message):
    with pytest.raises(UserError, match=message):
        tasks.questions(TASKS[task], [example], Options())


def test_what_needs_a_head():
    with pytest.raises(UserError, match="objective=token_classification"):
        tasks.asking(Data())(Record({"tokens": ["a"], "tags": ["O"]}, "token_classification", "t:1"))
    with pytest.raises(UserError, match="no 'label'"):
        tasks.asking(Data())(record("classification", label=None))


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'translation'"):
        tasks.named("translaton")


def test_baselines():
    rows = [{"document": "One two three. Four five. Six.", "summary": "x y z"}]
    name, scores = TASKS["summarisation"].baseline(rows, [["one two three"]], Options())
    assert name == "the first sentences"
    assert scores.values["rouge1"] == 1.0
    name, scores = TASKS["classification"].baseline([{}] * 3, ["a", "b", "b"], Options())
    assert (name, scores.values["accuracy"]) == ("always 'b'", pytest.approx(2 / 3))
    _, scores = TASKS["choice"].baseline([ROWS["choice"]] * 2, [0, 1], Options())
    assert scores.values["acc"] == 0.5
