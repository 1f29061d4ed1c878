"""Losses of logits over a large vocabulary in chunks, so that full logits are never held: cross-entropy, and others.

The gradient of a chunk is taken while its logits are there (as Liger's fused linear cross-entropy does, Hsu et al.,
2024, https://arxiv.org/abs/2410.10989), so nothing is computed twice, and the gradient of a frozen head not at all.

Where weights are split over devices, the head is gathered once for all chunks, and its gradient is added up on each
device for itself until the last: else each chunk would send the head to all devices and its gradient back.

Dimensions: B batch, T time, D embed, V vocab, C chunks, c time within a chunk, P parts of the time on
devices of their own, t time of a part, S shards of batch and time, b batch of a shard.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

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


Terms = Callable[[Array, tuple[Array, ...], Any, bool], tuple[Array, ...]]


def cross_entropy(outputs: Outputs, target_BT: Array, weight_BT: Array) -> tuple[Array, Array]:
    """Sum over tokens of `weight · -log p(target)`, and the weighted number of right first guesses; both float32.

    Under differentiation a tie counts as right: an exact argmax would cost a tenth of a step on CPU.
    """
    loss_sum, hits = chunked(outputs, _cross_entropy, (target_BT, weight_BT))
    return loss_sum, hits


def _cross_entropy(logits_BcV: Array, columns: tuple[Array, ...], rest: Any, exact: bool) -> tuple[Array, Array]:
    target_Bc, weight_Bc = columns
    return (weight_Bc * minus_log(logits_BcV, target_Bc)).sum(), hits(logits_BcV, target_Bc, weight_Bc, exact)


def chunked(
    outputs: Outputs, terms: Terms, columns: tuple[Array, ...], rest: Any = (), times: int = 1
) -> tuple[Array, ...]:
    """Sums over tokens of what `terms` makes of logits, a chunk of the time after the other.

    Args:
      outputs: of the model.
      terms: from a chunk's logits `[B, c, V]`, its part of `columns`, `rest`, and whether to be exact (False under
        differentiation) to float32 scalars, which are added up over chunks. The first is a loss: it is differentiated
        with respect to `outputs`, the others are not. A module's function, or a value that can be hashed.
      columns: arrays of `[B, T, …]`, not differentiated.
      rest: arrays that `terms` needs whole for each chunk, such as another model's head; not differentiated.
      times: how many logits `terms` holds for each of the model's.
    """
    C = _chunks(outputs, columns[0].shape[:2], times)
    hidden_CBcD, split = _split(outputs.hidden_BTD, C), tuple(_split(x, C) for x in columns)
    head = gathered(outputs.head, outputs.readout.eqn)
    return _sums(terms, outputs.readout, hidden_CBcD, head, split, rest)


def gathered(head: Any, eqn: str) -> Any:
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


def _chunks(outputs: Outputs, shape: tuple[int, ...], times: int) -> int:
    """How many pieces the time axis goes in, for a chunk's logits to stay within LOGITS_BYTES on each device."""
    vocab = jax.eval_shape(lambda o: o.logits(o.hidden_BTD[:1, :1]), outputs).shape[-1]
    mesh = jax.sharding.get_abstract_mesh()
    per_device = (
        times * shape[0] * shape[1] * vocab * 4 / (1 if mesh.empty else mesh.size // mesh.shape.get("stage", 1))
    )
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


@jax.custom_vjp
def minus_log(logits_BcV: Array, target_Bc: Array) -> Array:
    """`-log p(target)`, `[B, c]`; its gradient is made without a scatter."""
    return _minus_log(logits_BcV, target_Bc)[0]


def _minus_log(logits_BcV: Array, target_Bc: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    top_Bc = logits_BcV.max(-1)
    lse_Bc = top_Bc + jnp.log(jnp.exp(logits_BcV - top_Bc[..., None]).sum(-1))
    right_Bc = jnp.take_along_axis(logits_BcV, target_Bc[..., None], -1)[..., 0]
    return lse_Bc - right_Bc, (logits_BcV, lse_Bc, target_Bc)


def _minus_log_backward(saved: tuple[Array, Array, Array], d_Bc: Array) -> tuple[Array, None]:
    logits_BcV, lse_Bc, target_Bc = saved
    p_BcV = jnp.exp(logits_BcV - lse_Bc[..., None])
    return d_Bc[..., None] * (p_BcV - (jnp.arange(logits_BcV.shape[-1]) == target_Bc[..., None])), None


minus_log.defvjp(_minus_log, _minus_log_backward)


def hits(logits_BcV: Array, target_Bc: Array, weight_Bc: Array, exact: bool) -> Array:
    """The weighted number of targets that are guessed first; a tie is one where that need not be exact."""
    if exact:
        return (weight_Bc * (logits_BcV.argmax(-1) == target_Bc)).sum()
    right_Bc = jnp.take_along_axis(logits_BcV, target_Bc[..., None], -1)[..., 0]
    return (weight_Bc * (right_Bc >= logits_BcV.max(-1))).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(
    terms: Terms, readout: Readout, hidden_CBcD: Array, head: Any, columns_CBc: tuple[Array, ...], rest: Any
) -> tuple[Array, ...]:
    def one(hidden_BcD: Array, columns: tuple[Array, ...]) -> tuple[Array, ...]:
        return terms(readout(hidden_BcD, head), columns, rest, True)

    def body(sums: tuple[Array, ...], chunk: tuple) -> tuple[tuple[Array, ...], None]:
        return jax.tree.map(jnp.add, sums, one(*chunk)), None

    chunks = hidden_CBcD, columns_CBc
    return jax.lax.scan(body, _zeros(one, chunks), chunks)[0]


def _zeros(one: Callable[..., Any], chunks: Any) -> Any:
    """What is added to first: zeros of the form of what `one` gives of a chunk."""
    shapes = jax.eval_shape(lambda *chunk: one(*chunk), *jax.tree.map(lambda x: x[0], chunks))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _forward(
    terms: Terms, readout: Readout, hidden_CBcD: Any, head: Any, columns_CBc: Any, rest: Any
) -> tuple[tuple[Array, ...], Any]:
    """Sums, and the gradients of the loss with respect to the hidden states and the trained leaves of the head."""
    leaves, tree = jax.tree.flatten(head, is_leaf=lambda x: hasattr(x, "perturbed"))
    trained = [x.perturbed and jnp.issubdtype(x.value.dtype, jnp.floating) for x in leaves]
    values = [x.value for x in leaves]
    some = [v for t, v in zip(trained, values, strict=True) if t]
    columns_CBc, rest = jax.tree.map(lambda x: x.value, (columns_CBc, rest), is_leaf=lambda x: hasattr(x, "perturbed"))

    def logits_of(hidden_BcD: Array, some: list[Array]) -> Array:
        left = iter(some)
        mixed = [next(left) if t else v for t, v in zip(trained, values, strict=True)]
        return readout(hidden_BcD, jax.tree.unflatten(tree, mixed))

    def one(hidden_BcD: Array, columns: tuple[Array, ...]) -> tuple[tuple[Array, ...], list[Array], Array]:
        def split(logits_BcV: Array) -> tuple[Array, tuple[Array, ...]]:
            loss, *others = terms(logits_BcV, columns, rest, False)
            return loss, tuple(others)

        logits_BcV, pullback = jax.vjp(logits_of, hidden_BcD, some)
        (loss, others), d_logits_BcV = jax.value_and_grad(split, has_aux=True)(logits_BcV)
        d_hidden_BcD, d_some = pullback(d_logits_BcV)
        return (loss, *others), d_some, d_hidden_BcD

    shape = hidden_CBcD.value.shape[1:3]
    R, P = _shards(shape)
    apart = R * P > 1 and bool(some)

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, Array]:
        sums, grads = carry
        if apart:
            added, d_some, d_hidden_SbtD = jax.vmap(one)(*jax.tree.map(_by_shard, chunk))
            added, d_hidden_BcD = jax.tree.map(jnp.sum, added), _whole(d_hidden_SbtD, shape)
            grads = [_spread(g + d.astype(jnp.float32), P) for g, d in zip(grads, d_some, strict=True)]
        else:
            added, d_some, d_hidden_BcD = one(*chunk)
            grads = [g + d.astype(jnp.float32) for g, d in zip(grads, d_some, strict=True)]
        return (jax.tree.map(jnp.add, sums, added), grads), d_hidden_BcD

    chunks = hidden_CBcD.value, columns_CBc
    zeros = [jnp.zeros((R * P, *v.shape) if apart else v.shape, jnp.float32) for v in some]
    start = _zeros(lambda *chunk: one(*chunk)[0], chunks), [_spread(z, P) for z in zeros] if apart else zeros
    (sums, grads), d_hidden_CBcD = jax.lax.scan(body, start, chunks)
    if apart:
        grads = [g.sum(0) for g in grads]
    left = iter(grads)
    d_head = [next(left).astype(v.dtype) if t else None for t, v in zip(trained, values, strict=True)]
    return sums, (d_hidden_CBcD, jax.tree.unflatten(tree, d_head))


def _backward(
    terms: Terms, readout: Readout, saved: tuple[Array, Any], cotangents: tuple
) -> tuple[Array, Any, None, None]:
    scale = cotangents[0]  # of the loss; the others have none
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        scale = jnp.float32(0)
    d_hidden_CBcD, d_head = jax.tree.map(lambda d: (scale * d).astype(d.dtype), saved)
    return d_hidden_CBcD, d_head, None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)
