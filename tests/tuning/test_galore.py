"""GaLore against GaLore by hand, and what its state takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtune import optim, tuning
from jaxtune.config import Galore, Optim
from jaxtune.errors import UserError
from jaxtune.layers import is_weight
from jaxtune.models.decoder import abstract_weights
from tests.tiny import SHAPE

RANK, EVERY, SCALE, RATE = 3, 2, 0.25, 0.1
WEIGHTS = abstract_weights(SHAPE)


def gradients(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.value.shape), jnp.float32), WEIGHTS, is_leaf=is_weight)


def make(name="adamw", **given):
    method = tuning.make(Galore(method="galore", rank=RANK, every=EVERY, scale=SCALE, **given), SHAPE)
    c = Optim(name=name, learning_rate=RATE, schedule="constant", warmup=0, clip=0, weight_decay=0.1)
    return optim.make(c, 9, WEIGHTS, within=method.within)


def by_hand(grads, w):
    """GaLore-Adam on one matrix: the shorter side projected, by an SVD every two steps."""
    m = v = p = None
    for t, g in enumerate(grads, 1):
        wide = g.shape[0] <= g.shape[1]
        if (t - 1) % EVERY == 0:
            u, _, vh = np.linalg.svd(g, full_matrices=False)
            p = u[:, :RANK] if wide else vh[:RANK].T
        r = p.T @ g if wide else g @ p
        m = 0.1 * r if m is None else 0.9 * m + 0.1 * r
        v = 0.001 * r * r if v is None else 0.999 * v + 0.001 * r * r
        n = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w - RATE * (SCALE * (p @ n if wide else n @ p.T) + 0.1 * w)
    return w


def test_steps_are_those_by_hand():
    tx, start = make(), gradients(0)
    w, state, update = start, tx.init(start), jax.jit(tx.update)
    for s in (1, 2):
        updates, state = update(gradients(s), state, w)
        w = optax.apply_updates(w, updates)
    plain = optim.make(Optim(learning_rate=RATE, schedule="constant", warmup=0, clip=0, weight_decay=0.1), 9, WEIGHTS)
    adam, held, plain_update = start, plain.init(start), jax.jit(plain.update)
    for s in (1, 2):
        updates, held = plain_update(gradients(s), held, adam)
        adam = optax.apply_updates(adam, updates)
    np.testing.assert_allclose(w["embed_tokens"]["weight"], adam["embed_tokens"]["weight"], atol=1e-6)
    np.testing.assert_allclose(w["norm"]["weight"], adam["norm"]["weight"], atol=1e-6)
    for part, module, into in (("self_attn", "q_proj", 32), ("self_attn", "o_proj", 32), ("mlp", "down_proj", 48)):

        def leaf(tree, i, part=part, module=module, into=into):
            return np.asarray(tree["layers_0-1"][part][module]["weight"][i], np.float64).reshape(into, -1)

        for i in range(2):
            want = by_hand([leaf(gradients(s), i) for s in (1, 2)], leaf(start, i))
            np.testing.assert_allclose(leaf(w, i), want, atol=2e-5)


def test_the_state_is_small():
    """A matrix of m by n, m the shorter, holds r (m + 2n) numbers where Adam holds 2mn."""
    state = jax.eval_shape(make().init, gradients(0))
    adam = optim.make(Optim(), 9, WEIGHTS)
    sides = [(32, 32), (16, 32), (16, 32), (32, 32), (32, 48), (32, 48), (32, 48)]
    saved = 2 * sum(2 * m * n - RANK * (m + 2 * n) for m, n in sides)

    def numbers(s):
        return sum(x.size for x in jax.tree.leaves(s) if x.ndim)

    assert numbers(jax.eval_shape(adam.init, gradients(0))) - numbers(state) == saved


def test_projections_change_only_every_few_steps():
    tx, w = make("sgd"), gradients(0)
    state, update = tx.init(w), jax.jit(tx.update)
    seen = []
    for s in range(1, 5):
        _, state = update(gradients(s), state, w)
        seen.append(np.asarray(state[1].projection["layers_0-1/mlp/up_proj/weight"]))
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[2], seen[3])
    assert np.abs(seen[1] - seen[2]).max() > 0.1
    np.testing.assert_allclose(np.einsum("xsr,xst->xrt", seen[0], seen[0]), np.tile(np.eye(RANK), (2, 1, 1)), atol=1e-5)


def test_only_targets_are_projected_and_whole_modules():
    state = make(targets=["up_proj"]).init(gradients(0))
    assert set(state[1].projection) == {"layers_0-1/mlp/up_proj/weight"}
    with pytest.raises(UserError, match="matches layers/1/mlp/up_proj and not layers/0/mlp/up_proj: GaLore projects"):
        make(targets="layers/1/.*up_proj")
    with pytest.raises(UserError, match="tuning.targets: pattern 'nope' matches no weight"):
        make(targets="nope")
