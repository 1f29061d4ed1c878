import pytest

from jaxtune.data.examples import Judged, Pair
from jaxtune.errors import UserError
from tests.data.formats.rows import TURNS, one

GOOD, BAD = [{"role": "assistant", "content": "Yes"}], [{"role": "assistant", "content": "No"}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Q", "chosen": "Yes", "rejected": "No"},
        {"prompt": TURNS[:1], "chosen": GOOD, "rejected": BAD},
        {"chosen": [*TURNS[:1], *GOOD], "rejected": [*TURNS[:1], *BAD]},
        {"prompt": "Hi", "chosen": [*TURNS[:1], *GOOD], "rejected": [*TURNS[:1], *BAD], "messages": TURNS},
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
        one(tmp_path, {"messages": TURNS, "label": "maybe"}, format="kto")
