import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jaxtune import optim
from jaxtune.config import Optim
from jaxtune.errors import UserError
from tests.optim.trees import abstract, arrays, walk


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


NAMES = ["adamw", "adamw8bit", "adafactor", "lion", "sgd", "muon", "schedule_free"]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_goes_downhill(name):
    tx = optim.make(Optim(name=name, learning_rate=0.05, schedule="constant", warmup=0), 100, abstract())
    w = jax.tree.map(jnp.ones_like, arrays(0))
    state, update = tx.init(w), jax.jit(tx.update)
    first = float(optax.tree.norm(w))
    for _ in range(30):
        updates, state = update(w, state, w)  # the gradient of |w|²/2 is w
        w = optax.apply_updates(w, updates)
    assert float(optax.tree.norm(optim.averaged(state, w))) < 0.7 * first


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "sgd", "schedule_free"])
def test_weights_in_bfloat16_have_moments_in_bfloat16(name):
    """And they are not lost: 20 steps end near those of float32."""
    c = Optim(name=name, learning_rate=0.05, schedule="constant", warmup=0)
    if name == "schedule_free":
        with pytest.raises(UserError, match="schedule_free averages by steps that bfloat16 loses"):
            optim.make(c, 9, abstract(jnp.bfloat16))
        return
    tx = optim.make(c, 20, abstract(jnp.bfloat16))
    ours, state = walk(tx, arrays(0, jnp.bfloat16), range(20))
    assert {x.dtype.name for x in jax.tree.leaves(ours)} == {"bfloat16"}
    large = {x.dtype.name for x in jax.tree.leaves(state) if x.ndim}
    assert large <= ({"float8_e4m3fn", "float32"} if name == "adamw8bit" else {"bfloat16"})
    want, _ = walk(tx, arrays(0), range(20))
    for a, b, start in zip(*(jax.tree.leaves(t) for t in (ours, want, arrays(0))), strict=True):
        moved, error = np.abs(b - start).mean(), np.abs(a.astype(jnp.float32) - b).mean()
        assert error < 0.25 * moved + 0.01


def test_clipping():
    c = Optim(name="sgd", learning_rate=1.0, schedule="constant", warmup=0, clip=1.0, beta1=0.0)
    g = jax.tree.map(lambda x: 100 * x, arrays(0))
    tx = optim.make(c, 9, abstract())
    updates, _ = tx.update(g, tx.init(g), g)
    assert float(optax.tree.norm(updates)) == pytest.approx(1.0, rel=1e-5)


# --- muon -----------------------------------------------------------------------------------------------------------


def test_stacked_layers_step_as_single_ones_under_muon():
    c = Optim(name="muon", learning_rate=0.1, schedule="constant", warmup=0, clip=0)
    got, _ = walk(optim.make(c, 9, abstract()), arrays(0), [1, 2, 3])
    for i in range(2):
        for name, (into, out) in {"q_proj": (4, 6), "o_proj": (6, 4)}.items():

            def matrix(t, i=i, name=name, into=into, out=out):
                return np.asarray(t["layers_0-1"]["self_attn"][name]["weight"][i]).reshape(into, out)

            tx = optax.chain(
                optax.contrib.scale_by_muon(weight_dimension_numbers=optax.contrib.MuonDimensionNumbers()),
                optax.scale(-0.1 * 0.2 * 6**0.5),
            )
            w = jnp.asarray(matrix(arrays(0)))
            state, update = tx.init(w), jax.jit(tx.update)
            for s in (1, 2, 3):
                updates, state = update(jnp.asarray(matrix(arrays(s))), state, w)
                w = w + updates
            np.testing.assert_allclose(matrix(got), w, atol=1e-5)


def test_muon_steps_as_torchs_and_leaves_the_rest_to_adam():
    """One step; torch iterates in bfloat16."""
    c = Optim(name="muon", learning_rate=0.1, schedule="constant", warmup=0, clip=0)
    start, g = arrays(0), arrays(1)
    got, _ = walk(optim.make(c, 9, abstract()), start, [1])
    adam, _ = walk(optim.make(c.model_copy(update={"name": "adamw"}), 9, abstract()), start, [1])
    for path in (("embed_tokens", "weight"), ("lm_head", "weight"), ("norm", "weight")):
        np.testing.assert_array_equal(got[path[0]][path[1]], adam[path[0]][path[1]])
    q = [t["layers_0-1"]["self_attn"]["q_proj"] for t in (got, adam, start, g)]
    np.testing.assert_array_equal(q[0]["bias"], q[1]["bias"])
    p = torch.nn.Parameter(torch.tensor(np.asarray(q[2]["weight"][1]).reshape(4, 6)))
    p.grad = torch.tensor(np.asarray(q[3]["weight"][1]).reshape(4, 6))
    torch.optim.Muon([p], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw").step()
    np.testing.assert_allclose(np.asarray(q[0]["weight"][1]).reshape(4, 6), p.detach().numpy(), atol=3e-3)


# --- schedule-free and averages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "optim.schedule=cosine: schedule_free does without; set optim.schedule=constant"),
        ({"schedule": "constant", "beta1": 0}, "optim.beta1=0: schedule_free interpolates by it"),
    ],
)
def test_schedule_free_says_what_it_wants(given, words):
    with pytest.raises(UserError) as e:
        optim.make(Optim(name="schedule_free", **given), 9, abstract())
    assert words in str(e.value)


