"""`jaxtune prepare` as a user runs it: files, decisions, idempotence, what it refuses to write over."""

import csv
import json
import shlex

import pytest

from jaxtune import config
from jaxtune.data import formats
from tests.prepare.pages import Page
from tests.prepare.test_checks import clean, labelled
from tests.test_cli import call
from tests.tiny import write_jsonl

FILES = {"train.jsonl", "validation.jsonl", "removed.jsonl", "sample.html", "sample.csv", "report.html", "report.json"}
QUICK = ["--skip", "language"]


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def messy(tmp_path):
    rows = [
        *clean(),
        {"prompt": "<script>alert(1)</script>?", "completion": "cafÃ© for ada@example.org"},
        {"prompt": clean()[0]["prompt"], "completion": clean()[0]["completion"] + " "},
        {"prompt": "Nothing?", "completion": ""},
        {"prompt": "=1+1", "completion": "my key is sk-abcdefghijklmnop1234567890"},
    ]
    file = write_jsonl(tmp_path / "messy.jsonl", rows)
    with file.open("a") as f:
        f.write('{"prompt": "cut\n')
    return file


def test_every_row_is_kept_or_accounted_for(messy, tmp_path, capsys):
    before = messy.read_bytes()
    out = tmp_path / "out"
    call("prepare", messy, "--yes", "--out", out, *QUICK)
    assert messy.read_bytes() == before
    assert {p.name for p in out.iterdir()} == FILES
    train, held, removed = (read(out / f"{n}.jsonl") for n in ("train", "validation", "removed"))
    assert len(train) + len(held) + len(removed) == 25
    assert len(held) == 2
    assert [(r["origin"].rsplit(":")[-1], r["reason"].split(":")[0]) for r in removed[1:]] == [
        ("23", "missing"), ("22", "duplicates"),
    ]  # fmt: skip
    assert "JSON" in removed[0]["reason"]
    everything = json.dumps(train + held, ensure_ascii=False)
    assert "café for <EMAIL>" in everything
    assert "my key is <SECRET>" in everything
    said = capsys.readouterr().out
    for place in out.iterdir():
        assert "ada@example" not in place.read_text()
        assert "abcdefghijklmnop" not in place.read_text()
    assert "abcdefghijklmnop" not in said
    assert "unreadable: 1 rows cannot be read" in said
    assert "missing: 1 rows lack something; remove them: done" in said


def test_the_report_counts_and_the_pages_are_safe(messy, tmp_path):
    out = tmp_path / "out"
    call("prepare", messy, "--yes", "--out", out, "--sample", 100, *QUICK)
    report = json.loads((out / "report.json").read_text())
    about = report["about"]
    assert about["rows read"] == about["train"] + about["validation"] + about["removed"] == 24
    assert (about["unreadable"], about["changed"]) == (1, 2)
    page = Page((out / "report.html").read_text())
    assert "svg" in {t for t, _ in page.tags}
    sample = Page((out / "sample.html").read_text())
    assert "<script>alert(1)</script>?" in sample.text
    cells = list(csv.reader((out / "sample.csv").read_text().splitlines()))
    assert len(cells) == 23
    assert any("'=1+1" in row for row in cells)


def test_the_same_again_is_the_same_and_its_own_output_is_clean(messy, tmp_path, capsys):
    out = tmp_path / "out"
    call("prepare", messy, "--yes", "--out", out, *QUICK)
    first = {p.name: p.read_bytes() for p in out.iterdir()}
    call("prepare", messy, "--yes", "--out", out, *QUICK)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == first
    capsys.readouterr()
    call("prepare", out / "train.jsonl", "--yes", "--split", 0, "--out", tmp_path / "again", *QUICK)
    assert ": done" not in capsys.readouterr().out
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == first["train.jsonl"]
    assert (tmp_path / "again" / "removed.jsonl").read_bytes() == b""
    assert not (tmp_path / "again" / "validation.jsonl").exists()


def test_translations_are_looked_at_and_keep_their_form(tmp_path):
    pairs = [{"en": p, "de": c} for p, c in (r.values() for r in clean())]
    rows = [{"id": i, "translation": p} for i, p in enumerate([*pairs, pairs[3], {"en": "A cafÃ©?", "de": "Ja."}])]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    out = tmp_path / "out"
    columns = ["columns.source=en", "columns.target=de"]
    call("prepare", file, *columns, "--yes", "--split", 0, "--out", out, *QUICK)
    rows[21]["translation"]["en"] = "A café?"
    assert read(out / "train.jsonl") == rows[:20] + rows[21:]
    [gone] = read(out / "removed.jsonl")
    assert (gone["origin"], gone["row"]) == (f"{file}:21", rows[20])
    about = json.loads((out / "report.json").read_text())["about"]
    assert (about["rows read"], about["removed"], about["changed"]) == (22, 1, 1)


def test_files_of_its_own_that_are_not_made_any_more_go(messy, tmp_path):
    out = tmp_path / "out"
    call("prepare", messy, "--yes", "--out", out, *QUICK)
    (out / "notes.txt").write_text("mine")
    call("prepare", messy, "--yes", "--out", out, "--split", 0, "--sample", 0, *QUICK)
    assert {p.name for p in out.iterdir()} == FILES - {"validation.jsonl", "sample.html", "sample.csv"} | {"notes.txt"}


