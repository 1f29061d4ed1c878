"""Every real data set in the assets is readable, all of it: rows counted against what SOURCES.md says."""

import pytest

from jaxtune.config import Source
from jaxtune.data import formats
from jaxtune.data.examples import Conversation, Document, Judged, Pair, Record

SETS = {
    "ag_news": ("classification", {"text": "title", "text_pair": "description", "label": "label_text"}),
    "alpaca_en_demo": ("auto", {}),
    "alpaca_zh_demo": ("auto", {}),
    "banking77": ("classification", {"label": "category"}),
    "c4_demo": ("auto", {}),
    "cmrc2018_zh": ("auto", {}),
    "dialogsum": ("summarisation", {"document": "dialogue"}),
    "dpo_en_demo": ("auto", {}),
    "glaive_toolcall_en_demo": ("auto", {}),
    "gsm8k": ("maths", {}),
    "identity": ("auto", {}),
    "kto_en_demo": ("auto", {}),
    "multi30k_en_de": ("translation", {"source": "en", "target": "de"}),
    "poem_sentiment": ("classification", {}),
    "scitldr": ("summarisation", {"document": "source"}),
    "self_instruct_seed": ("auto", {}),
    "snips": ("auto", {}),
    "sst2": ("classification", {"label": "label_text"}),
    "tatoeba_en_zh": ("translation", {"source": "en", "target": "zh"}),
    "tinyshakespeare": ("auto", {}),
    "tinystories": ("auto", {}),
    "uci_sentiment": ("classification", {"label": "label_text"}),
    "wiki_demo": ("auto", {}),
    "wikitext2": ("auto", {}),
    "xquad_de": ("auto", {}),
    "xquad_en": ("auto", {}),
    "xquad_zh": ("auto", {}),
}
KINDS = {"dpo_en_demo": Pair, "kto_en_demo": Judged} | dict.fromkeys(
    ("alpaca_en_demo", "alpaca_zh_demo", "glaive_toolcall_en_demo", "identity", "self_instruct_seed"), Conversation
) | dict.fromkeys(("c4_demo", "tinyshakespeare", "tinystories", "wiki_demo", "wikitext2"), Document)  # fmt: skip


def read(assets, name, split="train"):
    kind, columns = SETS[name]
    [file] = (assets / "data" / name).glob(f"{split}.*")
    return formats.read(Source(path=str(file), format=kind, columns=columns))


@pytest.fixture(scope="module")
def counts(assets):
    """Rows by file, as SOURCES.md has them."""
    table = [line.split("|") for line in (assets / "SOURCES.md").read_text().splitlines() if line.startswith("| data/")]
    return {cells[1].strip().removeprefix("data/"): int(cells[2]) for cells in table}


def test_no_set_is_forgotten(assets):
    assert {p.name for p in (assets / "data").iterdir()} == set(SETS)


@pytest.mark.parametrize("name", SETS)
def test_all_rows_are_read(assets, counts, name):
    for file in sorted((assets / "data" / name).glob("*.*")):
        examples = read(assets, name, file.stem)
        want = counts[f"{name}/{file.name}"]
        if file.suffix == ".txt":  # counted with its blank lines there
            text = file.read_text()
            assert text.count("\n") == want
            want = sum(bool(line.strip()) for line in text.splitlines())
        assert len(examples) == want
        assert {type(e) for e in examples} == {KINDS.get(name, Record)}


def test_labels(assets):
    def labels(name):
        return {e.row["label"] for e in read(assets, name)}

    assert labels("sst2") == {"positive", "negative"}
    assert labels("poem_sentiment") == {"-1", "0", "1", "2"}
    assert labels("ag_news") == {"World", "Sports", "Business", "Sci/Tech"}
    assert len(labels("banking77")) == 77


def test_slots_stand_where_they_say(assets):
    for e in read(assets, "snips"):
        assert e.row["spans"]
        assert all(e.row["text"][s["start"] : s["end"]].strip() for s in e.row["spans"])


def test_answers_stand_where_they_say(assets):
    lost = 0
    for name in ("cmrc2018_zh", "xquad_zh"):
        for split in ("train", "validation"):
            for e in read(assets, name, split):
                for text, start in zip(e.row["answers"]["text"], e.row["answers"]["answer_start"], strict=True):
                    assert start == -1 or e.row["context"].startswith(text, start)
                    lost += start == -1
    assert lost < 30  # of 3424, which the contexts do not hold letter for letter


def test_calls_and_answers(assets):
    calls = [
        m.extra["tool_calls"]
        for e in read(assets, "glaive_toolcall_en_demo")
        for m in e.messages
        if "tool_calls" in m.extra
    ]
    assert len(calls) > 50
    assert all(isinstance(c["function"]["arguments"], dict) for several in calls for c in several)
    for p in read(assets, "dpo_en_demo"):
        assert p.prompt[-1].role == "user"
        assert [p.chosen[0].role, p.rejected[0].role] == ["assistant"] * 2
    good = [j.good for j in read(assets, "kto_en_demo")]
    assert 0 < sum(good) < len(good)
