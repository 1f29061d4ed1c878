from collections import Counter

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.mixing import mixed

SETS = st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 4)), min_size=1, max_size=4)


@given(SETS, st.integers(0, 9))
def test_concatenated_sets_come_in_order_each_as_often_as_its_weight(sets, seed):
    lengths, weights = zip(*sets, strict=True)
    picks = mixed(lengths, weights, "concat", seed)
    assert [k for k, _ in picks] == sorted(k for k, _ in picks)
    for k, (n, w) in enumerate(sets):
        times = Counter(i for at, i in picks if at == k)
        assert sum(times.values()) == int(w) * n + round((w % 1) * n)
        assert {times[i] for i in range(n)} <= {int(w), int(w) + 1}
    assert picks == mixed(lengths, weights, "concat", seed)


@pytest.mark.parametrize(
    ("how", "stop"), [("interleave_under", "first_exhausted"), ("interleave_over", "all_exhausted")]
)
@given(sets=SETS, seed=st.integers(0, 9))
@settings(max_examples=8, deadline=None)
def test_interleaving_is_that_of_datasets(how, stop, sets, seed):
    lengths, weights = zip(*sets, strict=True)
    made = [datasets.Dataset.from_dict({"k": [k] * n, "i": list(range(n))}) for k, n in enumerate(lengths)]
    odds = (np.array(weights) / sum(weights)).tolist()
    theirs = datasets.interleave_datasets(made, probabilities=odds, seed=seed, stopping_strategy=stop)
    assert mixed(lengths, weights, how, seed) == list(zip(theirs["k"], theirs["i"], strict=True))


def test_seeds_draw_anew():
    assert mixed([50], [0.5], "concat", 0) != mixed([50], [0.5], "concat", 1)
    with pytest.raises(ValueError, match="no rows"):
        mixed([3, 0], [1, 1], "interleave_over", 0)
