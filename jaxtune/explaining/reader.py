"""A model as functions of the embeddings that it reads: the value of an answer, and its slope along a path.

Dimensions: B rows that are read together, T tokens, C tokens of the answer, D embed, V outputs.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune import sharding
from jaxtune.errors import UserError
from jaxtune.explaining.questions import Question
from jaxtune.models.decoder import Decoder
from jaxtune.nodes.given import given, looked_up
from jaxtune.tuned import Tuned
from jaxtune.weights import Array

LENGTH_STEP = 16  # lengths of texts are rounded up to this, so that few shapes are compiled
_ANSWER = 4  # and those of answers to this
VALUES = ("logprob", "logit")


class Asked(NamedTuple):
    """A question as arrays, rounded up."""

    ids_T: np.ndarray
    n: int  # tokens that are there
    at_C: np.ndarray
    target_C: np.ndarray
    weight_C: np.ndarray  # 0 where there is no token


class Reader:
    """A model that is asked with embeddings instead of tokens.

    Args:
      tuned: the model.
      value: of what an answer's value is made: "logprob", natural logarithms of probabilities, or "logit". Those of an
        answer's tokens are added up. Of a regression it is the number itself.
      rows: how many texts are read together.
    """

    def __init__(self, tuned: Tuned, value: str = "logprob", rows: int = 8) -> None:
        if value not in VALUES:
            raise UserError(f"value {value!r} is not known; allowed: {', '.join(VALUES)}")
        c, head = tuned.blueprint.decoder, tuned.blueprint.decoder.task
        self.tuned, self.rows = tuned, rows + -rows % sharding.batch_shards(tuned.mesh)
        self.model = Decoder(dataclasses.replace(c, attention="xla", remat="none"))
        single = head is not None and head.kind == "regression"
        self.how = "logit" if single else "each" if head and head.multi and value == "logprob" else value

    def asked(self, q: Question) -> Asked:
        """A question as arrays."""
        T, C = (-(-n // step) * step for n, step in ((len(q.ids), LENGTH_STEP), (len(q.at), _ANSWER)))
        C = len(q.at) if len(q.at) == 1 else C
        pads = np.array(q.ids), np.array(q.at), np.array(q.target), np.ones(len(q.at), np.float32)
        ids_T, at_C, target_C, weight_C = (np.pad(x, (0, n - len(x))) for x, n in zip(pads, (T, C, C, C), strict=True))
        return Asked(ids_T.astype(np.int32), len(q.ids), at_C, target_C, weight_C)

    def embedded(self, ids_T: np.ndarray) -> np.ndarray:
        """The embeddings of tokens, float32 `[T, D]`."""
        with jax.set_mesh(self.tuned.mesh):
            return np.asarray(_embed(self.tuned.weights, ids_T))

    def values(self, a: Asked, x_NTD: Iterator[np.ndarray], count: int) -> np.ndarray:
        """The answer's value at each of `count` embeddings `[T, D]`, float64 `[N]`."""
        out: list[np.ndarray] = []
        for first in range(0, count, self.rows):
            n = min(self.rows, count - first)
            x_BTD = np.stack([next(x_NTD) for _ in range(n)])
            x_BTD = np.concatenate([x_BTD, np.repeat(x_BTD[-1:], self.rows - n, 0)])
            with jax.set_mesh(self.tuned.mesh):
                value_B = _values(self.model, self.how, self.tuned.weights, x_BTD, a)
            out.append(np.asarray(value_B, np.float64)[:n])
        return np.concatenate(out)

    def slopes(
        self, a: Asked, x_TD: np.ndarray, base_TD: np.ndarray, alpha_N: np.ndarray, weight_N: np.ndarray
    ) -> np.ndarray:
        """Σ over N of weight · (x − base) · ∂value/∂x at base + alpha · (x − base), summed over D: float64 `[T]`."""
        out_T = np.zeros(len(x_TD))
        for first in range(0, len(alpha_N), self.rows):
            part = slice(first, first + self.rows)
            lacking = (0, self.rows - len(alpha_N[part]))
            alpha_B, weight_B = (np.pad(x[part], lacking).astype(np.float32) for x in (alpha_N, weight_N))
            with jax.set_mesh(self.tuned.mesh):
                out_T += np.asarray(
                    _slopes(self.model, self.how, self.tuned.weights, x_TD, base_TD, alpha_B, weight_B, a), np.float64
                )
        return out_T

    def outputs(self, q: Question) -> np.ndarray:
        """Of each output its probability (of a regression, the number) at the question's first place: `[V]`."""
        a = self.asked(q)
        with jax.set_mesh(self.tuned.mesh):
            logits_V = _logits(self.model, self.tuned.weights, a)[0, 0]
            if (head := self.tuned.blueprint.decoder.task) is None:
                return np.asarray(jax.nn.softmax(logits_V))
            by_kind = jax.nn.sigmoid if head.multi else (lambda x: x) if head.kind == "regression" else jax.nn.softmax
            return np.asarray(by_kind(logits_V))


def value_of(model: Decoder, how: str, weights: Any, a: Asked, x_BTD: Array | None = None) -> Array:
    """The answer's value, float32 `[B]`, for rows of embeddings; of the tokens themselves where none are given."""
    logits_BCV = _read(model, weights, a, x_BTD)
    if how == "logprob":
        logits_BCV = jax.nn.log_softmax(logits_BCV)
    elif how == "each":
        logits_BCV = jax.nn.log_sigmoid(logits_BCV)
    target_BC1 = jnp.broadcast_to(a.target_C, logits_BCV.shape[:2])[..., None]
    return (jnp.take_along_axis(logits_BCV, target_BC1, 2)[..., 0] * a.weight_C).sum(1)


def _read(model: Decoder, weights: Any, a: Asked, x_BTD: Array | None) -> Array:
    """Logits at the places that are looked at, float32 `[B, C, V]`."""
    B, T = 1 if x_BTD is None else x_BTD.shape[0], a.ids_T.shape[0]
    ids_BT = jnp.broadcast_to(a.ids_T, (B, T))
    position_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    segment_BT = (position_BT < a.n).astype(jnp.int32)
    weights = weights if x_BTD is None else given(weights, x_BTD)
    outputs = model.apply({"params": weights}, ids_BT, segment_BT, position_BT)[0]
    return outputs.logits(outputs.hidden_BTD[:, a.at_C])


@functools.partial(jax.jit, static_argnames=("model", "how"))
def _values(model: Decoder, how: str, weights: Any, x_BTD: Array, a: Asked) -> Array:
    return value_of(model, how, weights, a, x_BTD)


@functools.partial(jax.jit, static_argnames="model")
def _logits(model: Decoder, weights: Any, a: Asked) -> Array:
    return _read(model, weights, a, None)


@jax.jit
def _embed(weights: Any, ids_T: Array) -> Array:
    return looked_up(weights, ids_T)


@functools.partial(jax.jit, static_argnames=("model", "how"))
def _slopes(
    model: Decoder, how: str, weights: Any, x_TD: Array, base_TD: Array, alpha_B: Array, weight_B: Array, a: Asked
) -> Array:
    step_TD = x_TD - base_TD

    def total(x_BTD: Array) -> Array:
        return value_of(model, how, weights, a, x_BTD).sum()

    d_BTD = jax.grad(total)(base_TD + alpha_B[:, None, None] * step_TD)
    return jnp.einsum("b,btd,td->t", weight_B, d_BTD.astype(jnp.float32), step_TD, precision="highest")
