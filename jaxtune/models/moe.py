"""A mixture of experts in place of the feed-forward part: top-k routing, dropless grouped matrix products.

Rows are sorted by expert and multiplied in groups (MegaBlocks, Gale et al., 2022, https://arxiv.org/abs/2211.15841), so
no token is dropped and no expert padded. On a mesh each device sorts its own rows; with an `expert` axis it takes the
rows of the devices that it shares that axis with, multiplies those of its own experts, and hands the sums back.

Dimensions: B batch, T time, D embed, E experts, k experts per token, M rows, F mlp of one expert.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxtune.layers import BATCH_AXES, Linear, Weight, parameter, time_axis
from jaxtune.weights import Array, grouped

_EXPERT = "expert"


class Experts(nn.Module):
    """Matrices of all experts; gate and up in one tensor, as transformers 5 holds them."""

    dims: Mapping[str, int]
    act: Any

    @nn.compact
    def __call__(self, x_BTD: Array, chosen_BTk: Array, share_BTk: Array) -> Array:
        d = self.dims
        gate_up = self._weight("gate_up_proj", ("embed", "gate_up", "expert_mlp"), d["embed"])
        down = self._weight("down_proj", ("expert_mlp", "embed"), d["expert_mlp"])

        def run(x_BTD: Array, chosen_BTk: Array, share_BTk: Array, gate_up: Any, down: Any, split: int) -> Array:
            own = d["expert"] // split
            first = jax.lax.axis_index(_EXPERT) * own if split > 1 else 0
            return self._multiply(x_BTD, chosen_BTk, share_BTk, gate_up, down, first, own)

        mesh = jax.sharding.get_abstract_mesh()
        axes = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
        if mesh.empty or mesh.size == 1 or not axes or x_BTD.shape[0] % math.prod(mesh.shape[a] for a in axes):
            return run(x_BTD, chosen_BTk, share_BTk, gate_up, down, 1)
        split = mesh.shape.get(_EXPERT, 1)
        if d["expert"] % split:
            split = 1  # the weights are copied, then; `sharding` has said so
        time = time_axis(x_BTD.shape[1])
        manual = axes if time is None else (*axes, time)
        rows = PartitionSpec(tuple(a for a in axes if a != _EXPERT or split == 1), time)

        def spread(x_BTD: Array, chosen_BTk: Array, share_BTk: Array, gate_up: Any, down: Any) -> Array:
            gate_up, down = (jax.tree.map(own_key, w) for w in (gate_up, down))
            y_BTD = run(x_BTD, chosen_BTk, share_BTk, gate_up, down, split)
            return y_BTD if split == 1 else jax.lax.psum_scatter(y_BTD, _EXPERT, scatter_dimension=0, tiled=True)

        def is_key(a: Any) -> bool:
            return jnp.issubdtype(a.dtype, jax.dtypes.prng_key)

        def own_key(a: Any) -> Any:
            """A device's own dropout."""
            return jax.random.fold_in(a, jax.lax.axis_index(manual)) if is_key(a) else a

        by_expert = PartitionSpec(_EXPERT) if split > 1 else PartitionSpec()

        def specs(w: Any) -> Any:
            return jax.tree.map(lambda a: PartitionSpec() if is_key(a) else by_expert, w)

        return jax.shard_map(
            spread,
            in_specs=(rows, rows, rows, specs(gate_up), specs(down)),
            out_specs=PartitionSpec(axes, time),
            axis_names=set(manual),
            check_vma=False,
        )(x_BTD, chosen_BTk, share_BTk, gate_up, down)

    def _weight(self, name: str, axes: tuple[str, ...], fan_in: int) -> Any:
        shape = tuple(self.dims[a] for a in (_EXPERT, *axes))
        return parameter(
            self, name, lambda k, s: Weight(jax.random.normal(k, s) * fan_in**-0.5, (_EXPERT, *axes), n_in=1), shape
        )

    def _multiply(
        self, x_BTD: Array, chosen_BTk: Array, share_BTk: Array, gate_up: Any, down: Any, first: Any, own: int
    ) -> Array:
        """What experts `first` to `first + own` add to each token."""
        B, T, D = x_BTD.shape
        k = chosen_BTk.shape[-1]
        expert_M = chosen_BTk.reshape(-1) - first
        mine_M = (expert_M >= 0) & (expert_M < own)
        order_M = jnp.argsort(jnp.where(mine_M, expert_M, own), stable=True)  # the others' rows come last
        sizes_E = jnp.bincount(jnp.where(mine_M, expert_M, own), length=own + 1)[:own].astype(jnp.int32)
        real_M1 = (jnp.arange(len(order_M)) < sizes_E.sum())[:, None]  # beyond them a grouped product is undefined
        x_MD = jnp.where(real_M1, x_BTD.reshape(-1, D)[order_M // k], 0)
        gate_up_McF = jnp.where(real_M1[..., None], grouped(gate_up, x_MD, sizes_E), 0)
        hidden_MF = self.act(gate_up_McF[:, 0]) * gate_up_McF[:, 1]
        y_MD = grouped(down, hidden_MF, sizes_E)[jnp.argsort(order_M)]
        share_M = jnp.where(mine_M, share_BTk.reshape(-1), 0)
        y_MD = jnp.where(mine_M[:, None], y_MD, 0) * share_M[:, None].astype(y_MD.dtype)
        return y_MD.reshape(B, T, k, D).sum(2)


class Moe(nn.Module):
    """The router and its experts. Gives also what the load-balancing loss is made of, see `balance`."""

    dims: Mapping[str, int]
    act: Any
    top_k: int
    normalise: bool  # whether the shares of the chosen experts add up to 1

    @nn.compact
    def __call__(self, x_BTD: Array, segment_BT: Array) -> tuple[Array, tuple[Array, Array]]:
        logits_BTE = Linear("btd,de->bte", "embed -> router", self.dims, name="gate")(x_BTD)
        p_BTE = jax.nn.softmax(logits_BTE.astype(jnp.float32), -1)
        share_BTk, chosen_BTk = jax.lax.top_k(p_BTE, self.top_k)
        if self.normalise:
            share_BTk = share_BTk / share_BTk.sum(-1, keepdims=True)
        y_BTD = Experts(self.dims, self.act, name="experts")(x_BTD, chosen_BTk, share_BTk.astype(x_BTD.dtype))
        real_BT1 = (segment_BT > 0)[..., None].astype(jnp.float32)
        taken_BTE = jax.nn.one_hot(chosen_BTk, p_BTE.shape[-1], dtype=jnp.float32).sum(2)
        return y_BTD, ((taken_BTE * real_BT1).sum((0, 1)), (p_BTE * real_BT1).sum((0, 1)))


def balance(taken_E: Array, p_E: Array, rows: Array) -> Array:
    """The load-balancing loss (Switch Transformer, Fedus et al., 2021, eq. 4-6), float32; `top_k` where all is even.

    `taken_E` counts how often each expert was chosen, `p_E` adds up its probabilities, both over `rows` tokens and
    layers: the means are over all layers together, as transformers takes them.
    """
    rows = jnp.maximum(rows, 1)
    return (taken_E / rows * (p_E / rows)).sum() * taken_E.shape[-1]
