"""Supervised fine-tuning: next-token cross-entropy on the tokens that the loss mask marks."""

from collections.abc import Mapping
from typing import Any

from jaxtune.layers import Outputs
from jaxtune.objectives.base import cross_entropy, next_token
from jaxtune.weights import Array


def objective(outputs: Outputs, batch: Mapping[str, Array]) -> tuple[Array, Array, dict[str, Any]]:
    """Loss sum, token count and `{"hits": right first guesses}`, all float32 scalars.

    `batch` has `ids_BT`, `loss_mask_BT`, `segment_BT`, all int32 `[B, T]`.
    """
    target_BT, weight_BT = next_token(batch)
    loss_sum, hits = cross_entropy(outputs, target_BT, weight_BT)
    return loss_sum, weight_BT.sum(), {"hits": hits}
