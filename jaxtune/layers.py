"""Building blocks of a decoder. A weight is declared once, where it is used.

`Linear("btd,dnh->btnh", "embed -> heads head", dims)` says a weight's shape, its logical axes for sharding, its fan-in,
how adapters factor it and how Hugging Face stores it: all are derived from the `Weight` that it leaves in the tree.

Dimensions: B batch, T time, D embed, N query heads, K key/value heads, H head dim, R rotated part of a head, L layers,
V vocab.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from jaxtune.attention import NEVER
from jaxtune.weights import Array, einsum, is_node, platform, take

BATCH_AXES = ("data", "fsdp", "expert")  # mesh axes over which a batch is split
LAYER_INPUT = "layer_input"  # what remat "offload" keeps on the host
REMAT_POLICIES: Mapping[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
_GROUP = re.compile(r"^layers_(\d+)-(\d+)/")
_UNROLL = 8  # layers that a loop on CPU takes at once: XLA there copies what a loop carries


class Weight(nn.LogicallyPartitioned):
    """One parameter and what is known of it: `names` are its logical axes.

    In front stand the axes over which matrices are only piled up: "layers", which `stack` adds, and "expert". Of those
    that follow, the first `n_in` are contracted.
    """

    n_in: int = flax.struct.field(default=0, pytree_node=False)

    @property
    def stacked(self) -> bool:
        return self.names[0] == "layers"

    @property
    def lead(self) -> int:
        """How many axes stand in front of the matrix."""
        return next(i for i, n in enumerate((*self.names, None)) if n not in ("layers", "expert"))

    def like(self, value: Any) -> "Weight":
        return self.replace(value=value)


def is_weight(x: object) -> bool:
    """Whether this is a `Weight` (as a leaf, for `jax.tree` functions)."""
    return isinstance(x, Weight)


def unbox(tree: Any) -> Any:
    """The values of a tree of `Weight`s."""
    return jax.tree.map(lambda w: w.value if is_weight(w) else w, tree, is_leaf=is_weight)


def parameter(module: nn.Module, name: str, make: Callable[[Array, tuple[int, ...]], Weight], shape: Any) -> Any:
    """A module's weight: an array, or the node that stands in its place.

    Raises:
      ValueError: the node stands for an array of another shape.
    """
    stored: Any = module.get_variable("params", name) if module.has_variable("params", name) else None
    if is_node(stored):
        if stored.shape != shape:
            raise ValueError(f"{module.name}/{name}: {type(stored).__name__} of {stored.shape}, {shape} was expected")
        return stored
    return module.param(name, make, shape)


def show(module: nn.Module, name: str, value: Callable[[], Array]) -> None:
    """Let those who ask look at a value inside of the model, see `models.inside`; else it is never computed."""
    if module.is_mutable_collection("intermediates"):
        module.sow("intermediates", name, value(), reduce_fn=lambda _, new: new, init_fn=lambda: None)


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
        w = parameter(self, "weight", lambda *args: Weight(init(*args), tuple(into + out), n_in=n_in), shape)
        show(self, "x", lambda: x.reshape(*x.shape[: x.ndim - n_in], -1))
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
        self.weight = parameter(
            self, "weight", lambda k, s: Weight(jax.random.normal(k, s) * 0.02, ("vocab", "embed"), n_in=1), shape
        )

    def __call__(self, ids_BT: Array) -> Array:
        return take(self.weight, ids_BT, self.dtype)


class Head(nn.Module):
    """The output matrix, and its bias if it has one, handed to the objective as values: full logits are never made
    here."""

    dims: Mapping[str, int]
    to: str = "vocab"
    use_bias: bool = False

    @nn.compact
    def __call__(self) -> Any:
        shape = self.dims["embed"], self.dims[self.to]
        init = nn.initializers.lecun_normal()
        w = parameter(self, "weight", lambda k, s: Weight(init(k, s), ("embed", self.to), n_in=1), shape)
        if not self.use_bias:
            return w
        bias: Any = self.param("bias", lambda _, s: Weight(jnp.zeros(s), (self.to,)), shape[1:])
        return w, bias


@dataclasses.dataclass(frozen=True)
class Readout:
    """How hidden states become logits."""

    eqn: str
    scale: float = 1.0
    softcap: float = 0.0  # logits stay within ± this; 0 is no bound
    vocab: int = 0  # rows of the head beyond it are padding and never likely; 0 is none

    def __call__(self, hidden_BTD: Array, head: Any) -> Array:
        """Logits in float32, `[B, T, V]`. `head` is a matrix, or one and a bias."""
        weight, bias = head if isinstance(head, tuple) else (head, None)
        logits_BTV = einsum(self.eqn, hidden_BTD, weight).astype(jnp.float32)
        if bias is not None:
            logits_BTV = logits_BTV + bias.astype(jnp.float32)
        if self.scale != 1.0:
            logits_BTV = logits_BTV * self.scale
        if self.softcap:
            logits_BTV = jnp.tanh(logits_BTV / self.softcap) * self.softcap
        if self.vocab and self.vocab < logits_BTV.shape[-1]:
            logits_BTV = jnp.where(jnp.arange(logits_BTV.shape[-1]) < self.vocab, logits_BTV, NEVER)
        return logits_BTV


@flax.struct.dataclass
class Outputs:
    """What a model gives: last hidden states, and the head that would turn them into logits."""

    hidden_BTD: Array
    head: Any
    readout: Readout = flax.struct.field(pytree_node=False)
    balance: Any = None  # the load-balancing loss of a mixture of experts, float32; None where there is none

    def logits(self, hidden_BTD: Array | None = None) -> Array:
        """Logits in float32, of the given hidden states or of all: `[B, T, V]`."""
        return self.readout(self.hidden_BTD if hidden_BTD is None else hidden_BTD, self.head)


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich, 2019) over the axes named, computed in float32 and rounded once."""

    eps: float
    axes: str = "embed"
    around_one: bool = False  # Gemma stores what is added to a scale of 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        names = tuple(self.axes.split())
        over = tuple(range(-len(names), 0))
        start = jnp.zeros if self.around_one else jnp.ones
        scale: Any = self.param("weight", lambda _, s: Weight(start(s), names), x.shape[-len(names) :])
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, over, keepdims=True) + self.eps)
        return (y * (scale.astype(jnp.float32) + float(self.around_one))).astype(x.dtype)