@pytest.mark.parametrize("name", ["train.jsonl", "report.json", "sample.csv"])
def test_it_writes_over_nothing_that_it_did_not_make(messy, tmp_path, capsys, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    call("prepare", messy, "--yes", "--out", out, *QUICK, code=2)
    assert "give another folder with --out" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == [name]
    assert (out / name).read_text() == "{}"


def test_a_file_changed_by_hand_is_not_written_over(messy, tmp_path, capsys):
    out = tmp_path / "out"
    call("prepare", messy, "--yes", "--out", out, *QUICK)
    with (out / "sample.csv").open("a") as f:
        f.write("reviewed\n")
    call("prepare", messy, "--yes", "--out", out, "--seed", 1, *QUICK, code=2)
    assert "was changed since it was made" in capsys.readouterr().err
    call("prepare", out / "train.jsonl", "--yes", "--out", out, *QUICK, code=2)
    assert "lies where the result would go" in capsys.readouterr().err


def answers(monkeypatch, *given):
    left = list(given)

    def answer(question):
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", answer)
    return left


def test_asked_it_does_as_told(messy, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    only = [a for c in ("missing", "duplicates", "emails") for a in ("--only", c)]
    left = answers(monkeypatch, "keep", "list", "", "a", "what", "0.25")
    call("prepare", messy, "--out", out, *only)
    assert left == []
    assert "messy.jsonl:23: 'completion' is empty" in capsys.readouterr().out
    assert "ada@example.org" in (out / "train.jsonl").read_text() + (out / "validation.jsonl").read_text()
    assert len(read(out / "removed.jsonl")) == 3
    assert len(read(out / "validation.jsonl")) == round(0.25 * 22)


def test_without_answers_nothing_is_written(messy, tmp_path, capsys, monkeypatch):
    answers(monkeypatch)
    call("prepare", messy, "--out", tmp_path / "out", "--only", "missing", code=2)
    assert "give --yes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_labels_are_stratified_and_the_command_reads_the_result(tmp_path, capsys):
    rows = [{"sentence": r["text"], "class": r["label"]} for r in labelled(80)]
    file = write_jsonl(tmp_path / "a file.jsonl", rows)
    columns = ["--format", "classification", "columns.text=sentence", "columns.label=class"]
    out = tmp_path / "my out"
    call("prepare", file, *columns, "--yes", "--split", "0.25", "--out", out, *QUICK)
    held = [r["class"] for r in read(out / "validation.jsonl")]
    assert sorted(held) == ["bad"] * 10 + ["good"] * 10
    command = shlex.split(capsys.readouterr().out.rpartition("next: ")[2])
    assert command[:2] == ["jaxtune", "train"]
    c = config.load(None, config.parse_overrides(command[2:]))
    assert c.objective == "classification"
    assert len(formats.read(c.data.sources[0])) == 60
    assert len(formats.read(c.data.validation_sources[0])) == 20


def test_the_other_set_is_kept_apart(messy, tmp_path):
    other = write_jsonl(tmp_path / "validation.jsonl", clean()[:3])
    call("prepare", messy, "--yes", "--against", other, "--out", tmp_path / "out", *QUICK)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [c["count"] for c in report["checks"] if c["check"] == "leakage"] == [3]
    assert f"data.validation={other}" in report["next"]
    assert not (tmp_path / "out" / "validation.jsonl").exists()


def test_tokens_are_counted_by_the_model(messy, tmp_path, tiny, capsys):
    call("prepare", messy, "--yes", "--model", tiny, "--max-length", 60, "--out", tmp_path / "out", *QUICK)
    assert "too_long: tokens of a row: median" in capsys.readouterr().out
    assert f"model={tiny}" in json.loads((tmp_path / "out" / "report.json").read_text())["next"]


def test_words_and_unknown_checks(messy, tmp_path, capsys):
    terms = tmp_path / "words.txt"
    terms.write_text("# a remark\nboat\n")
    call("prepare", messy, "--yes", "--words", terms, "--only", "words", "--out", tmp_path / "out")
    assert "words: 4 rows hold terms of the list" in capsys.readouterr().out
    call("prepare", messy, "--only", "duplicate", code=2)
    assert "did you mean 'duplicates'" in capsys.readouterr().err
    call("prepare", tmp_path / "none.jsonl", "--yes", code=2)
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "given"),
    [
        ("sst2/validation.jsonl", ["--format", "classification"]),
        ("banking77/validation.csv", ["--format", "classification", "columns.label=category"]),
        ("alpaca_en_demo/validation.jsonl", []),
        ("glaive_toolcall_en_demo/validation.jsonl", []),
        ("dpo_en_demo/validation.jsonl", []),
        ("snips/validation.jsonl", []),
        ("xquad_zh/validation.jsonl", []),
        ("tatoeba_en_zh/validation.jsonl", ["--format", "translation", "columns.source=en", "columns.target=zh"]),
    ],
)
def test_real_data_end_to_end(assets, tmp_path, capsys, file, given):
    out = tmp_path / "out"
    call("prepare", assets / "data" / file, *given, "--yes", "--out", out, *QUICK)
    about = json.loads((out / "report.json").read_text())["about"]
    assert about["unreadable"] == 0
    assert about["rows read"] == about["train"] + about["validation"] + about["removed"]
    assert about["removed"] <= max(1, 0.02 * about["rows read"])
    # every row that was written reads back
    c = config.load(None, config.parse_overrides(shlex.split(capsys.readouterr().out.rpartition("next: ")[2])[2:]))
    assert len(formats.read(c.data.sources[0])) == about["train"]
    assert len(formats.read(c.data.validation_sources[0])) == about["validation"]
    Page((out / "report.html").read_text())
    Page((out / "sample.html").read_text())
    capsys.readouterr()
    call("prepare", out / "train.jsonl", *given, "--yes", "--split", 0, "--out", tmp_path / "again", *QUICK)
    assert ": done" not in capsys.readouterr().out
    assert (tmp_path / "again" / "train.jsonl").read_bytes() == (out / "train.jsonl").read_bytes()
