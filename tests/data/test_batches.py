import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.data.batches import Batches, Rows
from jaxtune.data.encode import Encoded
from jaxtune.data.packing import buckets


def rows(n, length=4):
    examples = [Encoded(np.full(3, i + 3, np.int32), np.ones(3, bool)) for i in range(n)]
    return Rows(examples, [f"f:{i}" for i in range(n)], [[i] for i in range(n)], length)


def seen(batches):
    return [b.rows.tolist() for b in batches]


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_each_pass_sees_every_row_once(n, batch_size, passes, seed):
    flat = [i for b in seen(Batches(rows(n), batch_size, seed=seed, row_count=n * passes)) for i in b]
    real = [i for i in flat if i >= 0]
    for p in range(passes):
        assert sorted(real[p * n : (p + 1) * n]) == list(range(n))
    assert len(flat) % batch_size == 0
    assert len(flat) - len(real) < batch_size


def test_passes_differ_and_seeds_repeat():
    def order(seed):
        return [i for b in seen(Batches(rows(32), 8, seed=seed, row_count=64)) for i in b]

    assert order(1)[:32] != order(1)[32:]
    assert order(1) == order(1)
    assert order(1) != order(2)


def test_the_state_resumes_exactly():
    whole = seen(Batches(rows(10), 3, seed=0, row_count=25))
    first = Batches(rows(10), 3, seed=0, row_count=25)
    head = [next(first).rows.tolist() for _ in range(4)]
    second = Batches(rows(10), 3, seed=0, row_count=25)
    second.state = first.state
    assert head + seen(second) == whole


def test_fill_up_rows_are_empty():
    last = list(Batches(rows(5), 4, seed=None, row_count=5))[-1]
    assert last.rows.tolist() == [4, -1, -1, -1]
    assert last.tokens == 3
    assert not last.columns["segment_BT"][1:].any()


def test_processes_lay_out_their_own_rows_and_together_all_of_them():
    """Seven rows, three at a time: the set does not divide, nor does a batch over two processes."""
    whole = list(Batches(rows(7), 3, seed=0, row_count=7))
    parts = [list(Batches(rows(7), 3, seed=0, row_count=7, own=own)) for own in ({0, 1}, {2})]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, x in batch.columns.items():
            np.testing.assert_array_equal(sum(s.columns[name] for s in shares), x)
        for share in shares:
            assert (share.tokens, share.origins) == (batch.tokens, batch.origins)


@given(st.integers(1, 99), st.integers(1, 40), st.floats(0.01, 4))
def test_there_is_a_batch_for_every_step(n, batch_size, epochs):
    steps, taken = rows(n).extent(batch_size, epochs, None, 0)
    assert (steps - 1) * batch_size < taken <= steps * batch_size
    assert rows(n).extent(batch_size, epochs, 7, 0) == (7, None)


def bucketed(lengths):
    examples = [Encoded(np.full(n, i + 3, np.int32), np.ones(n, bool)) for i, n in enumerate(lengths)]
    found = buckets(lengths, 1024)
    return Rows(examples, [f"f:{i}" for i in range(len(lengths))], [[i] for i in range(len(lengths))], 1024, found)


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 5), st.floats(0.1, 3), st.sampled_from([None, 3]))
@settings(max_examples=20, deadline=None)
def test_batches_of_buckets_have_one_length_and_passes_see_every_row_once(lengths, batch_size, epochs, seed):
    data = bucketed(lengths)
    steps, row_count = data.extent(batch_size, epochs, None, seed)
    batches = list(Batches(data, batch_size, seed=seed, row_count=row_count))
    assert len(batches) == steps
    per_pass = data.extent(batch_size, 1, None, seed)[0]
    for p in range(0, len(batches) - per_pass + 1, per_pass):
        assert sorted(i for b in batches[p : p + per_pass] for i in b.rows if i >= 0) == list(range(len(lengths)))
    for b in batches:
        T = b.columns["ids_BT"].shape[1]
        assert b.columns["ids_BT"].shape[0] == batch_size
        assert T in data.buckets
        assert b.tokens == sum(lengths[i] for i in b.rows if i >= 0)
        assert b.origins == [f"f:{i}" for i in b.rows if i >= 0]
        assert all(data.widths[i] == T for i in b.rows if i >= 0)
    assert sum(i >= 0 for b in batches for i in b.rows) >= row_count


def test_buckets_resume_exactly_and_go_on_without_end():
    def begun():
        return Batches(bucketed([20, 70, 70, 200, 90, 33, 10]), 2, seed=5, row_count=None)

    whole, first, second = begun(), begun(), begun()
    head = [next(first).rows.tolist() for _ in range(7)]
    second.state = first.state
    rest = [next(second).rows.tolist() for _ in range(30)]
    assert head + rest == [next(whole).rows.tolist() for _ in range(37)]


@given(LENGTHS, st.integers(32, 1024))
def test_every_length_has_a_bucket(lengths, capacity):
    lengths = [min(n, capacity) for n in lengths]
    found = buckets(lengths, capacity)
    assert list(found) == sorted(set(found))
    assert max(lengths) <= found[-1] <= capacity
