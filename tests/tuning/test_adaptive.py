"""AdaLoRA, LISA and gradient-selected matrices: who trains, what it costs, and that it goes on after a stop."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import allocation, log, run, sharding, tuning
from jaxtune.config import AdaLora, GradientSelect, Group, Lisa, Mesh, Optim, Train
from jaxtune.errors import UserError
from jaxtune.hf import files
from jaxtune.nodes.adalora import AdaLoRA
from jaxtune.tuning import adalora, blocks, lisa
from jaxtune.tuning.method import Training
from jaxtune.weights import densify, einsum
from tests.tiny import SHAPE, make_config, on_eight_devices, write_tiny

L, STEPS = 4, 9
DECODER = dataclasses.replace(SHAPE, layers=L)
PLAIN = Optim(learning_rate=0.01, schedule="constant", warmup=0, clip=0)
SHAPES = {"self_attn/q_proj": (L, 4, 2, 3), "mlp/up_proj": (L, 4, 6), "input_layernorm": (L, 4)}
UNIT_SIZES = {"self_attn/q_proj": 24, "mlp/up_proj": 24}


def weights(rng, dtype=np.float32):
    """A tree like a model's, of four stacked layers."""
    tree = {"embed_tokens": {"weight": rng.normal(size=(5, 4)).astype(np.float32)}, "layers_0-3": {}}
    for name, shape in SHAPES.items():
        at = tree["layers_0-3"]
        for part in name.split("/"):
            at = at.setdefault(part, {})
        at["weight"] = rng.normal(size=shape).astype(jnp.dtype(dtype))
    return tree


def trainable(tree, method):
    """What the method does not freeze, None in the place of what it does."""
    labels = tuning.method.label(method, tree)
    return tuning.method.split(tree, labels)[0]


def stepped(method, params, grads):
    """Weights and optimiser state after each gradient."""
    tx = method.around(optax.adam(0.01))
    state = tx.init(params)

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    out = []
    for g in grads:
        params, state = step(params, state, g)
        out.append((jax.device_get(params), jax.device_get(state)))
    return out


class Adam:
    """By hand, of one array."""

    def __init__(self, w):
        self.w, self.m, self.v, self.t = w.astype(np.float32), 0.0, 0.0, 0

    def step(self, g):
        g, self.t = g.astype(np.float32), self.t + 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
        u = self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        self.w = self.w - np.float32(0.01) * u.astype(np.float32)
        return self.w


def random_like(tree, rng):
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), tree)


def now(method, state):
    return {k for k, v in method.choice(state).items() if int(v)}


# --- LISA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lisa_is_adam_on_the_drawn_layers_begun_anew(dtype):
    """Beside an AdamW of its own for the layers of each draw; the embeddings' AdamW goes on all the time."""
    rng = np.random.default_rng(0)
    method = lisa.method(Lisa(method="lisa", layers=2, every=3), DECODER, Training(STEPS, PLAIN, Train(seed=1)))
    params = trainable(weights(rng, dtype), method)
    grads = [random_like(params, rng) for _ in range(STEPS)]
    got = stepped(method, params, grads)
    stack, table, draws = params["layers_0-3"], Adam(params["embed_tokens"]["weight"]), []
    for n, g in enumerate(grads):
        after, state = got[n]
        drawn = sorted(int(x.removeprefix("layers/")) for x in now(method, state))
        assert len(drawn) == 2
        if n % 3 == 0:
            draws.append(drawn)
            layers = {name: Adam(_at(stack, name)[drawn]) for name in SHAPES}
        assert drawn == draws[-1]
        np.testing.assert_allclose(
            after["embed_tokens"]["weight"], table.step(g["embed_tokens"]["weight"]), rtol=1e-4, atol=1e-6
        )
        still = [i for i in range(L) if i not in drawn]
        for name in SHAPES:
            want = layers[name].step(_at(g["layers_0-3"], name)[drawn])
            x, old = (_at(t, name) for t in (after["layers_0-3"], stack))
            tolerance = 1e-4 if dtype == "float32" else 1e-2
            np.testing.assert_allclose(x[drawn].astype(np.float32), want, rtol=tolerance, atol=1e-6)
            np.testing.assert_array_equal(x[still], old[still])
        stack = after["layers_0-3"]
    assert len({tuple(d) for d in draws}) > 1


