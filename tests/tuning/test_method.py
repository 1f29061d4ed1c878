import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import blueprint, sharding, tuning
from jaxtune.config import Freeze, Full, Lora, Mesh
from jaxtune.errors import UserError
from jaxtune.layers import unbox
from jaxtune.tuning import method as m
from tests.tiny import write_tiny

IDS = jnp.arange(24).reshape(2, 12) % 300


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("deep") / "m", layers=5, tied=False)


def make(folder, t, dtype="float32", remat="none"):
    mesh = sharding.make_mesh(Mesh(), jax.devices()[:1])
    b = blueprint.draw(folder, lambda d: tuning.make(t, d), mesh, dtype, remat)
    return b, unbox(blueprint.materialise(b, jax.random.key(0)))


def logits(b, weights):
    one = jnp.ones_like(IDS)
    return b.model.apply({"params": weights}, IDS, one, jnp.broadcast_to(jnp.arange(12), IDS.shape))[0].logits()


def nudged(weights, labels):
    """The weights with noise on what trains, as if trained."""
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    on = jax.tree.leaves(labels)
    return tree.unflatten(
        [
            x + 0.1 * jax.random.normal(k, x.shape) if o != m.FROZEN else x
            for x, k, o in zip(leaves, keys, on, strict=True)
        ]
    )


@pytest.mark.parametrize(
    ("t", "groups"),
    [
        (Full(method="full"), (5,)),
        (Freeze(method="freeze", last=2), (3, 2)),
        (Freeze(method="freeze", train=[r"layers/[13]/.*mlp"]), (1, 1, 1, 1, 1)),
        (Freeze(method="freeze", train=["norm", "head"]), (5,)),
        (Lora(), (5,)),
        (Lora(targets=[r"layers/[34]/.*q_proj", "v_proj"]), (3, 2)),
    ],
)
def test_layers_that_are_alike_stand_together(deep, t, groups):
    assert make(deep, t)[0].decoder.groups == groups


@pytest.mark.parametrize("t", [Full(method="full"), Freeze(method="freeze", last=2, train=["head"]), Lora(rank=3)])
def test_split_and_join_are_each_others_inverse(deep, t):
    b, w = make(deep, t)
    trainable, frozen = m.split(w, b.labels)
    assert m.count(trainable) + m.count(frozen) == m.count(w)
    assert m.count(trainable) > 0
    jax.tree.map(np.testing.assert_array_equal, m.join(trainable, frozen), w)


@pytest.mark.parametrize(
    "t", [Lora(), Lora(targets="q_proj|lm_head", rslora=True), Lora(targets=["layers/1/"], rank=2)]
)
def test_adapters_change_nothing_at_first_and_merge_exactly(deep, t):
    base, plain = make(deep, Full(method="full"))
    b, w = make(deep, t)
    np.testing.assert_allclose(logits(b, w), logits(base, plain), atol=1e-5)
    w = nudged(w, b.labels)
    assert np.abs(logits(b, w) - logits(base, plain)).max() > 0.01
    np.testing.assert_allclose(logits(b, m.merge(w)), logits(b, w), atol=2e-4)
    np.testing.assert_allclose(logits(b, m.strip(w)), logits(base, plain), atol=1e-5)


def test_lora_counts_and_scale(deep):
    b, w = make(deep, Lora(rank=4, targets=["q_proj"], alpha=8.0, rslora=True))
    assert m.count(m.split(w, b.labels)[0]) == 5 * 4 * (32 + 32)
    assert w["layers_0-4"]["self_attn"]["q_proj"]["weight"].scale == 4.0


def test_groups_and_remat_do_not_change_the_model(deep):
    base, plain = make(deep, Full(method="full"))
    want = logits(base, plain)
    np.testing.assert_allclose(logits(*make(deep, Freeze(method="freeze", last=2))), want, atol=1e-5)
    for remat in ("dots", "full"):
        b, w = make(deep, Full(method="full"), remat=remat)
        g, h = (jax.grad(lambda w, b=x: logits(b, w).sum())(w) for x in (b, base))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), g, h)


def test_dtypes_trained_float32_frozen_in_compute_dtype(deep):
    b, w = make(deep, Freeze(method="freeze", last=1), "bfloat16")
    trainable, frozen = m.split(w, b.labels)
    assert {x.dtype.name for x in jax.tree.leaves(trainable)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {"bfloat16"}
    assert logits(b, w).dtype == jnp.float32


def flops(b, w):
    trainable, frozen = m.split(w, b.labels)
    f = jax.jit(jax.grad(lambda t: logits(b, m.join(t, frozen)).sum()))
    return f.lower(trainable).compile().cost_analysis()["flops"]


def test_freezing_the_lower_layers_shortens_the_backward_pass(tmp_path):
    """Groups of one layer are not loops, so the compiler's count holds them all."""
    folder = write_tiny(tmp_path / "m", layers=3, tied=False, embed=64, mlp=256)
    some = r"layers/0/.*q_proj"  # sets the groups apart: each layer is compiled by itself
    every = flops(*make(folder, Freeze(method="freeze", train=[some, r"layers/1/.*k_proj", r"layers/2/"])))
    two = flops(*make(folder, Freeze(method="freeze", train=[r"layers/1/.*k_proj", r"layers/2/"])))
    one = flops(*make(folder, Freeze(method="freeze", train=[r"layers/2/"])))
    assert every > 1.1 * two > 1.1 * 1.1 * one


@pytest.mark.parametrize(
    ("t", "words"),
    [
        (
            Freeze(method="freeze", train=["q_prog"]),
            "tuning.train: pattern 'q_prog' matches no weight; there are embed",
        ),
        (Freeze(method="freeze", train=["("]), "is not a regular expression"),
        (Freeze(method="freeze", last=6), "tuning.last=6: the model has 5 layers"),
        (Lora(targets=["q_proj", "nope"]), "tuning.targets: pattern 'nope' matches no weight"),
        (Lora(targets="layernorm"), "tuning.targets: pattern 'layernorm' matches no weight"),
        (Lora(train=["q_proj/bias"]), "tuning.train: pattern 'q_proj/bias' matches no weight"),
    ],
)
def test_patterns_that_match_nothing_are_named(deep, t, words):
    with pytest.raises(UserError, match="tuning") as e:
        make(deep, t)
    assert words in str(e.value)


def test_rules_cover_every_weight():
    with pytest.raises(
        UserError, match=r"no rule covers parameter 'norm/weight'; add one, e.g. \(\"norm/weight\", \"freeze\"\)"
    ):
        m.label(m.Method(m.leave, [("embed", "train")]), {"norm": {"weight": 1}})
