"""Rates and decays of single parameters, by hand and against torch's parameter groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtune import optim
from jaxtune.config import Optim
from jaxtune.errors import UserError
from jaxtune.layers import Weight
from jaxtune.optim import groups
from tests.optim.trees import abstract, arrays, walk

CONSTANT = {"schedule": "constant", "warmup": 0, "clip": 0}


def test_layer_decay_is_beits():
    """1 for head and last norm, d^(L-i) for layer i, d^(L+1) for the embeddings."""
    rates, _ = groups.factors(Optim(layer_decay=0.5), abstract())
    assert rates["lm_head"]["weight"] == rates["norm"]["weight"] == 1.0
    assert rates["embed_tokens"]["weight"] == 0.125
    q = rates["layers_0-1"]["self_attn"]["q_proj"]
    np.testing.assert_array_equal(q["weight"], np.reshape([0.25, 0.5], (2, 1, 1, 1)))
    np.testing.assert_array_equal(q["bias"], np.reshape([0.25, 0.5], (2, 1, 1)))


def test_frozen_layers_count_as_layers():
    """A head group of layers that is frozen leaves the others' depth as it is."""
    weights = {"layers_0-3": {"mlp": {"weight": None}}, "layers_4-5": abstract()["layers_0-1"]}
    rates, _ = groups.factors(Optim(layer_decay=0.5), weights)
    assert rates["layers_0-3"]["mlp"]["weight"] is None
    np.testing.assert_array_equal(rates["layers_4-5"]["input_layernorm"]["weight"], [[0.25], [0.5]])


def test_the_first_group_holds_and_factors_multiply():
    c = Optim(
        learning_rate=0.1, weight_decay=0.3, layer_decay=0.5,
        groups=[
            {"match": "layers/1/.*q_proj", "learning_rate": 0.2},
            {"match": "q_proj", "learning_rate": 0.0, "weight_decay": 0.7},
            {"match": "norms", "weight_decay": 0.9},
        ],
    )  # fmt: skip
    rates, decays = groups.factors(c, abstract(), rates=[("q_proj/weight$", 16.0)])
    q, dq = (t["layers_0-1"]["self_attn"]["q_proj"] for t in (rates, decays))
    np.testing.assert_allclose(q["weight"].ravel(), [0.0, 2.0 * 16.0 * 0.5])
    np.testing.assert_allclose(q["bias"].ravel(), [0.0, 2.0 * 0.5])
    np.testing.assert_allclose(dq["weight"].ravel(), [0.7, 0.3])
    np.testing.assert_allclose(dq["bias"].ravel(), [0.7, 0.0])
    assert decays["norm"]["weight"] == 0.9
    assert decays["lm_head"]["weight"] == 0.3


def test_decay_acts_on_matrices_only():
    _, decays = groups.factors(Optim(weight_decay=0.1), abstract())
    found = {k: jax.tree.leaves(v) for k, v in decays.items()}
    assert found["embed_tokens"] == found["lm_head"] == [0.1]
    assert found["norm"] == [0.0]
    attention = decays["layers_0-1"]["self_attn"]
    assert attention["o_proj"]["weight"] == attention["q_proj"]["weight"] == 0.1
    assert attention["q_proj"]["bias"] == decays["layers_0-1"]["input_layernorm"]["weight"] == 0.0


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("q_prog", "optim.groups: pattern 'q_prog' matches no weight; there are embed_tokens/weight, layers/N/"),
        ("(", "optim.groups: '(' is not a regular expression"),
    ],
)
def test_a_group_that_matches_nothing_is_refused(pattern, words):
    with pytest.raises(UserError) as e:
        optim.make(Optim(groups=[{"match": pattern}]), 9, abstract())
    assert words in str(e.value)


def test_only_what_trains_is_matched():
    weights = abstract()
    weights["lm_head"]["weight"] = None
    with pytest.raises(UserError, match="pattern '.*lm_head.* matches no weight"):
        optim.make(Optim(groups=[{"match": "head"}]), 9, weights)


def test_layers_that_take_turns_cannot_be_told_apart():
    tx = optim.make(Optim(layer_decay=0.5), 9, abstract())
    one = jax.tree.map(lambda x: x, arrays(0))
    one["layers_0-1"] = jax.tree.map(lambda x: x[:1], one["layers_0-1"])
    with pytest.raises(UserError, match="cannot tell 2 layers apart of which 1 train at a time"):
        tx.init(one)


def test_groups_step_as_torchs():
    """AdamW with two rates and decays, layers of one leaf among them, over six steps."""
    c = Optim(
        learning_rate=0.1, weight_decay=0.02, **CONSTANT,
        groups=[{"match": "layers/1/.*o_proj", "learning_rate": 0.03, "weight_decay": 0.5}],
    )  # fmt: skip
    weights = arrays(0)
    ours, _ = walk(optim.make(c, 6, abstract()), weights, range(1, 7))

    def leaf(tree):
        return np.asarray(tree["layers_0-1"]["self_attn"]["o_proj"]["weight"])

    ps = [torch.nn.Parameter(torch.tensor(x)) for x in leaf(weights)]
    opt = torch.optim.AdamW(
        [{"params": [ps[0]]}, {"params": [ps[1]], "lr": 0.03, "weight_decay": 0.5}], lr=0.1, weight_decay=0.02
    )
    for s in range(1, 7):
        for p, g in zip(ps, leaf(arrays(s)), strict=True):
            p.grad = torch.tensor(g)
        opt.step()
    np.testing.assert_allclose(leaf(ours), np.stack([p.detach().numpy() for p in ps]), atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimisers_step_as_torchs(name):
    rng = np.random.default_rng(0)
    w, grads = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(6, 5, 3)).astype(np.float32)
    decay = 0.02 if name == "adamw" else 0.0  # torch's SGD decays otherwise
    c = Optim(name=name, learning_rate=0.1, weight_decay=decay, **CONSTANT)
    tx = optim.make(c, 6, {"w": Weight(jax.ShapeDtypeStruct((5, 3), np.float32), ("embed", "mlp"), n_in=1)})
    ours = {"w": jnp.asarray(w)}
    state = tx.init(ours)
    p = torch.nn.Parameter(torch.tensor(w))
    opt = torch.optim.AdamW([p], lr=0.1, weight_decay=decay) if decay else torch.optim.SGD([p], lr=0.1, momentum=0.9)
    for g in grads:
        updates, state = tx.update({"w": jnp.asarray(g)}, state, ours)
        ours = {"w": ours["w"] + updates["w"]}
        p.grad = torch.tensor(g)
        opt.step()
    np.testing.assert_allclose(ours["w"], p.detach().numpy(), atol=1e-5)