def _at(tree, name):
    for part in name.split("/"):
        tree = tree[part]
    return tree["weight"]


def test_only_slots_have_masters_and_optimiser_state():
    rng = np.random.default_rng(0)
    method = lisa.method(Lisa(method="lisa", layers=1, train=["embeddings"]), DECODER, Training(STEPS, PLAIN))
    params = trainable(weights(rng), method)
    state = jax.eval_shape(method.around(optax.adam(0.01)).init, params)
    numbers = sum(x[0].size for x in jax.tree.leaves(params["layers_0-3"]))
    floats = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.dtype == jnp.float32)
    assert floats == 4 * (2 * params["embed_tokens"]["weight"].size + 3 * numbers + L)


def test_draws_favour_what_learned_most_and_starve_none():
    """4000 draws of one of four layers: each as often as its odds say, within five standard deviations."""
    learned_L, every_L = jnp.array([3.0, 1.0, 1.0, 0.0]), np.ones(L, bool)
    weights_of = {"layers_0-3/mlp/up_proj/weight": jnp.zeros((L, 1))}

    def draw(step):
        seen = blocks.Seen(step, {}, weights_of, {}, {})
        return lisa._drawn(learned_L, seen, every_L, 1, 0)["layers_0-3/mlp/up_proj/weight"]

    n = 4000
    times = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(n))).sum(0)
    p = np.asarray(lisa.odds(learned_L, jnp.asarray(every_L)))
    np.testing.assert_allclose(p, [0.53, 0.21, 0.21, 0.05], atol=1e-6)
    assert times.sum() == n
    assert (np.abs(times - n * p) < 5 * np.sqrt(n * p * (1 - p))).all()


def test_what_a_layer_learned_is_how_far_its_weights_moved():
    rng = np.random.default_rng(0)
    t = Lisa(method="lisa", layers=2, every=3, draw="importance", train=["embeddings"])
    method = lisa.method(t, DECODER, Training(7, PLAIN, Train(seed=3)))
    params = trainable(weights(rng), method)
    got = stepped(method, params, [random_like(params, rng) for _ in range(4)])
    first = sorted(int(x[-1]) for x in now(method, got[0][1]))
    memory = np.asarray(got[3][1].memory)
    assert (np.asarray(got[2][1].memory) == -1).all()
    for i in range(L):
        if i not in first:
            assert memory[i] == -1
            continue
        moved = [np.ravel(_at(got[2][0]["layers_0-3"], n)[i] - _at(params["layers_0-3"], n)[i]) for n in SHAPES]
        np.testing.assert_allclose(memory[i], np.sqrt(np.mean(np.concatenate(moved) ** 2)), rtol=1e-4)


# --- gradient-selected matrices -------------------------------------------------------------------------------------


def selecting(o=PLAIN, **more):
    t = GradientSelect(**{"method": "gradient_select", "budget": 0.25, "warmup": 2, "every": 3, **more})
    return tuning.make(t, DECODER, Training(STEPS, o))


def scaled(params, rng, factors):
    """Gradients that are as large as `factors` say, by unit; 1 for others."""
    g = random_like(params, rng)
    for unit, factor in factors.items():
        _, i, name = unit.split("/", 2)
        at = g["layers_0-3"]
        for part in name.split("/"):
            at = at[part]
        at["weight"][int(i)] *= factor
    return g


@pytest.mark.parametrize("score", ["fisher", "norm", "taylor"])
def test_the_layer_whose_gradient_matters_is_chosen(score):
    rng = np.random.default_rng(0)
    method = selecting(score=score)
    params = trainable(weights(rng), method)
    planted = {"layers/2/self_attn/q_proj": 30.0, "layers/2/mlp/up_proj": 20.0}
    got = stepped(method, params, [scaled(params, rng, planted) for _ in range(4)])
    assert now(method, got[1][1]) == set()
    jax.tree.map(np.testing.assert_array_equal, got[1][0]["layers_0-3"], params["layers_0-3"])
    assert now(method, got[3][1]) == set(planted)
    for name in UNIT_SIZES:
        new, old = (np.asarray(_at(x["layers_0-3"], name)) for x in (got[3][0], params))
        np.testing.assert_array_equal(np.delete(new, 2, 0), np.delete(old, 2, 0))
        assert (new[2] != old[2]).all()
    assert "input_layernorm" not in str(jax.tree_util.tree_leaves_with_path(got[3][1]))


