"""Rounding to grids: as plain float64 arithmetic has it, the same when done again, and trained through."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune import job as jobs
from jaxtune import run, steps, tuned
from jaxtune.compress.quantize import wanted
from jaxtune.config import Train
from jaxtune.errors import UserError
from jaxtune.nodes.grid import FakeQuantized, Scheme, dense, nearest, through_rounding
from jaxtune.nodes.lora import LoRA
from jaxtune.weights import densify, einsum
from tests.tiny import make_config

SCHEMES = [Scheme("int4", 8), Scheme("int4", 8, False), Scheme("int8", 0), Scheme("int8", 16, False), Scheme("fp8", 0)]


def drawn(seed, shape=(6, 16)):
    return (np.random.default_rng(seed).normal(size=shape) * 3).astype(np.float32)


@pytest.mark.parametrize("s", SCHEMES, ids=str)
def test_nearest_is_the_nearest_number_of_the_grid(s):
    w = drawn(0)
    got = np.asarray(dense(nearest(w, s)), np.float64).reshape(6, -1, s.group or 16)
    for group, mine in zip(
        w.astype(np.float64).reshape(-1, s.group or 16), got.reshape(-1, s.group or 16), strict=True
    ):
        if s.dtype == "fp8":
            scale = float(np.float16(np.float32(np.abs(group).max()) / np.float32(448)))
            levels = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
        elif s.symmetric:
            most = 2 ** (s.bits - 1) - 1
            levels = np.arange(-most, most + 1) * float(np.float16(np.float32(np.abs(group).max()) / np.float32(most)))
        else:
            low, high = min(group.min(), 0), max(group.max(), 0)
            zero = round(-low / ((high - low) / (2**s.bits - 1)))
            levels = (np.arange(2**s.bits) - zero) * float(np.float16((high - low) / (2**s.bits - 1)))
        levels = levels[np.isfinite(levels)]
        nearest_of = np.abs(group[:, None] - levels).min(1)
        np.testing.assert_allclose(np.abs(mine - group), nearest_of, atol=2e-3)
        assert np.isin(np.round(mine, 4), np.round(levels, 4)).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([s for s in SCHEMES if s.symmetric]))
def test_rounding_again_changes_nothing(seed, s):
    once = nearest(drawn(seed), s)
    again = nearest(dense(once), s)
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_products_see_the_rounded_matrix_and_gradients_pass():
    s, w, x = Scheme("int4", 8), jnp.asarray(drawn(1, (16, 2, 3))), jnp.asarray(drawn(2, (1, 4, 16)))
    flat = dense(nearest(np.asarray(w).reshape(16, -1).T, s)).T.reshape(w.shape)

    def out(w):
        return einsum("btd,dnh->btnh", x, FakeQuantized(w, s))

    np.testing.assert_allclose(out(w), jnp.einsum("btd,dnh->btnh", x, flat), rtol=1e-5, atol=1e-5)
    up = jnp.asarray(drawn(3, (1, 4, 2, 3)))
    (found,) = jax.vjp(out, w)[1](up)
    np.testing.assert_allclose(found, jnp.einsum("btd,btnh->dnh", x, up), rtol=1e-5, atol=1e-5)


def test_an_adapter_is_rounded_with_what_it_stands_on():
    s = Scheme("int4", 8)
    node = LoRA(*(jnp.asarray(drawn(i, shape)) for i, shape in enumerate([(16, 5), (16, 2), (2, 5)])), scale=0.5)
    x = jnp.eye(16)[None]
    seen = einsum("btd,df->btf", x, FakeQuantized(node, s))[0]
    np.testing.assert_allclose(seen, through_rounding(densify(node), 1, s), rtol=1e-6)
    gradient = jax.grad(lambda n: einsum("btd,df->btf", x, FakeQuantized(n, s)).sum())(node)
    assert np.abs(gradient.a).min() > 0
    assert np.abs(gradient.b).min() > 0


def test_what_was_trained_through_rounding_is_exported_on_the_grid(tiny, sums_file, tmp_path):
    c = make_config(
        tiny, sums_file, tmp_path / "run", tuning__method="full", train__qat="int4", train__qat_group=16, train__steps=6
    )
    folder = run.train(c)
    losses = [m["loss"] for m in tuned.Run(folder).metrics if "loss" in m]
    assert losses[-1] < losses[0]
    layers = tuned.open_model(str(folder)).weights["layers_0-1"]
    for part, name in [("self_attn", "q_proj"), ("mlp", "down_proj")]:
        for w in np.asarray(layers[part][name]["weight"]):
            w_OI = w.reshape(w.shape[0], -1).T
            np.testing.assert_array_equal(dense(nearest(w_OI, Scheme("int4", 16))), w_OI)
    before = tuned.open_model(str(tiny)).weights["layers_0-1"]["mlp"]["down_proj"]["weight"]
    assert np.abs(np.asarray(before) - np.asarray(layers["mlp"]["down_proj"]["weight"])).max() > 0


def test_fp8_is_trained_on_the_grid_that_is_written():
    want = wanted(dtype="fp8").how.scheme
    assert steps.rounding(Train(qat="fp8")) == want == Scheme("fp8", 0)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tuning__method": "qlora", "train__qat_group": 16}, "held quantised already"),
        ({"tuning__method": "lora", "tuning__dropout": 0.1, "train__qat_group": 16}, "without dropout"),
        ({"tuning__method": "lora", "train__qat_group": 128}, "train.qat_group=128: .* does"),
    ],
)
def test_what_cannot_be_rounded_in_training_is_refused(tiny, sums_file, tmp_path, keys, said):
    with pytest.raises(UserError, match=said):
        jobs.prepare(make_config(tiny, sums_file, tmp_path / "run", train__qat="int4", **keys))