# --- positions ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., 2021) and its scalings, fields named as in Hugging Face's config."""

    dim: int  # R, how many of a head's dimensions turn
    theta: float = 10000.0
    kind: str = "default"  # default · linear · dynamic · yarn · llama3 · longrope
    factor: float = 1.0
    context: int = 2048  # that the frequencies were trained for; scalings start from there
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def rope_tables(ropes: Sequence[Rope | None], position_BT: Array, segment_BT: Array) -> tuple[Array, Array]:
    """Cosines and sines for the given positions, float32, one table for each rope: `[ropes, B, T, 1, R/2]`.

    None stands for no rotation. Scalings that depend on the length (dynamic, longrope) go by that of the token's own
    segment, so what is packed into a row turns as it would alone.
    """
    dim = next(r.dim for r in ropes if r is not None)
    length_BT11 = segment_length(segment_BT, position_BT)[:, :, None, None]
    tables = []
    for rope in ropes:
        if rope is None:
            tables.append((jnp.ones((*position_BT.shape, 1, dim // 2)), jnp.zeros((*position_BT.shape, 1, dim // 2))))
            continue
        freq = _frequencies(rope, length_BT11)
        angle_BT1R = position_BT[:, :, None, None].astype(jnp.float32) * freq
        tables.append((jnp.cos(angle_BT1R) * rope.attention_factor, jnp.sin(angle_BT1R) * rope.attention_factor))
    cos, sin = zip(*tables, strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def segment_length(segment_BT: Array, position_BT: Array) -> Array:
    """How long the segment of each token is: the last position in it, and one.

    >>> segment_length(jnp.array([[1, 1, 1, 2, 2]]), jnp.array([[0, 1, 2, 0, 1]])).tolist()
    [[3, 3, 3, 2, 2]]
    """
    T = segment_BT.shape[1]
    ends_BT = (segment_BT != jnp.roll(segment_BT, -1, 1)).at[:, -1].set(True)
    last_BT = jax.lax.cummin(jnp.where(ends_BT, jnp.arange(T), T - 1), axis=1, reverse=True)
    return jnp.take_along_axis(position_BT, last_BT, 1) + 1


def _frequencies(rope: Rope, length_BT11: Array) -> Array:
    """Radians per position, `[R/2]`, or `[B, T, 1, R/2]` where they depend on the length."""
    dim = rope.dim
    if rope.kind == "dynamic":  # the base grows with the length (NTK-aware)
        grown_BT11 = jnp.maximum(length_BT11, rope.context).astype(jnp.float32)
        growth_BT11 = rope.factor * grown_BT11 / rope.context - (rope.factor - 1)
        theta_BT11 = rope.theta * growth_BT11 ** (dim / (dim - 2))
        return 1.0 / theta_BT11 ** (jnp.arange(0, dim, 2) / dim)
    if rope.kind == "longrope":  # Ding et al., 2024, https://arxiv.org/abs/2402.13753
        base_R = 1.0 / rope.theta ** (np.arange(0, dim, 2) / dim)
        short_R, long_R = (
            jnp.asarray(base_R / np.array(f), jnp.float32) for f in (rope.short_factor, rope.long_factor)
        )
        return jnp.where(length_BT11 > rope.context, long_R, short_R)
    return jnp.asarray(_fixed_frequencies(rope), jnp.float32)


def _fixed_frequencies(rope: Rope) -> np.ndarray:
    dim = rope.dim
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


def rotate(x_BTNH: Array, cos_BT1R: Array, sin_BT1R: Array) -> Array:
    """Turn the halves of the first R dimensions of each head by a table of `rope_tables`; the others stay."""
    R = 2 * cos_BT1R.shape[-1]
    a, b = jnp.split(x_BTNH[..., :R].astype(jnp.float32), 2, -1)
    turned = [a * cos_BT1R - b * sin_BT1R, b * cos_BT1R + a * sin_BT1R]
    rest = [x_BTNH[..., R:]] if x_BTNH.shape[-1] > R else []
    return jnp.concatenate([t.astype(x_BTNH.dtype) for t in turned] + rest, -1)


# --- depth ----------------------------------------------------------------------------------------------------------


def constrain(x: Array, lead: int = 0) -> Array:
    """Keep a batch split over the mesh's batch axes, its time over `context`, and whole in every other dimension.

    What does not divide is left alone, as is all without a mesh. Before the batch axis are `lead` others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
    if mesh.empty or not axes or x.shape[lead] % math.prod(mesh.shape[a] for a in axes):
        return x
    spec = PartitionSpec(*(None,) * lead, axes, time_axis(x.shape[lead + 1]))
    return jax.lax.with_sharding_constraint(x, spec)


def time_axis(T: int) -> str | None:
    """The mesh axis over which rows of a length are split, None where they are not."""
    parts = jax.sharding.get_abstract_mesh().shape.get("context", 1)
    return "context" if parts > 1 and T % parts == 0 else None


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

    Call in a module's compact method. By name, each gives `module(x, own, rest) -> (x, out)`, where the leaves of `own`
    and `out` carry the layer axis and `rest` is the same for every layer.
    """
    if (policy := REMAT_POLICIES[remat]) is not None:
        block = nn.remat(block, prevent_cse=False, policy=policy)
    scanned, first = [], 0
    for count in groups:
        module = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=count,
            unroll=min(count, _UNROLL) if platform() == "cpu" else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        name = group_name(first, count)
        scanned.append((name, module(*args, name=name)))
        first += count
    return scanned
