"""Which heads, channels and layers a model can best do without; `hf.smaller` takes them out.

Heads and channels are judged by what they give to their layer's output, after the layers below were pruned, and those
that stay are fitted to make up for the others.

Dimensions: O outputs, I inputs, L layers, B batch, T time, D embed, G groups of inputs.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.compress import sparse
from jaxtune.compress.calibrate import Stats, through
from jaxtune.compress.prune import matrices
from jaxtune.layers import group_name
from jaxtune.models.decoder import DecoderConfig
from jaxtune.models.inside import Layers
from jaxtune.weights import Array, path_name

Tree = Any
BY = ("influence", "angular")
_READS = {"heads": "self_attn/o_proj", "channels": "mlp/down_proj"}  # the matrix whose inputs they are


class Thinned(NamedTuple):
    """A model some of whose heads or channels do nothing any more: `keep` says which of each layer still do."""

    weights: Tree
    keep: list[list[int]]


def energy(w_OI: Array, gram_II: Array, groups: int) -> Array:
    """`‖W_g X_g‖²` of each of so many equal groups of inputs, float32 `[G]`: what they give to the output, squared."""
    w_OGi = w_OI.astype(jnp.float32).reshape(w_OI.shape[0], groups, -1)
    i = w_OGi.shape[2]
    own_Gii = (
        jnp.stack([gram_II[g * i : g * i + i, g * i : g * i + i] for g in range(groups)])
        if i > 1
        else jnp.diagonal(gram_II)[:, None, None]
    )
    return jnp.einsum("ogi,gij,ogj->g", w_OGi, own_Gii, w_OGi, precision=jax.lax.Precision.HIGHEST)


def thin(
    c: DecoderConfig, weights: Tree, batches: Iterable[Mapping[str, Any]], kind: str, kept: int, refit: bool = True
) -> Thinned:
    """Leave so many key/value heads ("heads") or mlp channels ("channels") in each layer.

    Args:
      c: the decoder.
      weights: its arrays.
      batches: to calibrate with, see `calibrate.through`.
      kind: "heads", of which those that share keys and values go together, or "channels".
      kept: how many stay in each layer.
      refit: whether those that stay are fitted to the outputs of all, by least squares.
    """
    name, groups = _READS[kind], c.kv_heads if kind == "heads" else c.mlp
    m, keep = matrices(c)[f"{name}/weight"], []

    def visit(i: int, layer: Tree, stats: Mapping[str, Stats]) -> Tree:
        def leaf(path: tuple, w: Array) -> Array:
            if path_name(path) != f"{name}/weight":
                return w
            w_OI, gram_II = m.outputs_first(w)[0], stats[name].gram_II
            best_G = jnp.argsort(-energy(w_OI, gram_II, groups), stable=True)[:kept]
            keep.append(sorted(int(g) for g in best_G))
            keep_I = jnp.repeat(jnp.isin(jnp.arange(groups), best_G), w_OI.shape[1] // groups)
            new = sparse.refit(w_OI, gram_II, keep_I) if refit else jnp.where(keep_I, w_OI, 0)
            return m.back(new[None], w)

        return jax.tree_util.tree_map_with_path(leaf, layer)

    return Thinned(through(c, weights, batches, visit), keep)


def distances(
    c: DecoderConfig, weights: Tree, batches: Iterable[Mapping[str, Any]], span: int, angular: bool
) -> np.ndarray:
    """How far what goes into each layer is from what comes out of the `span`-th layer from it: `[L + 1 - span]`.

    The mean over tokens of 1 − cos, or, angular, of arccos(cos) / π. One batch is gone through at a time.
    """
    layers = Layers(c)
    first, run = jax.jit(layers.first), jax.jit(lambda *a: layers.layer(*a)[0])

    @jax.jit
    def far(a_BTD: Array, b_BTD: Array, real_BT: Array) -> Array:
        a, b = (x.astype(jnp.float32) for x in (a_BTD, b_BTD))
        cos_BT = (a * b).sum(-1) / jnp.maximum(jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1), 1e-12)
        d_BT = jnp.arccos(jnp.clip(cos_BT, -1, 1)) / jnp.pi if angular else 1 - cos_BT
        return jnp.where(real_BT, d_BT, 0).sum()

    total, tokens = np.zeros(c.layers + 1 - span), 0
    for columns in batches:
        batch = {k: jnp.asarray(columns[k]) for k in ("ids_BT", "segment_BT", "position_BT")}
        real_BT = batch["segment_BT"] > 0
        tokens += int(real_BT.sum())
        hidden = deque([first(weights, batch)], maxlen=span + 1)
        for i in range(c.layers):
            hidden.append(run(i, layers.one(weights, i), hidden[-1], batch))
            if len(hidden) == span + 1:
                total[i + 1 - span] += float(far(hidden[0], hidden[-1], real_BT))
    return total / max(tokens, 1)


def layers_to_keep(
    c: DecoderConfig, weights: Tree, batches: Sequence[Mapping[str, Any]], kept: int, by: str
) -> tuple[list[int], np.ndarray]:
    """Which layers stay, and the distances that say so.

    By "influence", those go that turn what they get least (ShortGPT, Men et al., 2024,
    https://arxiv.org/abs/2403.03853); by "angular", that run of consecutive layers goes from whose input to whose
    output the angle is least (Gromov et al., 2024, https://arxiv.org/abs/2403.17887).
    """
    gone = c.layers - kept
    if gone == 0:
        return list(range(c.layers)), np.zeros(0)
    d = distances(c, weights, batches, 1 if by == "influence" else gone, by == "angular")
    if by == "influence":
        out = {int(i) for i in np.argsort(d, kind="stable")[:gone]}
    else:
        start = int(np.argmin(d))
        out = set(range(start, start + gone))
    return [i for i in range(c.layers) if i not in out], d


def only_layers(c: DecoderConfig, weights: Tree, keep: Sequence[int]) -> tuple[DecoderConfig, Tree]:
    """A decoder and its weights with these layers, in one group."""
    layers = Layers(c)
    small = dataclasses.replace(
        c,
        layers=len(keep),
        groups=(),
        windows=tuple(c.windows[i] for i in keep) if c.windows else (),
        rope_of=tuple(c.rope_of[i] for i in keep) if c.rope_of else (),
    )
    rest = {n: x for n, x in weights.items() if not n.startswith("layers_")}
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[layers.one(weights, i) for i in keep])
    return small, {**rest, group_name(0, len(keep)): stacked}
