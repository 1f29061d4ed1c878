"""B batch, T time, D embed, V vocab."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.layers import Outputs, Readout
from jaxtune.nodes.lora import LoRA
from jaxtune.objectives import base, pretrain, sft
from jaxtune.weights import densify
from tests.tiny import on_eight_devices

B, T, D, V = 2, 13, 8, 50


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def reference(hidden, w, target, weight):
    logp = jax.nn.log_softmax(hidden @ w)
    return -(jnp.take_along_axis(logp, target[..., None], -1)[..., 0] * weight).sum()


@pytest.fixture(params=[1, 3, 13], ids=lambda n: f"{n} chunks")
def problem(request, monkeypatch):
    monkeypatch.setattr(base, "LOGITS_BYTES", {"cpu": -(-B * T * V * 4 // request.param)})
    target = jax.random.randint(jax.random.key(2), (B, T), 0, V)
    weight = (jax.random.uniform(jax.random.key(3), (B, T)) > 0.4).astype(jnp.float32)
    return normal(0, B, T, D), normal(1, D, V), target, weight


def loss(hidden, head, target, weight):
    return base.cross_entropy(Outputs(hidden, head, Readout("btd,dv->btv")), target, weight)[0]


def test_value_and_gradients_equal_the_plain_formula(problem):
    hidden, w, target, weight = problem
    assert loss(*problem) == pytest.approx(float(reference(*problem)), rel=1e-5)
    for argnums in (0, 1, (0, 1)):
        got = jax.grad(lambda *a: 0.5 * loss(*a), argnums)(hidden, w, target, weight)
        want = jax.grad(lambda *a: 0.5 * reference(*a), argnums)(hidden, w, target, weight)
        for g, x in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, x, rtol=1e-4, atol=1e-5)


def test_a_tied_head_and_a_head_under_an_adapter(problem):
    hidden, w, target, weight = problem
    tied = base.cross_entropy(Outputs(hidden, w.T, Readout("btd,vd->btv")), target, weight)[0]
    assert float(tied) == pytest.approx(float(reference(*problem)), rel=1e-5)
    a, b = normal(4, D, 2), normal(5, 2, V)

    def through(f, a, b):
        node = LoRA(w, a, b, scale=0.3)
        return f(hidden, node if f is loss else densify(node), target, weight)

    got, want = (jax.grad(lambda a, b, f=f: through(f, a, b), (0, 1))(a, b) for f in (loss, reference))
    for g, x in zip(got, want, strict=True):
        np.testing.assert_allclose(g, x, rtol=1e-4, atol=1e-4)


def count_dots(f, *args):
    def walk(jaxpr):
        for e in jaxpr.eqns:
            yield e.primitive.name == "dot_general"
            for v in e.params.values():
                for j in v if isinstance(v, tuple) else (v,):
                    if hasattr(j, "jaxpr") or hasattr(j, "eqns"):
                        yield from walk(getattr(j, "jaxpr", j))

    return sum(walk(jax.make_jaxpr(f)(*args).jaxpr))


def test_a_frozen_head_has_no_gradient_product(problem):
    hidden, w, *rest = problem
    assert count_dots(jax.grad(loss), hidden, w, *rest) == 2
    assert count_dots(jax.grad(loss, (0, 1)), hidden, w, *rest) == 3


def test_full_logits_are_never_held(monkeypatch):
    monkeypatch.setattr(base, "LOGITS_BYTES", {"cpu": 4 * V * B})
    hidden, w = normal(0, B, 64, D), normal(1, D, V)
    target = jnp.zeros((B, 64), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, w, target, jnp.ones((B, 64))))
    assert f"[{B},64,{V}]" not in text
    assert f"{B * 64},{V}]" not in text


def test_targets_stay_within_their_segment_and_mask():
    batch = {
        "ids_BT": jnp.array([[5, 6, 7, 8, 9, 0]]),
        "segment_BT": jnp.array([[1, 1, 1, 2, 2, 0]]),
        "loss_mask_BT": jnp.array([[1, 0, 1, 1, 1, 0]]),
    }
    target, weight = base.next_token(batch)
    assert weight.tolist() == [[0, 1, 0, 1, 0, 0]]
    assert target[0, 1] == 7
    assert target[0, 3] == 9


def test_hits_and_pretraining():
    hidden, w = jnp.eye(4)[None], jnp.eye(4) * 9
    batch = {
        "ids_BT": jnp.array([[3, 0, 1, 3]]),
        "segment_BT": jnp.ones((1, 4), jnp.int32),
        "loss_mask_BT": jnp.array([[0, 0, 0, 1]]),
    }
    outputs = Outputs(hidden, w, Readout("btd,dv->btv"))
    _, count, metrics = sft.objective(outputs, batch)
    assert (float(count), float(metrics["hits"])) == (1, 0)
    _, count, metrics = pretrain.objective(outputs, batch)
    assert (float(count), float(metrics["hits"])) == (3, 2)


def test_ties_are_hits_in_training_alone():
    hidden, w = jnp.ones((1, 4, 2)), jnp.zeros((2, 5))
    outputs, target = Outputs(hidden, w, Readout("btd,dv->btv")), jnp.array([[0, 1, 2, 3]])
    assert float(base.cross_entropy(outputs, target, jnp.ones((1, 4)))[1]) == 1
    _, hits = jax.value_and_grad(
        lambda h: base.cross_entropy(Outputs(h, w, Readout("btd,dv->btv")), target, jnp.ones((1, 4))), has_aux=True
    )(hidden)[0]
    assert float(hits) == 4


SPREAD = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding as At, PartitionSpec as P
from jaxtune import sharding
from jaxtune.config import Mesh
from jaxtune.layers import Outputs, Readout
from jaxtune.objectives import base
from tests.tiny import on_eight_devices
from jaxtune.planning import reading

B, T, D, V = 8, 32, 16, 96
base.LOGITS_BYTES = {"cpu": 4 * V * B * T // 8 // 4}
keys = jax.random.split(jax.random.key(0), 4)
hidden, w = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, V))
target = jax.random.randint(keys[2], (B, T), 0, V)
weight = (jax.random.uniform(keys[3], (B, T)) > 0.3).astype(jnp.float32)

def loss(hidden, head):
    return base.cross_entropy(Outputs(hidden, head, Readout("btd,dv->btv")), target, weight)[0]

want = jax.value_and_grad(loss, (0, 1))(hidden, w)
for sizes in ({"fsdp": 8}, {"fsdp": 2, "context": 2, "tensor": 2}, {"data": 2, "context": 4, "fsdp": 1}):
    mesh = sharding.make_mesh(Mesh(**sizes))
    rows, both = ("data", "fsdp"), At(mesh, P(("fsdp", "context"), "tensor"))
    place = At(mesh, P(rows, "context", None)), both
    for argnums in (0, (0, 1)):
        with jax.set_mesh(mesh):
            out = (At(mesh, P()), place if argnums else place[0])
            step = jax.jit(jax.value_and_grad(loss, argnums), in_shardings=place, out_shardings=out)
            got = step(hidden, w)
            text = step.lower(hidden, w).compile().as_text()
        pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want))
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
        large = [c for c in reading.read(text, dict(mesh.shape)).collectives if c.payload >= 2 * D * V]
        print("SENT", argnums, [(c.kind, c.times) for c in large])
        assert all(c.times == 1 for c in large), large
        assert mesh.shape["fsdp"] == 1 or large
"""


def test_the_head_is_sent_once_for_all_chunks():
    """Its gradient too, where it trains, and both are those of one device."""
    assert on_eight_devices(SPREAD).stdout.count("SENT") == 6
