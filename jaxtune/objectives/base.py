"""Cross-entropy over a large vocabulary in chunks, so that full logits are never held.

The gradient of a chunk is taken while its logits are there (as Liger's fused linear cross-entropy does, Hsu et al.,
2024, https://arxiv.org/abs/2410.10989), so nothing is computed twice, and the gradient of a frozen head not at all.

Where weights are split over devices, the head is gathered once for all chunks, and its gradient is added up on each
device for itself until the last: else each chunk would send the head to all devices and its gradient back.

Dimensions: B batch, T time, D embed, V vocab, C chunks, c time within a chunk, P parts of the time on
devices of their own, t time of a part, S shards of batch and time, b batch of a shard.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxtune.layers import BATCH_AXES, Outputs, Readout, constrain, time_axis
from jaxtune.weights import Array, parts, platform

LOGITS_BYTES = {"cpu": 2**26, "gpu": 2**28, "tpu": 2**28}  # of one chunk's float32 logits, on each device


def next_token(batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """Targets and their weights: each token predicts the next one of its own segment, where the loss mask has that one.

    Returns: `target_BT` int32, 0 where nothing is predicted, and `weight_BT` float32.
    """
    same_BT = batch["segment_BT"] == jnp.roll(batch["segment_BT"], -1, 1)
    wanted_BT = same_BT & (jnp.roll(batch["loss_mask_BT"], -1, 1) > 0) & (batch["segment_BT"] > 0)
    wanted_BT = wanted_BT.at[:, -1].set(False)
    return jnp.where(wanted_BT, jnp.roll(batch["ids_BT"], -1, 1), 0), wanted_BT.astype(jnp.float32)


def cross_entropy(outputs: Outputs, target_BT: Array, weight_BT: Array) -> tuple[Array, Array]:
    """Sum over tokens of `weight · -log p(target)`, and the weighted number of right first guesses; both float32.

    Under differentiation a tie counts as right: an exact argmax would cost a tenth of a step on CPU.
    """
    C = _chunks(outputs, target_BT.shape)
    hidden_CBcD, target_CBc, weight_CBc = (_split(x, C) for x in (outputs.hidden_BTD, target_BT, weight_BT))
    head = _gathered(outputs.head, outputs.readout.eqn)
    return _sums(outputs.readout, hidden_CBcD, head, target_CBc, weight_CBc)


def _gathered(head: Any, eqn: str) -> Any:
    """The head's matrix, whole on each device but for the vocabulary's split over `tensor`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return head
    matrix, split = (head[0] if isinstance(head, tuple) else head), mesh.shape.get("tensor", 1)
    vocab = parts(eqn).w.index("v") if "v" in parts(eqn).w else None
    spec = [None if i != vocab or split == 1 or n % split else "tensor" for i, n in enumerate(matrix.shape)]

    def whole(x: Array) -> Array:
        return x if x.shape != matrix.shape else jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))

    return jax.tree.map(whole, head)


