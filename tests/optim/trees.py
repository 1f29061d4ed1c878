"""A small tree of weights as the model's are named: two stacked layers with a projection of heads, a table, a head."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.layers import Weight

SHAPES = {
    "embed_tokens": {"weight": ((6, 4), ("vocab", "embed"), 1)},
    "layers_0-1": {
        "self_attn": {
            "q_proj": {"weight": ((2, 4, 2, 3), ("layers", "embed", "heads", "head"), 1),
                       "bias": ((2, 2, 3), ("layers", "heads", "head"), 0)},
            "o_proj": {"weight": ((2, 2, 3, 4), ("layers", "heads", "head", "embed"), 2)},
        },
        "input_layernorm": {"weight": ((2, 4), ("layers", "embed"), 0)},
    },
    "norm": {"weight": ((4,), ("embed",), 0)},
    "lm_head": {"weight": ((4, 6), ("embed", "vocab"), 1)},
}  # fmt: skip


def _map(f: Any, *trees: Any) -> Any:
    return {k: _map(f, *(t[k] for t in trees)) if isinstance(v, dict) else f(v) for k, v in trees[0].items()}


def abstract(dtype: Any = jnp.float32) -> Any:
    """Abstract `Weight`s."""
    return _map(lambda s: Weight(jax.ShapeDtypeStruct(s[0], dtype), s[1], n_in=s[2]), SHAPES)


def arrays(seed: int, dtype: Any = jnp.float32) -> Any:
    """Normal numbers in the same form."""
    rng = np.random.default_rng(seed)
    return _map(lambda s: jnp.asarray(rng.normal(size=s[0]), dtype), SHAPES)


def walk(tx: optax.GradientTransformation, weights: Any, seeds: Any) -> tuple[Any, Any]:
    """Weights and state after a step for each seed of a gradient."""
    state, update = tx.init(weights), jax.jit(tx.update)
    for s in seeds:
        grads = jax.tree.map(lambda g, w: g.astype(w.dtype), arrays(s), weights)
        updates, state = update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights, state
