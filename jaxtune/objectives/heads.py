"""Objectives of heads: one label or several for a text, a number, a tag for each token, the span of an answer.

A text's last token speaks for it, so texts may share a row.

Dimensions: B batch, T time, S segments of a row, C outputs of the head, D embed.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.layers import Outputs
from jaxtune.objectives.base import cross_entropy
from jaxtune.weights import Array

Result = tuple[Array, Array, dict[str, Any]]
_NEVER = -1e30


def last_logits(outputs: Outputs, batch: Mapping[str, Array]) -> tuple[Array, Array]:
    """The head's outputs at the last token of each segment, float32 `[B, S, C]`, and which segments there are."""
    last_BS = batch["last_BS"]
    at_BS = jnp.maximum(last_BS, 0)
    there_BS = (last_BS >= 0) & (jnp.take_along_axis(batch["segment_BT"], at_BS, 1) > 0)  # rows may be filled up
    hidden_BSD = jnp.take_along_axis(outputs.hidden_BTD, at_BS[..., None], 1)
    return outputs.logits(hidden_BSD), there_BS.astype(jnp.float32)


def classification(outputs: Outputs, batch: Mapping[str, Array]) -> Result:
    """Cross-entropy of `label_BS`, int32; or with `label_BSC`, float32, the binary one of each label, averaged over C.

    Metrics: `hits`, the texts whose label is guessed first, or whose labels are all right.
    """
    logits_BSC, there_BS = last_logits(outputs, batch)
    if (label := batch["label_BS"]).ndim == 3:
        loss_BS = _binary(logits_BSC, label).mean(-1)
        hit_BS = ((logits_BSC > 0) == (label > 0.5)).all(-1)
    else:
        loss_BS = _cross_entropy(logits_BSC, label)
        hit_BS = logits_BSC.argmax(-1) == label
    return (loss_BS * there_BS).sum(), there_BS.sum(), {"hits": (hit_BS * there_BS).sum()}


def regression(outputs: Outputs, batch: Mapping[str, Array]) -> Result:
    """Squared error of `label_BS`, float32."""
    logits_BSC, there_BS = last_logits(outputs, batch)
    error_BS = logits_BSC[..., 0] - batch["label_BS"]
    return (error_BS**2 * there_BS).sum(), there_BS.sum(), {}


def token_classification(outputs: Outputs, batch: Mapping[str, Array]) -> Result:
    """Cross-entropy of `label_BT`, int32, on the tokens that the loss mask marks: the first of each word."""
    weight_BT = ((batch["loss_mask_BT"] > 0) & (batch["segment_BT"] > 0)).astype(jnp.float32)
    loss_sum, hits = cross_entropy(outputs, batch["label_BT"], weight_BT)
    return loss_sum, weight_BT.sum(), {"hits": hits}


def span_qa(outputs: Outputs, batch: Mapping[str, Array]) -> Result:
    """Mean of the cross-entropies of where an answer begins and ends: `start_BS` and `end_BS`, places in the segment.

    Candidates are the tokens that the loss mask marks: the context, and the first token, which means no answer.
    Metrics: `hits`, the segments of which both ends are guessed first.
    """
    logits_BTC = outputs.logits()
    S = batch["start_BS"].shape[1]
    mine_BTS = batch["segment_BT"][..., None] == jnp.arange(1, S + 1)
    there_BS = mine_BTS.any(1).astype(jnp.float32)
    open_BTS = mine_BTS & (batch["loss_mask_BT"] > 0)[..., None]
    loss_BS, hit_BS = jnp.zeros_like(there_BS), there_BS > 0
    for c, name in enumerate(("start_BS", "end_BS")):
        score_BTS = jnp.where(open_BTS, logits_BTC[..., c, None], _NEVER)
        right_BTS = mine_BTS & (batch["position_BT"][..., None] == batch[name][:, None])
        right_BS = jnp.where(right_BTS, score_BTS, 0.0).sum(1)
        loss_BS += (jax.nn.logsumexp(score_BTS, 1) - right_BS) / 2
        hit_BS &= right_BS >= score_BTS.max(1)
    return (loss_BS * there_BS).sum(), there_BS.sum(), {"hits": (hit_BS * there_BS).sum()}


def _cross_entropy(logits: Array, label: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], -1)[..., 0]


def _binary(logits: Array, label: Array) -> Array:
    return jax.nn.softplus(logits) - label * logits
