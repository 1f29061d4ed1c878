"""Continued pre-training: next-token cross-entropy on every token but the first of each document."""

from collections.abc import Mapping
from typing import Any

from jaxtune.layers import Outputs
from jaxtune.objectives import sft
from jaxtune.weights import Array


def objective(outputs: Outputs, batch: Mapping[str, Array]) -> tuple[Array, Array, dict[str, Any]]:
    """As `sft.objective`, whatever the loss mask says; virtual tokens, beyond the vocabulary, are not predicted."""
    return sft.objective(outputs, masked(outputs, batch))


def masked(outputs: Outputs, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch with all text in its loss mask."""
    of_text_BT = (batch["segment_BT"] > 0) & (batch["ids_BT"] < (outputs.readout.vocab or 2**31 - 1))
    return {**batch, "loss_mask_BT": of_text_BT}
