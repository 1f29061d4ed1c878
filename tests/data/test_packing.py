import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxtune.data.encode import Encoded
from jaxtune.data.packing import lay_out, pack


@given(st.lists(st.integers(1, 32), max_size=60))
def test_every_example_stands_once_and_no_row_overflows(lengths):
    rows = pack(lengths, 32)
    assert sorted(i for r in rows for i in r) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in r) <= 32 for r in rows)


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
def test_no_two_rows_would_fit_in_one(lengths):
    filled = sorted(sum(lengths[i] for i in r) for r in pack(lengths, 32))
    assert len(filled) == 1 or filled[0] + filled[1] > 32


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_row_keeps_tokens_masks_and_restarts_positions(lengths):
    rng = np.random.default_rng(0)
    examples = [Encoded(rng.integers(3, 99, n), rng.integers(0, 2, n).astype(bool)) for n in lengths]
    row = lay_out(examples, 40)
    for k, e in enumerate(examples, 1):
        here = row["segment_BT"] == k
        np.testing.assert_array_equal(row["ids_BT"][here], e.ids)
        np.testing.assert_array_equal(row["loss_mask_BT"][here], e.mask)
        np.testing.assert_array_equal(row["position_BT"][here], np.arange(len(e.ids)))
    assert (row["segment_BT"] == 0).sum() == 40 - sum(lengths)
    assert not row["loss_mask_BT"][row["segment_BT"] == 0].any()
