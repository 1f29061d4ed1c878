"""The split is a partition, keeps labels' shares and groups, and is a function of the seed."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.errors import UserError
from jaxtune.prepare.split import split

strata = st.lists(st.sampled_from("abc"), min_size=5, max_size=120)
shares = st.floats(0.05, 0.7)
seeds = st.integers(0, 1000)


@given(strata, shares, seeds, st.integers(1, 8))
@settings(max_examples=80, deadline=None)
def test_a_partition_with_groups_on_one_side(labels, share, seed, size):
    groups = [i // size for i in range(len(labels))]
    train, held = split(labels, groups, share, seed)
    assert sorted(train + held) == list(range(len(labels)))
    assert not {groups[i] for i in train} & {groups[i] for i in held}
    assert len(held) <= max(1, round(share * len(labels)))
    assert (train, held) == split(labels, groups, share, seed)


@given(strata, shares, seeds)
@settings(max_examples=80, deadline=None)
def test_labels_keep_their_shares_within_rounding(labels, share, seed):
    _, held = split(labels, range(len(labels)), share, seed)
    n = max(1, round(share * len(labels)))
    assert len(held) == n
    taken = Counter(labels[i] for i in held)
    for label, count in Counter(labels).items():
        assert abs(taken[label] - n * count / len(labels)) < 1


def test_the_seed_decides():
    labels, groups = [None] * 200, range(200)
    assert split(labels, groups, 20, 0)[1] != split(labels, groups, 20, 1)[1]
    assert len(split(labels, groups, 20, 0)[1]) == 20


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(UserError, match="none is left to train on"):
        split(["a"] * 3, range(3), 3, 0)
