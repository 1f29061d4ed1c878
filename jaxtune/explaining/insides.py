"""What happens on the way through the layers: the logit lens, where heads look, roll-out, and activations to compare.

Dimensions: B batch (1), T tokens, S tokens that are looked at, D embed, L layers, N heads, V outputs, K of them shown.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.explaining.questions import Question
from jaxtune.explaining.reader import LENGTH_STEP, Reader
from jaxtune.models import inside
from jaxtune.models.decoder import DecoderConfig
from jaxtune.weights import Array

_SHOWN = 3  # outputs named in each place of the lens


class Lens(NamedTuple):
    """What the last norm and the head would say after each layer (nostalgebraist, 2020)."""

    top_LTK: np.ndarray  # the likeliest outputs, int32
    p_LTK: np.ndarray
    target_L: np.ndarray  # at the place that is asked: probability of the answer's first token, or of the label
    rank_L: np.ndarray  # how many outputs are likelier there


class Insides(NamedTuple):
    """What was seen of one text."""

    lens: Lens
    hidden_LTD: np.ndarray  # float32
    p_LNTS: np.ndarray | None  # attention; None behind a prefix
    rollout_LTS: np.ndarray | None


class Activations(NamedTuple):
    """What a model makes of a text on the way: to be compared with another's."""

    hidden_LTD: np.ndarray  # float32
    p_TV: np.ndarray  # of the next token, float32; or the outputs of a head


def see(reader: Reader, q: Question) -> Insides:
    """Look inside while a model reads a question."""
    n = q.prompt.stop
    a = reader.asked(q._replace(ids=q.ids[:n], at=[n - 1], target=q.target[:1]))
    decoder = reader.model.c
    with jax.set_mesh(reader.tuned.mesh):
        found = jax.device_get(_seen(decoder, reader.tuned.weights, a.ids_T, a.n))
    hidden_LTD, p_LNTS, which_LTK, top_LTK, p_LV = found
    target = q.target[0]
    rank_L = (p_LV > p_LV[:, target, None]).sum(1)
    own = slice(q.prompt.start, n)
    if p_LNTS is not None:
        p_LNTS = p_LNTS[:, :, :n, :n]
    return Insides(
        Lens(which_LTK[:, own], top_LTK[:, own], p_LV[:, target], rank_L),
        hidden_LTD[:, own],
        p_LNTS,
        None if p_LNTS is None else rollout(p_LNTS),
    )


@functools.partial(jax.jit, static_argnames="decoder")
def _seen(decoder: DecoderConfig, weights: Any, ids_T: Array, n: Array) -> Any:
    _, seen = inside.look(decoder, weights, _batch(ids_T, n))
    p_LNTS = None if seen.p_LBNTS is None else seen.p_LBNTS[:, 0]

    def after(hidden_BTD: Array) -> Any:
        p_TV = probabilities(decoder, inside.Layers(decoder).last(weights, hidden_BTD)[0])
        top, which = jax.lax.top_k(p_TV, min(_SHOWN, p_TV.shape[-1]))
        return which, top, p_TV[n - 1]

    which_LTK, top_LTK, last_LV = jax.lax.map(after, seen.hidden_LBTD)
    return seen.hidden_LBTD[:, 0].astype(jnp.float32), p_LNTS, which_LTK, top_LTK, last_LV


def activations(reader: Reader, ids: Sequence[int]) -> Activations:
    """What a model makes of a text's tokens; its own virtual ones are put before them."""
    virtual = list(reader.tuned.blueprint.virtual_ids)
    whole = np.pad(np.array([*virtual, *ids], np.int32), (0, -(len(virtual) + len(ids)) % LENGTH_STEP))
    own = slice(len(virtual), len(virtual) + len(ids))
    with jax.set_mesh(reader.tuned.mesh):
        found = jax.device_get(_active(reader.model.c, reader.tuned.weights, whole, own.stop))
    return Activations(found[0][:, own], found[1][own])


@functools.partial(jax.jit, static_argnames="decoder")
def _active(decoder: DecoderConfig, weights: Any, ids_T: Array, n: Array) -> Any:
    outputs, seen = inside.look(decoder, weights, _batch(ids_T, n))
    return seen.hidden_LBTD[:, 0].astype(jnp.float32), probabilities(decoder, outputs.logits()[0])


def _batch(ids_T: Array, n: Array) -> dict[str, Array]:
    position_BT = jnp.arange(ids_T.shape[0])[None]
    return {"ids_BT": ids_T[None], "segment_BT": (position_BT < n).astype(jnp.int32), "position_BT": position_BT}


def probabilities(decoder: DecoderConfig, logits: Array) -> Array:
    """Of each output; of a regression's head the number itself."""
    if decoder.task is not None and decoder.task.kind == "regression":
        return logits
    if decoder.task is not None and decoder.task.multi:
        return jax.nn.sigmoid(logits)
    return jax.nn.softmax(logits)


def rollout(p_LNTS: np.ndarray) -> np.ndarray:
    """Attention roll-out (Abnar & Zuidema, 2020, https://arxiv.org/abs/2005.00928): `[L, T, S]`.

    How much of each place comes from each token after each layer, where heads count alike and half of a layer's output
    is what went in.

    >>> rollout(np.full((2, 1, 2, 2), 0.5)).round(3).tolist()
    [[[0.75, 0.25], [0.25, 0.75]], [[0.625, 0.375], [0.375, 0.625]]]
    """
    T = p_LNTS.shape[-1]
    out, so_far = [], np.eye(T)
    for p_NTS in p_LNTS.astype(np.float64):
        mixed = (p_NTS.mean(0) + np.eye(T)) / 2
        so_far = mixed / mixed.sum(1, keepdims=True) @ so_far
        out.append(so_far)
    return np.stack(out)