def test_budgets_hold_and_slots_are_few():
    rng = np.random.default_rng(0)
    for budget in (0.3, 1.0):
        method = selecting(budget=budget, warmup=1, every=1)
        params = trainable(weights(rng), method)
        state = stepped(method, params, [random_like(params, rng) for _ in range(3)])[-1][1]
        size = 24 * len(now(method, state))
        assert 0.5 * budget * 8 * 24 < size <= budget * 8 * 24
        slots = min(L, int(np.ceil(2 * budget * L)))
        leaves = jax.tree_util.tree_leaves_with_path(state)
        bytes_ = sum(x.nbytes for p, x in leaves if x.ndim > 1)
        assert bytes_ == 3 * 4 * slots * 2 * 24


def test_units_of_many_sizes_are_taken_greedily():
    worth = {"a": jnp.array([5.0, 1.0, 9.0]), "b": jnp.array([7.0, 8.0, 6.0])}
    sizes = {"a": 10, "b": 40}
    chosen = blocks_greedy(worth, sizes, 0.4, lambda n: n)  # of 150: 60
    assert chosen == {"a": [True, False, True], "b": [False, True, False]}
    assert blocks_greedy(worth, sizes, 0.4, lambda n: 1) == {"a": [False, False, True], "b": [False, True, False]}


def blocks_greedy(*args):
    from jaxtune.tuning.gradient_select import greedy

    return {k: v.tolist() for k, v in greedy(*args).items()}


@pytest.mark.parametrize(("hysteresis", "changes"), [(0.5, 0), (0.0, 1)])
def test_hysteresis_keeps_what_trains_where_scores_are_near(hysteresis, changes):
    """First one unit is a little better, then another: the change must be worth it."""
    rng = np.random.default_rng(0)
    method = selecting(budget=0.13, hysteresis=hysteresis, warmup=1, every=4, score="norm")
    params = trainable(weights(rng), method)
    a, b = "layers/0/self_attn/q_proj", "layers/3/mlp/up_proj"
    ones = jax.tree.map(np.ones_like, params)
    grads = [scaled_ones(ones, {a: 5.5, b: 5.0})] * 5 + [scaled_ones(ones, {a: 5.0, b: 5.9})] * 30
    kept = [now(method, s) for _, s in stepped(method, params, grads)]
    assert kept[0] == set()
    assert kept[1] == {a}
    assert kept[-1] == ({b} if changes else {a})


def scaled_ones(ones, factors):
    class Ones:
        def normal(self, size):
            return np.ones(size)

    return scaled(ones, Ones(), factors)


def test_units_that_stay_keep_their_optimiser_state_and_new_ones_begin_with_zeros():
    rng = np.random.default_rng(0)
    method = selecting(budget=0.25, warmup=1, every=2, hysteresis=0.0)
    params = trainable(weights(rng), method)
    a, b, c = "layers/1/mlp/up_proj", "layers/0/mlp/up_proj", "layers/3/mlp/up_proj"
    grads = [scaled(params, rng, {a: 90.0, b: 20.0})] * 3 + [scaled(params, rng, {a: 90.0, c: 300.0})] * 2
    got = stepped(method, params, grads)
    assert [now(method, s) for _, s in got] == [set(), {a, b}, {a, b}, {a, c}, {a, c}]
    path = "layers_0-3/mlp/up_proj/weight"
    after, s = got[-1]
    for unit, start in ((1, 1), (3, 3)):  # as by an Adam of its own
        adam = Adam(_at(params["layers_0-3"], "mlp/up_proj")[unit])
        for g in grads[start:]:
            want = adam.step(_at(g["layers_0-3"], "mlp/up_proj")[unit])
        slot = s.layers[path].tolist().index(unit)
        mu = next(x for p, x in jax.tree_util.tree_leaves_with_path(s) if "mu" in str(p) and "up_proj" in str(p))
        np.testing.assert_allclose(mu[slot], adam.m, rtol=1e-5)
        np.testing.assert_allclose(_at(after["layers_0-3"], "mlp/up_proj")[unit], want, rtol=1e-4, atol=1e-6)
        assert s.age[path][slot] == len(grads) - start


# --- AdaLoRA --------------------------------------------------------------------------------------------------------