def test_schedule_free_is_adamw_by_averaging():
    """By hand (Defazio et al., 2024): y between z and x, z by Adam without momentum, x the mean of all z."""
    c = Optim(name="schedule_free", learning_rate=0.1, schedule="constant", warmup=2, weight_decay=0.1, clip=0)
    tx, w = optim.make(c, 9, abstract()), arrays(0)
    y, state = walk(tx, w, range(1, 6))

    def leaf(tree):
        return np.asarray(tree["lm_head"]["weight"], np.float64)

    x = z = at = leaf(w)
    v, weight = 0.0, 0.0
    for t in range(1, 6):
        rate = 0.05 if t == 1 else 0.1
        g = leaf(arrays(t))
        v = 0.999 * v + 0.001 * g * g
        z = z - rate * (g / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.1 * at)
        weight += rate**2
        x = x + rate**2 / weight * (z - x)
        at = 0.9 * x + 0.1 * z
    np.testing.assert_allclose(leaf(y), at, atol=1e-5)
    np.testing.assert_allclose(leaf(optim.averaged(state, y)), x, atol=1e-5)


def test_the_average_is_that_of_a_loop():
    c = Optim(learning_rate=0.1, schedule="constant", warmup=0)
    plain = optim.make(c, 9, abstract())
    tx = optim.averaging(plain, 0.8)
    w, state = walk(tx, arrays(0), range(1, 6))
    new = mean = arrays(0)
    held, update = plain.init(new), jax.jit(plain.update)
    for n in range(1, 6):
        updates, held = update(arrays(n), held, new)
        new = optax.apply_updates(new, updates)
        mean = jax.tree.map(lambda m, x: 0.8 * m + 0.2 * x, mean, new)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), optim.averaged(state, w), mean)
    jax.tree.map(np.testing.assert_array_equal, w, new)  # what trains is not changed by it
    assert optim.averaged(plain.init(w), w) is w


def test_an_average_of_an_average_is_refused():
    free = optim.make(Optim(name="schedule_free", schedule="constant"), 9, abstract())
    with pytest.raises(UserError, match="train.ema: schedule_free averages by itself"):
        optim.averaging(free, 0.9).init(arrays(0))


@pytest.mark.parametrize("name", ["adamw", "schedule_free"])
def test_traced_knobs_give_what_constants_give(name):
    """And one program serves other rates, decays and schedules."""
    seen = []

    def updates(given, knobs, w, grads):
        tx = optim.make(given, 9, abstract(), given=knobs)
        seen.append(given)
        out, state = [], tx.init(w)
        for g in grads:
            u, state = tx.update(g, state, w)
            out.append(u)
            w = optax.apply_updates(w, u)
        return out

    base = {"name": name, "schedule": "constant" if name == "schedule_free" else "cosine", "layer_decay": 0.8}
    grads, w = [arrays(s) for s in (1, 2, 3)], arrays(0)
    first = Optim(learning_rate=0.1, weight_decay=0.1, warmup=3, **base)
    other = Optim(learning_rate=0.03, weight_decay=0.01, warmup=0, **base)
    program = jax.jit(functools.partial(updates, first))
    for c in (first, other):
        want = jax.jit(functools.partial(updates, c, None))(w, grads)
        got = program(optim.knobs(c, 9, abstract()), w, grads)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-9), got, want)
    assert seen.count(first) == 2  # with constants, and once for both


def test_the_rates_of_all_steps_are_those_of_the_schedule():
    for schedule in ("cosine", "linear", "constant", "wsd"):
        c = Optim(learning_rate=1e-3, schedule=schedule)
        single = jax.jit(optim.schedule(c, 50))
        np.testing.assert_allclose(optim.knobs(c, 50, abstract())["rate_S"], [single(n) for n in range(50)], rtol=1e-6)
