"""Loss, perplexity and token accuracy of weights on packed rows."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxtune.data.pipeline import Batch, Batches, Rows
from jaxtune.objectives import Objective
from jaxtune.training import Apply
from jaxtune.weights import Array

Sums = Callable[[Any, Mapping[str, Array]], tuple[Array, Array, Mapping[str, Array]]]


def make_sums(apply: Apply, objective: Objective) -> Sums:
    """The objective of a batch of `[B, T]` columns, as a pure function of weights and batch."""
    return lambda weights, batch: objective(apply(weights, batch), batch)


def scores(
    sums: Sums, weights: Any, rows: Rows, batch_size: int, put: Callable[[Batch], Mapping[str, Array]]
) -> dict[str, float]:
    """`loss` (nats per token), `perplexity`, and `accuracy` (share of tokens guessed first), over all rows.

    Sums are added up on the host in double precision, so the result does not depend on the batch size.
    """
    totals = [0.0, 0.0, 0.0]
    for batch in Batches(rows, batch_size, seed=None, row_count=len(rows)):
        loss_sum, count, metrics = jax.device_get(sums(weights, put(batch)))
        for i, v in enumerate((loss_sum, count, metrics["hits"])):
            totals[i] += float(v)
    loss_sum, count, hits = totals
    loss = loss_sum / max(count, 1.0)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "accuracy": hits / max(count, 1.0)}
