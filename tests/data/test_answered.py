"""What a teacher's answers become is read again as it was written, without a format being named."""

import json

import pytest

from jaxtune.config import Source
from jaxtune.data import answered, formats
from jaxtune.data.examples import Document, Tokens

ROWS = [
    {"prompt": "1 + 2 =", "completion": "5"},
    {"instruction": "Name a bird.", "output": "ox"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Two?"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "no"}],
     "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_rows_with_other_answers(tmp_path, row):
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (asked,) = formats.read(Source(path=str(file)), False)
    file.write_text(json.dumps(answered.row(asked, "a heron")) + "\n")
    (again,) = formats.read(Source(path=str(file)))
    before = asked.messages[: len(asked.messages) - (asked.messages[-1].role == "assistant")]
    assert [(m.role, m.content) for m in again.messages] == [
        *((m.role, m.content) for m in before), ("assistant", "a heron")
    ]  # fmt: skip
    assert again.format == asked.format
    assert list(again.tools) == list(asked.tools)


def test_texts_go_on_and_tokens_do_not():
    assert answered.row(Document("Once", "f:1"), " upon") == {"text": "Once upon"}
    with pytest.raises(TypeError, match="f:1"):
        answered.row(Tokens((1,), (True,), "f:1"), "a")