def test_a_node_is_the_sum_of_its_triplets():
    rng = np.random.default_rng(0)
    base, a, b, e = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 6), (2, 5, 3), (2, 3, 6), (2, 3)))
    w = AdaLoRA(base, a, b, scale=0.5, e=e)
    want = base + 0.5 * jnp.einsum("lir,lr,lro->lio", a, e, b)
    np.testing.assert_allclose(densify(w), want, rtol=1e-5)
    x = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    one = jax.tree.map(lambda y: y[1], w)
    np.testing.assert_allclose(einsum("xi,io->xo", x, one), x @ want[1], rtol=1e-4)


def test_what_is_skewed_is_penalised():
    a = jnp.stack([jnp.eye(4)[:, :2], 2 * jnp.eye(4)[:, :2]])
    w = AdaLoRA(None, a, jnp.swapaxes(a, 1, 2), e=jnp.zeros((2, 2)))
    np.testing.assert_allclose(adalora.askew({"x": w}), (0 + np.sqrt(18)) / 2, rtol=1e-6)


# --- runs -----------------------------------------------------------------------------------------------------------

RUNS = {
    "lisa": {"method": "lisa", "layers": 1, "every": 3, "draw": "importance", "train": ["embeddings", "layers/0/mlp"]},
    "gradient_select": {"method": "gradient_select", "budget": 0.2, "warmup": 2, "every": 3},
    "adalora": {
        "method": "adalora",
        "init_rank": 3,
        "rank": 2,
        "every": 2,
        "warmup": 2,
        "final": 2,
        "targets": "[qv]_proj",
    },
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("deep") / "m", layers=3)


def settings(model, data, out, name, **more):
    remat = "dots" if name == "gradient_select" else "none"
    given = {"train__steps": STEPS, "train__accumulation": 2, "checkpoint__every": 4, "train__remat": remat}
    return make_config(model, data, out, tuning=RUNS[name], **{**given, **more})


@pytest.fixture(scope="module")
def straight(deep, sums_file, tmp_path_factory):
    """A run of each method, once."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp("straight") / name
            made[name] = run.train(settings(deep, sums_file, out, name))
        return made[name]

    return get


def losses(folder):
    return [e["loss"] for e in log.read_metrics(folder / "metrics.jsonl") if "loss" in e]


def exported(folder):
    return {f.name: f.read_bytes() for f in sorted((folder / "export").glob("*.safetensors"))}


@pytest.mark.parametrize("name", RUNS)
def test_stopped_in_the_middle_it_ends_as_if_it_had_not_been(name, straight, deep, sums_file, tmp_path, monkeypatch):
    want = straight(name)
    c = settings(deep, sums_file, tmp_path / "r", name)
    step = log.RunLog.step

    def dying(self, n, *rest):
        step(self, n, *rest)
        if n == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(log.RunLog, "step", dying)
        run.train(c)
    resumed = run.train(c)
    assert losses(resumed) == losses(want)
    assert losses(want)[-1] < losses(want)[0]
    assert exported(resumed) == exported(want)
    record = (want / "allocation.jsonl").read_text()
    assert (resumed / "allocation.jsonl").read_text() == record
    lines = [json.loads(x) for x in record.splitlines()]
    steps = [e["step"] for e in lines]
    assert steps == sorted(set(steps))
    assert all(x["allocation"] != y["allocation"] for x, y in itertools.pairwise(lines))
    sums = [sum(e["allocation"].values()) for e in lines]
    if name == "lisa":
        assert set(sums) == {1}
        assert set(steps) <= {1, 4, 7}
    elif name == "gradient_select":
        assert sums[0] == 0
        assert set(steps) <= {1, 3, 6, 9}
    else:
        assert (sums[0], sums[-1]) == (3 * 6, 2 * 6)
    assert (want / "allocation.png").stat().st_size > 5000


def test_what_was_never_chosen_is_exported_bit_by_bit(deep, sums_file, tmp_path):
    """In bfloat16, of a base in float32."""
    c = settings(deep, sums_file, tmp_path / "r", "gradient_select", train__compute_dtype="bfloat16")
    out = run.train(c)
    base, new = (read(x) for x in (deep, out / "export"))
    assert base.keys() == new.keys()
    lines = [json.loads(x)["allocation"] for x in (out / "allocation.jsonl").read_text().splitlines()]
    ever = {unit for e in lines for unit, on in e.items() if on}
    changed = {k for k in base if not np.array_equal(base[k], new[k])}
    may = {k for k in base if k.removeprefix("model.").removesuffix(".weight").replace(".", "/") in ever}
    assert changed <= may
    assert len(changed) > len(may) // 2
    assert len(may) < len(base)


def read(folder):
    return {k: t.open() for f in folder.glob("*.safetensors") for k, t in files.read_header(f).items()}


SCRIPT = """
import sys
from pathlib import Path
import jax
from jaxtune import run
from tests.tuning.test_adaptive import RUNS, settings
assert jax.device_count() == 8
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
model, data, out = (Path(a) for a in sys.argv[1:4])
for name in RUNS.keys() - {'lisa'}:
    run.train(settings(model, data, out / name, name, mesh=MESH, train__accumulation=1, train__remat="none"))