def _chunks(outputs: Outputs, shape: tuple[int, ...]) -> int:
    """How many pieces the time axis goes in, for a chunk's logits to stay within LOGITS_BYTES on each device."""
    vocab = jax.eval_shape(lambda o: o.logits(o.hidden_BTD[:1, :1]), outputs).shape[-1]
    mesh = jax.sharding.get_abstract_mesh()
    per_device = shape[0] * shape[1] * vocab * 4 / (1 if mesh.empty else mesh.size // mesh.shape.get("stage", 1))
    return int(np.clip(-(-per_device // LOGITS_BYTES[platform()]), 1, shape[1] // _parts(shape[1])))


def _parts(T: int) -> int:
    """Over how many devices the time is split."""
    return 1 if (axis := time_axis(T)) is None else jax.sharding.get_abstract_mesh().shape[axis]


def _split(x_BT: Array, chunks: int) -> Array:
    """`[B, T, …]` as `[C, B, c, …]`, batch and time left as they are sharded: a chunk has a piece of each device's part
    of the time. Padded with zeros."""
    B, T = x_BT.shape[:2]
    P, rest = _parts(T), x_BT.shape[2:]
    c = -(-T // (P * chunks))
    x_BPt = x_BT.reshape(B, P, T // P, *rest)
    padded = jnp.pad(x_BPt, [(0, 0), (0, 0), (0, c * chunks - T // P), *[(0, 0)] * len(rest)])
    x_CBc = jnp.moveaxis(padded.reshape(B, P, chunks, c, *rest), 2, 0).reshape(chunks, B, P * c, *rest)
    return x_CBc if P == 1 else constrain(x_CBc, 1)


def _shards(shape: tuple[int, ...]) -> tuple[int, int]:
    """Over how many devices batch and time of a chunk `[B, c]` are split."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = math.prod(mesh.shape.get(a, 1) for a in BATCH_AXES)
    return (rows if shape[0] % rows == 0 else 1), _parts(shape[1])


def _by_shard(x_Bc: Array) -> Array:
    """`[B, c, …]` as `[S, b, t, …]`: what each device has of it."""
    (R, P), (B, c), rest = _shards(x_Bc.shape), x_Bc.shape[:2], x_Bc.shape[2:]
    x_RPbt = jnp.moveaxis(x_Bc.reshape(R, B // R, P, c // P, *rest), 2, 1)
    return _spread(x_RPbt.reshape(R * P, B // R, c // P, *rest), P)


def _whole(x_Sbt: Array, shape: tuple[int, ...]) -> Array:
    """The reverse of `_by_shard`."""
    R, P = _shards(shape)
    b, t, *rest = x_Sbt.shape[1:]
    return jnp.moveaxis(x_Sbt.reshape(R, P, b, t, *rest), 1, 2).reshape(R * b, P * t, *rest)


def _spread(x_S: Array, P: int) -> Array:
    """Each of the shards on its own device."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = (*(a for a in BATCH_AXES if mesh.shape.get(a, 1) > 1), *(["context"] if P > 1 else []))
    return jax.lax.with_sharding_constraint(x_S, PartitionSpec(axes, *[PartitionSpec.UNCONSTRAINED] * (x_S.ndim - 1)))


class _Statistics(NamedTuple):
    """Of one chunk's logits, all `[B, c]`."""

    loss_Bc: Array  # -log p(target)
    hit_Bc: Array  # whether no logit is above the target's
    lse_Bc: Array


def _statistics(logits_BcV: Array, target_Bc: Array) -> _Statistics:
    top_Bc = logits_BcV.max(-1)
    lse_Bc = top_Bc + jnp.log(jnp.exp(logits_BcV - top_Bc[..., None]).sum(-1))
    right_Bc = jnp.take_along_axis(logits_BcV, target_Bc[..., None], -1)[..., 0]
    return _Statistics(lse_Bc - right_Bc, right_Bc >= top_Bc, lse_Bc)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(readout: Readout, hidden_CBcD: Array, head: Any, target_CBc: Array, weight_CBc: Array) -> tuple[Array, Array]:
    def body(sums: tuple[Array, Array], chunk: tuple) -> tuple[tuple[Array, Array], None]:
        hidden_BcD, target_Bc, weight_Bc = chunk
        logits_BcV = readout(hidden_BcD, head)
        hit_Bc = logits_BcV.argmax(-1) == target_Bc
        loss_Bc = _statistics(logits_BcV, target_Bc).loss_Bc
        return (sums[0] + (weight_Bc * loss_Bc).sum(), sums[1] + (weight_Bc * hit_Bc).sum()), None

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), (hidden_CBcD, target_CBc, weight_CBc))[0]


def _forward(readout: Readout, hidden_CBcD: Any, head: Any, target_CBc: Any, weight_CBc: Any) -> tuple[Any, Any]:
    """Sums, and the gradients of the loss with respect to the hidden states and the trained leaves of the head."""
    leaves, tree = jax.tree.flatten(head, is_leaf=lambda x: hasattr(x, "perturbed"))
    trained = [x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating) for x in leaves]
    values = [x.value for x in leaves]
    some = [v for t, v in zip(trained, values, strict=True) if t]

    def logits_of(hidden_BcD: Array, some: list[Array]) -> Array:
        left = iter(some)
        mixed = [next(left) if t else v for t, v in zip(trained, values, strict=True)]
        return readout(hidden_BcD, jax.tree.unflatten(tree, mixed))

    def one(hidden_BcD: Array, target_Bc: Array, weight_Bc: Array) -> tuple[tuple[Array, Array], list[Array], Array]:
        logits_BcV, pullback = jax.vjp(logits_of, hidden_BcD, some)
        s = _statistics(logits_BcV, target_Bc)
        p_BcV = jnp.exp(logits_BcV - s.lse_Bc[..., None])
        is_target_BcV = jnp.arange(logits_BcV.shape[-1]) == target_Bc[..., None]
        d_hidden_BcD, d_some = pullback(weight_Bc[..., None] * (p_BcV - is_target_BcV))
        return ((weight_Bc * s.loss_Bc).sum(), (weight_Bc * s.hit_Bc).sum()), d_some, d_hidden_BcD

    shape = hidden_CBcD.value.shape[1:3]
    R, P = _shards(shape)
    apart = R * P > 1 and bool(some)

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, Array]:
        sums, grads = carry
        if apart:
            added, d_some, d_hidden_SbtD = jax.vmap(one)(*map(_by_shard, chunk))
            added, d_hidden_BcD = jax.tree.map(jnp.sum, added), _whole(d_hidden_SbtD, shape)
            grads = [_spread(g + d.astype(jnp.float32), P) for g, d in zip(grads, d_some, strict=True)]
        else:
            added, d_some, d_hidden_BcD = one(*chunk)
            grads = [g + d.astype(jnp.float32) for g, d in zip(grads, d_some, strict=True)]
        return (jax.tree.map(jnp.add, sums, added), grads), d_hidden_BcD

    zeros = [jnp.zeros((R * P, *v.shape) if apart else v.shape, jnp.float32) for v in some]
    start = (jnp.float32(0), jnp.float32(0)), [_spread(z, P) for z in zeros] if apart else zeros
    (sums, grads), d_hidden_CBcD = jax.lax.scan(body, start, (hidden_CBcD.value, target_CBc.value, weight_CBc.value))
    if apart:
        grads = [g.sum(0) for g in grads]
    left = iter(grads)
    d_head = [next(left).astype(v.dtype) if t else None for t, v in zip(trained, values, strict=True)]
    return sums, (d_hidden_CBcD, jax.tree.unflatten(tree, d_head))


def _backward(readout: Readout, saved: tuple[Array, Any], cotangents: tuple) -> tuple[Array, Any, None, None]:
    scale = cotangents[0]  # of the loss; the hits have none
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        scale = jnp.float32(0)
    d_hidden_CBcD, d_head = jax.tree.map(lambda d: (scale * d).astype(d.dtype), saved)
    return d_hidden_CBcD, d_head, None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)
