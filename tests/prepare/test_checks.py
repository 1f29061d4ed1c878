"""Each check finds planted faults in exactly their rows, and nothing in clean rows."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.config import Source
from jaxtune.prepare import rows
from jaxtune.prepare.checks import CHECKS, masks, repair
from jaxtune.prepare.checks.duplicates import groups, jaccard
from jaxtune.prepare.finding import Look, apply
from jaxtune.prepare.rows import Row, Table
from tests.tiny import write_jsonl

NAMES = "Ada Bob Cem Dora Emil Fay Gus Hana Ilse Jon Kim Lena Max Nora Otto Pia Quinn Rosa Sven Tom".split()
THINGS = ["the old clock tower", "a jar of plum jam", "his wooden boat", "the blue bicycle", "their garden fence"]


def table(rows_, format="prompt_completion", **columns):
    return Table(tuple(Row(f"a.jsonl:{i + 1}", r) for i, r in enumerate(rows_)), format, columns)


def clean():
    """Twenty rows that nothing is the matter with."""
    return [
        {
            "prompt": f"What did {name} repair on day {i} of the week of work?",
            "completion": f"{name} repaired {THINGS[i % 5]}.",
        }
        for i, name in enumerate(NAMES)
    ]


def labelled(n=60):
    good = ["a warm and lovely film", "great acting, lovely music", "I enjoyed this great story"]
    bad = ["a dull and boring film", "awful acting, boring music", "I hated this awful story"]
    return [
        {"text": f"{(good, bad)[i % 2][i % 3]} seen in {NAMES[i % 20]} cinema {i}", "label": ("good", "bad")[i % 2]}
        for i in range(n)
    ]


@pytest.mark.parametrize("name", [n for n in CHECKS if n not in ("language",)])
def test_clean_rows_are_left_alone(name):
    finding = CHECKS[name](table(clean()), Look(against=table([{"prompt": "Quite another thing", "completion": "x"}])))
    assert not finding.detail
    assert not finding.proposal


PLANTED = {
    "mojibake": {"completion": "A cafÃ© with crÃ¨me brÃ»lÃ©e."},
    "control": {"completion": "zero\u200bwidth and \x07bell and \u202eturned"},
    "keys": {"completion": "use sk-abcdefghijklmnop1234567890 please"},
    "emails": {"completion": "write to ada.lovelace@mail.example.org, please"},
    "accounts": {"completion": "pay to DE89 3704 0044 0532 0130 00 or with 4111-1111-1111-1111"},
    "phones": {"completion": "ring +49 30 901820 now"},
    "missing": {"completion": "  "},
    "extra": {"comment": "x"},
    "outliers": {"completion": "word " * 3000},
    "case": {"completion": "THIS IS VERY MUCH TOO LOUD, SAYS SHE."},
    "words": {"completion": "you Blasted fool"},
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_in_its_row_alone(name):
    planted = clean()
    planted[7] |= PLANTED[name]
    finding = CHECKS[name](table(planted), Look(words=("blasted",)))
    assert finding.rows == [7]
    assert finding.proposal
    again = CHECKS[name](apply(table(planted), finding), Look(words=("blasted",)))
    assert not again.detail


SECRETS = [
    ("AKIAIOSFODNN7EXAMPLE", "keys"),
    ("ghp_" + "aB3" * 12, "keys"),
    ("sk-proj-" + "aB3x" * 8, "keys"),
    ("hf_" + "aBcD" * 8, "keys"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmN", "keys"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIEabc\n-----END RSA PRIVATE KEY-----", "keys"),
    ('api_key = "q8Zk20PbW7xL4v"', "keys"),
    ("password: hunter2X9!kq", "keys"),
    ("first.last+tag@sub.domain.co.uk", "emails"),
    ("用户@例子.公司", "emails"),
    ("(555) 123-4567", "phones"),
    ("555-123-4567", "phones"),
    ("13912345678", "phones"),
    ("phone number: 030 1234567", "phones"),
    ("GB82WEST12345698765432", "accounts"),
    ("5500 0000 0000 0004", "accounts"),
    ("3782-822463-10005", "accounts"),
    ("the card: 4111111111111111", "accounts"),
]


@pytest.mark.parametrize(("secret", "check"), SECRETS)
def test_secrets_are_masked_and_never_shown(secret, check):
    t = table([*clean(), {"prompt": "Tell me.", "completion": f"It is {secret} and so on"}])
    finding = CHECKS[check](t, Look())
    assert finding.rows == [20]
    new = finding.changes[20]["completion"]
    assert new.startswith("It is ")
    assert new.endswith(" and so on")
    value = secret.split(": ")[-1].split(" = ")[-1].strip('"')
    assert value not in new
    assert value not in finding.detail[20]


NO_SECRETS = """1000 + 2000 = 3000
from 2019-2020 to 12.03.2021
ISBN 978-3-16-148410-0
pi is 3.14159265358979
@home at 5
token: word
the password is not here
4111 1111 1111 1112
order 1234567890123
1646615806005 + 4111111111111111""".splitlines()


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_stays(text):
    assert masks.without_any(text) == text


@given(st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_masks_are_idempotent(text):
    once = masks.without_any(text + " a@b.org password=x7Gq2kPz9 +49 30 1234567 DE89370400440532013000")
    assert masks.without_any(once) == once


def test_missing_names_what_is_wrong():
    chat = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hello"}]},
        {"messages": []},
        {},
    ]
    detail = CHECKS["missing"](table(chat, "messages"), Look()).detail
    assert detail == {
        1: "has no turn of the assistant",
        2: "turn 0 is empty",
        3: "'messages' is empty",
        4: "no 'messages'",
    }


def test_a_turn_of_calls_alone_is_not_missing():
    calls = [{"type": "function", "function": {"name": "clock", "arguments": "{}"}}]
    asked = {"role": "user", "content": "What time is it?"}
    for said in ({"content": ""}, {"content": None}, {}):
        chat = [{"messages": [asked, {"role": "assistant", **said, "tool_calls": calls}]}]
        assert not CHECKS["missing"](table(chat, "messages"), Look()).detail
    chat = [{"messages": [asked, {"role": "assistant", "content": "", "tool_calls": []}]}]
    assert CHECKS["missing"](table(chat, "messages"), Look()).detail == {0: "turn 1 is empty"}


def test_an_empty_input_or_null_answer_is_not_missing():
    alpaca = [{"instruction": "Sing.", "input": "", "output": "La"}]
    assert not CHECKS["missing"](table(alpaca, "alpaca"), Look()).detail
    qa = [{"context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}]
    assert not CHECKS["missing"](table(qa, "qa"), Look()).detail


def test_exact_and_near_duplicates():
    long = "The quick brown fox jumps over the lazy dog near the river bank every single morning in June"
    twice = {"prompt": "  " + clean()[3]["prompt"], "completion": clean()[3]["completion"] + "\n"}
    nearly = [{"prompt": "Tell: " + long, "completion": "fine"}, {"prompt": f"Tell: {long}!", "completion": "Fine"}]
    planted = [*clean(), twice, *nearly]
    t = table(planted)
    assert CHECKS["duplicates"](t, Look()).detail == {20: "as a.jsonl:4"}
    t = apply(t, CHECKS["duplicates"](t, Look()))
    near = CHECKS["near_duplicates"](t, Look())
    assert near.rows == [21]
    assert not CHECKS["near_duplicates"](apply(t, near), Look()).detail


def test_near_duplicates_of_other_labels_are_none():
    text = "a long sentence about a film that is quite good overall, I would say, number one"
    rows_ = [
        {"text": text, "label": "good"},
        {"text": text + ".", "label": "bad"},
        {"text": text + "!", "label": "good"},
    ]
    assert CHECKS["near_duplicates"](table(rows_, "classification"), Look()).rows == [2]


def test_contradictions_and_label_errors():
    rows_ = labelled()
    rows_[10]["label"] = "bad"
    rows_.append({**rows_[0], "label": "bad"})
    t = table(rows_, "classification")
    assert CHECKS["conflicts"](t, Look()).rows == [60]
    assert set(CHECKS["label_errors"](t, Look()).rows) >= {10}
    assert len(CHECKS["label_errors"](t, Look()).rows) <= 3
    assert CHECKS["balance"](t, Look()).counts == {"bad": 32, "good": 29}


def test_rare_and_alike_labels():
    t = table([*labelled(), {"text": "x", "label": "Good"}], "classification")
    finding = CHECKS["balance"](t, Look())
    assert finding.rows == [60]
    assert any("'Good', 'good'" in r for r in finding.remarks)


def test_leakage_exact_and_near():
    t = table(clean())
    other = table([clean()[2], {"prompt": clean()[5]["prompt"] + " Say!", "completion": "another answer"}])
    found = CHECKS["leakage"](t, Look(against=other, near=0.75))
    assert found.rows == [2, 5]
    assert found.safe


def test_too_long_by_the_tokenizer_given():
    t = table([*clean(), {"prompt": "word " * 50, "completion": "x"}])
    finding = CHECKS["too_long"](t, Look(tokens=lambda t, r: len(" ".join(t.texts(r.raw)).split()), max_length=40))
    assert finding.detail == {20: "51 tokens"}
    assert "--model" in CHECKS["too_long"](t, Look()).remarks[0]


ENGLISH = "The children went down to the river and looked for smooth stones until the evening"


def test_language_by_lingua():
    pytest.importorskip("lingua")
    german = "Die Kinder gingen am Nachmittag zum Fluss hinunter und suchten glatte Steine bis zum Abend"
    t = table([*[{"text": f"{ENGLISH}, said {n}."} for n in NAMES * 2], {"text": german}], "text")
    found = CHECKS["language"](t, Look())
    assert found.detail == {40: "text is German"}
    assert found.counts["English"] == 40


def test_language_by_script_without_lingua(monkeypatch):
    monkeypatch.setitem(sys.modules, "lingua", None)
    t = table([*[{"text": f"{ENGLISH}, said {n}."} for n in NAMES * 2], {"text": "孩子们去了河边"}], "text")
    found = CHECKS["language"](t, Look())
    assert found.detail == {40: "text is CJK"}
    assert "not installed" in found.remarks[0]


def test_repairs_keep_the_span_of_an_answer():
    context = "\u200bIn Zürich\u200b lives Ada. Ada is from \u200bKöln."
    row = {
        "context": context,
        "question": "Where?",
        "answers": {"text": ["Köln"], "answer_start": [context.index("Köln")]},
    }
    t = table(
        [row, {"context": "mail a@b.org", "question": "Which?", "answers": {"text": ["a@b.org"], "answer_start": [5]}}],
        "qa",
    )
    new = CHECKS["control"](t, Look()).changes[0]
    start = new["answers"]["answer_start"][0]
    assert new["context"][start : start + 4] == "Köln"
    assert row["answers"]["answer_start"] == [context.index("Köln")]
    mail = CHECKS["emails"](t, Look()).changes[1]
    assert mail["answers"] == {"text": ["<EMAIL>"], "answer_start": [5]}


def test_rows_with_spans_of_characters_are_counted_and_left():
    t = table(
        [{"text": "a@b.org in Oslo", "spans": [{"start": 11, "end": 15, "label": "city"}]}], "token_classification"
    )
    finding = CHECKS["emails"](t, Look())
    assert not finding.detail
    assert "1 more stay as they are" in finding.remarks[0]


@given(st.text(), st.text())
@settings(max_examples=60, deadline=None)
def test_similarity_is_symmetric_and_one_for_equals(a, b):
    assert jaccard(a, b) == jaccard(b, a)
    assert jaccard(a, a) == 1
    assert 0 <= jaccard(a, b) <= 1


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_control_characters_go_and_nothing_else(text):
    out = repair.CONTROL.sub("", text)
    assert repair.CONTROL.sub("", out) == out
    assert [c for c in text if not repair.CONTROL.match(c)] == list(out)


def test_groups_link_same_questions_and_same_contexts():
    t = table([*clean(), {"prompt": clean()[4]["prompt"], "completion": "another"}])
    assert groups(t, 0.8) == [*range(20), 4]
    qa = [
        {"context": c, "question": q, "answers": {}}
        for c, q in [("river " * 9, "who is it"), ("lake " * 9, "what"), ("river " * 9, "when exactly")]
    ]
    assert groups(table(qa, "qa"), 0.8) == [0, 1, 0]


def test_articles_of_squad_are_rows_of_questions(tmp_path):
    file = tmp_path / "squad.json"
    qas = [{"id": str(i), "question": f"q{i}", "answers": [{"text": "a", "answer_start": 0}]} for i in range(3)]
    file.write_text(
        '{"data": [{"title": "t", "paragraphs": [{"context": "a b", "qas": ' + str(qas).replace("'", '"') + "}]}]}"
    )
    t, unreadable = rows.open_table(Source(path=str(file)))
    assert (len(t), t.format, unreadable) == (3, "qa", [])


def test_the_format_is_that_of_the_first_row_that_has_one(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"odd": 1}, *clean()])
    t, _ = rows.open_table(Source(path=str(file)))
    assert t.format == "prompt_completion"
    assert CHECKS["missing"](t, Look()).rows == [0]


def test_rows_without_tags_are_missing():
    tagged = [
        {"text": "to Oslo", "spans": []},
        {"text": "to Oslo", "slots": []},
        {"words": ["Oslo"], "tags": ["O"]},
        {"text": "to Oslo"},
        {"words": ["Oslo"], "ner_tags": ["O"]},
    ]
    detail = CHECKS["missing"](table(tagged, "token_classification", tokens="words"), Look()).detail
    assert detail == {3: "no 'spans'", 4: "no 'tags'"}
