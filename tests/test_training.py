"""The step and the loop, on a tiny model. A micro-batches, B rows, T time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import blueprint, distributed, sharding, tuning
from jaxtune.config import Freeze, Full, Lora, Mesh
from jaxtune.data.encode import Encoded
from jaxtune.data.packing import lay_out
from jaxtune.data.pipeline import Batch
from jaxtune.errors import UserError
from jaxtune.guards import Guards
from jaxtune.layers import unbox
from jaxtune.objectives import sft
from jaxtune.training import WISHES, Every, Hooks, State, loop, make_step
from jaxtune.tuning import method as m


class Setup(NamedTuple):
    apply: object
    weights: object
    labels: object

    def state(self, tx):
        trainable, frozen = m.split(self.weights, self.labels)
        key = jax.random.key_data(jax.random.key(1))
        return State(trainable, frozen, tx.init(trainable), jnp.int32(0), key)


def setup(folder, t, dtype="float32"):
    b = blueprint.draw(folder, lambda d: tuning.make(t, d), sharding.make_mesh(Mesh(), jax.devices()[:1]), dtype)

    def apply(w, batch):
        return b.model.apply({"params": w}, batch["ids_BT"], batch["segment_BT"], batch["position_BT"])[0]

    return Setup(apply, unbox(blueprint.materialise(b, jax.random.key(0))), b.labels)


def examples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Encoded(rng.integers(3, 300, n).astype(np.int32), rng.integers(0, 2, n).astype(bool)) for n in lengths]


def columns(rows, length=32):
    laid = [lay_out(r, length) for r in rows]
    return {k: np.stack([x[k] for x in laid]) for k in laid[0]}


SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def full(tiny):
    return setup(tiny, Full(method="full"))


def test_packed_rows_weigh_as_unpacked_ones_and_do_not_see_each_other(full):
    es = examples([7, 12, 9, 20, 5])
    packed = columns([es[:3], es[3:]])
    alone = columns([[e] for e in es])
    got, want = (jax.jit(lambda b: sft.objective(full.apply(full.weights, b), b)[:2])(b) for b in (packed, alone))
    assert float(got[1]) == float(want[1])
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)


@pytest.mark.parametrize("A", [2, 4])
def test_accumulation_equals_the_big_batch(full, A):
    """Micro-batches of very different token counts: a mean of means would differ."""
    es = examples([30, 3, 4, 25, 3, 3, 28, 5])
    flat = columns([[e] for e in es])
    step = jax.jit(make_step(full.apply, sft.objective, SGD))
    results = []
    for n in (1, A):
        state, report = step(full.state(SGD), {k: v.reshape(n, -1, v.shape[-1]) for k, v in flat.items()})
        results.append((state.trainable, float(report["loss"]), float(report["tokens"])))
    assert results[0][2] == results[1][2]
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), results[0][0], results[1][0])


def test_the_loss_falls_and_frozen_weights_stay_bit_equal(tiny):
    s = setup(tiny, Freeze(method="freeze", last=1))
    tx = optax.adam(3e-2)
    step = jax.jit(make_step(s.apply, sft.objective, tx))
    state, losses = s.state(tx), []
    batch = {k: v[None] for k, v in columns([[e] for e in examples([20, 20])]).items()}
    for _ in range(15):
        state, report = step(state, batch)
        losses.append(float(report["loss"]))
    assert losses[-1] < 0.95 * losses[0]
    assert int(state.step) == 15
    jax.tree.map(np.testing.assert_array_equal, state.frozen, s.state(tx).frozen)
    moments = [x for x in jax.tree.leaves(state.optimiser) if x.ndim]
    assert sum(x.size for x in moments) == 2 * m.count(state.trainable)


def test_dropout_varies_by_step_and_repeats_by_key(tiny):
    s = setup(tiny, Lora(dropout=0.5, rank=2))
    w = jax.tree.map(lambda x, on: x + 0.05 if on == "train" else x, s.weights, s.labels)
    s = s._replace(weights=w)
    batch = {k: v[None] for k, v in columns([[e] for e in examples([20])]).items()}
    nothing = optax.set_to_zero()
    step = jax.jit(make_step(s.apply, sft.objective, nothing))

    def losses():
        state, out = s.state(nothing), []
        for _ in range(3):
            state, report = step(state, batch)
            out.append(float(report["loss"]))
        return out

    assert len(set(losses())) == 3
    assert losses() == losses()


def run_loop(full, losses, **changes):
    """The loop over a made-up step that reports these losses."""
    events = []
    at = iter(losses)

    def step(state, batch):
        told = {WISHES: next(changes["wishes"])} if "wishes" in changes else {}
        return state, {"loss": next(at), "grad_norm": 1.0, **told}

    hooks = Hooks(
        lambda n, v, b: events.append(("log", n)),
        lambda n, s: events.append(("evaluate", n)),
        lambda n, s: events.append(("save", n)),
        changes.get("stop", lambda: False),
        changes.get("save_now", lambda: False),
        lambda n, values: events.append(("note", n)),
        lambda n, state: events.append(("back", n)),
    )
    batches = iter([Batch({}, np.array([i])) for i in range(len(losses))])
    args = (None, step, batches, lambda b: b, changes.get("start", 0), len(losses) + changes.get("start", 0))
    try:
        loop(*args, Every(2, 3), hooks, lambda b: [f"f:{b.rows[0]}"], changes.get("guards"))
    except UserError as e:
        events.append(str(e))
    return events


def test_the_loop_logs_evaluates_and_saves_in_order(full):
    events = run_loop(full, [1.0] * 5)
    assert [n for what, n in events if what == "log"] == [1, 2, 3, 4, 5]
    assert [n for what, n in events if what == "evaluate"] == [2, 4, 5]
    assert [n for what, n in events if what == "save"] == [3, 5]
    assert events.index(("log", 3)) < events.index(("save", 3))


def test_a_loss_that_is_not_finite_names_step_and_rows_and_is_not_saved(full):
    events = run_loop(full, [1.0, 1.0, float("nan"), 1.0])
    assert ("save", 3) not in events
    assert "step 3: loss nan" in events[-1]
    assert "on rows f:2;" in events[-1]
    assert "checkpoint is kept" in events[-1]


def test_told_to_stop_it_saves_and_leaves(full):
    left = iter([False, True, True])
    events = run_loop(full, [1.0] * 5, stop=lambda: next(left))
    assert events[-1] == ("save", 2)
    assert ("log", 2) in events


def test_what_several_processes_were_told_is_reported_and_acted_upon_by_all(full):
    """Each bit is the maximum over all devices; the loop stops one step after the report, and saves."""
    step = jax.jit(make_step(full.apply, sft.objective, SGD))
    batch = {k: v[None] for k, v in columns([[e] for e in examples([20])]).items()}
    for told, want in (([0, 0], 0), ([0, distributed.STOP], 1), ([distributed.SAVE, distributed.STOP], 3)):
        assert int(step(full.state(SGD), {**batch, WISHES: np.array(told, np.int32)})[1][WISHES]) == want
    events = run_loop(full, [1.0] * 6, stop=lambda: True, wishes=iter([0, distributed.SAVE, distributed.STOP, 0, 0, 0]))
    assert events[-1] == ("save", 4)
    assert ("log", 4) in events


def test_bfloat16_computes_nearly_the_same(tiny):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        s = setup(tiny, Lora(rank=4), dtype)
        tx = optax.adam(1e-2)
        step = jax.jit(make_step(s.apply, sft.objective, tx))
        state = s.state(tx)
        batch = {k: v[None] for k, v in columns([[e] for e in examples([20, 20])]).items()}
        for _ in range(10):
            state, report = step(state, batch)
        losses[dtype] = float(report["loss"])
        assert {x.dtype.name for x in jax.tree.leaves(state.trainable)} == {"float32"}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def nan_where_asked(outputs, batch):
    """The objective, not finite where the mask holds a 7."""
    loss, count, metrics = sft.objective(outputs, batch)
    return jnp.where((batch["loss_mask_BT"] == 7).any(), jnp.nan, loss), count, metrics


def test_a_step_that_is_left_out_changes_nothing_but_the_count(full):
    adam = optax.adam(1e-2)
    batch = {k: v[None] for k, v in columns([[e] for e in examples([20, 9])]).items()}
    bad = {**batch, "loss_mask_BT": np.full_like(batch["loss_mask_BT"], 7)}
    step = jax.jit(make_step(full.apply, nan_where_asked, adam, skip=True))
    state, _ = step(full.state(adam), batch)
    after, report = step(state, bad)
    assert not np.isfinite(report["loss"])
    assert (int(state.step), int(after.step)) == (1, 2)
    jax.tree.map(np.testing.assert_array_equal, (state.trainable, state.optimiser), (after.trainable, after.optimiser))
    assert int(step(after, batch)[0].optimiser[0].count) == 2


def test_the_loop_saves_when_asked_and_tells_of_spikes(full):
    asked = iter([False, True, False, False, False])
    events = run_loop(full, [1.0] * 5, save_now=lambda: next(asked, False))
    assert [n for what, n in events if what == "save"] == [2, 3, 5]
    events = run_loop(full, [1.0 + n % 2 for n in range(40)] + [99.0, 1.0], guards=Guards(spike=6.0))
    assert [e for e in events if e[0] == "note"] == [("note", 41)]


def test_the_loop_goes_back_and_drops_the_step_that_was_on_its_way(full):
    nan = float("nan")
    events = run_loop(full, [1.0, 1.0, 1.0, 1.0, nan, nan, 1.0, 1.0], guards=Guards("rollback"))
    assert [n for what, n in events if what == "log"] == [1, 2, 3, 4, 7, 8]
    assert [n for what, n in events if what == "back"] == [5]
