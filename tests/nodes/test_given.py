import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import tuned
from jaxtune.nodes.given import given, looked_up
from jaxtune.nodes.soft_prompt import Prefix, SoftPrompt

RNG = np.random.default_rng(0)


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape) * 0.3, jnp.float32)


@pytest.mark.parametrize("kind", ["soft_prompt", "prefix"])
def test_what_is_looked_up_and_given_is_what_the_tokens_give(tiny, kind):
    m = tuned.open_model(str(tiny))
    table = m.weights["embed_tokens"]["weight"]
    ids_T = jnp.array([300, 301, 302, 5, 9, 14] if kind == "soft_prompt" else [1, 5, 9, 14])
    prefix = Prefix(table, drawn(2, 2, 3, 8), drawn(2, 2, 3, 8))
    node = SoftPrompt(table, drawn(3, 32)) if kind == "soft_prompt" else prefix
    weights = {**m.weights, "embed_tokens": {"weight": node}}
    columns = ids_T[None], jnp.ones((1, len(ids_T)), jnp.int32), jnp.arange(len(ids_T))[None]

    @jax.jit
    def both(w):
        x_BTD = looked_up(w, ids_T)[None]
        trees = w, given(w, x_BTD), given(w, x_BTD * 2)
        return [m.blueprint.model.apply({"params": v}, *columns)[0].logits() for v in trees]

    plain, same, other = both(weights)
    np.testing.assert_allclose(same, plain, atol=1e-5)
    assert abs(np.asarray(other - plain)).max() > 1e-3
