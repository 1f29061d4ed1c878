"""Noise on embeddings: how much, when, and where not."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.nodes.lora import LoRA
from jaxtune.nodes.noisy import Noisy, noisy
from jaxtune.weights import densify, einsum, seeded, take

TABLE = {
    "embed_tokens": {"weight": jnp.arange(640, dtype=jnp.float32).reshape(10, 64)},
    "norm": {"weight": jnp.ones(3)},
}
IDS_BT = jnp.tile(jnp.arange(8), (40, 2))


def test_noise_is_uniform_within_its_bounds():
    """± alpha / √(T · D), mean 0, variance a third of the bound's square; another draw for each key."""
    w = seeded(noisy(TABLE, 5.0), jax.random.key(0))["embed_tokens"]["weight"]
    noise = np.asarray(take(w, IDS_BT, jnp.float32) - TABLE["embed_tokens"]["weight"][IDS_BT])
    bound = 5.0 / (16 * 64) ** 0.5
    assert 0.999 * bound < np.abs(noise).max() <= bound + 1e-4
    assert abs(noise.mean()) < 0.02 * bound
    np.testing.assert_allclose(noise.var(), bound**2 / 3, rtol=0.02)
    other = seeded(noisy(TABLE, 5.0), jax.random.key(1))["embed_tokens"]["weight"]
    assert not np.array_equal(take(other, IDS_BT, jnp.float32), take(w, IDS_BT, jnp.float32))


def test_heads_evaluation_and_export_are_without():
    plain = TABLE["embed_tokens"]["weight"]
    unseeded = noisy(TABLE, 5.0)["embed_tokens"]["weight"]
    np.testing.assert_array_equal(take(unseeded, IDS_BT, jnp.float32), plain[IDS_BT])
    w = seeded({"w": unseeded}, jax.random.key(0))["w"]
    x_BTD = jnp.ones((1, 2, 64))
    np.testing.assert_array_equal(einsum("btd,vd->btv", x_BTD, w), einsum("btd,vd->btv", x_BTD, plain))
    np.testing.assert_array_equal(densify(w), plain)
    assert noisy(TABLE, 0.0) is TABLE


def test_it_stands_on_nodes_whose_dropout_goes_on():
    lora = LoRA(TABLE["embed_tokens"]["weight"], jnp.ones((10, 2)), jnp.ones((2, 64)), dropout=0.5)
    w = Noisy(lora, alpha=1.0).seeded(jax.random.key(0))
    assert w.shape == (10, 64)
    assert w.base.key is not None
    np.testing.assert_allclose(take(w, IDS_BT, jnp.float32), take(lora, IDS_BT, jnp.float32), atol=1 / 32 + 1e-4)
