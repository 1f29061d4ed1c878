"""Fewer bits: rounding that is right on average, codes, and Adam in 8 bits beside Adam."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune.optim.narrow import noise, pack, round_at_random, scale_by_adam8bit, unpack

KEY = jax.random.key(3)


def drawn(x):
    return noise(jnp.int32(7), 3, x.shape)


def test_rounding_is_to_a_neighbour_and_right_on_average():
    x = jnp.full(40_000, 1.0 + 0.3 / 128)  # three tenths of the way to the next bfloat16
    y = round_at_random(x, 16, drawn(x))
    assert set(np.unique(y)) == {1.0, np.float32(1 + 1 / 128)}
    assert float(y.mean()) == pytest.approx(float(x[0]), abs=1e-4)
    np.testing.assert_array_equal(y.astype(jnp.bfloat16).astype(jnp.float32), y)
    np.testing.assert_array_equal(round_at_random(-x, 16, drawn(x)), -y)


def test_noise_is_even_and_of_its_own_each_step():
    bits = np.stack([np.asarray(noise(jnp.int32(t), i, (64, 64))) for t in (1, 2) for i in (0, 1)]).reshape(4, -1)
    ones = np.unpackbits(bits.view(np.uint8), axis=1).reshape(4, -1, 32)
    np.testing.assert_allclose(ones.mean(1), 0.5, atol=0.04)
    assert np.abs(np.corrcoef(bits.astype(float)) - np.eye(4)).max() < 0.06
    assert np.abs(np.corrcoef(bits[0, 1:].astype(float), bits[0, :-1].astype(float))[0, 1]) < 0.06


@pytest.mark.parametrize("shape", [(3, 512), (2, 300), (7,), (2, 3, 256)])
def test_codes_are_near_and_zeros_stay(shape):
    x = jax.random.normal(KEY, shape) * jnp.exp(3 * jax.random.normal(jax.random.key(1), shape))
    x = x.at[..., 0].set(0.0)
    codes, scale = jax.jit(pack)(x, drawn(x))
    assert codes.shape == x.shape
    assert codes.dtype == jnp.float8_e4m3fn
    assert scale.shape == (*shape[:-1], -(-shape[-1] // 256))
    y = unpack(codes, scale)
    largest = np.repeat(np.asarray(scale), -(-shape[-1] // scale.shape[-1]), -1)[..., : shape[-1]] * 448
    assert (np.abs(y - x) <= np.abs(x) / 8 + largest * 2.0**-9 / 448).all()
    np.testing.assert_array_equal(y == 0, x == 0)
    assert not np.isnan(y).any()


def test_codes_are_right_on_average_down_to_the_least():
    x = jnp.array([448.0, 300.0, 1.03, 0.02, 0.005, 0.0031])
    many = jax.vmap(lambda n: unpack(*pack(x, n)))(drawn(jnp.zeros((4000, 6))))
    np.testing.assert_allclose(many.mean(0), x, rtol=0.02)


def test_nothing_but_zeros_is_a_block_of_zeros():
    zeros = jnp.zeros((2, 300))
    assert not unpack(*pack(zeros, drawn(zeros))).any()


def test_two_hundred_steps_follow_adam_in_2_03_bytes_a_parameter():
    """Least squares with batches: the loss falls as Adam's, and the weights end where Adam's do."""
    rng = np.random.default_rng(0)
    a, want = rng.normal(size=(4096, 32)).astype(np.float32), rng.normal(size=(32, 512)).astype(np.float32)
    y = a @ want + 0.1 * rng.normal(size=(4096, 512)).astype(np.float32)

    def loss(w, i):
        rows = jax.lax.dynamic_slice_in_dim(jnp.asarray(a), i * 16, 16)
        return jnp.mean((rows @ w["w"] - jax.lax.dynamic_slice_in_dim(jnp.asarray(y), i * 16, 16)) ** 2)

    def train(core):
        tx = optax.chain(core, optax.scale(-0.02))

        def step(carry, i):
            w, state = carry
            value, g = jax.value_and_grad(loss)(w, i)
            updates, state = tx.update(g, state, w)
            return (optax.apply_updates(w, updates), state), value

        w = {"w": jnp.zeros((32, 512))}
        return jax.lax.scan(step, (w, tx.init(w)), jnp.arange(200))

    (w, _), losses = train(optax.scale_by_adam(0.9, 0.999, 1e-8))
    (w8, state), losses8 = train(scale_by_adam8bit(0.9, 0.999, 1e-8))
    np.testing.assert_allclose(losses8, losses, rtol=0.15)
    assert float(jnp.linalg.norm(w8["w"] - w["w"]) / jnp.linalg.norm(w["w"])) < 0.03
    held = sum(x.nbytes for x in jax.tree.leaves(state)) / (32 * 512)
    assert held < 2.04


def test_a_second_moment_in_8_bits_falls_when_gradients_do():
    """Rounded to the nearest it would stay for ever: a step changes it by a thousandth."""
    tx = scale_by_adam8bit(0.9, 0.999, 1e-8)
    w = {"w": jnp.zeros((4, 256))}
    gradients = jax.random.normal(KEY, (1500, 4, 256)) * jnp.where(jnp.arange(256) < 128, 1.0, 0.3)

    def step(state, x):
        _, state = tx.update({"w": x[0] * x[1]}, state)
        return state, None

    size = jnp.where(jnp.arange(1500) < 500, 1.0, 0.1)
    state, _ = jax.lax.scan(step, tx.init(w), (gradients, size))
    exact, _ = jax.lax.scan(
        lambda v, x: (0.999 * v + 0.001 * (x[0] * x[1]) ** 2, None), jnp.zeros((4, 256)), (gradients, size)
    )
    root = unpack(state.nu["w"], state.nu_scale["w"])
    for half in (slice(0, 128), slice(128, 256)):
        np.testing.assert_allclose(root[:, half].mean(), jnp.sqrt(exact)[:, half].mean(), rtol=0.05)
    assert float(jnp.abs(root / jnp.sqrt(exact) - 1).mean()) < 0.2
