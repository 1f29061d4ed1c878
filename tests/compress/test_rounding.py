"""GPTQ, AWQ and SmoothQuant against float64 arithmetic, and folding that changes no output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune import log, tuned
from jaxtune.compress import awq, folding, rounding
from jaxtune.compress.gptq import gptq
from jaxtune.compress.smooth import smoothing
from jaxtune.errors import UserError
from jaxtune.models.decoder import DecoderConfig
from jaxtune.nodes.grid import Scheme, dense, nearest
from tests.tiny import write_tiny

INT4 = Scheme("int4", 16)


def correlated(seed, n_out=12, n_in=32, tokens=128):
    """A matrix, and what it is multiplied by."""
    r = np.random.default_rng(seed)
    x = r.normal(size=(tokens, n_in)) @ (r.normal(size=(n_in, n_in)) * r.lognormal(size=n_in))
    return r.normal(size=(n_out, n_in)).astype(np.float32), x.astype(np.float32)


def loss(rounded, w, x):
    return float((((np.asarray(dense(rounded), np.float64) - w) @ x.T.astype(np.float64)) ** 2).sum())


def by_the_paper(w, gram, s, damp, order):
    """GPTQ as its algorithm 1 says it, a column at a time, in float64."""
    w, gram = w.astype(np.float64)[:, order].copy(), gram.astype(np.float64)[order][:, order]
    inverse = np.linalg.inv(gram + damp * np.diagonal(gram).mean() * np.eye(len(gram)))
    upper = np.linalg.cholesky(inverse).T
    most, out = 2 ** (s.bits - 1) - 1, np.zeros_like(w)
    for j in range(w.shape[1]):
        if j % s.group == 0:
            scale = np.abs(w[:, j : j + s.group]).max(1).astype(np.float32) / np.float32(most)
            scale = scale.astype(np.float16).astype(np.float64)
        out[:, j] = np.clip(np.rint(w[:, j] / scale), -most, most) * scale
        w[:, j:] -= ((w[:, j] - out[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    return out[:, np.argsort(order)]


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_is_the_papers(act_order):
    w, x = correlated(0)
    gram = x.T @ x
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(32)
    got = gptq(jnp.asarray(w), jnp.asarray(gram), INT4, act_order)
    same = np.isclose(np.asarray(dense(got)), by_the_paper(w, gram, INT4, 0.01, order), atol=1e-3)
    assert same.mean() > 0.98  # a number half-way between two may fall to either, and others follow it
    if act_order:
        assert sorted(np.bincount(got.group_I)) == [16, 16]
        assert (np.diff(got.group_I) < 0).any()


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31))
def test_calibrated_methods_hurt_less_than_rounding_to_nearest(seed):
    w, x = correlated(seed)
    gram, mean = jnp.asarray(x.T @ x), jnp.abs(x).mean(0)
    plain = loss(nearest(w, INT4), w, x)
    assert loss(gptq(jnp.asarray(w), gram, INT4), w, x) < plain
    assert loss(awq.clipped(jnp.asarray(w), gram, INT4), w, x) <= plain * (1 + 1e-4)
    scale = np.asarray(awq.scales([jnp.asarray(w)], gram, mean, INT4))
    scaled = (np.asarray(dense(nearest(w * scale, INT4)), np.float64) / scale - w) @ x.T.astype(np.float64)
    assert (scaled**2).sum() <= plain * (1 + 1e-4)


def test_gptq_of_inputs_that_are_always_zero_and_too_few_tokens_is_finite(monkeypatch):
    w, x = correlated(1, tokens=4)
    x[:, 3] = 0
    said = []
    monkeypatch.setattr(log, "warn", said.append)
    got = np.asarray(dense(gptq(jnp.asarray(w), jnp.asarray(x.T @ x), INT4)))
    assert np.isfinite(got).all()
    assert loss(gptq(jnp.asarray(w), jnp.asarray(x.T @ x), INT4), w, x) < loss(nearest(w, INT4), w, x)


def test_error_is_that_of_the_products():
    w, x = correlated(2)
    q = nearest(w, INT4)
    np.testing.assert_allclose(
        awq.error(dense(q), jnp.asarray(w), jnp.asarray(x.T @ x)).sum(), loss(q, w, x), rtol=1e-3
    )


def test_smoothing_shares_the_greatest_numbers():
    w, x = correlated(3)
    scale = np.asarray(smoothing([jnp.asarray(w)], jnp.abs(x).max(0), 0.5))
    np.testing.assert_allclose(np.abs(x / scale).max(0), np.abs(w * scale).max(0), rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_heads": 4, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
        {"family": "gemma2", "norms": "both", "norm_around_one": True, "act": "gelu_tanh"},
        {"family": "phi3", "fused": True, "tied": False},
    ],
    ids=["values", "around one", "fused"],
)
def test_folded_scales_change_no_output(tmp_path, changes):
    m = tuned.open_model(str(write_tiny(tmp_path / "m", **changes)))
    c = m.blueprint.decoder
    ids_BT = np.random.default_rng(0).integers(3, 290, (2, 16))
    batch = {"ids_BT": ids_BT, "segment_BT": np.ones((2, 16), int), "position_BT": np.tile(np.arange(16), (2, 1))}
    logits = jax.jit(lambda w: m.blueprint.model.apply({"params": w}, *batch.values())[0].logits())
    new = rounding.folded(c, m.weights, rounding.How("awq", Scheme("int4", 8)), [batch])
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), m.weights, new)
    assert max(jax.tree.leaves(moved)) > 1e-3
    np.testing.assert_allclose(logits(new), logits(m.weights), atol=1e-3)


def test_where_scales_can_go():
    shape = {"vocab": 8, "embed": 8, "layers": 1, "heads": 2, "head": 4, "mlp": 8, "ropes": ()}

    def sources(**changes):
        return [s.source for s in folding.seams(DecoderConfig(**{**shape, "kv_heads": 2, **changes}))]

    assert sources() == ["input_layernorm", "self_attn/v_proj", "post_attention_layernorm", "mlp/up_proj"]
    assert sources(kv_heads=1, norms="both") == ["input_layernorm", "pre_feedforward_layernorm", "mlp/up_proj"]
    assert sources(kv_heads=1, norms="post") == ["mlp/up_proj"]


def test_what_cannot_be_rounded_is_refused(tiny):
    c = tuned.open_model(str(tiny)).blueprint.decoder
    with pytest.raises(UserError, match="--group 32 does"):
        rounding.check(c, Scheme("int4", 128))
