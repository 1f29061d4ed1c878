"""Every kind of adapter: nothing changes at first, merged is wrapped, what trains, and what does not go together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from jaxtune.config.tuning import Tuning, lora_unless_said
from jaxtune.errors import UserError
from jaxtune.nodes.dora import DoRA, norm
from jaxtune.nodes.ia3 import IA3
from jaxtune.nodes.loha import LoHa
from jaxtune.nodes.lokr import LoKr
from jaxtune.nodes.quantized import Quantized
from jaxtune.nodes.vera import VeRA
from jaxtune.tuning import lora
from jaxtune.tuning import method as m
from jaxtune.weights import densify, einsum, seeded
from tests.tiny import write_tiny
from tests.tuning.test_method import IDS, make, nudged

FORMS = {
    "dora": {"dora": True, "rank": 3, "targets": ["^layers/", "lm_head"]},
    "patterns": {"rank_pattern": {"layers/1/.*q_proj": 2, "mlp": 6}, "alpha_pattern": {"o_proj": 5.0}, "rslora": True},
    "pissa": {"init": "pissa", "rank": 3, "rslora": True},
    "olora": {"init": "olora", "rank": 3, "alpha": 3.0},
    "vera": {"form": "vera", "rank": 5, "targets": ["^layers/", "lm_head"]},
    "loha": {"form": "loha", "rank": 3, "rank_pattern": {"mlp": 2}},
    "lokr": {"form": "lokr", "rank": 2, "alpha": 4.0, "rank_pattern": {"mlp": 40}},
    "ia3": {"method": "ia3"},
    "ia3 of some": {"method": "ia3", "targets": ["layers/0/.*_proj", "v_proj"], "inputs": ["layers/0/.*(o|up)_proj"]},
}


def parse(t):
    return TypeAdapter(Tuning).validate_python(lora_unless_said(t))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def nodes(lead):
    """One of each, upon matrices of two input axes and one output axis."""
    w, a, b = normal(1, *lead, 2, 3, 4), normal(2, *lead, 2, 3, 2), normal(3, *lead, 2, 4)
    return {
        "DoRA": DoRA(w, a, b, normal(4, *lead, 4), scale=0.5),
        "IA3": IA3(w, normal(4, *lead, 4)),
        "IA3 of inputs": IA3(w, normal(4, *lead, 2, 3), inputs=True, axes=2),
        "VeRA": VeRA(w, a, b, normal(4, *lead, 2), normal(5, *lead, 4)),
        "LoHa": LoHa(w, a, b, normal(4, *a.shape), normal(5, *b.shape), scale=0.5),
        "LoKr": LoKr(w, normal(2, *lead, 2, 2), normal(3, *lead, 3, 2), scale=0.5),
        "LoKr in factors": LoKr(
            w, normal(2, *lead, 2, 2), a=normal(3, *lead, 3, 1), b=normal(4, *lead, 1, 2), scale=0.5
        ),
    }


@pytest.mark.parametrize("name", nodes(()))
def test_nodes_multiply_as_the_array_that_they_amount_to(name):
    x, w = normal(0, 2, 5, 2, 3), nodes(())[name]
    want = jnp.einsum("btnh,nhd->btd", x, densify(w))
    np.testing.assert_allclose(einsum("btnh,nhd->btd", x, w), want, rtol=1e-4, atol=1e-4)
    stacked = nodes((2,))[name]
    one = jax.tree.map(lambda x: x[1], stacked)
    np.testing.assert_allclose(densify(stacked)[1], densify(one), rtol=1e-5, atol=1e-5)


def test_the_norm_is_that_of_the_sum_and_of_zeros_one():
    a, b, w = normal(2, 2, 3, 2), normal(3, 2, 4), normal(1, 2, 3, 4)
    want = np.linalg.norm((w + 0.5 * jnp.tensordot(a, b, 1)).reshape(6, 4), axis=0)
    np.testing.assert_allclose(norm(w, a, b, 0.5), want, rtol=1e-4)
    assert norm(0 * w, a, 0 * b).tolist() == [1.0] * 4


def test_the_norm_is_a_constant_to_the_gradient():
    w, x = nodes(())["DoRA"], normal(0, 2, 5, 2, 3)
    factor = w.magnitude / norm(w.base, w.a, w.b, w.scale)
    got = jax.grad(lambda a: einsum("btnh,nhd->btd", x, DoRA(w.base, a, w.b, w.magnitude, scale=0.5)).sum())(w.a)
    want = jax.grad(lambda a: (jnp.einsum("btnh,nhr,rd->btd", x, a, w.b) * 0.5 * factor).sum())(w.a)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_doras_dropout_leaves_the_base_as_it_is():
    """As in peft: the weight itself sees all inputs, what is added to it the dropped ones."""
    x = jnp.ones((1, 500, 2, 3))
    w = nodes(())["DoRA"]
    w = DoRA(w.base, w.a, 0 * w.b, norm(w.base, w.a, 0 * w.b), dropout=0.5)
    np.testing.assert_allclose(
        einsum("btnh,nhd->btd", x, seeded({"w": w}, jax.random.key(0))["w"]),
        jnp.einsum("btnh,nhd->btd", x, w.base),
        atol=1e-4,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("small") / "m", layers=2, tied=False)


@functools.partial(jax.jit, static_argnames="model")  # one compilation for all weights of one form
def logits(model, weights, ids=IDS):
    at = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return model.apply({"params": weights}, ids, jnp.ones_like(ids), at)[0].logits()


@pytest.fixture(scope="module")
def plain(folder):
    b, w = make(folder, parse({"method": "full"}))
    return logits(b.model, w)


@pytest.mark.parametrize("name", FORMS)
def test_nothing_changes_at_first_and_merged_is_wrapped(folder, plain, name):
    b, w = make(folder, parse(FORMS[name]))
    base = m.strip(w)
    np.testing.assert_allclose(logits(b.model, w), plain, atol=2e-5)
    assert all(jax.tree.leaves(jax.tree.map(lambda x: x.dtype == jnp.float32, m.split(w, b.labels)[0])))
    w = nudged(w, b.labels)
    wrapped = logits(b.model, w)
    assert np.abs(wrapped - plain).max() > 1e-3
    np.testing.assert_allclose(logits(b.model, m.merge(w)), wrapped, atol=2e-4)
    jax.tree.map(np.testing.assert_array_equal, m.strip(w), base)


@pytest.mark.parametrize("name", ["dora"])
def test_adapters_stand_upon_four_bits(folder, name):
    """What trains is as many numbers; the model starts as the quantised base does."""
    b, w = make(folder, parse({**FORMS[name], "base": "nf4", "group": 16}))
    base = jax.tree.map(lambda x: x, m.strip(w))
    q = base["layers_0-1"]["self_attn"]["q_proj"]["weight"]
    assert isinstance(q, Quantized)
    np.testing.assert_allclose(logits(b.model, w), logits(b.model, base), atol=1e-3)
    plain, _ = make(folder, parse(FORMS[name]))
    assert m.count(m.split(w, b.labels)[0]) == m.count(m.split(plain.abstract, plain.labels)[0])


def test_qlora_is_lora_over_nf4(folder):
    b, w = make(folder, parse({"method": "qlora", "rank": 2, "group": 16}))
    _, w2 = make(folder, parse({"rank": 2, "base": "nf4", "group": 16}))
    assert b.method.base == ("nf4", 16)
    jax.tree.map(np.testing.assert_array_equal, w, w2)
    assert isinstance(w["layers_0-1"]["mlp"]["down_proj"]["weight"].base, Quantized)


def test_bfloat16_starts_exactly(folder):
    """The frozen pair of PiSSA is rounded as it is held, and what trains starts from what was rounded."""
    b, w = make(folder, parse({"init": "pissa", "rank": 3, "targets": "q_proj"}), "bfloat16")
    node = w["layers_0-1"]["self_attn"]["q_proj"]["weight"]
    assert (node.a.dtype, node.base.a.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(node.a, node.base.a.astype(jnp.float32))
    np.testing.assert_array_equal(node.b, -node.base.b.astype(jnp.float32))
    assert b.labels["layers_0-1"]["self_attn"]["q_proj"]["weight"].base.a == m.FROZEN


def test_patterns_of_ranks_and_alphas(folder):
    b, w = make(folder, parse(FORMS["patterns"]))
    assert b.decoder.groups == (1, 1)
    first, second = w["layers_0-0"]["self_attn"], w["layers_1-1"]["self_attn"]
    assert (first["q_proj"]["weight"].a.shape[-1], second["q_proj"]["weight"].a.shape[-1]) == (8, 2)
    assert second["q_proj"]["weight"].scale == 16 / 2**0.5
    assert first["o_proj"]["weight"].scale == 5 / 8**0.5
    assert first["k_proj"]["weight"].scale == 16 / 8**0.5


def test_counts(folder):
    def count(t):
        b, w = make(folder, parse(t))
        return m.count(m.split(w, b.labels)[0])

    assert count({"method": "ia3"}) == 2 * (16 + 16 + 48)
    assert count({"form": "vera", "rank": 5, "targets": "q_proj"}) == 2 * (5 + 32)
    assert count({"dora": True, "rank": 5, "targets": "q_proj"}) == 2 * (5 * 64 + 32)


def test_lora_plus_is_a_rate_of_b(folder):
    rates = make(folder, parse({"lora_plus": 16, "targets": "q_proj"}))[0].method.rates
    assert [f for _, f in rates] == [16]
    found = [bool(m.re.search(rates[0][0], f"layers/3/q_proj/weight/{x}")) for x in ("a", "b", "base/b/x")]
    assert found == [False, True, False]


@pytest.mark.parametrize(
    ("t", "words"),
    [
        ({"rank_pattern": {"nope": 3}}, "tuning.rank_pattern: pattern 'nope' matches no weight; there are layers/N"),
        ({"targets": "q_proj", "alpha_pattern": {"k_proj": 3}}, "tuning.alpha_pattern: pattern 'k_proj' matches no"),
        (
            {"dora": True, "targets": "embed"},
            "tuning.dora is for linear layers, and embed_tokens is an embedding",
        ),
        ({"form": "vera", "rank_pattern": {"q_proj": 3}}, "tuning.form=vera shares its matrices, so it has one rank"),
        ({"form": "loha", "dropout": 0.1}, "tuning.dropout is not for tuning.form=loha; set it to 0"),
        ({"form": "lokr", "adapter": "x"}, "tuning.adapter goes on from LoRA only; leave tuning.form=lokr out"),
        ({"init": "olora", "adapter": "x"}, "tuning.init=olora is for fresh adapters"),
        ({"init": "pissa", "rank": 17}, "tuning.init=pissa: rank 17 is above 16, the smaller side of layers/0/self_at"),
        ({"method": "ia3", "inputs": ["up_proj"]}, "tuning.inputs: pattern 'up_proj' matches no weight; there are"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, t, words):
    with pytest.raises(UserError, match="tuning") as e:
        make(folder, parse(t))
    assert words in str(e.value)


def test_experts_take_plain_lora():
    with pytest.raises(UserError, match=r"tuning.dora is for linear layers, and layers/0/mlp/experts/down_proj is exp"):
        lora.only_linear({"layers/0/self_attn/q_proj", "layers/0/mlp/experts/down_proj"}, "tuning.dora")


@pytest.mark.parametrize("t", [{"form": "vera", "dora": True}, {"dora": True, "init": "pissa"}])
def test_keys_that_exclude_each_other_are_refused(t):
    with pytest.raises(ValidationError, match="tuning.dora"):
        parse(t)
