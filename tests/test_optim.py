import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import optim
from jaxtune.config import Optim
from jaxtune.errors import UserError


def rates(total=100, **c):
    s = optim.schedule(Optim(learning_rate=1.0, **c), total)
    return np.array([float(s(i)) for i in range(total + 1)])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_schedules_warm_up_and_stay_within_bounds(name):
    r = rates(schedule=name, warmup=0.1)
    assert r[0] == pytest.approx(0.1)
    assert (np.diff(r[:10]) > 0).all()
    assert r[10] == pytest.approx(1.0)
    assert r.max() <= 1.0 + 1e-6
    assert (np.diff(r[10:]) <= 1e-6).all()
    assert r[-1] == pytest.approx(1.0 if name == "constant" else 0.0, abs=1e-6)


def test_wsd_is_constant_then_falls():
    r = rates(schedule="wsd", warmup=0, decay=0.25, final=0.1)
    assert (r[:75] == 1.0).all()
    assert r[-1] == pytest.approx(0.1)
    assert (np.diff(r[75:]) < 0).all()


def test_warmup_as_a_number_of_steps():
    assert rates(schedule="constant", warmup=5)[4] == pytest.approx(1.0)
    with pytest.raises(UserError, match="not shorter than the run of 100 steps"):
        rates(warmup=100)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
def test_every_optimiser_goes_downhill(name):
    tx = optim.make(Optim(name=name, learning_rate=0.05, schedule="constant", warmup=0), 100)
    w = {"layers_0-0": {"mlp": {"weight": jnp.ones((4, 4))}}}
    state = tx.init(w)
    first = float(optax.tree.norm(w))
    for _ in range(30):
        updates, state = tx.update(w, state, w)  # the gradient of |w|²/2 is w
        w = optax.apply_updates(w, updates)
    assert float(optax.tree.norm(w)) < 0.6 * first


def test_decay_spares_norms_and_biases():
    w = {"input_layernorm": {"weight": jnp.ones(2)}, "q_proj": {"weight": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    tx = optim.make(Optim(name="sgd", learning_rate=0.5, schedule="constant", warmup=0, weight_decay=0.1, clip=0), 9)
    zero = {k: {n: jnp.zeros_like(x) for n, x in v.items()} for k, v in w.items()}
    updates, _ = tx.update(zero, tx.init(w), w)
    assert np.allclose(updates["q_proj"]["weight"], -0.05)
    assert not updates["q_proj"]["bias"].any()
    assert not updates["input_layernorm"]["weight"].any()


def test_clipping():
    tx = optim.make(Optim(name="sgd", learning_rate=1.0, schedule="constant", warmup=0, clip=1.0, beta1=0.0), 9)
    g = {"w": jnp.full(4, 100.0)}
    updates, _ = tx.update(g, tx.init(g), g)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0, rel=1e-5)
