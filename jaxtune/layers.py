"""Building blocks of a decoder. A weight is declared once, where it is used.

`Linear("btd,dnh->btnh", "embed -> heads head", dims)` says a weight's shape, its logical axes for sharding, its fan-in,
how adapters factor it and how Hugging Face stores it: all are derived from the `Weight` that it leaves in the tree.

Dimensions: B batch, T time of the queries, S time of the keys, D embed, N query heads, K key/value heads,
G query heads per key/value head, H head dim, L layers, V vocab.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxtune.weights import Array, einsum, precision, take

BATCH_AXES = ("data", "fsdp")  # mesh axes over which a batch is split
REMAT_POLICIES: Mapping[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
_GROUP = re.compile(r"^layers_(\d+)-(\d+)/")
_UNROLL = 8  # layers that a loop on CPU takes at once: XLA there copies what a loop carries
_NEVER = -1e30  # a masked score; finite, so that a row without any key gives no NaN


class Weight(nn.LogicallyPartitioned):
    """One parameter and what is known of it: `names` are its logical axes, of which the first `n_in` are contracted.

    A layer axis, added in front by `stack`, is named "layers" and not counted in `n_in`.
    """

    n_in: int = flax.struct.field(default=0, pytree_node=False)

    @property
    def stacked(self) -> bool:
        return self.names[0] == "layers"

    def like(self, value: Any) -> "Weight":
        return self.replace(value=value)


def is_weight(x: object) -> bool:
    """Whether this is a `Weight` (as a leaf, for `jax.tree` functions)."""
    return isinstance(x, Weight)


def unbox(tree: Any) -> Any:
    """The values of a tree of `Weight`s."""
    return jax.tree.map(lambda w: w.value if is_weight(w) else w, tree, is_leaf=is_weight)


class Linear(nn.Module):
    """A matrix product with a weight named `weight` and, if asked, a `bias`."""

    eqn: str
    axes: str  # "in … -> out …", logical axis names
    dims: Mapping[str, int]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        into, out = (side.split() for side in self.axes.split("->"))
        shape = tuple(self.dims[a] for a in into + out)
        n_in = len(into)
        init = nn.initializers.lecun_normal(in_axis=tuple(range(n_in)), out_axis=tuple(range(n_in, len(shape))))
        w = self.param("weight", lambda *args: Weight(init(*args), tuple(into + out), n_in=n_in), shape)
        y = einsum(self.eqn, x, w)
        if self.use_bias:
            bias: Any = self.param("bias", lambda _, s: Weight(jnp.zeros(s), tuple(out)), shape[n_in:])
            y = y + bias.astype(y.dtype)
        return y


class Embed(nn.Module):
    """A table of vectors, looked up by token; the same table may serve as the head."""

    dims: Mapping[str, int]
    dtype: Any

    def setup(self) -> None:
        shape = self.dims["vocab"], self.dims["embed"]
        self.weight = self.param(
            "weight", lambda k, s: Weight(jax.random.normal(k, s) * 0.02, ("vocab", "embed"), n_in=1), shape
        )

    def __call__(self, ids_BT: Array) -> Array:
        return take(self.weight, ids_BT, self.dtype)


class Head(nn.Module):
    """The output matrix of a language model, handed to the objective as a value: full logits are never made here."""

    dims: Mapping[str, int]

    @nn.compact
    def __call__(self) -> Any:
        shape = self.dims["embed"], self.dims["vocab"]
        init = nn.initializers.lecun_normal()
        return self.param("weight", lambda k, s: Weight(init(k, s), ("embed", "vocab"), n_in=1), shape)


@flax.struct.dataclass
class Outputs:
    """What a language model gives: last hidden states, and the head that would turn them into logits."""

    hidden_BTD: Array
    head: Any
    eqn: str = flax.struct.field(pytree_node=False)

    def logits(self, hidden_BTD: Array | None = None) -> Array:
        """Logits in float32, of the given hidden states or of all: `[B, T, V]`."""
        x_BTD = self.hidden_BTD if hidden_BTD is None else hidden_BTD
        return einsum(self.eqn, x_BTD, self.head).astype(jnp.float32)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019), computed in float32 as transformers does."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        scale_D: Any = self.param("weight", lambda _, s: Weight(jnp.ones(s), ("embed",)), x_BTD.shape[-1:])
        y_BTD = x_BTD.astype(jnp.float32)
        y_BTD = y_BTD * jax.lax.rsqrt(jnp.mean(y_BTD * y_BTD, -1, keepdims=True) + self.eps)
        return y_BTD.astype(x_BTD.dtype) * scale_D.astype(x_BTD.dtype)


# --- positions ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., 2021) and its scalings, fields named as in Hugging Face's config."""

    head_dim: int
    theta: float = 10000.0
    kind: str = "default"  # default · linear · dynamic · yarn · llama3
    factor: float = 1.0
    context: int = 2048  # max_position_embeddings, or the original context where the scaling names one
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


def rope_tables(rope: Rope, position_BT: Array) -> tuple[Array, Array]:
    """Cosines and sines, float32 `[B, T, 1, H/2]`, for the given positions."""
    dim = rope.head_dim
    if rope.kind == "dynamic":  # the base grows with the longest position of the row (NTK-aware)
        length_B1 = jnp.maximum(position_BT.max(1, keepdims=True) + 1, rope.context).astype(jnp.float32)
        growth_B1 = rope.factor * length_B1 / rope.context - (rope.factor - 1)
        theta_B111 = (rope.theta * growth_B1 ** (dim / (dim - 2)))[:, :, None, None]
        freq_H = 1.0 / theta_B111 ** (jnp.arange(0, dim, 2) / dim)
    else:
        freq_H = jnp.asarray(_frequencies(rope), jnp.float32)
    angle_BT1H = position_BT[:, :, None, None].astype(jnp.float32) * freq_H
    return jnp.cos(angle_BT1H) * rope.attention_factor, jnp.sin(angle_BT1H) * rope.attention_factor


