import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtune.nodes.lora import LoRA
from jaxtune.weights import densify, einsum, map_nodes, seeded, take

SIZES = {"b": 2, "t": 3, "d": 4, "n": 2, "h": 3, "f": 5, "v": 7}
EQUATIONS = ["btd,df->btf", "btd,dnh->btnh", "btnh,nhd->btd", "btd,vd->btv", "btd,dv->btv"]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def shape(letters):
    return tuple(SIZES[c] for c in letters)


@given(st.sampled_from(EQUATIONS), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_seam_is_an_einsum(eqn, seed):
    x, w = eqn.split("->")[0].split(",")
    x, w = normal(seed, *shape(x)), normal(seed + 1, *shape(w))
    np.testing.assert_allclose(einsum(eqn, x, w), jnp.einsum(eqn, x, w), rtol=2e-5, atol=1e-5)


def lora(into, out, lead=()):
    return LoRA(normal(1, *lead, *into, *out), normal(2, *lead, *into, 2), normal(3, *lead, 2, *out), scale=0.5)


@pytest.mark.parametrize(("eqn", "into"), [("btd,dnh->btnh", 1), ("btnh,nhd->btd", 2), ("btd,df->btf", 1)])
def test_lora_multiplies_as_the_array_it_amounts_to(eqn, into):
    x, w = eqn.split("->")[0].split(",")
    node = lora(shape(w[:into]), shape(w[into:]))
    want = einsum(eqn, normal(4, *shape(x)), densify(node))
    np.testing.assert_allclose(einsum(eqn, normal(4, *shape(x)), node), want, rtol=1e-4, atol=1e-5)
    assert not np.allclose(want, einsum(eqn, normal(4, *shape(x)), node.base))


def test_stacked_nodes_densify_layer_by_layer():
    node = lora((4,), (2, 3), lead=(3,))
    for i in range(3):
        one = jax.tree.map(lambda x, i=i: x[i], node)
        np.testing.assert_allclose(densify(node)[i], densify(one), rtol=1e-6)


def test_nodes_nest():
    inner = lora((4,), (5,))
    outer = dataclasses.replace(lora((4,), (5,)), base=inner)
    x = normal(5, 2, 3, 4)
    want = einsum("btd,df->btf", x, densify(inner) + densify(lora((4,), (5,))) - inner.base)
    np.testing.assert_allclose(einsum("btd,df->btf", x, outer), want, rtol=1e-4, atol=1e-5)


def test_take_of_an_adapted_table():
    node, ids = lora((7,), (4,)), jnp.array([[0, 3, 6]])
    np.testing.assert_allclose(take(node, ids, jnp.float32), densify(node)[ids], rtol=1e-5, atol=1e-6)


def test_dropout_needs_a_key_and_keeps_the_mean():
    node = dataclasses.replace(lora((4,), (5,)), dropout=0.5)
    x = jnp.ones((1, 1, 4))
    clean = einsum("btd,df->btf", x, node)
    drawn = jnp.stack([einsum("btd,df->btf", x, seeded(node, jax.random.key(i))) for i in range(400)])
    assert np.std(drawn, 0).min() > 0
    np.testing.assert_allclose(drawn.mean(0), clean, atol=4 * float(np.std(drawn, 0).max()) / 20)


def test_dropout_differs_by_layer_and_by_node_and_repeats_by_key():
    tree = {"a": dataclasses.replace(lora((4,), (5,), lead=(3,)), dropout=0.1), "b": lora((4,), (5,))}
    keyed = seeded(tree, jax.random.key(0))
    assert keyed["b"].key is None
    data = jax.random.key_data(keyed["a"].key)
    assert len(np.unique(data, axis=0)) == 3
    assert np.array_equal(data, jax.random.key_data(seeded(tree, jax.random.key(0))["a"].key))


def test_map_nodes_sees_whole_nodes():
    seen = []
    map_nodes(lambda w: seen.append(type(w)), {"x": lora((4,), (5,)), "y": jnp.ones(2)})
    assert seen == [LoRA, type(jnp.ones(2))]
