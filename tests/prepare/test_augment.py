"""Copies keep labels, answers, numbers, negations and spans; they are marked, seeded, and counted when dropped."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config import Source
from jaxtune.errors import UserError
from jaxtune.prepare import edits
from jaxtune.prepare.augment import EDA, TYPOS, Options, augment
from tests.prepare.test_checks import labelled
from tests.test_cli import call
from tests.tiny import write_jsonl, write_tiny

SYNONYMS = {"film": ["movie", "picture"], "story": ["tale"], "cinema": ["theatre"]}
KEEP = edits.kept(frozenset({"good"}))
words = st.lists(
    st.sampled_from("the a film story not isn't 3 good bad very boring their letter 你 好".split()), max_size=15
)


def made(tmp_path, rows, format="classification", **options):
    tmp_path.mkdir(exist_ok=True)
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    (out := tmp_path / "out.jsonl").unlink(missing_ok=True)
    n, counts = augment(Source(path=str(file), format=format), out, Options(**options))
    assert n == len(rows)
    return [json.loads(line) for line in out.read_text().splitlines()], counts


@given(words, st.sampled_from([*EDA, *TYPOS]), st.integers(0, 99), st.floats(0, 0.9))
@settings(max_examples=150, deadline=None)
def test_edits_touch_no_word_that_must_stay(tokens, name, seed, rate):
    text = " ".join(tokens)
    more = {"table": SYNONYMS} if name in ("insert", "synonym") else {}
    out = getattr(edits, name)(text, rate, np.random.default_rng(seed), KEEP, **more)
    assert out == getattr(edits, name)(text, rate, np.random.default_rng(seed), KEEP, **more)
    assert [w for w in edits.WORDS.findall(out) if w[0].isalnum() and KEEP(w)] == [w for w in tokens if KEEP(w)]
    pieces = sorted(w for w in edits.WORDS.findall(out) if not w.isspace())
    if name == "swap":
        assert pieces == sorted(tokens)
    if name == "delete" and tokens:
        assert 0 < len(pieces) <= len(tokens)
    if name == "insert":
        assert len(pieces) >= len(tokens)


@pytest.mark.parametrize("inside", [True, False])
def test_rows_to_translate_keep_their_form(tmp_path, inside):
    pairs = [{"en": f"the old film told a long story {n}", "de": f"Satz {n}"} for n in range(3)]
    rows = [{"id": 1, "translation": p} for p in pairs] if inside else [{"source": p["en"], **p} for p in pairs]
    columns = {"source": "en" if inside else "source", "target": "de"}
    file, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    source = Source(path=str(file), format="translation", columns=columns)
    assert augment(source, out, Options(operations=["swap"]))[0] == 3
    copies = [r for line in out.read_text().splitlines() if "augmented" in (r := json.loads(line))]
    assert len(copies) == 3
    for r, row in zip(copies, rows, strict=True):
        made, was = (r["translation"], row["translation"]) if inside else (r, row)
        assert made["de"] == was["de"]
        text = "en" if inside else "source"
        assert made[text] != was[text]
        assert sorted(made[text].split()) == sorted(was[text].split())
        assert r["source" if inside else "source_row"].startswith(str(file))


def test_copies_are_marked_and_labels_stay(tmp_path):
    rows = labelled(20)
    out, counts = made(tmp_path, rows, operations=[*EDA, *TYPOS], table=SYNONYMS, copies=3, rate=0.2)
    copies = [r for r in out if "augmented" in r]
    assert [r for r in out if "augmented" not in r] == rows
    assert sum(counts.values()) == 60
    assert len(copies) == sum(n for k, n in counts.items() if not k.startswith("dropped")) >= 45
    for r in copies:
        line = int(r["source"].rpartition(":")[2]) - 1
        assert r["source"].startswith(str(tmp_path / "rows.jsonl"))
        assert r["label"] == rows[line]["label"]
        assert r["text"] != rows[line]["text"]
        assert {w for w in r["text"].split() if w.isdigit()} == {w for w in rows[line]["text"].split() if w.isdigit()}
    assert {r["augmented"] for r in copies} <= {f"eda-{o}" for o in EDA} | {f"typo-{o}" for o in TYPOS}
    texts = [r["text"] for r in out]
    assert len(set(texts)) == len(texts)


def test_the_seed_decides(tmp_path):
    rows = labelled(10)
    one, _ = made(tmp_path / "a", rows, operations=["swap"], seed=1)
    again, _ = made(tmp_path / "a", rows, operations=["swap"], seed=1)
    other, _ = made(tmp_path / "a", rows, operations=["swap"], seed=2)
    assert one == again != other


@pytest.mark.parametrize(
    ("rewritten", "reason"),
    [
        ("Bob paid 30 euros and did leave", "dropped: a number, negation or label's name was lost"),
        ("Bob paid 40 euros and did not leave", "dropped: a number, negation or label's name was lost"),
        ("30 not", "dropped: too far from its row"),
        (" Bob paid 30 euros and did  not leave", "dropped: as the row or another copy"),
        ("", "dropped: as the row or another copy"),
        ("Bob paid just 30 euros and did not go", "paraphrase"),
    ],
)
def test_a_rewriting_is_checked(tmp_path, rewritten, reason):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Bob paid 30 euros and did not leave", "completion": "ok"}])
    rewrites = {"paraphrase": lambda texts, copy: [rewritten] * len(texts)}
    _, counts = augment(Source(path=str(file)), tmp_path / "out.jsonl", Options(), rewrites)
    assert counts == {reason: 1}
    copies = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()][1:]
    assert [c["completion"] for c in copies] == (["ok"] if reason == "paraphrase" else [])


def test_an_answers_span_survives_or_the_copy_goes(tmp_path):
    context = "Ada lived in Cologne for years and then in a small town by the sea with her old dog"
    row = {"context": context, "question": "Where?", "answers": {"text": ["Cologne"], "answer_start": [13]}}
    out, counts = made(tmp_path, [row], "qa", operations=["delete", "keyboard"], copies=12, rate=0.3, column="context")
    assert counts["dropped: the answer's span was lost"] > 0
    assert len(out) > 3
    for r in out:
        assert r["context"][r["answers"]["answer_start"][0] :].startswith("Cologne")


def test_only_the_users_last_turn_changes(tmp_path):
    said = ["Hello dear friend", "Hello", "Tell me about the river", "It flows"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(said)]
    out, _ = made(tmp_path, [{"messages": turns}], "messages", operations=["swap"])
    same = [m["content"] == t["content"] for m, t in zip(out[1]["messages"], turns, strict=True)]
    assert same == [True, True, False, True]


def test_what_is_refused(tmp_path, capsys):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a b c", "completion": "d"}])
    for name in ("validation.jsonl", "my-test.jsonl", "dev.jsonl"):
        held = write_jsonl(tmp_path / name, [{"prompt": "a b c", "completion": "d"}])
        with pytest.raises(UserError, match="never augmented"):
            augment(Source(path=str(held)), tmp_path / "out.jsonl", Options(["swap"]))
    with pytest.raises(UserError, match="is there already"):
        augment(Source(path=str(rows)), rows, Options(["swap"]))
    made_ = tmp_path / "made.jsonl"
    augment(Source(path=str(rows)), made_, Options(["swap"]))
    with pytest.raises(UserError, match="is augmented already"):
        augment(Source(path=str(made_)), tmp_path / "out.jsonl", Options(["swap"]))
    call("augment", rows, "--out", tmp_path / "x.jsonl", code=2)
    assert "nothing to do was given" in capsys.readouterr().err
    call("augment", rows, "--out", tmp_path / "x.jsonl", "--eda", "synonym", code=2)
    assert "--table" in capsys.readouterr().err
    call("augment", rows, "--out", tmp_path / "x.jsonl", "--eda", "swop", code=2)
    assert "allowed: swap, delete" in capsys.readouterr().err
    assert not (tmp_path / "x.jsonl").exists()


def test_by_a_model_of_our_own(tmp_path, capsys):
    model = write_tiny(tmp_path / "tiny", template=True)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "the fox eats", "completion": "d"}])
    table = tmp_path / "synonyms.json"
    table.write_text(json.dumps({"Fox": ["vixen"]}))
    out = tmp_path / "out.jsonl"
    call("augment", rows, "--out", out, "--eda", "synonym", "--table", table, "--paraphrase", model,
         "--backtranslate", model,
         "--max-new-tokens", 4, "--closest", 0, "--temperature", 0)  # fmt: skip
    said = capsys.readouterr().out
    assert "1 copies: eda-synonym" in said
    copies = [json.loads(line) for line in out.read_text().splitlines()][1:]
    assert copies[0]["prompt"] == "the vixen eats"
    assert {c["augmented"] for c in copies[1:]} <= {"paraphrase", "backtranslation"}
    assert sum(int(line.split()[0]) for line in said.splitlines() if " copies: " in line) == 3