"""


def test_a_mesh_gives_the_same_losses(straight, deep, sums_file, tmp_path):
    on_eight_devices(SCRIPT, deep, sums_file, tmp_path)
    for name in RUNS.keys() - {"lisa"}:  # which has its slots from the same file
        np.testing.assert_allclose(losses(tmp_path / name), losses(straight(name)), rtol=2e-4)
        assert (tmp_path / name / "allocation.jsonl").read_text() == (straight(name) / "allocation.jsonl").read_text()


def test_masters_lie_as_their_weights_do():
    mesh = sharding.make_mesh(Mesh(), jax.devices())
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    method = lisa.method(Lisa(method="lisa", layers=1, train=["embeddings"]), DECODER, Training(STEPS, PLAIN))
    params = trainable(weights(np.random.default_rng(0)), method)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params)
    state = sharding.optimiser_shardings(method.around(optax.adam(0.01)), params, mesh)
    path = "layers_0-3/mlp/up_proj/weight"
    assert state.masters[path] == where
    assert state.layers[path] == sharding.replicated(mesh)
    assert state.inner[0].nu["layers_0-3"]["mlp"]["up_proj"]["weight"] == where


@pytest.mark.parametrize(
    ("t", "o", "words"),
    [
        (Lisa(method="lisa", layers=5), {}, "tuning.layers=5: the model has 4 layers to draw from"),
        (Lisa(method="lisa", train=["nope"]), {}, "tuning.train: pattern 'nope' matches no weight"),
        (Lisa(method="lisa"), {"name": "adafactor"}, "tuning.method=lisa with optim.name=adafactor is not supported"),
        (Lisa(method="lisa"), {"layer_decay": 0.9}, "optim.layer_decay is not supported"),
        (Lisa(method="lisa"), {"groups": [Group(match="layers/1/")]}, "optim.groups: 'layers/1/' tells layers apart"),
        (GradientSelect(method="gradient_select", budget=0.001), {}, "holds no matrix; raise it to 0.0"),
        (GradientSelect(method="gradient_select", train=["layers/"]), {}, "none is left to choose"),
        (AdaLora(method="adalora", warmup=5, final=4), {}, "leave no step of 9 in which ranks shrink"),
        (AdaLora(method="adalora", targets="nope"), {}, "tuning.targets: pattern 'nope' matches no weight"),
        (AdaLora(method="adalora"), {"name": "schedule_free"}, "take adamw"),
    ],
)
def test_what_cannot_be_is_refused(t, o, words):
    with pytest.raises(UserError, match="tuning") as e:
        tuning.make(t, DECODER, Training(STEPS, PLAIN.model_copy(update=o)))
    assert words in str(e.value)


def test_groups_that_hold_for_all_layers_go_along():
    o = PLAIN.model_copy(update={"groups": [Group(match="embeddings"), Group(match="q_proj|mlp")]})
    assert tuning.make(Lisa(method="lisa"), DECODER, Training(STEPS, o)).choice is not None


def test_experts_are_refused():
    experts = dataclasses.replace(SHAPE, family="mixtral", experts=4, top_k=2)
    with pytest.raises(UserError, match=r"mlp/experts/.*AdaLoRA is not for experts; narrow it"):
        tuning.make(AdaLora(method="adalora"), experts, Training(STEPS, PLAIN))


def test_a_map_of_many_layers_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    kinds = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/o_proj", "mlp/gate_proj")
    lines = [
        {"step": s, "allocation": {f"layers/{i}/{k}": int(rng.integers(0, 13)) for i in range(32) for k in kinds}}
        for s in range(1, 500, 50)
    ]
    allocation.draw(lines, 500, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
