"""B batch, T time, N query heads, K key/value heads, H head dim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.attention import attend
from jaxtune.layers import Rope, rope_tables, rotate


def naive(q, k, v, seg):
    """Attention in float64 numpy, one score at a time in the head's own shape."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out = np.zeros_like(q)
    for b in range(B):
        for n in range(N):
            kv = n // (N // k.shape[2])
            s = q[b, :, n] @ k[b, :, kv].T / np.sqrt(H)
            see = np.tril(np.ones((T, T), bool)) & (seg[b][:, None] == seg[b][None])
            s = np.where(see, s, -np.inf)
            p = np.exp(s - s.max(-1, keepdims=True))
            out[b, :, n] = p / p.sum(-1, keepdims=True) @ v[b, :, kv]
    return out


@pytest.mark.parametrize(("T", "blocks"), [(5, 8), (130, 8), (200, 2)])
def test_attention_equals_a_float64_reference(T, blocks):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, T, n, 8)).astype(np.float32) for n in (4, 2, 2))
    seg = np.sort(rng.integers(1, 4, (2, T)), 1).astype(np.int32)
    got = attend(q, k, v, seg, blocks=blocks)
    np.testing.assert_allclose(got, naive(q, k, v, seg), rtol=1e-4, atol=1e-5)


def test_no_gradient_flows_to_the_future_or_to_other_segments():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 80, n, 4)), jnp.float32) for n in (2, 2, 2))
    seg = jnp.asarray(np.repeat([[1, 2]], 40, 1), jnp.int32)
    for t in (10, 39, 40, 70):
        g = jax.grad(lambda k, v, t=t: attend(q, k, v, seg)[0, t].sum(), (0, 1))(k, v)
        first = 0 if t < 40 else 40
        for x in g:
            assert not x[0, t + 1 :].any()
            assert not x[0, :first].any()
            assert x[0, t].any() or t == first  # one key alone has a constant softmax


def test_a_row_of_padding_gives_no_nan():
    x = jnp.ones((1, 4, 2, 4))
    assert np.isfinite(attend(x, x, x, jnp.zeros((1, 4), jnp.int32))).all()


def test_scores_of_rotated_vectors_depend_on_the_distance_alone():
    rope = Rope(8)
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (0, 1))

    def score(m, n):
        at = [[t[0] for t in rope_tables([rope], jnp.array([[p]]), jnp.ones((1, 1)))] for p in (m, n)]
        return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

    assert score(3, 1) == pytest.approx(score(103, 101), rel=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), rel=1e-2)


def test_dynamic_rope_does_not_look_at_other_rows():
    rope = Rope(8, kind="dynamic", factor=2.0, context=16)
    both = rope_tables([rope], jnp.array([[0, 1, 2], [0, 1, 40]]), jnp.ones((2, 3)))[0][0]
    alone = rope_tables([rope], jnp.array([[0, 1, 2]]), jnp.ones((1, 3)))[0][0]
    np.testing.assert_array_equal(both[:1], alone)
    assert not np.allclose(both[1, 1], both[0, 1])
