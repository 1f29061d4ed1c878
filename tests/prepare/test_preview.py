"""`jaxtune preview` shows what trains: in the terminal and as a page that is safe to open."""

import re

import pytest

from tests.prepare.pages import Page
from tests.test_cli import call
from tests.tiny import write_jsonl, write_tiny


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("m") / "tiny", template=True)


def preview(chatty, tmp_path, rows, *more):
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    page = tmp_path / "page.html"
    call("preview", f"model={chatty}", f"data.train={file}", f"output={tmp_path / 'run'}", "data.max_length=64",
         "--html", page, *more)  # fmt: skip
    assert not (tmp_path / "run").exists()
    return Page(page.read_text()), page.read_text()


def test_trained_tokens_are_marked_and_segments_told_apart(chatty, tmp_path, capsys):
    rows = [{"prompt": f"{a} + 2 =", "completion": f" {a + 2}"} for a in range(4)]
    page, text = preview(chatty, tmp_path, rows, "--n", 1)
    assert sum(attrs.get("class") == "s" for _, attrs in page.tags) > 1
    on = re.findall(r'class="t on" title="\d+">([^<]*)<', text)
    first = re.search(r'<div class="s">(.*?)</div>', text).group(1)
    assert "on" in first
    assert any("2" in t or "3" in t or "4" in t or "5" in t for t in on)
    said = capsys.readouterr().out
    assert "the tokenizer's own" in said
    assert "⟦" in said
    assert "trained on" in said
    assert str(tmp_path / "rows.jsonl") in said


def test_data_cannot_write_into_the_page(chatty, tmp_path):
    rows = [{"prompt": '<script>alert("x")</script>', "completion": '<b>no</b> & "quotes"'}]
    page, text = preview(chatty, tmp_path, rows)
    assert "<script" not in text
    assert "<b>" not in text
    assert "script" in page.text


def test_pretraining_marks_everything_and_cuts_are_told(chatty, tmp_path, capsys):
    page, _ = preview(chatty, tmp_path, [{"text": "abcdefgh " * 30}], "objective=pretrain", "--n", 9)
    spans = [a["class"] for t, a in page.tags if t == "span" and "title" in a]
    assert spans.count("t") <= 9  # the first token of each piece is never predicted
    assert spans.count("t on") > 60
    file = [{"prompt": "a", "completion": "long " * 100}]
    preview(chatty, tmp_path, file)
    assert "were cut" in capsys.readouterr().out


def test_labels_of_a_head_have_their_names(chatty, tmp_path, capsys):
    rows = [{"text": f"the fox eats {i}", "label": ("tame", "wild")[i % 2]} for i in range(6)]
    head = ["objective=classification", "data.format=classification", "tuning.method=full"]
    page, _ = preview(chatty, tmp_path, rows, *head)
    assert {"label = tame", "label = wild"} <= set(re.findall(r"label = \w+", page.text))
    assert not [t for t, a in page.tags if a.get("class") == "t on" and "title" in a]
    assert "label = wild" in capsys.readouterr().out


def test_the_span_of_an_answer_is_marked(chatty, tmp_path):
    answers = {"text": ["berries"], "answer_start": [13]}
    rows = [{"context": "the fox eats berries", "question": "what?", "answers": answers}] * 2
    head = ["objective=span_qa", "data.format=qa", "tuning.method=full"]
    _, text = preview(chatty, tmp_path, rows, *head, "--n", 1)
    assert "berries" in "".join(re.findall(r'class="t on" title="\d+">([^<]*)<', text))


def test_a_stream_is_refused(chatty, tmp_path, capsys):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "abcdefgh " * 30}] * 9)
    call("preview", f"model={chatty}", f"data.train={file}", f"output={tmp_path / 'run'}", "objective=pretrain",
         "data.max_length=64", "data.streaming=true", "train.steps=2", code=2)  # fmt: skip
    assert "data.streaming=false" in capsys.readouterr().err
