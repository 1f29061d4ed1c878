import pytest

from jaxtune.data.examples import Segments, Tokens
from jaxtune.errors import UserError
from tests.data.formats.rows import one


def test_segments_and_tokens(tmp_path):
    e = one(tmp_path, {"segments": [{"text": "a", "label": False}, {"text": "b", "label": True}]})
    assert e == Segments((("a", False), ("b", True)), e.origin)
    e = one(tmp_path, {"input_ids": [1, 2, 3, 0], "labels": [-100, 2, 3, -100], "attention_mask": [1, 1, 1, 0]})
    assert e == Tokens((1, 2, 3), (False, True, True), e.origin)
    assert one(tmp_path, {"input_ids": [1, 2]}).mask == (True, True)
    masks = {"completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 0, 1, 1], "attention_mask": [1, 1, 1, 0]}
    assert one(tmp_path, {"input_ids": [1, 2, 3, 0], **masks}).mask == (False, False, True)
    masks.pop("assistant_masks")
    assert one(tmp_path, {"input_ids": [1, 2, 3, 0], **masks}).mask == (False, True, True)
    assert one(tmp_path, {"input_ids": [1, 2, 3, 0], "labels": [1, -100, 3, 0], **masks}).mask == (True, False, True)
    for row, words in (
        ({"input_ids": [1, 2], "completion_mask": [1]}, "2 input_ids, 1 values in 'completion_mask'"),
        ({"input_ids": [1, 2], "assistant_masks": [1, 2]}, r"assistant_masks\[1\]' should be true or false"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids, 1 labels"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, r"labels\[1\] is 3; allowed: input_ids\[1\], 2, or -100"),
        ({"input_ids": [1, -2]}, "should be token ids"),
        ({"input_ids": [1, True]}, "should be a whole number"),
        ({"segments": [{"text": "a"}]}, r"segments\[0\] should have 'text' and 'label'"),
    ):
        with pytest.raises(UserError, match=words):
            one(tmp_path, row)
