"""What every method promises, over random settings of it: who changes, who owns state, what merging and saving keep."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jaxtune import blueprint, job, overview, steps
from jaxtune.checkpoint import Checkpoints
from jaxtune.data.pipeline import Batches
from jaxtune.layers import unbox
from jaxtune.training import State
from jaxtune.tuning import method as m
from jaxtune.weights import map_nodes, under
from tests.tiny import make_config, write_tiny

RANK = st.integers(1, 4)
BASE = st.sampled_from([None, None, "nf4", "int8"])
TARGETS = st.sampled_from(["all-linear", ["q_proj", "down_proj"], [r"layers/1/"]])
LORA = {"method": st.just("lora"), "rank": RANK, "targets": TARGETS, "base": BASE}

# name -> settings, and whether the wrapped model is the base model at first
METHODS = {
    "full": ({"method": st.just("full")}, True),
    "freeze": ({"method": st.just("freeze"), "last": st.integers(1, 2), "first": st.integers(0, 1),
                "train": st.sampled_from([[], ["norms"]])}, True),
    "lora": ({**LORA, "rslora": st.booleans(), "init": st.sampled_from(["default", "gaussian"]),
              "train": st.sampled_from([[], ["head"], ["norms"]])}, True),
    "lora by layer": ({**LORA, "targets": st.just("all-linear"), "rank_pattern": st.just({"layers/0/": 1})}, True),
    "dora": ({**LORA, "dora": st.just(True)}, True),
    "pissa": ({**LORA, "init": st.sampled_from(["pissa", "olora"])}, True),
    "vera": ({**LORA, "form": st.just("vera")}, True),
    "loha": ({**LORA, "form": st.just("loha")}, True),
    "lokr": ({**LORA, "form": st.just("lokr")}, True),
    "qlora": ({**LORA, "method": st.just("qlora"), "base": st.sampled_from(["nf4", "int4", "fp8"])}, True),
    "adalora": ({"method": st.just("adalora"), "init_rank": st.just(4), "rank": RANK, "base": BASE,
                 "every": st.just(1)}, True),
    "lisa": ({"method": st.just("lisa"), "layers": st.just(1), "every": st.integers(1, 3),
              "draw": st.sampled_from(["uniform", "importance"])}, True),
    "gradient_select": ({"method": st.just("gradient_select"), "budget": st.floats(0.1, 0.6), "warmup": st.just(1),
                         "every": st.integers(1, 2), "score": st.sampled_from(["fisher", "norm", "taylor"])}, True),
    "ia3": ({"method": st.just("ia3"), "base": BASE}, True),
    "galore": ({"method": st.just("galore"), "rank": RANK, "every": st.integers(1, 3)}, True),
    "prompt": ({"method": st.just("prompt"), "tokens": st.integers(1, 3), "base": BASE,
                "encoder": st.sampled_from(["none", "mlp"])}, False),
    "prefix": ({"method": st.just("prefix"), "tokens": st.integers(1, 3), "base": BASE}, False),
}  # fmt: skip
NOT_MERGED = ("prompt", "prefix")
# copies of each trained number that the optimiser holds: two moments, and masters of what trains now, or importances
COPIES = {"lisa": 3, "gradient_select": 3, "adalora": 4}
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("every") / "m", layers=2, tied=False)


def logits_of(j):
    """The model's logits on a fixed batch, compiled once for each form of the weights."""
    ids = jnp.arange(24).reshape(2, 12) % 300
    virtual = jnp.array([*j.blueprint.virtual_ids], jnp.int32)
    ids = jnp.concatenate([jnp.broadcast_to(virtual, (2, len(virtual))), ids], 1)
    batch = {"ids_BT": ids, "segment_BT": jnp.ones_like(ids)}
    batch["position_BT"] = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    compiled = jax.jit(lambda w: steps.apply_of(j.blueprint)(w, batch).logits())

    def logits(weights):
        with jax.set_mesh(j.mesh):
            return np.asarray(compiled(weights))

    return logits


def start(j):
    b = j.blueprint
    with jax.set_mesh(j.mesh):
        trainable, frozen = m.split(unbox(blueprint.materialise(b, jax.random.key(j.config.train.seed))), b.labels)
        optimiser = jax.jit(j.tx.init)(trainable)
    return State(trainable, frozen, optimiser, jnp.int32(0), jax.random.key_data(jax.random.key(1)))


def plain(t):
    """Nodes that stand upon nothing but the base, quantised or not, as the base."""
    return map_nodes(under, t)


@pytest.mark.parametrize("name", METHODS)
@given(data=st.data(), accumulation=st.sampled_from([1, 2]), remat=st.sampled_from(["none", "full"]))
@settings(
    max_examples=1, deadline=None, derandomize=True, phases=[Phase.generate],  # to shrink would compile for minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_every_method_keeps_its_promises(folder, sums_file, tmp_path, name, data, accumulation, remat):
    strategies, same_at_first = METHODS[name]
    t = {k: data.draw(s, k) for k, s in strategies.items()}
    c = make_config(
        folder, sums_file, tmp_path / "r", tuning=t, train__accumulation=accumulation, train__remat=remat,
        train__steps=12,
    )  # fmt: skip
    j = job.prepare(c)
    state = start(j)
    weights = m.join(state.trainable, state.frozen)
    logits = logits_of(j)
    before_BTV = logits(weights)
    if same_at_first:
        np.testing.assert_allclose(before_BTV, logits(plain(weights)), atol=2e-4)

    own, state_bytes = overview.held(state.trainable), overview.held(state.optimiser)
    assert own > 0
    assert state_bytes < own * COPIES.get(name, 2) + 4096  # and counters
    frozen, before = jax.tree.map(np.asarray, (state.frozen, state.trainable))

    with jax.set_mesh(j.mesh):
        step, put = steps.compile_step(j), steps.putter(j.mesh, accumulation)
        batches = [put(x) for x in itertools.islice(Batches(j.data.train, 4, seed=0, row_count=None), STEPS + 1)]
        for x in batches[:STEPS]:
            state, report = step(state, x)
    assert np.isfinite(float(report["loss"]))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, frozen)
    changed = jax.tree.map(lambda x, y: bool((np.asarray(x) != y).any()), state.trainable, before)
    assert any(jax.tree.leaves(changed))
    after = m.join(state.trainable, state.frozen)
    after_BTV = logits(after)
    if name not in NOT_MERGED:
        np.testing.assert_allclose(logits(m.merge(after)), after_BTV, atol=1e-3)
    assert np.abs(after_BTV - before_BTV).max() > 1e-5

    checkpoints = Checkpoints(tmp_path / f"c{len(list(tmp_path.iterdir()))}")
    checkpoints.save(STEPS, state.saved(), {}, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(STEPS, j.state.saved())
    checkpoints.close()
    with jax.set_mesh(j.mesh):
        one, _ = step(state, batches[STEPS])  # which takes the state's arrays
        two, _ = step(State(frozen=jax.tree.map(jnp.copy, one.frozen), **restored), batches[STEPS])
    jax.tree.map(np.testing.assert_array_equal, one.saved(), two.saved())