def _frequencies(rope: Rope) -> np.ndarray:
    dim = rope.head_dim
    base_H = 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    if rope.kind == "linear":
        return base_H / rope.factor
    if rope.kind == "llama3":
        wavelength_H = 2 * np.pi / base_H
        low, high = rope.context / rope.low_freq_factor, rope.context / rope.high_freq_factor
        smooth = (rope.context / wavelength_H - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend_H = (1 - smooth) * base_H / rope.factor + smooth * base_H
        return np.where(wavelength_H > low, base_H / rope.factor, np.where(wavelength_H < high, base_H, blend_H))
    if rope.kind == "yarn":  # Peng et al., 2023, https://arxiv.org/abs/2309.00071

        def turns(n: float) -> float:  # the dimension that turns n times within the original context
            return dim * math.log(rope.context / (n * 2 * math.pi)) / (2 * math.log(rope.theta))

        low, high = turns(rope.beta_fast), turns(rope.beta_slow)
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp_H = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
        return base_H / rope.factor * ramp_H + base_H * (1 - ramp_H)
    return base_H


def rotate(x_BTNH: Array, cos_BT1H: Array, sin_BT1H: Array) -> Array:
    """Turn the halves of each head by the tables of `rope_tables`."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos_BT1H - b * sin_BT1H, b * cos_BT1H + a * sin_BT1H], -1).astype(x_BTNH.dtype)


# --- attention ------------------------------------------------------------------------------------------------------


def attend(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    q_segment_BT: Array,
    k_segment_BS: Array,
    start: Array | int = 0,
    *,
    blocks: int = 8,
) -> Array:
    """Causal grouped-query attention within segments; the query at `t` stands at position `start + t` of the keys.

    Queries go in at most `blocks` blocks, each over the keys that it can see, so nearly half of the scores are never
    made. Scores and the softmax are float32. Segment 0 is padding.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    q_BKGTH = (q_BTNH * H**-0.5).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    aligned = isinstance(start, int) and start == 0 and S == T
    size = max(64, -(-T // blocks)) if aligned else T
    out = []
    for i in range(0, T, size):
        j = min(i + size, T)
        seen = j if aligned else S
        causal_ts = start + jnp.arange(i, j)[:, None] >= jnp.arange(seen)
        same_Bts = q_segment_BT[:, i:j, None] == k_segment_BS[:, None, :seen]
        score_BKgs = _batched(q_BKGTH[:, :, :, i:j].reshape(B, K, -1, H), k_BKSH[:, :, :seen], 3)
        score_BKGts = score_BKgs.reshape(B, K, G, j - i, seen)
        p_BKGts = jax.nn.softmax(jnp.where((causal_ts & same_Bts)[:, None, None], score_BKGts, _NEVER), -1)
        p_BKgs = p_BKGts.astype(v_BKSH.dtype).reshape(B, K, -1, seen)
        out.append(_batched(p_BKgs, v_BKSH[:, :, :seen], 2).reshape(B, K, G, j - i, H))
    o_BKGTH = jnp.concatenate(out, 3) if len(out) > 1 else out[0]
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _batched(x: Array, y: Array, contract: int) -> Array:
    """Matrix products over batch and heads, each sharded in its own way; contracts axis `contract` of `y`."""
    dims = (((3,), (contract,)), ((0, 1), (0, 1)))
    wide = jnp.float32 if contract == 3 else None  # scores
    return jax.lax.dot_general(x, y, dims, precision=precision(x.dtype), preferred_element_type=wide)


# --- depth ----------------------------------------------------------------------------------------------------------


def constrain(x: Array) -> Array:
    """Keep a batch split over the mesh's batch axes, and whole in every other dimension; nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
    if mesh.empty or not axes or x.shape[0] % math.prod(mesh.shape[a] for a in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *(None,) * (x.ndim - 1)))


def group_name(first: int, count: int) -> str:
    """A group of stacked layers is named by the layers that it holds.

    >>> group_name(28, 4)
    'layers_28-31'
    """
    return f"layers_{first}-{first + count - 1}"


def plain_names(path: str) -> list[str]:
    """The plain names that a path stands for, one per layer.

    >>> plain_names("layers_2-3/mlp/up_proj/weight")
    ['layers/2/mlp/up_proj/weight', 'layers/3/mlp/up_proj/weight']
    """
    if (m := _GROUP.match(path)) is None:
        return [path]
    return [f"layers/{i}/{path[m.end() :]}" for i in range(int(m[1]), int(m[2]) + 1)]


def stack(block: type[nn.Module], groups: Sequence[int], remat: str, *args: Any) -> list[tuple[str, nn.Module]]:
    """Layers in consecutive groups, each scanned over its stacked weights and rematerialised by a named policy.

    Call in a module's compact method. By name, each gives `module(x, cache, *rest) -> (x, cache)`, where the leaves
    of `cache` carry the layer axis and `rest` is the same for every layer.
    """
    if (policy := REMAT_POLICIES[remat]) is not None:
        block = nn.remat(block, prevent_cse=False, policy=policy)
    scanned, first = [], 0
    for count in groups:
        module = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=count,
            unroll=min(count, _UNROLL) if jax.default_backend() == "cpu" else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        name = group_name(first, count)
        scanned.append((name, module(*args, name=name)))
        first += count
    return scanned
